"""How fast an experiment's iteration is: the loop's own step, phase by phase, against the machine.

Nothing is measured that a run does not do: `iterations` takes steps of `train.one_step`.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax import feed, flops
from rlhf_jax.config import Config, ConfigError, rollout_rows
from rlhf_jax.data import tokenizers
from rlhf_jax.experience import Run
from rlhf_jax.metrics import Meter
from rlhf_jax.start import begin
from rlhf_jax.train import one_step, prepared

WARM = 2  # iterations before those that count: the first compiles


def bench(config: Config, *, repeats: int = 5, profile: str | None = None) -> dict[str, Any]:
    """Times of `repeats` iterations after two, medians by phase, and fractions of the limits.

    Raises:
        ConfigError: if the experiment cannot run, or has no rollouts.
    """
    _check(config, repeats)
    config = replace(config, steps=WARM + repeats + (profile is not None))
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as out:
        steps = iterations(config, Path(out))
        for _ in range(WARM + repeats):
            found.append(next(steps))
            if len(found) == 1:
                start_up = _process_seconds() - found[0]["seconds"]
        if profile is not None:
            with jax.profiler.trace(profile):
                next(steps)
        steps.close()
    kept = found[WARM:]
    policy = config.models[config.rollouts.policy]
    limit = limits(getattr(policy, "dtype", "float32"))  # a model of one's own need not say it
    phases = by_phase(config, kept, limit)
    return {
        "experiment": config.name,
        "iterations": kept,
        "phases": phases,
        "start_up_seconds": start_up,
        "compile_seconds": found[0]["seconds"] - statistics.median(x["seconds"] for x in kept),
        "peak_bytes": peak_bytes(),
        "limits": limit,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "host": platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "rlhf_jax")},
    }


def iterations(config: Config, out: Path) -> Iterator[dict[str, float]]:
    """The run's steps one after another: seconds, in all and by phase, and what it logs."""
    phases = prepared(config)
    meter = Meter(out, name=config.name, start=0, total=config.steps)
    with jax.set_mesh(phases.mesh), meter:
        state, frozen = begin(config, phases, {})
        streams, tokenizer = feed.opened_all(config), tokenizers.load(config.tokenizer)
        run = Run(config, phases, frozen, streams, {}, tokenizer, meter, out)
        for step in range(config.steps):
            began = time.perf_counter()
            state = one_step(run, state, step)
            seconds = time.perf_counter() - began
            meter.flush()
            line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            yield {"seconds": seconds} | {k: v for k, v in line.items() if k != "step"}


def limits(dtype: str, *, size: int = 2048, megabytes: int = 512) -> dict[str, float]:
    """What this machine reaches: operations per second of a product, bytes per second of a sum."""
    one = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    memory = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    read = jax.jit(jnp.sum)
    return {
        "flops_per_second": 2 * size**3 / _best(product, one, one),
        "bytes_per_second": memory.nbytes / _best(read, memory),
        "product": f"{size} × {size} × {size}, {dtype}",
    }


def peak_bytes() -> int:
    """Most memory so far: of the first device, or of the process where devices are the host."""
    found = jax.local_devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(found.get("peak_bytes_in_use", host))


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """The result as a table."""
    table = Table(title=f"{found['experiment']} on {found['device']}")
    table.add_column("phase", overflow="fold")
    for name in ("seconds", "least", "most", "tokens/s", "of FLOP/s", "of bytes/s"):
        table.add_column(name, justify="right")
    for name, row in found["phases"].items():
        cells = [f"{row[key]:.3f}" for key in ("seconds", "least", "most")]
        cells.append(f"{row['tokens'] / row['seconds']:,.0f}" if "tokens" in row else "")
        cells.append(f"{row['of_flops']:.0%}" if "of_flops" in row else "")
        cells.append(f"{row['of_bytes']:.0%}" if "of_bytes" in row else "")
        table.add_row(name, *cells)
    console = console or Console()
    console.print(table)
    limit = found["limits"]
    console.print(
        f"limits: {limit['flops_per_second'] / 1e9:,.0f} GFLOP/s ({limit['product']}), "
        f"{limit['bytes_per_second'] / 1e9:,.1f} GB/s read; start-up "
        f"{found['start_up_seconds']:.1f} s, compilation {found['compile_seconds']:.1f} s, peak "
        f"memory {found['peak_bytes'] / 2**30:.2f} GiB; medians of {len(found['iterations'])}"
    )


