"""One phase of a plan: compiled, and its memory, messages, operations and least times read."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import flops, sharding
from rlhf_jax.config import Config
from rlhf_jax.models.cache import resizable
from rlhf_jax.plan import collectives, compiled
from rlhf_jax.plan.chips import Target
from rlhf_jax.plan.programs import Program, Run, device_bytes
from rlhf_jax.rollout import cache_sizes

LARGEST = 6  # arrays that are named


def held(run: Run) -> dict[str, int]:
    """Bytes on each device between phases, by what they are."""
    found = {}
    for name, learner in run.state.learners.items():
        found[f"{name}: weights"] = device_bytes(learner.params)
        found[f"{name}: optimiser"] = device_bytes(learner.opt_state)
    return found | {f"{name}: frozen weights": device_bytes(x) for name, x in run.frozen.items()}


def cache_bytes(config: Config, mesh: Mapping[str, int], text: tuple[int, int] | None) -> int:
    """Bytes on each device of the keys and values of all texts that are written at a time.

    `text` has the rows and tokens of a rollout; None: there is none.
    """
    sizes = _cache_bytes(config, mesh, text)
    spec = config.rollouts
    refilled = text is not None and (spec.slots or text[0]) < text[0] // spec.chunks
    return sum(sizes) if refilled else sizes[-1]


def _cache_bytes(config, mesh, text) -> list[int]:
    """The same of each size of the cache."""
    model = config.models[config.rollouts.policy] if text is not None else None
    if not hasattr(model, "empty_cache"):
        return [0]
    spec, (rows, tokens) = config.rollouts, text
    rows = min(rows // spec.chunks, spec.slots or rows)

    def held(tokens):
        made = jax.eval_shape(lambda: model.empty_cache(rows, tokens))
        kept = jax.tree.leaves(getattr(made, "layers", made))
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
        return whole // math.prod(mesh[axis] for axis in (*sharding.WRITERS[0], "tensor"))

    sizes = cache_sizes(tokens - spec.length, spec.length, 1, windows=_windows(config))
    return [held(tokens) for _, tokens in sizes]


def measured(config, program: Program, run: Run, target: Target, mesh: Mesh) -> dict[str, Any]:
    """One phase: compiled and read."""
    began = time.perf_counter()
    row: dict[str, Any] = {"name": program.name}
    with jax.set_mesh(mesh):
        traced = program.fn.trace(*program.arguments, **program.keywords)
        try:
            made = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row |= {"refused": refusal(str(error)), "seconds": time.perf_counter() - began}
            return row | {"arguments": device_bytes((program.arguments, program.keywords))}
    row["seconds"] = time.perf_counter() - began
    row["memory"] = _memory(program, run, made.memory_analysis(), mesh)
    text = compiled.parse(made.as_text())
    messages = collectives.collectives(text, mesh, at_most=_loops(config, program))
    row["collectives"] = [
        asdict(one)
        | {key: program.times * getattr(one, key) for key in ("count", "bytes", "moved")}
        | {"seconds": _seconds(program.times * one.moved, target.speed(mesh, one.axes))}
        for one in messages
    ]
    row["arrays"] = collectives.largest(text, LARGEST)
    row["parts"] = _parts(config, program, traced.jaxpr, row, target, mesh)
    row["flops"] = sum(part["flops"] for part in row["parts"].values())
    useful = useful_flops(config, program)
    row["useful_flops"] = None if useful is None else useful / mesh.size
    costs = made.cost_analysis() or {}
    row["xla_flops"] = costs.get("flops")  # XLA counts what is in a loop once
    return row


def _loops(config: Config, program: Program) -> int | None:
    """How often a decoding loop can run at most; each window has one."""
    if program.name != "rollout":
        return None
    spec, rows = config.rollouts, program.arguments[1].tokens.shape[0]
    waves = -(-rows // min(spec.slots or rows, rows))
    return -(-(waves * spec.length - 1) // _windows(config))


def _windows(config: Config) -> int:
    """Loops, each with a cache of its size."""
    spec = config.rollouts
    return spec.windows if resizable(config.models[spec.policy]) else 1


def refusal(message: str) -> dict[str, Any]:
    """What the compiler says of a program that does not fit: bytes needed, and the largest."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
    used = re.search(r"(?:[Uu]sed |HLO temporaries \()([\d.]+)([KMGT]?)", message)
    sizes = re.findall(r"Size: ([\d.]+)([KMGT]?)[\s\S]*?Shape: (\S+)", message)
    return {
        "said": message.split("\n")[0][:300],
        "needs": float(used[1]) * units[used[2]] if used else None,
        "largest": [(float(n) * units[unit], shape) for n, unit, shape in sizes[:LARGEST]],
    }


