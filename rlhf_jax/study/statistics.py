"""Statistics of a few paired seeds: exact tests, their corrections, intervals, law fits, survival.

Pure functions in numpy float64; an array `x` is one number per seed. Random draws have a fixed
seed, so that the same results always give the same verdicts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.special

EXACT = 14  # seeds: up to here all 2^n flips are counted, beyond 2^14 of them
FEW = 5  # seeds that a bootstrap needs
RESAMPLES = 9999
EPSILON = np.finfo(np.float64).eps
SAME = 1e-12  # relative: sums this close are equal but for rounding


def sign_flip(
    x: Sequence[float] | np.ndarray,
    against: float = 0.0,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
) -> float:
    """Share of sign flips of x − against with as large a mean: p of the mean being `against`.

    Exact if x − against is symmetric about 0 (Fisher 1935, section 21): with 8 seeds the smallest
    p are 1/256 and, two-sided, 2/256. For more than 14 seeds the flips are the identity and random
    ones, which keeps the test exact and p above zero (Phipson & Smyth 2010).
    """
    x = _seeds(x, "sign_flip")
    d = x - against
    sums = _flips(d.size) @ d  # the first flip is the identity
    # Flips that tie but for rounding count as ties; so do seeds that equal the bound but for it.
    slack = SAME * np.abs(d).sum() + 4 * EPSILON * (np.abs(x) + abs(against)).sum()
    if alternative == "greater":
        as_large = sums >= sums[0] - slack
    elif alternative == "less":
        as_large = sums <= sums[0] + slack
    elif alternative == "two-sided":
        as_large = np.abs(sums) >= np.abs(sums[0]) - slack
    else:
        raise ValueError(
            f"alternative={alternative!r} must be 'two-sided', 'greater' (the mean is above "
            "`against`) or 'less'"
        )
    return float(as_large.mean())


def _flips(n: int) -> np.ndarray:
    """Signs [flips, n], the identity first: all of them, or 2^14 that are drawn."""
    if n <= EXACT:
        return 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    drawn = np.random.default_rng(0).integers(0, 2, (2**EXACT, n))
    drawn[0] = 0
    return 1.0 - 2.0 * drawn


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusted p of one family: the i-th smallest times m − i + 1, never falling (Holm 1979)."""
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"holm needs a list of p between 0 and 1, not {p.tolist()}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def equivalence(x: Sequence[float] | np.ndarray, margin: float) -> float:
    """Larger of two one-sided sign-flip p: that the mean lies outside of (−margin, margin).

    Two one-sided tests (Schuirmann 1987) with sign flips in place of t: small means "equal to 0".
    """
    if not margin > 0:
        raise ValueError(f"margin={margin} must be above zero: what counts as equal?")
    return max(sign_flip(x, -margin, "greater"), sign_flip(x, margin, "less"))