def _check(config: Config, repeats: int) -> None:
    if not isinstance(config, Config) or config.rollouts is None:
        raise ConfigError("bench measures one run with rollouts; benchmarks/ppo.py is one")
    if any(derived.pool is not None for derived in config.derived.values()):
        raise ConfigError("bench cannot measure a run that keeps a pool of batches")
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: at least 1")


def by_phase(config: Config, found: Sequence[Mapping], limit: Mapping) -> dict[str, dict]:
    """Medians, with operations and bytes where the models' shapes say them."""
    spec, models, rows = config.rollouts, config.models, rollout_rows(config)
    table = {}
    names = dict.fromkeys(key for one in found for key in one if key.startswith("time/"))
    for key in ("seconds", *names):  # not all learners learn in every step
        times = [x[key] for x in found if key in x]
        row = {"seconds": statistics.median(times), "least": min(times), "most": max(times)}
        table["iteration" if key == "seconds" else key.removeprefix("time/")] = row
    said = statistics.median(x["rollout/length"] for x in found)
    text = _prompt_tokens(config) + said

    def known(names):
        return [models[name] for name in names if hasattr(models[name], "size_of_head")]

    def operations(names):
        return sum(flops.forward(m, rows=rows, tokens=text, read=said) for m in known(names))

    # However rows are put together, each of a full batch waits for as many readings of all weights
    # as it has tokens.
    each = partial(flops.decode_bytes, rows=rows, tokens=text - said / 2)
    scored = {spec.reference, spec.value, spec.policy if spec.rescore else None} - {None}
    work = {
        "rollout": (operations([spec.policy]), said * sum(map(each, known([spec.policy]))), said),
        "score": (
            operations(scored),
            spec.chunks * spec.microbatches * sum(map(flops.weight_bytes, known(scored))),
            text,
        ),
    }
    own = {}
    for name, learner in config.learners.items():
        if learner.batch == "experience":
            updates = learner.epochs * learner.minibatches
            moved = partial(flops.update_bytes, passes=learner.microbatches)
            own[name] = (
                3 * learner.epochs * operations([name]),  # backward costs twice what forward does
                updates * sum(map(moved, known([name]))),
                learner.epochs * text,
            )
    count, size, _ = map(sum, zip(*work.values(), *own.values(), strict=True))
    for key in table:  # of learners that were updated at once, all
        turn = key.removeprefix("update/").split("+")
        if key.startswith("update/") and own.keys() >= set(turn):
            work[key] = tuple(map(sum, zip(*(own[name] for name in turn), strict=True)))
    work["iteration"] = count, size, said
    for name, (count, size, tokens) in work.items():
        row = table[name]
        row |= {"flops": count, "bytes": size, "tokens": rows * tokens}
        row["of_flops"] = count / row["seconds"] / limit["flops_per_second"]
        row["of_bytes"] = size / row["seconds"] / limit["bytes_per_second"]
    return table


def _prompt_tokens(config: Config) -> float:
    """Mean length of the first prompts."""
    batch = next(iter(feed.opened(config, config.rollouts.prompts)))
    return float(np.asarray(batch.length).mean())


def _best(fn, *given, times: int = 7) -> float:
    jax.block_until_ready(fn(*given))
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(fn(*given))
        found.append(time.perf_counter() - began)
    return min(found)


def _process_seconds() -> float:
    """How long this process has been there."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # no /proc: only what this process has computed
        return time.process_time()
