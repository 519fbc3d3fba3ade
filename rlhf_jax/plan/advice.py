"""What to change when a plan does not fit, and how many bytes on each device it saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.check_mesh import check_sizes
from rlhf_jax.config import Config, ConfigError, rollout_rows
from rlhf_jax.plan.phase import stored_bytes
from rlhf_jax.sharding import ROWS, WRITERS


def advice(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changes for every phase that does not fit, the one that saves most first.

    Of a phase that the compiler refused without a number, savings are those of one that needs all
    of the chip's memory: at least.
    """
    memory, changes = found["chip"]["memory"], []
    for phase in found["phases"]:
        refused = phase.get("refused")  # by the compiler, which keeps some of the memory back
        if refused is not None:
            active = max(0, (refused["needs"] or memory) - phase["arguments"])
        else:
            active = phase["memory"]["peak"] - phase["memory"]["arguments"]
        if refused is not None or phase["memory"]["total"] > memory:
            changes += [
                {"phase": phase["name"], "change": change, "saves": int(saved)}
                for change, saved in _changes(config, found, phase["name"], active)
                if saved > 0.005 * memory
            ]
    return sorted(changes, key=lambda one: -one["saves"])


def _changes(config: Config, found, phase: str, active: float) -> Iterator[tuple[str, float]]:
    """`active`: bytes that come and go in the phase, what its rows need and gathered weights."""
    mesh, resident = found["mesh"], sum(found["resident"].values())
    if mesh["data"] > 1:
        wider = mesh["data"] * mesh["fsdp"]
        change = f"--mesh with data=1, fsdp={wider}: weights over all devices that share rows"
        yield change, resident * (1 - 1 / mesh["data"])
    else:
        yield "twice the devices, fsdp twice as large", resident / 2
    for tree, size in found["resident"].items():
        owner, _, what = tree.partition(": ")
        model = config.models[owner]
        if what == "frozen weights" and getattr(model, "param_dtype", "") == "float32":
            own = config.frozen[owner].model is not None
            change = f"--set frozen.{owner}.model.param_dtype=bfloat16"
            change = change if own else f'param_dtype="bfloat16" in a model for frozen.{owner}'
            yield change, size / 2
        if what == "optimiser" and config.learners[owner].optimizer.keywords.get("clip") != 0:
            given = getattr(config.learners[owner].optimizer, "keywords", {})
            if given.get("momentum_dtype") is None:
                change = f"--set learners.{owner}.optimizer.momentum_dtype=bfloat16"
                yield change, size / 4  # of two moments, half of one
    if phase == "rollout" or phase.startswith("copy/"):
        name = config.rollouts.policy if phase == "rollout" else phase.removeprefix("copy/")
        if (wider := _wider(config, mesh)) is not None:
            copy = stored_bytes(config.models[name], mesh)
            yield f"{wider}: half of the copy that rollouts read", copy / 2
    if phase == "rollout":
        yield from _of_rollout(config, found)
    elif phase.startswith("update/"):
        yield from _of_update(config, phase.removeprefix("update/"), active, mesh)
    elif phase == "reward":
        yield from _in_chunks(config, mesh, active)
    elif phase == "score":
        spec, rows, more = config.rollouts, rollout_rows(config), 2 * config.rollouts.microbatches
        if rows is None or rows // spec.chunks % more == 0:
            yield f"--set rollouts.microbatches={more}: half of the rows at a time", active / 2


def _wider(config: Config, mesh: Mapping[str, int]) -> str | None:
    """The mesh with tensor twice as large, if there is one that the models divide over."""
    sizes = {**mesh, "tensor": 2 * mesh["tensor"], "fsdp": mesh["fsdp"] // 2}
    if mesh["fsdp"] % 2:
        return None
    try:
        check_sizes(config, tuple(sizes.values()))
    except ConfigError:
        return None
    return f"--mesh with tensor={sizes['tensor']}, fsdp={sizes['fsdp']}"


def _in_chunks(config: Config, mesh: Mapping[str, int], active: float):
    spec, rows = config.rollouts, rollout_rows(config)
    writers = math.prod(mesh[axis] for axis in WRITERS[0])
    if rows is not None and rows % (2 * spec.chunks * spec.samples * writers) == 0:
        yield f"--set rollouts.chunks={2 * spec.chunks}: half of the texts at a time", active / 2


def _of_rollout(config: Config, found) -> Iterator[tuple[str, float]]:
    spec = config.rollouts
    model, cache, rows = config.models[spec.policy], found["cache"], rollout_rows(config)
    if cache and rows is not None:
        setting = f"--set learners.{spec.policy}.model.cache_dtype"
        if model.cache_dtype != "int8":
            wide = 2 if (model.cache_dtype or model.dtype) in ("bfloat16", "float16") else 4
            unit = (1 + 4 / model.size_of_head) / wide  # a number of 4 bytes for each head's codes
            yield f"{setting}=int8", cache * (1 - unit)
            if wide == 4:
                yield f"{setting}=bfloat16", cache / 2
        half = min(spec.slots or rows, rows // spec.chunks) // 2
        yield f"--set rollouts.slots={half}: half of the texts at a time", cache / 2


def _of_update(config: Config, name: str, active: float, mesh) -> Iterator[tuple[str, float]]:
    learner = config.learners[name]
    model = learner.model
    if getattr(model, "remat", "full") == "none":
        change = f"--set learners.{name}.model.remat=full: one layer's activations, not all"
        yield change, active * (1 - 1 / model.layers)
    parts = math.prod(mesh[axis] for axis in ROWS[0])
    rows = rollout_rows(config) if learner.batch == "experience" else None
    more = 2 * learner.microbatches
    if rows is None or rows % (learner.minibatches * more * parts) == 0:
        yield f"--set learners.{name}.microbatches={more}: half of the rows at a time", active / 2
    elif (wider := _wider(config, mesh)) is not None:
        yield f"{wider}: half of each activation (rows do not divide further)", active / 2
