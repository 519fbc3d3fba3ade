"""Numbers that the claims of `token_feedback.py` make of curves, one per seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.study.results import Results

ENOUGH = 0.05  # P(wrong) at which an arm has learned the facts


def labels_until(
    results: Results, kind: str, labels: Sequence[int], *, metric: str = "wrong_known"
) -> np.ndarray:
    """Labels at which P(wrong) of marked facts falls to 5 %, [seeds]; log N is interpolated.

    At the fewest it counts as reached there, which is too many; an arm that never gets there
    counts with the most, which is too few.
    """
    wrong = np.stack([results.values(metric, f"{kind}_{n}") for n in labels], axis=1)
    log_n, found = np.log(labels), np.full(wrong.shape[0], float(labels[-1]))
    for seed, row in enumerate(wrong):
        reached = np.flatnonzero(row <= ENOUGH)
        if reached.size and reached[0] == 0:
            found[seed] = labels[0]
        elif reached.size:
            i = reached[0]
            share = (row[i - 1] - ENOUGH) / (row[i - 1] - row[i])
            found[seed] = np.exp(log_n[i - 1] + share * (log_n[i] - log_n[i - 1]))
    return found


def first(results: Results, arm: str, level: float, *, of: str = "step") -> np.ndarray:
    """The first measured step at which P(wrong) of marked facts is at most `level`, [seeds].

    The last if it never is. With `of` that metric's value there.
    """
    steps, wrong = results.curve("wrong_known", arm)
    below = wrong <= level
    at = np.where(below.any(axis=1), below.argmax(axis=1), steps.size - 1)
    if of == "step":
        return steps[at].astype(np.float64)
    return results.curve(of, arm)[1][np.arange(at.size), at]


def line(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and R² of each seed's least-squares line over steps; a flat curve has R² = 0."""
    x = steps - steps.mean()
    y = values - values.mean(axis=1, keepdims=True)
    slope = y @ x / (x @ x)
    total = (y**2).sum(axis=1)
    explained = slope**2 * (x @ x)
    return slope, np.divide(explained, total, out=np.zeros_like(total), where=total > 0)


def pace(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Slope of a curve in the last half ÷ in the half before, [seeds]: 1 is a line, 0 an end."""
    half = steps >= steps[-1] / 2
    late = line(steps[half], values[:, half])[0]
    early = line(steps[steps <= steps[-1] / 2], values[:, steps <= steps[-1] / 2])[0]
    return late / early