def bootstrap_t(
    x: Sequence[float] | np.ndarray, level: float = 0.95, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Interval of the mean: mean − s·t*, t* = quantiles of (mean* − mean)/s* over resamples, s =
    standard error (Efron & Tibshirani 1993, section 12.5).

    Student's t takes the place of t* for fewer than 5 seeds, where a resample of nearly one value
    makes the interval thousands of times too wide, and where so many values tie that resamples of
    one value alone (s* = 0, t* = ±∞) could be the quantile. One seed has no interval (nan), seeds
    that are all equal have one without width.
    """
    x = _seeds(x, "bootstrap_t")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, as .95")
    tail, mean, n = (1 - level) / 2, float(x.mean()), x.size
    if n == 1:
        return float("nan"), float("nan")
    tiny = SAME * np.abs(x).max()
    if np.ptp(x) <= tiny:
        return mean, mean
    error = x.std(ddof=1) / np.sqrt(n)
    drawn = x[np.random.default_rng(0).integers(0, n, (resamples, n))]
    constant = np.ptp(drawn, axis=1) <= tiny
    if n < FEW or constant.mean() >= tail:
        reach = float(scipy.special.stdtrit(n - 1, 1 - tail) * error)
        return mean - reach, mean + reach
    errors = np.where(constant, 1.0, drawn.std(axis=1, ddof=1)) / np.sqrt(n)
    away = drawn.mean(axis=1) - mean
    t = np.where(constant, np.copysign(np.inf, away), away / errors)
    # Without interpolation: between a finite and an infinite t there is no number.
    low, high = np.quantile(t, (tail, 1 - tail), method="inverted_cdf")
    return float(mean - high * error), float(mean - low * error)


def effect_size(x: Sequence[float] | np.ndarray, against: float = 0.0) -> float:
    """d_z = (mean − against)/sd, in standard deviations of the seeds (Cohen 1988, eq. 2.3.5).

    ±∞ if all seeds are equal, 0 if they equal `against`, nan for one seed.
    """
    x = _seeds(x, "effect_size")
    if x.size == 1:
        return float("nan")
    away, slack = float(x.mean()) - against, SAME * max(np.abs(x).max(), abs(against))
    if np.ptp(x) <= slack:
        return 0.0 if abs(away) <= slack else float(np.copysign(np.inf, away))
    return float(away / x.std(ddof=1))


def farthest(*each: np.ndarray) -> np.ndarray:
    """Of several numbers per seed the one that is farthest from 0, with its sign, [seeds].

    Each argument is [seeds], or [seeds, k]: k of them.
    """
    each = np.column_stack(each)
    return np.take_along_axis(each, np.abs(each).argmax(axis=1)[:, None], axis=1)[:, 0]


class Law(NamedTuple):
    """y = slope · x + intercept, one of each per seed."""

    slope: np.ndarray  # [seeds]
    intercept: np.ndarray  # [seeds]


def law(
    x: Sequence[float] | np.ndarray,
    y: Sequence[Sequence[float]] | np.ndarray,
    log: Collection[Literal["x", "y"]] = (),
) -> Law:
    """Least-squares line through at least 4 points of each seed: slope = Σ(x−x̄)(y−ȳ) / Σ(x−x̄)².

    y is [seeds, points], x [points] or [seeds, points]; `log` names the axes whose logarithm is
    taken, so that with ("x", "y") the slope is an exponent. A slope per seed is what a claim about
    a law tests, as any other number per seed.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if y.ndim != 2 or x.shape not in (y.shape, y.shape[1:]):
        raise ValueError(
            f"law needs y [seeds, points] and x [points] or [seeds, points], not {y.shape} and "
            f"{x.shape}"
        )
    if y.shape[1] < 4:
        raise ValueError(
            f"{y.shape[1]} points do not tell a line from a curve; a law is fitted to at least 4"
        )
    if unknown := set(log) - {"x", "y"}:
        raise ValueError(f"log={log!r}: {sorted(unknown)} is no axis; name 'x', 'y' or both")
    for axis, values in (("x", x), ("y", y)):
        if not np.isfinite(values).all() or (axis in log and (values <= 0).any()):
            need = "finite and above zero (its logarithm is taken)" if axis in log else "finite"
            raise ValueError(f"law: every {axis} must be {need}, not {values.tolist()}")
    x = np.broadcast_to(np.log(x) if "x" in log else x, y.shape)
    y = np.log(y) if "y" in log else y
    if (np.ptp(x, axis=1) == 0).any():
        raise ValueError("law: all x of a seed are the same; a slope needs two different ones")
    from_mean = x - x.mean(axis=1, keepdims=True)
    slope = (from_mean * y).sum(axis=1) / (from_mean**2).sum(axis=1)
    return Law(slope, y.mean(axis=1) - slope * x.mean(axis=1))


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion by its score test (Wilson 1927); scipy has it."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson needs 0 ≤ successes ≤ n and n ≥ 1, not {successes} of {n}")
    from scipy.stats import binomtest  # takes a second to import

    found = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


class Survival(NamedTuple):
    """How many are left after each time; `median` is the first with at most half of them."""

    times: np.ndarray  # [k], ascending
    survival: np.ndarray  # [k]
    median: float  # inf: more than half are left at the end


def kaplan_meier(
    time: Sequence[float] | np.ndarray, observed: Sequence[bool] | np.ndarray
) -> Survival:
    """S(t) = Π over times ≤ t of 1 − events/at risk (Kaplan & Meier 1958); scipy has it.

    `observed` is False where all that is known is that nothing happened up to `time`.
    """
    time, observed = np.asarray(time, np.float64), np.asarray(observed)
    if time.ndim != 1 or time.shape != observed.shape or not time.size:
        raise ValueError(
            "kaplan_meier needs as many times as observed flags, at least one, not "
            f"{time.shape} and {observed.shape}"
        )
    if not np.isin(observed, (0, 1)).all() or not np.isfinite(time).all():
        raise ValueError("kaplan_meier: every time must be finite, every observed True or False")
    seen = observed.astype(bool)
    from scipy.stats import CensoredData, ecdf  # takes a second to import

    found = ecdf(CensoredData(uncensored=time[seen], right=time[~seen])).sf
    left = found.probabilities <= 0.5 + SAME
    median = float(found.quantiles[left][0]) if left.any() else float("inf")
    return Survival(found.quantiles, found.probabilities, median)


def _seeds(x: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(
            f"{name} needs one finite number per seed in a list that is not empty, not {x.tolist()}"
        )
    return x
