"""Verdicts on a study's claims, by the rule that the claims state before anything is run."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.study import statistics
from rlhf_jax.study.design import Claim
from rlhf_jax.study.results import NotRun, Results, ResultsError, listed


class Verdict(NamedTuple):
    """What became of a primary claim."""

    claim: Claim
    estimate: float  # mean over seeds
    low: float  # 95 % interval of the mean; nan with one seed
    high: float
    effect: float  # (mean − nearest bound of `supported`) in standard deviations of the seeds
    n: int  # seeds
    p: float
    p_adjusted: float
    verdict: str  # supported, refuted, undecided, or not run
    inside: bool  # whether the estimate lies in `supported`
    note: str = ""


def judge(
    claims: Sequence[Claim],
    results: Results,
    level: float = 0.05,
    *,
    arms: Collection[str] | None = None,
) -> list[Verdict]:
    """Verdicts on the primaries, one family: each is wrong with probability ≤ `level`, before Holm.

    p of a claim is 2·min(p of support, p of refutation) of one-sided sign-flip tests. Support must
    pass at every bound of `supported` (two one-sided tests), refutation at one bound of `possible`;
    a difference, `supported=(0, ∞)`, has the ordinary two-sided p. Factor 2 is enough for intervals
    too: a wrong verdict puts the mean too low or too high, and all that put it too low have passed
    a one-sided test at one bound, the nearest that is not above the truth.

    Holm's correction always counts all of `claims`, also those whose arms were not run: a part of
    a study decides no more easily than the whole. `arms` are the study's own: a claim about an arm
    that is none of them is a mistake, not an arm that was not run.

    Raises:
        ResultsError: if a claim's value is missing, not finite, or not one number per seed.
    """
    found = []
    for claim in claims:
        try:
            found.append(_tested(claim, _value(claim, results), level, len(claims)))
        except NotRun as missing:
            if arms is not None and missing.arm not in arms:
                raise ResultsError(
                    f"claim {claim.name}: there is no arm {missing.arm!r}; the study's arms are "
                    f"{listed(arms)}"
                ) from missing
            found.append(_not_run(claim, missing))
    p = statistics.holm([1.0 if math.isnan(one.p) else one.p for one in found])
    return [
        one
        if one.verdict == "not run"
        else one._replace(
            p_adjusted=float(adjusted), verdict=one.verdict if adjusted < level else "undecided"
        )
        for one, adjusted in zip(found, p, strict=True)
    ]


def _tested(claim: Claim, x: np.ndarray, level: float, family: int) -> Verdict:
    """The verdict that stands if the correction for the family leaves p below the level."""
    low, high = claim.supported
    least, most = claim.supported if claim.possible is None else claim.possible
    support = max(
        statistics.sign_flip(x, bound, side)
        for bound, side in ((low, "greater"), (high, "less"))
        if math.isfinite(bound)
    )
    refute = min(
        statistics.sign_flip(x, bound, side) if math.isfinite(bound) else 1.0
        for bound, side in ((least, "less"), (most, "greater"))
    )
    mean = float(x.mean())
    nearest = min((b for b in (low, high) if math.isfinite(b)), key=lambda b: abs(mean - b))
    smallest = 2 * max(2.0**-x.size, 2.0**-statistics.EXACT)
    seeds = "1 seed" if x.size == 1 else f"{x.size} seeds"
    few = f"{seeds} cannot decide {'a claim' if family == 1 else f'{family} claims'}"
    return Verdict(
        claim=claim,
        estimate=mean,
        **dict(zip(("low", "high"), statistics.bootstrap_t(x), strict=True)),
        effect=statistics.effect_size(x, nearest),
        n=x.size,
        p=min(1.0, 2 * min(support, refute)),
        p_adjusted=math.nan,  # the family's
        verdict="supported" if support < refute else "refuted" if refute < support else "undecided",
        inside=low < mean < high,
        note=few if smallest * family >= level else "",
    )


class Estimate(NamedTuple):
    """What was measured of a secondary claim, without a verdict."""

    claim: Claim
    estimate: float
    low: float
    high: float
    n: int
    where: str  # the interval against `supported`: inside, outside, straddles; one seed, not run
    inside: bool  # whether the estimate lies in `supported`
    note: str = ""


def estimates(claims: Sequence[Claim], results: Results) -> list[Estimate]:
    """Means and 95 % intervals of secondary claims. A mean that is not finite has no interval."""
    return [_estimated(claim, results) for claim in claims]


def _estimated(claim: Claim, results: Results) -> Estimate:
    nan = math.nan
    try:
        x = _value(claim, results, finite=False)
    except NotRun as missing:
        return Estimate(claim, nan, nan, nan, 0, "not run", False, str(missing))
    low, high = claim.supported
    if not np.isfinite(x).all():
        seeds = [seed for seed, v in zip(results.seeds, x, strict=True) if not math.isfinite(v)]
        note = f"not finite for seeds {listed(seeds)}"
        return Estimate(claim, nan, nan, nan, x.size, "not finite", False, note)
    mean, (least, most) = float(x.mean()), statistics.bootstrap_t(x)
    if x.size == 1:
        where = "one seed"
    elif low < least and most < high:
        where = "inside"
    else:
        where = "outside" if most <= low or least >= high else "straddles"
    return Estimate(claim, mean, least, most, x.size, where, low < mean < high)


def _value(claim: Claim, results: Results, *, finite: bool = True) -> np.ndarray:
    """A claim's number per seed."""
    try:
        x = np.asarray(claim.value(results), np.float64)
    except NotRun:
        raise
    except ResultsError as error:
        raise ResultsError(f"claim {claim.name}: {error}") from error
    if x.shape != (len(results.seeds),):
        raise ResultsError(
            f"claim {claim.name}: its value must be one number for each of the "
            f"{len(results.seeds)} seeds, not an array of shape {x.shape}"
        )
    wrong = [(s, v) for s, v in zip(results.seeds, x, strict=True) if not math.isfinite(v)]
    if finite and wrong:
        raise ResultsError(
            f"claim {claim.name} is {wrong[0][1]} for seed {wrong[0][0]}"
            + (f" and not finite for {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + "; a claim is tested on finite numbers only"
        )
    return x


def _not_run(claim: Claim, missing: NotRun) -> Verdict:
    nan = math.nan
    return Verdict(claim, nan, nan, nan, nan, 0, nan, nan, "not run", False, str(missing))
