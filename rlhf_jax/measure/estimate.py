"""A number that was estimated from samples, and how sure it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Estimate(NamedTuple):
    """A value with its standard error. `float(estimate)` is the value; errors of 1 draw are nan."""

    value: float | np.ndarray  # an array when it is measured at several places
    error: float | np.ndarray  # standard error, in the unit of the value
    n: int | np.ndarray  # independent draws it rests on

    def __float__(self) -> float:
        return float(self.value)


def mean(x: Float[np.ndarray, "n"], group: Int[np.ndarray, "n"] | None = None) -> Estimate:
    """Σ x/n; the error is the standard deviation/√n, between groups where they are given."""
    x = np.asarray(x, np.float64)
    return ratio(x, np.ones(x.shape), group)


def ratio(
    total: Float[np.ndarray, "n"],
    count: Float[np.ndarray, "n"],
    group: Int[np.ndarray, "n"] | None = None,
) -> Estimate:
    """Σ total/Σ count over independent draws, such as a mean over the tokens of n texts.

    The error is the linearised one, √(g/(g − 1) Σ e²)/Σ count with e = total − ratio · count, each
    summed over its group: texts of one prompt are one draw (Cochran 1977, chapter 6).

    Raises:
        ValueError: if there is nothing to average.
    """
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    if total.ndim != 1 or total.shape != count.shape:
        raise ValueError(f"one total and one count per draw, not {total.shape} and {count.shape}")
    if not count.sum() > 0:
        raise ValueError("there is nothing to average: no draw has anything in it")
    _, index = np.unique(np.arange(len(total)) if group is None else group, return_inverse=True)
    total, count = np.bincount(index, total), np.bincount(index, count)
    # Draws with nothing in them still vary in how much they hold.
    value, g = total.sum() / count.sum(), len(total)
    left = ((total - value * count) ** 2).sum()
    error = np.sqrt(g / (g - 1) * left) / count.sum() if g > 1 else np.nan
    return Estimate(float(value), float(error), g)