def _memory(program: Program, run: Run, found: Any, mesh: Any) -> dict[str, int]:
    """Bytes on each device while the phase runs: its own, and what else is alive."""
    passed = device_bytes((program.arguments, program.keywords))
    trees = sum(held(run).values())
    inside = {id(x) for x in jax.tree.leaves((program.arguments, program.keywords))}
    idle = [run.state, run.frozen]
    if not program.name.startswith(("copy", "rollout", "reward", "score", "collect")):
        idle.append({k: v for k, v in run.batches.items() if k not in ("rollout", "reward")})
    elsewhere = device_bytes([x for x in jax.tree.leaves(idle) if id(x) not in inside])
    # An argument that a program does not read is alive all the same.
    elsewhere += max(0, passed - found.argument_size_in_bytes)
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    on_cpu = mesh.devices.flat[0].platform == "cpu"  # whose peak leaves them out
    peak = 0 if on_cpu else getattr(found, "peak_memory_in_bytes", 0)
    whole = found.argument_size_in_bytes + new + found.temp_size_in_bytes
    # Temporaries are the sum of what XLA has allocated; by the peak, some were gone again.
    peak = peak if found.argument_size_in_bytes < peak < whole else whole
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "peak": peak,
        "elsewhere": elsewhere,
        "resident": trees,
        "total": elsewhere + peak,
    }


def _parts(config, program, jaxpr, row, target, mesh) -> dict[str, dict[str, float | None]]:
    """Floors of time: of a rollout for its prompts and for its tokens, else of all of it."""
    chip = target.chip

    def part(operations, read, messages):
        links = [one["seconds"] for one in messages]
        operations, read = program.times * operations, program.times * read
        return {
            "flops": operations / mesh.size,
            "bytes": read,
            "compute": _seconds(operations / mesh.size, chip.flops),
            "memory": _seconds(read, chip.bandwidth),
            "links": None if None in links else sum(links),
        }

    once = sum(
        passes * stored_bytes(config.models[name], mesh.shape)
        for name, passes in program.models.items()
    )
    if program.name == "rollout":
        loops = _loops(config, program)
        least = flops.of_program(jaxpr, at_most=0)
        most = flops.of_program(jaxpr, at_most=loops)
        bounded = [one["bounded"] for one in row["collectives"]]
        sides = [
            [one for one, inside in zip(row["collectives"], bounded, strict=True) if inside is x]
            for x in (False, True)
        ]
        rows, prompt = program.arguments[1].tokens.shape
        text = program.times * rows, prompt + config.rollouts.length
        sizes = _cache_bytes(config, mesh.shape, text)
        decoded = loops * (len(sizes) * once + sum(sizes))
        return {
            "prefill": part(least, once, sides[0]),
            "decode": part(most - least, decoded, sides[1]),
        }
    read = program.steps * once + 2 * program.updates * device_bytes(program.arguments[:1])
    if not program.models:
        read = device_bytes((program.arguments, program.keywords))
    return {"": part(flops.of_program(jaxpr), read, row["collectives"])}


def stored_bytes(model: Any, mesh: Mapping[str, int]) -> int:
    """Bytes of the weights that a device reads once they are gathered, in the compute dtype."""
    if not hasattr(model, "dtype"):
        return 0
    size, total = jnp.dtype(model.dtype).itemsize, 0
    for name, leaf in flops.shapes(model).items():
        path = tuple(jax.tree_util.DictKey(part) for part in name.split("/"))
        split = jax.tree.leaves(tuple(sharding.spec(path, leaf)))
        # A lookup reads a few rows of an embedding, a head that is tied to it all of them.
        head = name == "embed/embedding" and getattr(model, "tied", False) and model.lm_head
        if head or not name.endswith("embedding"):
            total += math.prod(leaf.shape) * size // (mesh["tensor"] if "tensor" in split else 1)
    return total


def useful_flops(config: Config, program: Program) -> float | None:
    """Operations that the phase needs, by its models' shapes; None: nobody knows."""
    models = {name: config.models[name] for name in program.models}
    if not models or not all(hasattr(model, "size_of_head") for model in models.values()):
        return None
    learner = config.learners.get(program.name.removeprefix("update/"))
    batch = next(x for x in program.arguments if hasattr(x, "tokens"))
    *ahead, tokens = batch.tokens.shape
    read = tokens
    if learner is None or learner.batch == "experience":
        read = config.rollouts.length
    if program.name == "rollout":
        tokens += config.rollouts.length
    count = partial(flops.forward, rows=math.prod(ahead), tokens=tokens, read=read)
    if learner is None:
        return program.times * sum(map(count, models.values()))
    others = sum(count(models[name]) for name in learner.scores)
    return learner.epochs * (3 * count(learner.model) + others)  # backward costs two forward


def _seconds(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate
