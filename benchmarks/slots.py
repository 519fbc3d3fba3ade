"""What slots that are refilled save, and what a produced token costs where some texts are long.

    python benchmarks/slots.py --set size=S                           # against batches of 32 rows
    python benchmarks/slots.py --set size=S --set windows=4 --spread  # longest text 2, 8 × the mean

Prompts of 32 tokens, 32 slots, responses of 24 tokens on average. The first way has 256 prompts and
responses of at most 128 tokens; the second 1024 prompts, 32 times the slots.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import feed
from rlhf_jax.experiment import load
from rlhf_jax.models import weights
from rlhf_jax.rollout import generate

SLOTS, MEAN, REPEATS = 32, 24, 5


def main() -> None:
    """Print steps, seconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A=VALUE")
    parser.add_argument("--spread", action="store_true", help="compare 2 with 8 times the mean")
    given = parser.parse_args()
    (spread if given.spread else refill)(given.settings)


def refill(settings: list[str]) -> None:
    """Slots against batches."""
    prompts, say = sampler(settings, rows=256, longest=128, mean=float(MEAN))
    rows = prompts.length.shape[0]
    parts = [jax.tree.map(lambda x, i=i: x[i : i + SLOTS], prompts) for i in range(0, rows, SLOTS)]
    found, seconds = timed(
        {
            "batches": lambda: [say(part) for part in parts],
            "slots": lambda: [say(prompts, slots=SLOTS)],
        }
    )
    steps = {name: sum(int(one.steps.max()) for one in made) for name, made in found.items()}
    for name in found:
        print(f"{name:8s} {steps[name]:5d} steps  {statistics.median(seconds[name]):.3f} s")
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    print(
        f"slots / batches: {steps['slots'] / steps['batches']:.2f} of the steps, "
        f"{statistics.median(ratios):.2f} of the time ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def spread(settings: list[str]) -> None:
    """Cost of a token of the whole queue, its tail included, when slots run dry."""
    ways = {}
    for times in (2, 8):
        given = settings if times == 8 else [*settings, "windows=1"]  # short texts need one size
        prompts, say = sampler(
            given, rows=32 * SLOTS, longest=times * MEAN, mean=untruncated(times * MEAN)
        )
        ways[times] = partial(lambda say, prompts: [say(prompts, slots=SLOTS)], say, prompts)
    found, seconds = timed(ways)
    costs = {}
    for times, (made,) in found.items():
        length, last = np.asarray(made.mask.sum(1)), np.asarray(made.steps)
        begun = (last - length)[-SLOTS // 8 :].min()  # the last prompts; a text that moved waited
        costs[times] = np.array(seconds[times]) / length.sum()
        print(
            f"{times}×: {length.sum()} tokens, {length.mean():.1f} on average, {length.max()} at "
            f"most; {last.max()} steps, the last {last.max() - begun} without prompts that wait; "
            f"{statistics.median(seconds[times]):.3f} s"
        )
    ratios = sorted(costs[8] / costs[2])
    print(
        f"a token, 8× / 2×: {statistics.median(ratios):.2f} of the time "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def sampler(settings: list[str], *, rows: int, longest: int, mean: float) -> tuple:
    """Prompts, and a compiled function that answers them with what a run on a CPU reads."""
    given = [f"rows={rows}", f"length={longest}", f"mean={mean}", *settings]
    config = load(Path(__file__).parent / "ppo.py", given)
    model, spec = config.learners["policy"].model, config.rollouts
    params, key = jax.jit(model.init)(jax.random.key(0)), jax.random.key(1)
    params = weights.merged(params, jax.jit(model.panels)(params))
    prompts = jax.tree.map(jnp.asarray, next(iter(feed.opened(config, "prompts"))))
    made = partial(
        generate, model=model, length=spec.length, sampling=spec.sampling, windows=spec.windows
    )
    say = jax.jit(made, static_argnames="slots")
    return prompts, lambda part, slots=None: say(params, part, key, slots=slots)


def untruncated(longest: int) -> float:
    """The mean at which texts that end with 1 / mean after a token, or at the longest, have MEAN.

    E min(N, L) = m (1 − (1 − 1/m)^L) for a geometric N of mean m.
    """
    low, high = float(MEAN), 100.0 * MEAN
    for _ in range(60):
        middle = (low + high) / 2
        short = middle * (1 - (1 - 1 / middle) ** longest) < MEAN
        low, high = (middle, high) if short else (low, middle)
    return low


def timed(ways: dict[object, Callable]) -> tuple[dict, dict]:
    """What each way makes, and its seconds, in turns."""
    found = {name: jax.block_until_ready(run()) for name, run in ways.items()}  # compiles
    seconds = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, run in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return found, seconds


if __name__ == "__main__":
    main()
