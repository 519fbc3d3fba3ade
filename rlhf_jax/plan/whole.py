"""Does a run fit on machines that are not there, and how fast can it be at most?

The phases of the loop are compiled for the topology and read: memory, messages, operations. Nothing
runs and no weight is made. Times are floors by the chip's published limits, not measurements.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax import lanes, sharding
from rlhf_jax.config import Config, ConfigError
from rlhf_jax.plan.advice import advice
from rlhf_jax.plan.chips import Target
from rlhf_jax.plan.phase import LARGEST, cache_bytes, held, measured
from rlhf_jax.plan.programs import Run, device_bytes, host_batches, programs, sizes
from rlhf_jax.train import prepared, turns

COMPILERS = 4  # programs compiled at a time, at most; each needs a few GB of the host
STAYS = "between phases"


def plan(
    config: Config,
    target: Target,
    *,
    mesh: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda line: None,
    compilers: int = COMPILERS,
) -> dict[str, Any]:
    """Every phase compiled for the target: bytes, messages, operations, floors of time.

    `say` is told of each phase when it is compiled, which can take minutes; `compilers` work side
    by side. If what stays between phases is more than the chip has, nothing is compiled.

    Raises:
        ConfigError: if the experiment cannot run on such a mesh.
    """
    began = time.perf_counter(), time.process_time()
    config = config if mesh is None else replace(config, mesh=tuple(mesh))
    phases = prepared(config, target.devices)
    host = host_batches(config)
    run, size = programs(config, phases, host), sizes(config, host)
    resident = held(run)

    def one(program):
        row = measured(config, program, run, target, phases.mesh)
        say(f"{program.name}: {row['seconds']:.0f} s")
        return row

    stays = sum(resident.values())
    if stays > target.chip.memory:  # libtpu can crash on programs far too large
        refused = {"needs": stays, "said": "what stays does not fit", "largest": []}
        found = [{"name": STAYS, "refused": refused, "arguments": stays, "seconds": 0.0}]
    else:
        names = ", ".join(program.name for program in run.programs)
        say(f"compiling {names}; of a large model each can take minutes")
        with ThreadPoolExecutor(min(compilers, os.cpu_count() or 1)) as pool:  # XLA lets others run
            found = list(pool.map(one, run.programs))
        _beside_each_other(config, run, found, phases.mesh)
    result = {
        "experiment": config.name,
        "topology": target.name,
        "devices": len(target.devices),
        "chip": asdict(target.chip),
        "mesh": dict(phases.mesh.shape),
        "resident": resident,
        "cache": cache_bytes(config, phases.mesh.shape, size.get("experience")),
        "phases": found,
        "left_out": list(run.left_out),
        "largest": _largest_leaves(run),
        "planned_in": time.perf_counter() - began[0],
        "processor_seconds": time.process_time() - began[1],
    }
    result |= _verdict(config, result, size)
    return result | {"advice": advice(config, result)}


def _beside_each_other(config: Config, run: Run, found: Sequence[Mapping], mesh: Mesh) -> None:
    """Where programs run at once, what the others have meanwhile is elsewhere, too."""
    if (many := lanes.count(mesh)) == 1:
        return
    rows = {row["name"]: row["memory"] for row in found if "memory" in row}
    own = {name: row["peak"] - row["arguments"] for name, row in rows.items()}
    times = {program.name: program.times for program in run.programs}
    more = {name: (min(times[name], many) - 1) * size for name, size in own.items()}
    if "reward" in rows:  # paid for one by one, while the next chunks are sampled
        more["reward"] = min(times["reward"] - 1, many) * own.get("rollout", 0)
    if config.rollouts is not None and config.rollouts.ahead:  # it may last as long as the step
        for name in set(more) - {"rollout"}:
            more[name] += own.get("rollout", 0)
    learnt = [name for name in config.learners if f"update/{name}" in rows]
    for turn in turns(config, learnt, mesh):
        together = sum(own[f"update/{name}"] for name in turn)
        for name in turn:
            more[f"update/{name}"] += together - own[f"update/{name}"]
    for name, row in rows.items():
        row["elsewhere"] += more[name]
        row["total"] += more[name]


def _verdict(
    config: Config, found: Mapping[str, Any], size: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Whether all phases fit, seconds of an iteration, and tokens a second."""
    memory = found["chip"]["memory"]
    fits = all(
        "refused" not in phase and phase["memory"]["total"] <= memory for phase in found["phases"]
    )
    limits = [
        [part[k] for k in ("compute", "memory", "links")]
        for phase in found["phases"]
        for part in phase.get("parts", {}).values()
    ]
    known = limits and not any(x is None for part in limits for x in part)
    known = known and all("parts" in phase for phase in found["phases"])
    # At best everything overlaps; at worst nothing does, each at its limit.
    seconds = [sum(map(max, limits)), sum(map(sum, limits))] if known else None
    speed = None
    if seconds and "experience" in size:
        tokens = size["experience"][0] * config.rollouts.length
        speed = {"tokens": tokens, "tokens_per_second": [tokens / x for x in seconds]}
    return {"fits": fits, "seconds": seconds, "speed": speed}


def _largest_leaves(run: Run) -> list[tuple[int, str, str]]:
    """Bytes on each device, path and shape of the largest arrays that stay."""
    found = []
    trees = {**run.state.learners, **run.frozen}
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            where = f"{name}/{sharding.path_name(path)}"
            found.append((device_bytes(leaf), where, f"{leaf.dtype}{list(leaf.shape)}"))
    return sorted(found, key=lambda one: -one[0])[:LARGEST]


def mesh_argument(text: str | None) -> tuple[int, ...] | None:
    """`fsdp=32,tensor=4`, the axes not named 1; or all sizes in the order of the axes.

    Raises:
        ConfigError: if it is neither.
    """
    if text is None:
        return None
    order = ",".join(sharding.AXES)

    def wrong(why):
        return ConfigError(
            f"--mesh {text}: {why}. Name axes, such as fsdp=32,tensor=4 (of {order}; those not "
            f"named are 1), or give all {len(sharding.AXES)} sizes in this order; -1: what is left"
        )

    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        if len(parts) != len(sharding.AXES):
            raise wrong(f"these are {len(parts)} sizes")
        parts = [f"{axis}={size}" for axis, size in zip(sharding.AXES, parts, strict=True)]
    sizes = dict.fromkeys(sharding.AXES, 1)
    given = [part.partition("=")[::2] for part in parts]
    for i, (axis, size) in enumerate(given):
        if axis not in sizes:
            raise wrong(f"{axis!r} is no axis")
        if axis in dict(given[:i]):
            raise wrong(f"{axis} stands there twice")
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise wrong(f"{axis} is {size or 'nothing'}, not a number from 1 or -1")
        sizes[axis] = int(size)
    return tuple(sizes.values())
