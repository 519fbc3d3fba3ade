"""What to change when a plan does not fit, and how many bytes on each device it saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.config import Config, rollout_rows
from rlhf_jax.sharding import ROWS

GIB = 2**30


def advice(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changes for every phase that does not fit, the one that saves most first."""
    memory, changes = found["chip"]["memory"], []
    for phase in found["phases"]:
        needs = phase["refused"]["needs"] if "refused" in phase else phase["memory"]["total"]
        if "refused" in phase or needs > memory:
            changes += [
                {"phase": phase["name"], "change": change, "saves": int(saved)}
                for change, saved in _changes(config, found, phase)
                if saved > 0.005 * memory
            ]
    return sorted(changes, key=lambda one: -one["saves"])


def _changes(config: Config, found, phase) -> Iterator[tuple[str, float]]:
    name, mesh = phase["name"], found["mesh"]
    resident = sum(found["resident"].values())
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
            yield f'param_dtype="bfloat16" in the model of frozen.{owner}', size / 2
        if what == "optimiser" and config.learners[owner].optimizer.keywords.get("clip") != 0:
            given = getattr(config.learners[owner].optimizer, "keywords", {})
            if given.get("momentum_dtype") is None:
                change = f'adam(momentum_dtype="bfloat16") for learners.{owner}'
                yield change, size / 4  # of two moments, half of one
    if name == "rollout":
        yield from _of_rollout(config, found)
    elif name.startswith("update/"):
        yield from _of_update(config, name.removeprefix("update/"), phase, mesh)
    elif name == "score":
        more = 2 * config.rollouts.microbatches
        yield f"rollouts.microbatches={more}: half of the rows at a time", _activations(phase) / 2


def _of_rollout(config: Config, found) -> Iterator[tuple[str, float]]:
    spec = config.rollouts
    model, cache, rows = config.models[spec.policy], found["cache"], rollout_rows(config)
    if cache and rows is not None:
        if model.cache_dtype != "int8":
            wide = 2 if (model.cache_dtype or model.dtype) in ("bfloat16", "float16") else 4
            unit = (1 + 4 / model.size_of_head) / wide  # a number of 4 bytes for each head's codes
            yield 'cache_dtype="int8" in the policy\'s model', cache * (1 - unit)
            if wide == 4:
                yield 'cache_dtype="bfloat16" in the policy\'s model', cache / 2
        half = min(spec.slots or rows, rows // spec.chunks) // 2
        yield f"rollouts.slots={half}: half of the texts at a time", cache / 2


def _of_update(config: Config, name: str, phase, mesh) -> Iterator[tuple[str, float]]:
    learner = config.learners[name]
    model, active = learner.model, _activations(phase)
    if getattr(model, "remat", "full") == "none":
        kept = 1 / model.layers
        change = f'remat="full" in the model of learners.{name}: one layer\'s activations, not all'
        yield change, active * (1 - kept)
    parts = math.prod(mesh[axis] for axis in ROWS[0])
    rows = rollout_rows(config) if learner.batch == "experience" else None
    more = 2 * learner.microbatches
    if rows is None or rows % (learner.minibatches * more * parts) == 0:
        yield f"learners.{name}.microbatches={more}: half of the rows at a time", active / 2
    else:
        change = f"tensor={2 * mesh['tensor']}, fsdp={mesh['fsdp'] // 2}: half of each activation"
        yield f"{change} (rows do not divide into more micro-batches)", active / 2


def _activations(phase) -> float:
    """Bytes that come and go in a phase: what its rows need, and gathered weights."""
    if "refused" in phase:
        return phase["refused"]["needs"] or 0.0
    return phase["memory"]["peak"] - phase["memory"]["arguments"]
