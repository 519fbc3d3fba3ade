"""The laboratory: every text, its probability, and what is measured of distributions."""

import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal
from toy_chain import OUTPUTS, REFERENCE, REWARD, START, TOKEN_REWARD, reference_params

from rlhf_jax import exact

DIGITS = 1e-6
STOPPING = exact.enumerate_outputs(prompt=[2, 1], vocab=3, length=3, stop=[1])
TABLE = toys.Table(3)


def table_of(p):
    """Weights of a Table that goes from any token to each next with probability p."""
    return toys.markov(np.log(np.tile(p, (3, 1))))


def close(found, expected):
    assert_allclose(found, expected, atol=DIGITS, rtol=0)


def some_law(n, seed=0):
    p = np.random.default_rng(seed).uniform(size=n)
    return p / p.sum()


# ---- texts


def test_every_text_is_there_once_and_texts_that_end_early_are_among_them():
    found = exact.enumerate_outputs(prompt=[2, 1], vocab=3, length=2, stop=[1])
    rest = [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert_array_equal(found.tokens, [[2, 1, *x] for x in rest])
    assert_array_equal(found.mask[:, :2], np.zeros((7, 2), bool))
    assert_array_equal(found.mask[:, 2:], [[True, i != 3] for i in range(7)])
    assert_array_equal(found.batch().segments[:, 3], [1, 1, 1, 0, 1, 1, 1])
    assert len(OUTPUTS) == 64
    assert len(exact.enumerate_outputs(prompt=[0], vocab=1, length=3, stop=[0])) == 1


def test_texts_share_a_state_as_long_as_they_agree():
    agree = exact.enumerate_outputs(prompt=[9], vocab=10, length=2, alphabet=[3, 7])
    assert_array_equal(agree.tokens[:, 1:], [[3, 3], [3, 7], [7, 3], [7, 7]])
    assert_array_equal(agree.prefix, [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 0, 1, 3]])


def test_too_many_texts_are_counted_and_the_way_out_is_named():
    with pytest.raises(ValueError, match=r"3,200,000 texts.*length to 4.*alphabet of 14 tokens"):
        exact.enumerate_outputs(prompt=[0], vocab=20, length=5, limit=600_000)
    with pytest.raises(ValueError, match="ids below 3"):
        exact.enumerate_outputs(prompt=[0], vocab=3, length=2, stop=[3])
    with pytest.raises(ValueError, match="prompt of at least 1 token"):
        exact.enumerate_outputs(prompt=[], vocab=3, length=2)


# ---- a model's probabilities


@pytest.mark.parametrize("rows", [4096, 20])
def test_a_model_that_is_the_chain_has_the_chains_probabilities(rows):
    p = exact.probabilities(reference_params(), OUTPUTS, model=REFERENCE, rows=rows)
    assert_allclose(p, START, rtol=1e-5)


def test_a_text_that_ends_early_costs_only_the_tokens_it_has():
    p = np.array([0.5, 0.2, 0.3])
    found = exact.probabilities(table_of(p), STOPPING, model=TABLE)
    expected = np.where(STOPPING.mask, p[STOPPING.tokens], 1.0).prod(axis=1)
    assert_allclose(expected.sum(), 1)
    assert_allclose(found, expected, rtol=1e-5)


def test_tokens_outside_the_alphabet_are_banned_as_by_the_sampler():
    two = exact.enumerate_outputs(prompt=[1], vocab=3, length=3, alphabet=[0, 2])
    found = exact.probabilities(table_of([0.5, 0.2, 0.3]), two, model=TABLE)
    zeros = (two.tokens[:, 1:] == 0).sum(axis=1)
    assert_allclose(found, 0.625**zeros * 0.375 ** (3 - zeros), rtol=1e-5)


