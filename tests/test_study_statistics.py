"""Statistics of few seeds: worked by hand, and against scipy and statsmodels where they have it."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired
from statsmodels.tools import add_constant

from rlhf_jax.study.statistics import (
    bootstrap_t,
    effect_size,
    equivalence,
    farthest,
    holm,
    kaplan_meier,
    law,
    sign_flip,
    wilson,
)

EIGHT = np.array([0.3, 0.1, 0.4, 0.15, 0.9, 0.26, 0.5, 0.35])


def draws(seed=0):
    return np.random.default_rng(seed)


# ----------------------------------------------------------------------------------- sign flips


def test_eight_seeds_on_one_side_have_the_smallest_p_of_all():
    assert sign_flip(EIGHT) == 2 / 256 == 0.0078125
    assert sign_flip(EIGHT, alternative="greater") == 1 / 256
    assert sign_flip(EIGHT, alternative="less") == 1.0
    assert sign_flip(-EIGHT, alternative="less") == 1 / 256
    assert sign_flip(EIGHT, 1.0, "less") == 1 / 256


def test_three_seeds_by_hand():
    # Sums of ±1 ±2 ±3: 6 4 2 0 0 −2 −4 −6; with the 1 negative the observed sum is 4.
    assert sign_flip([-1.0, 2, 3], alternative="greater") == 2 / 8
    assert sign_flip([-1.0, 2, 3], alternative="less") == 7 / 8
    assert sign_flip([-1.0, 2, 3]) == 4 / 8


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_scipy_has_the_same_exact_test(alternative):
    for seed in range(5):
        x = draws(seed).normal(0.4, 1, 8)
        found = scipy.stats.permutation_test(
            (x - 0.2,),
            lambda a, axis: a.mean(axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            alternative=alternative,
            vectorized=True,
        )
        assert_allclose(sign_flip(x, 0.2, alternative), found.pvalue, rtol=1e-12)


def test_one_seed_decides_nothing():
    assert sign_flip([3.0]) == 1.0
    assert sign_flip([3.0], alternative="greater") == 0.5


def test_seeds_at_the_bound_have_p_one_on_both_sides():
    for alternative in ("two-sided", "greater", "less"):
        assert sign_flip([0.7] * 8, 0.7, alternative) == 1.0
    assert sign_flip([1.0, 0, 0, 0]) == 1.0  # half of the flips keep the sum, half negate it
    assert sign_flip([1.0, 0, 0, 0], alternative="greater") == 0.5


def test_flips_that_tie_but_for_rounding_are_ties():
    # .1 + .2 − .3 is 0 on paper, 5.6e-17 in floating point: of 6 4 2 0 0 −2 −4 −6 five reach it.
    x = np.array([1.0, 2, -3])
    for scale in (1, 0.1, 1e-9, 1e9):
        assert sign_flip(scale * x, alternative="greater") == 5 / 8
    assert sign_flip(0.1 * x + 7.3, 7.3, "greater") == 5 / 8
    assert sign_flip([0.1 + 0.2] * 8, 0.3) == 1.0


def test_beyond_fourteen_seeds_drawn_flips_are_close_to_all_of_them():
    x = draws(4).normal(0.35, 1, 16)
    signs = np.array(list(itertools.product((1, -1), repeat=16)))
    exact = (signs @ x >= x.sum() - 1e-9).mean()
    assert 0.02 < exact < 0.2
    assert_allclose(sign_flip(x, alternative="greater"), exact, atol=4 * math.sqrt(exact / 2**14))
    assert sign_flip(np.ones(40)) == sign_flip(np.ones(40)) == 2**-14  # never zero


def test_under_the_null_p_is_at_most_the_level_as_often_as_the_level():
    found = [sign_flip(draws(i).normal(size=8)) for i in range(1500)]
    for level in (0.05, 0.1, 0.5):
        assert abs(np.mean(np.array(found) <= level) - level) < 4 * math.sqrt(0.25 / 1500)


def test_p_never_falls_as_the_bound_rises():
    found = [sign_flip(EIGHT, c, "greater") for c in np.linspace(-1, 1, 41)]
    assert (np.diff(found) >= 0).all() and found[0] < found[-1]


@pytest.mark.parametrize("x", [[], [1.0, math.nan], [[1.0, 2.0]], [math.inf]])
def test_what_is_not_one_finite_number_per_seed_is_refused(x):
    for test in (sign_flip, bootstrap_t, effect_size):
        with pytest.raises(ValueError, match="one finite number per seed"):
            test(x)


def test_an_unknown_alternative_is_refused():
    with pytest.raises(ValueError, match="'greater'"):
        sign_flip(EIGHT, alternative="larger")


# ------------------------------------------------------------------- corrections and equivalence


def test_statsmodels_has_the_same_holm():
    for p in ([0.01, 0.04, 0.03, 0.005], [0.2], [1.0, 0.5, 0.5, 0.0], draws().random(9), []):
        if len(p):
            assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)
        else:
            assert holm(p).shape == (0,)


def test_six_smallest_p_of_eight_seeds_survive_and_seven_do_not():
    assert_allclose(holm([2 / 256] * 6), 0.046875)
    assert (holm([2 / 256] * 7) > 0.05).all()


def test_holm_refuses_what_is_no_p():
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, math.nan])


def test_equivalence_by_hand():
    # Distances from −1: 1.2 1 .9, all positive: 1/8. From +1: all negative: 1/8.
    assert equivalence([0.2, 0.0, -0.1], 1.0) == 1 / 8
    # From −.05: .25 .05 −.05: sums as large as .25 are .35 (the last flipped) and .25 twice, as
    # flipping the equal pair keeps the sum: 3/8. From .05: .15 −.05 −.15: −.05 twice, −.25, −.35.
    assert equivalence([0.2, 0.0, -0.1], 0.05) == max(3 / 8, 4 / 8)
    assert equivalence(EIGHT * 1e-3, 0.01) == 1 / 256


def test_equivalence_decides_like_statsmodels_on_gaussian_seeds():
    same, decisions = 0, 0
    for i in range(400):
        x = draws(i).normal(0.3 * (i % 4), 0.5, 8)
        ours, theirs = equivalence(x, 0.6) < 0.05, ttost_paired(x, np.zeros(8), -0.6, 0.6)[0] < 0.05
        same, decisions = same + (ours == theirs), decisions + theirs
    assert 80 < decisions < 320 and same >= 0.97 * 400


def test_equivalence_needs_a_margin():
    with pytest.raises(ValueError, match="above zero"):
        equivalence(EIGHT, 0.0)


# ----------------------------------------------------------------------------------- bootstrap-t


@pytest.mark.parametrize("draw, mean, least", [("normal", 0, 0.92), ("exponential", 1, 0.9)])
def test_the_interval_covers_the_mean_of_eight_seeds(draw, mean, least):
    samples = getattr(draws(5), draw)(size=(700, 8))
    bounds = np.array([bootstrap_t(x, resamples=999) for x in samples])
    covered = ((bounds[:, 0] <= mean) & (mean <= bounds[:, 1])).mean()
    assert least <= covered <= 0.98


def test_a_skewed_sample_is_covered_better_than_by_student():
    samples = draws(6).exponential(size=(700, 8))
    ours = np.mean([np.prod(np.subtract(bootstrap_t(x, resamples=999), 1)) <= 0 for x in samples])
    reach = scipy.stats.t.ppf(0.975, 7) * samples.std(axis=1, ddof=1) / math.sqrt(8)
    assert ours > (np.abs(samples.mean(axis=1) - 1) <= reach).mean() + 0.01


def test_the_interval_follows_shift_and_scale_and_narrows_with_the_level():
    low, high = bootstrap_t(EIGHT)
    assert low < EIGHT.mean() < high
    assert_allclose(bootstrap_t(3 - 2 * EIGHT), (3 - 2 * high, 3 - 2 * low), rtol=0.02)
    inner = bootstrap_t(EIGHT, 0.5)
    assert low < inner[0] < inner[1] < high
    assert bootstrap_t(EIGHT) == (low, high)  # the same results, the same interval


def test_scipys_studentised_resamples_give_the_same_interval():
    drawn = EIGHT[draws(9).integers(0, 8, (40_000, 8))]
    t = scipy.stats.ttest_1samp(drawn, EIGHT.mean(), axis=1).statistic
    error = scipy.stats.sem(EIGHT)
    expected = EIGHT.mean() - error * np.quantile(t, (0.975, 0.025))
    assert_allclose(bootstrap_t(EIGHT), expected, atol=0.1 * error)


def test_intervals_of_one_seed_equal_seeds_and_ties():
    assert np.isnan(bootstrap_t([2.0])).all()
    assert bootstrap_t([0.1] * 8) == (pytest.approx(0.1),) * 2
    student = scipy.stats.t.interval(0.95, 7, 7 / 8, scipy.stats.sem([1.0] * 7 + [0]))
    assert_allclose(bootstrap_t([1.0] * 7 + [0]), student)
    for n in (2, 3, 4):
        x = EIGHT[:n]
        student = scipy.stats.t.interval(0.95, n - 1, x.mean(), scipy.stats.sem(x))
        assert_allclose(bootstrap_t(x), student)
    assert np.isfinite(bootstrap_t([1.0] * 5 + [0] * 3)).all()


def test_a_level_is_a_share():
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_t(EIGHT, 95)


# ---------------------------------------------------------------- effect, laws, shares, survival


def test_effect_sizes_by_hand():
    assert effect_size([1.0, 2, 3]) == 2.0
    assert effect_size([1.0, 2, 3], against=4) == -2.0
    assert effect_size([0.1] * 3) == math.inf and effect_size([0.1] * 3, 0.2) == -math.inf
    assert effect_size([0.1] * 3, 0.1) == 0.0 and effect_size([0.0] * 3) == 0.0
    assert math.isnan(effect_size([1.0]))


def test_the_farthest_number_of_a_seed_keeps_its_sign():
    curves = np.array([[0.1, -0.3], [0.2, 0.1], [0.0, 0.0]])
    assert_allclose(farthest(np.array([0.2, -0.5, 0.0]), curves), [-0.3, -0.5, 0.0])


def test_an_exponent_is_the_slope_of_the_logarithms():
    x = np.array([0.03, 0.1, 0.3, 1.0])
    y = np.array([[2.0], [5.0]]) * x ** np.array([[1.0], [2.0]])
    found = law(x, y, log=("x", "y"))
    assert_allclose(found.slope, [1, 2], rtol=1e-12)
    assert_allclose(np.exp(found.intercept), [2, 5], rtol=1e-12)
    assert_allclose(law(x, np.log(y), log=("x",)).slope, found.slope, rtol=1e-12)


def test_statsmodels_fits_the_same_lines():
    x, y = draws(1).normal(size=(3, 6)), draws(2).normal(size=(3, 6))
    for xs in (x, x[0]):
        found = law(xs, y)
        for seed in range(3):
            one = xs[seed] if xs.ndim == 2 else xs
            expected = OLS(y[seed], add_constant(one)).fit().params
            assert_allclose((found.intercept[seed], found.slope[seed]), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "x, y, log, says",
    [
        ([1, 2, 3], np.ones((2, 3)), (), "at least 4"),
        ([1, 2, 3, 4], np.ones(4), (), "seeds, points"),
        ([1, 2, 3, 4], np.ones((2, 5)), (), "seeds, points"),
        ([0, 1, 2, 3], np.ones((2, 4)), ("x",), "x must be finite and above zero"),
        ([1, 2, 3, 4], -np.ones((2, 4)), ("y",), "y must be finite and above zero"),
        ([1, 2, 3, 4], [[1, 2, 3, math.nan]], (), "y must be finite"),
        ([1, 1, 1, 1], np.ones((2, 4)), (), "all x of a seed are the same"),
        ([1, 2, 3, 4], np.ones((2, 4)), ("z",), "no axis"),
    ],
)
def test_a_law_that_cannot_be_fitted_says_why(x, y, log, says):
    with pytest.raises(ValueError, match=says):
        law(x, y, log=log)


def test_statsmodels_has_the_same_wilson_interval():
    for successes, n in ((0, 10), (3, 10), (10, 10), (2048, 4096)):
        expected = proportion_confint(successes, n, method="wilson")
        assert_allclose(wilson(successes, n), expected, rtol=1e-9, atol=1e-12)
    narrow = proportion_confint(3, 10, alpha=0.5, method="wilson")
    assert_allclose(wilson(3, 10, 0.5), narrow, rtol=1e-9)
    with pytest.raises(ValueError, match="11 of 10"):
        wilson(11, 10)


def test_survival_by_hand():
    # At risk 5, 4, 3, 2, 1; events at 1 and 3, a loss at 2: 4/5, then 4/5 · 2/3.
    found = kaplan_meier([1, 2, 3, 4, 4], [True, False, True, False, False])
    assert_allclose(found.times, [1, 2, 3, 4])
    assert_allclose(found.survival, [0.8, 0.8, 0.8 * 2 / 3, 0.8 * 2 / 3])
    assert found.median == math.inf
    assert kaplan_meier([1, 2, 3, 4], [True] * 4).median == 2  # at most half, not less than half
    assert kaplan_meier([32] * 3, [False] * 3).median == math.inf


def test_statsmodels_has_the_same_survival():
    for seed in range(4):
        time = np.minimum(draws(seed).geometric(0.06, 200), 32)
        seen = (time < 32) & (draws(seed + 9).random(200) < 0.9)
        found, expected = kaplan_meier(time, seen), SurvfuncRight(time, seen)
        events = np.isin(found.times, expected.surv_times)
        assert_allclose(found.survival[events], expected.surv_prob, rtol=1e-9)
        assert found.median == expected.quantile(0.5)


@pytest.mark.parametrize("time, observed", [([], []), ([1, 2], [True]), ([1.0], [0.5])])
def test_survival_refuses_times_without_flags(time, observed):
    with pytest.raises(ValueError, match="kaplan_meier"):
        kaplan_meier(time, observed)
