"""Where methods end, in numbers known to six digits: those of the chain in toy_chain.py."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from toy_chain import BETA, OUTPUTS, REWARD, START, TOKEN_REWARD

from rlhf_jax import exact

GOOD = 1 / (1 + np.exp(-REWARD))  # a person calls a text good with probability σ(reward)
STOPPING = exact.enumerate_outputs(prompt=[2, 1], vocab=3, length=3, stop=[1])


def close(found, expected):
    assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("beta", "value", "reward", "kl", "entropy"),
    [
        (0.1, 1.655355, 1.992613, 3.372581, 1.088149),
        (0.3, 1.118347, 1.700810, 1.941544, 2.422215),
        (0.5, 0.829551, 1.359942, 1.060783, 3.178711),
        (1.0, 0.523506, 0.866276, 0.342770, 3.670115),
        (3.0, 0.287966, 0.406215, 0.039416, 3.717671),
    ],
)
def test_the_tilted_chain(beta, value, reward, kl, entropy):
    q = exact.tilted(START, TOKEN_REWARD, beta=beta)
    found = exact.tilted_value(START, REWARD, beta=beta)
    close([found, q @ REWARD, exact.kl(q, START), exact.entropy(q)], [value, reward, kl, entropy])
    assert_allclose(found, q @ REWARD - beta * exact.kl(q, START))
    close(exact.kl_between_and_within(q, START, REWARD)[1], 0)


def test_a_tilt_without_a_price_is_conditioning_on_the_best():
    best = exact.conditioned(START, REWARD.max() == REWARD)
    assert_allclose(exact.tilted(START, REWARD, beta=0.01), best, atol=1e-12)
    with pytest.raises(ValueError, match=r"beta 0: must be above 0 .*conditioned"):
        exact.tilted(START, REWARD, beta=0)


@pytest.mark.parametrize(
    ("reward", "options", "positions"),
    [
        (REWARD, {"horizon": None, "kl_in_return": True}, (0.436538, 0.287681, 0.336563)),
        (REWARD, {"horizon": 1}, (0, 0, 0.530549)),
        (REWARD, {"horizon": 1, "kl_in_return": True}, (0, 0, 0.530549)),
        (REWARD, {"horizon": None, "discount": 0.0, "kl_in_return": True}, (0, 0, 0.530549)),
        (REWARD, {"horizon": 2}, (0, 0.297773, 0.375772)),
        (REWARD, {"horizon": 2, "kl_in_return": True}, (0.020368, 0.445386, 0.323310)),
        (TOKEN_REWARD, {"horizon": 1}, (0.428291, 0.391905, 0.302386)),
    ],
)
def test_the_optimum_of_a_credit_horizon(reward, options, positions):
    q = exact.horizon_optimum(START, reward, OUTPUTS, beta=BETA, **options)
    close(exact.kl_by_position(q, START, OUTPUTS), (0, *positions))


def test_what_short_horizons_earn():
    last = exact.horizon_optimum(START, REWARD, OUTPUTS, beta=BETA, horizon=1)
    token = exact.horizon_optimum(START, TOKEN_REWARD, OUTPUTS, beta=BETA, horizon=1)
    kl = exact.kl(token, START)
    close(last @ REWARD, 0.690357)
    close([token @ REWARD, kl, token @ REWARD - BETA * kl], [1.371327, 1.122582, 0.810036])
    close(exact.kl_between_and_within(last, START, REWARD)[1], 0.213620)


def test_the_whole_horizon_is_the_tilt_also_when_texts_end_early_or_are_impossible():
    p, reward = np.random.default_rng(2).uniform(size=(2, len(STOPPING)))
    p[STOPPING.prefix[:, 3] == 0] = 0
    p /= p.sum()
    q = exact.horizon_optimum(p, reward, STOPPING, beta=0.7, kl_in_return=True)
    assert_allclose(q, exact.tilted(p, reward, beta=0.7), atol=1e-12)


@pytest.mark.parametrize(
    ("n", "reward", "kl", "bound"),
    [
        (2, 0.632533, 0.181369, 0.193147),
        (4, 1.045928, 0.606035, 0.636294),
        (8, 1.362455, 1.133024, 1.204442),
        (16, 1.603066, 1.714953, 1.835089),
        (64, 1.934426, 2.967921, 3.174508),
    ],
)
def test_best_of_n(n, reward, kl, bound):
    q = exact.best_of_n(START, REWARD, n)
    close([q @ REWARD, exact.kl(q, START), exact.best_of_n_bound(n)], [reward, kl, bound])
    close(exact.kl_between_and_within(q, START, REWARD)[1], 0)


def test_best_of_n_without_ties_comes_near_its_bound_and_composes():
    p, reward = np.full(20_000, 1 / 20_000), np.arange(20_000)
    assert_allclose(exact.kl(exact.best_of_n(p, reward, 8), p), exact.best_of_n_bound(8), rtol=1e-3)
    twice = exact.best_of_n(exact.best_of_n(START, REWARD, 3), REWARD, 5)
    assert_allclose(twice, exact.best_of_n(START, REWARD, 15), atol=1e-12)


def test_conditioning_on_a_persons_word_is_a_tilt_and_leaves_the_marginal_alone():
    likelihood = np.stack([GOOD, 1 - GOOD], axis=1)
    probability, (good, bad) = exact.posteriors(START, likelihood)
    close([probability[0], good @ REWARD, bad @ REWARD], [0.533980, 0.454339, -0.151699])
    close(exact.kl(good, START), 0.059797)
    close(exact.mutual_information(START, likelihood), 0.071279)
    assert_allclose(good, exact.tilted(START, np.log(GOOD), beta=1))
    assert_allclose(exact.linear_pool([good, bad], probability), START, atol=1e-15)
    close(exact.kl_between_and_within(good, START, REWARD)[1], 0)


@pytest.mark.parametrize(("rounds", "reward"), [(2, 0.698715), (4, 1.037346), (8, 1.355354)])
def test_rounds_of_conditioning_multiply(rounds, reward):
    q = START
    for _ in range(rounds):
        q = exact.conditioned(q, GOOD)
    close(q @ REWARD, reward)
    assert_allclose(q, exact.tilted(START, rounds * np.log(GOOD), beta=1))


def test_an_impossible_event_or_no_probability_cannot_be_conditioned_on():
    with pytest.raises(ValueError, match="probability 0"):
        exact.conditioned(START, REWARD > 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        exact.conditioned(START, REWARD)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_the_maximum_entropy_policy_for_log_p(tau):
    q = exact.maxent(np.log(START), temperature=tau)
    assert_allclose(q, START ** (1 / tau) / (START ** (1 / tau)).sum())
    value = exact.maxent_value(np.log(START), temperature=tau)
    assert_allclose(value, q @ np.log(START) + tau * exact.entropy(q), atol=1e-12)
    if tau == 1:
        assert_allclose([value, *q], [0, *START], atol=1e-12)  # distillation


def test_maximum_entropy_without_entropy_is_the_mode():
    q = exact.maxent(np.log(START), temperature=1e-3)
    assert_allclose(q, START.max() == START, atol=1e-12)


def test_several_discriminators_intersect_and_one_unites():
    laws = np.array([[0.55, 0.30, 0.10, 0.05], [0.10, 0.30, 0.05, 0.55]])
    q = exact.log_pool(laws, [0.5, 0.5])
    close(q, [0.304153, 0.389073, 0.091705, 0.215068])
    close(exact.log_pool_cost(laws, [0.5, 0.5]), 0.259986)
    assert_allclose(0.5 * sum(exact.kl(q, p) for p in laws), 0.259986, atol=1e-6)
    close(exact.linear_pool(laws, [0.5, 0.5]), [0.325, 0.300, 0.075, 0.300])
    with pytest.raises(ValueError, match="must sum to 1"):
        exact.log_pool_cost(laws, [1, 1])


def test_sequence_temperature_moves_probability_within_levels_of_the_reward():
    q = exact.sequence_temperature(START, 0.5)
    close(exact.kl_between_and_within(q, START, REWARD)[1], 0.150898)


def test_heat_gives_the_entropy_back_and_not_the_distribution():
    q = exact.tilted(START, REWARD, beta=BETA)
    heat = exact.temperature_of_entropy(q, exact.entropy(START))
    hot = exact.sequence_temperature(q, heat)
    close([heat, exact.kl(hot, START), hot @ REWARD], [1.444242, 0.732895, 1.154554])
    with pytest.raises(ValueError, match="out of reach"):
        exact.temperature_of_entropy(q, 5.0)