def test_probabilities_that_do_not_sum_to_1_are_refused():
    few = exact.enumerate_outputs(prompt=[1], vocab=2, length=3)
    with pytest.raises(ValueError, match=r"sum to 0\.343000, not 1: enumerate the model's own"):
        exact.probabilities(table_of([0.5, 0.2, 0.3]), few, model=TABLE)
    with pytest.raises(ValueError, match=r"sums to 1; .*sum 2\.0"):
        exact.entropy(2 * START)
    with pytest.raises(ValueError, match=r"\[64\], one number per text"):
        exact.kl(START, START[:3] / START[:3].sum())


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_a_sampling_temperature_is_token_temperature_and_not_sequence_temperature(temperature):
    params = reference_params()
    found = exact.probabilities(params, OUTPUTS, model=REFERENCE, temperature=temperature)
    expected = exact.token_temperature(START, OUTPUTS, temperature)
    assert_allclose(found, expected, rtol=1e-5)
    assert exact.kl(found, exact.sequence_temperature(START, temperature)) > 1e-4


def test_the_two_temperatures_differ_by_a_known_kl():
    by_token = exact.token_temperature(START, OUTPUTS, 0.5)
    close(exact.kl(by_token, exact.sequence_temperature(START, 0.5)), 0.010494)


# ---- measures


def test_the_chain_has_the_known_moments():
    close([exact.entropy(START), START @ REWARD], [3.610435, 0.171913])
    value, probability = exact.levels(START, REWARD)
    assert_array_equal(value, np.arange(-1, 2.5, 0.5))
    close([probability[-1], probability.sum()], [0.031398, 1])
    close(START @ (REWARD - START @ REWARD) ** 2, 0.678572)


@pytest.mark.parametrize("outputs", [OUTPUTS, STOPPING])
def test_conditionals_multiply_to_the_text_and_kl_by_position_sums_to_kl(outputs):
    p, q = some_law(len(outputs)), some_law(len(outputs), 1)
    assert_allclose(np.exp(exact.conditionals(p, outputs).sum(axis=1)), p)
    assert_allclose(exact.kl_by_position(p, q, outputs).sum(), exact.kl(p, q))


def test_kl_is_infinite_where_the_second_cannot_speak_and_0_log_0_is_0():
    half, one = np.array([0.5, 0.5, 0, 0]), np.array([1.0, 0, 0, 0])
    two = exact.enumerate_outputs(prompt=[0], vocab=2, length=2)
    assert exact.kl(half, one) == np.inf
    assert_allclose(exact.kl(one, half), np.log(2))
    assert_allclose(exact.kl_by_position(one, half, two), [0, 0, np.log(2)])


@pytest.mark.parametrize("reward", [REWARD, TOKEN_REWARD], ids=["at the end", "by token"])
def test_advantages_are_a_martingale_whose_variances_add_up(reward):
    advantage = exact.advantages(START, reward, OUTPUTS)
    parts = START @ advantage**2
    close(parts[1:], [0.186588, 0.284855, 0.207128])
    close(parts.sum(), 0.678572)
    assert_allclose(advantage.sum(axis=1), REWARD - START @ REWARD, atol=1e-12)


def test_a_token_that_does_not_matter_has_no_advantage():
    second = 1.0 * (OUTPUTS.tokens[:, 2] == 2)
    advantage = exact.advantages(START, second, OUTPUTS)
    assert_allclose(advantage[:, 3], 0, atol=1e-12)
    value = exact.state_values(START, second, OUTPUTS)
    assert_allclose(value[:, 1], START @ second)
    assert_allclose(value[:, 3], second)


def test_a_token_reward_that_looks_ahead_is_refused():
    ahead = np.zeros(OUTPUTS.mask.shape)
    ahead[:, 1] = OUTPUTS.tokens[:, 3]
    with pytest.raises(ValueError, match=r"\[4, 0\] depends on what comes after it"):
        exact.advantages(START, ahead, OUTPUTS)
    with pytest.raises(ValueError, match=r"this one is \[3\]"):
        exact.state_values(START, np.zeros(3), OUTPUTS)
