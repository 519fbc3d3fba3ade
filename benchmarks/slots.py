"""Slots that are refilled against batches of as many rows: decoding steps and time, in one run.

    python benchmarks/slots.py --set size=S

256 prompts of 32 tokens, responses of 24 tokens on average and 128 at most, 32 rows at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax import feed
from rlhf_jax.experiment import load
from rlhf_jax.rollout import generate

SLOTS, REPEATS = 32, 5


def main() -> None:
    """Print steps, seconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A=VALUE")
    given = ["rows=256", "length=128", "mean=24.0", *parser.parse_args().settings]
    config = load(Path(__file__).parent / "ppo.py", given)
    model, spec = config.learners["policy"].model, config.rollouts
    params, key = jax.jit(model.init)(jax.random.key(0)), jax.random.key(1)
    prompts = jax.tree.map(jnp.asarray, next(iter(feed.opened(config, "prompts"))))
    made = partial(generate, model=model, length=spec.length, sampling=spec.sampling)
    say = jax.jit(made, static_argnames="slots")
    rows = prompts.length.shape[0]
    parts = [jax.tree.map(lambda x, i=i: x[i : i + SLOTS], prompts) for i in range(0, rows, SLOTS)]
    ways = {
        "batches": lambda: [say(params, part, key) for part in parts],
        "slots": lambda: [say(params, prompts, key, slots=SLOTS)],
    }
    steps, seconds = {}, {name: [] for name in ways}
    for name, run in ways.items():  # compiles
        steps[name] = sum(int(one.steps.max()) for one in jax.block_until_ready(run()))
    for _ in range(REPEATS):
        for name, run in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    for name in ways:
        print(f"{name:8s} {steps[name]:5d} steps  {statistics.median(seconds[name]):.3f} s")
    print(
        f"slots / batches: {steps['slots'] / steps['batches']:.2f} of the steps, "
        f"{statistics.median(ratios):.2f} of the time ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
