"""Verdicts: p values by hand, every verdict for every kind of claim, and few false ones."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.study import statistics
from rlhf_jax.study.design import Claim
from rlhf_jax.study.results import Results, ResultsError, Row
from rlhf_jax.study.verdicts import estimates, judge

INF = math.inf
NOISE = np.array([0.4, -1.3, 0.9, 0.2, -0.6, 1.1, -0.8, 0.1])  # its mean is 0
UP = np.array([0.3, 0.1, 0.4, 0.15, 0.9, 0.26, 0.5, 0.35])


def claim(name="P1", supported=(0, INF), possible=None, arm=None, metric="x"):
    arm = name if arm is None else arm
    return Claim(name, "", lambda r: r.values(metric, arm), supported, possible)


def results(**arms):
    return Results(
        Row(arm, seed, 1, "x", v) for arm, values in arms.items() for seed, v in enumerate(values)
    )


def one(x, **kind):
    [found] = judge([claim(**kind)], results(P1=x))
    return found


def test_eight_seeds_above_zero_decide_one_claim_and_six():
    alone = one(UP)
    assert alone.p == alone.p_adjusted == 2 / 256 and alone.verdict == "supported"
    assert alone.estimate == UP.mean() and alone.low < alone.estimate < alone.high
    assert_allclose(alone.effect, UP.mean() / UP.std(ddof=1))
    assert alone.n == 8 and alone.inside and not alone.note
    six = judge([claim(f"P{i}") for i in range(6)], results(**{f"P{i}": UP for i in range(6)}))
    assert_allclose([v.p_adjusted for v in six], 0.046875)
    assert {v.verdict for v in six} == {"supported"}


KINDS = {
    "difference": dict(supported=(0, INF)),
    "equal": dict(supported=(-1, 1)),
    "interval": dict(supported=(-1, 1), possible=(-3, 3)),
    "threshold": dict(supported=(-INF, 1), possible=(-INF, 3)),
    "exponent": dict(supported=(0.7, 1.3), possible=(0.5, INF)),
}
CASES = [
    ("difference", 2, "supported"),
    ("difference", 0, "undecided"),
    ("difference", -2, "refuted"),
    ("equal", 0, "supported"),
    ("equal", 1, "undecided"),
    ("equal", 3, "refuted"),
    ("equal", -3, "refuted"),
    ("interval", 0, "supported"),
    ("interval", 2, "undecided"),
    ("interval", 5, "refuted"),
    ("interval", -5, "refuted"),
    ("threshold", 0, "supported"),
    ("threshold", 2, "undecided"),
    ("threshold", 5, "refuted"),
    ("exponent", 1, "supported"),
    ("exponent", 0.6, "undecided"),
    ("exponent", 4, "undecided"),
    ("exponent", 0.1, "refuted"),
]


@pytest.mark.parametrize("kind, mean, verdict", CASES)
def test_every_kind_of_claim_can_end_in_every_verdict(kind, mean, verdict):
    width = 0.1 if kind == "exponent" else 0.3
    x = mean + width * NOISE
    assert one(x, **KINDS[kind]).verdict == verdict
    # So it can as one of six, the others being decided or not.
    names = [f"P{i}" for i in range(6)]
    for others in (UP, NOISE):
        data = results(**{name: x if name == "P0" else others for name in names})
        claims = [claim("P0", **KINDS[kind]), *map(claim, names[1:])]
        assert judge(claims, data)[0].verdict == verdict


def test_the_effect_is_the_distance_from_the_nearest_bound():
    for mean, distance in ((0.8, -0.2), (-0.7, 0.3), (2, 1)):
        x = mean + 0.3 * NOISE
        assert_allclose(one(x, supported=(-1, 1)).effect, distance / x.std(ddof=1))


def test_p_of_an_interval_by_hand():
    # Distances of .2 0 −.1 to the bounds ±1 have one sign: 1/8 at both, so 2/8; of 2 seeds, 2/4.
    assert one([0.2, 0.0, -0.1], supported=(-1, 1)).p == 2 / 8
    # All above 1: the flips as large as the observed one are 1 of 8 at the bound 1.
    assert one([1.2, 3.0, 1.1], supported=(-1, 1)).p == 2 / 8
    assert one([1.2, 3.0, 1.1], supported=(-1, 1), possible=(-4, 4)).p == 1.0


def test_the_p_of_a_difference_is_the_two_sided_one_in_both_directions():
    for seed in range(20):
        x = np.random.default_rng(seed).normal(0.3, 1, 8)
        for bounds in ((0, INF), (-INF, 0)):
            assert_allclose(one(x, supported=bounds).p, statistics.sign_flip(x))


@pytest.fixture
def no_intervals(monkeypatch):
    """Thousands of verdicts need none, and they take most of the time."""
    monkeypatch.setattr(statistics, "bootstrap_t", lambda x: (math.nan, math.nan))


def test_under_the_null_a_claim_is_decided_at_most_as_often_as_the_level(no_intervals):
    level, n = 0.05, 800
    above = level + 3 * math.sqrt(level * (1 - level) / n)
    draw = np.random.default_rng(3)
    for kind in ({"supported": (0, INF)}, {"supported": (-0.5, 0)}, {"supported": (-9, 0)}):
        found = [one(draw.normal(size=8), **kind).verdict for _ in range(n)]
        assert np.mean([v == "supported" for v in found]) <= above / 2 + 0.01
        assert np.mean([v != "undecided" for v in found]) <= above


def test_the_family_is_wrong_at_most_as_often_as_the_level(no_intervals):
    level, n, draw = 0.05, 300, np.random.default_rng(4)
    claims = [claim(f"P{i}") for i in range(3)]
    wrong = [
        any(
            v.verdict != "undecided"
            for v in judge(claims, results(**{f"P{i}": draw.normal(size=8) for i in range(3)}))
        )
        for _ in range(n)
    ]
    assert np.mean(wrong) <= level + 3 * math.sqrt(level / n)


def test_too_few_seeds_cannot_decide_but_say_where_the_estimate_lies():
    few = one([2.0], supported=(0, INF))
    assert few.verdict == "undecided" and few.p == 1.0 and few.inside
    assert few.note == "1 seed cannot decide a claim" and math.isnan(few.low)
    names = [f"P{i}" for i in range(6)]
    seven = judge([claim(n) for n in names], results(**{n: UP[:7] for n in names}))
    assert {v.verdict for v in seven} == {"undecided"}
    assert seven[0].note == "7 seeds cannot decide 6 claims"
    assert not one(-UP[:5]).inside and one(UP[:5]).note == "5 seeds cannot decide a claim"


def test_a_claim_whose_arm_was_not_run_counts_in_the_family():
    claims = [claim(f"P{i}") for i in range(6)]
    found = judge(claims, results(P0=UP, P1=UP), arms=[f"P{i}" for i in range(6)])
    assert [v.verdict for v in found] == ["supported"] * 2 + ["not run"] * 4
    assert_allclose([v.p_adjusted for v in found[:2]], 0.046875)
    assert found[5].n == 0 and math.isnan(found[5].p) and "'P5' was not run" in found[5].note
    weaker = UP * [-1, 1, 1, 1, 1, 1, 1, 1]
    assert judge(claims, results(P0=weaker))[0].verdict == "undecided"


def test_a_claim_about_an_arm_that_the_study_has_not_is_a_mistake():
    with pytest.raises(ResultsError, match="claim P1: there is no arm 'pppo'; the study's arms"):
        judge([claim(arm="pppo")], results(ppo=UP), arms=["ppo", "dpo"])


@pytest.mark.parametrize(
    "wrong, says",
    [
        (claim(metric="y"), "claim P1: arm 'P1' has no metric 'y'"),
        (claim(arm="bad"), r"claim P1 is nan for seed 2 and not finite for 1 more"),
        (Claim("P1", "", lambda r: r.values("x", "P1")[:3], (0, 1)), r"8 seeds, not .* \(3,\)"),
        (Claim("P1", "", lambda r: 1.0, (0, 1)), r"one number for each of the 8 seeds"),
    ],
)
def test_a_claim_without_one_finite_number_per_seed_is_an_error(wrong, says):
    bad = [1, 1, math.nan, 1, 1, math.inf, 1, 1]
    with pytest.raises(ResultsError, match=says):
        judge([wrong], results(P1=UP, bad=bad))


def test_secondary_claims_say_where_their_interval_lies():
    data = results(a=UP, b=[math.inf, *UP[1:]])
    wide = estimates(
        [
            claim("S1", (0, 1), arm="a"),
            claim("S2", (0, 0.4), arm="a"),
            claim("S3", (0.35, 0.4), arm="a"),
            claim("S4", (-INF, 0), arm="a"),
            claim("S5", (0, 1), arm="c"),
            claim("S6", (0, 1), arm="b"),
        ],
        data,
    )
    where = ["inside", "straddles", "straddles", "outside", "not run", "not finite"]
    assert [e.where for e in wide] == where
    assert [e.inside for e in wide] == [True, True, True, False, False, False]
    assert wide[5].note == "not finite for seeds 0" and "'c' was not run" in wide[4].note
    [single] = estimates([claim("S1", (0, 1), arm="a")], results(a=[0.5]))
    assert single.where == "one seed" and single.inside and single.estimate == 0.5
