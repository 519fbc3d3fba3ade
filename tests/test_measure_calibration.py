"""Calibration: worked numbers, scipy's own tests, and a model whose digits are known."""

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose
from scipy import stats
from toy_chain import CHAIN, REFERENCE, reference_params

from rlhf_jax import measure
from rlhf_jax.types import Prompts

DIE = np.array([0.1082, 0.2, 0.15, 0.7319, 0.05, 0.05])
DIE = DIE / DIE.sum()


def close(found, expected):
    assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_a_coin_has_the_numbers_worked_by_hand():
    found = measure.calibration([0.5, 0.3], target=[0.3, 0.7])
    among = np.array([0.625, 0.375])
    kl = 0.3 * np.log(0.3 / 0.625) + 0.7 * np.log(0.7 / 0.375)
    close([*found], [kl, 0.325, 1.25, 0.2])
    close(found.kl, stats.entropy([0.3, 0.7], among))
    half = measure.calibration([0.25, 0.15], [0.3, 0.7])
    close([*half], [*found[:3], 0.6])


def test_what_is_told_is_what_is_said_and_nothing_else():
    close([*measure.calibration(np.full(10, 0.1))], [0, 0, 1, 0])
    close([*measure.calibration([0.3, 0.7], [0.3, 0.7])], [0, 0, 1.4, 0])
    close([*measure.calibration(np.full(10, 0.05))], [0, 0, 1, 0.5])
    assert [*measure.calibration([1, 0, 0, 0])] == [np.inf, 0.75, 4, 0]
    close(measure.calibration([1, 0], [1, 0]).kl, 0)


def test_a_loaded_die_is_as_far_from_a_fair_one_as_scipy_says():
    found = measure.calibration(DIE)
    close(found.kl, stats.entropy(np.full(6, 1 / 6), DIE))
    close(found.top, 6 * DIE.max())


@pytest.mark.parametrize("target", [None, np.array([0.1, 0.2, 0.3, 0.4])])
def test_the_g_test_is_that_of_scipy(target):
    counts = np.array([30, 0, 25, 61])
    expected = counts.sum() * (np.full(4, 0.25) if target is None else target)
    reference = stats.power_divergence(counts, expected, lambda_="log-likelihood")
    found = measure.g_test(counts, target)
    assert_allclose(found[:2], reference, rtol=1e-10)
    plug_in = stats.entropy(counts / 116, expected / 116)
    close([found.kl, found.n], [plug_in - 3 / 232, 116])


def test_under_the_target_the_bias_is_what_is_subtracted():
    draws = np.random.default_rng(0).multinomial(4096, np.full(10, 0.1), size=3000)
    found = [measure.g_test(x) for x in draws]
    plug_in = np.mean([x.statistic / (2 * x.n) for x in found])
    assert_allclose(plug_in, 9 / (2 * 4096), rtol=0.03)  # .0011
    kl = np.array([x.kl for x in found])
    assert abs(kl.mean()) < 4 * kl.std() / 3000**0.5
    below = np.mean([x.p < 0.05 for x in found])
    assert abs(below - 0.05) < 4 * (0.05 * 0.95 / 3000) ** 0.5


def test_a_models_next_token_is_read_behind_each_prompt():
    tokens = np.array([[4, 1, 0], [4, 2, 3]], np.int32)
    prompts = Prompts(tokens, np.array([2, 3], np.int32), np.arange(2), np.zeros(2, np.int32))
    found = measure.next_token_probabilities(
        reference_params(), prompts, model=REFERENCE, outcomes=[3, 0]
    )
    close(found, CHAIN[[1, 3]][:, [3, 0]])
    hot = measure.next_token_probabilities(
        reference_params(), prompts, model=REFERENCE, outcomes=range(4), temperature=2.0
    )
    root = CHAIN[[1, 3]] ** 0.5
    close(hot, root / root.sum(axis=1, keepdims=True))
    close(measure.calibration(found[0]).invalid, 1 - CHAIN[1, [0, 3]].sum())


def test_padding_behind_a_prompt_touches_nothing(model, params):
    tokens = np.random.default_rng(0).integers(1, 30, (2, 6)).astype(np.int32)
    length, ids = np.array([3, 3], np.int32), np.arange(2)
    tokens[1, :3] = tokens[0, :3]
    prompts = Prompts(jnp.asarray(tokens), length, ids, ids)
    found = measure.next_token_probabilities(params, prompts, model=model, outcomes=range(32))
    close(found[0], found[1])
    logits = toys.forward(model, params, tokens[:1, :3])[1][0, -1]
    expected = np.exp(logits - logits.max())
    assert_allclose(found[0], expected / expected.sum(), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure.calibration([0.9, 0.9]), r"sum in \(0, 1\]; these are \[2\].*1.800000"),
        (lambda: measure.calibration([0.0, 0.0]), "sum 0.000000"),
        (lambda: measure.calibration([0.5, 0.5], [1, 1]), r"must be \[2\].*sum 2"),
        (lambda: measure.g_test([1, 2], [1, 0]), r"outcomes \[1\] have target 0"),
        (lambda: measure.g_test([0, 0]), "0 draws of 2 outcomes"),
        (lambda: measure.g_test([0.5, 1]), "whole numbers"),
        (
            lambda: measure.next_token_probabilities(
                reference_params(),
                Prompts(*(np.ones(x, np.int32) for x in ((1, 1), 1, 1, 1))),
                model=REFERENCE,
                outcomes=[4],
            ),
            "ids below 4",
        ),
        (
            lambda: measure.next_token_probabilities({}, None, model=REFERENCE, outcomes=[1, 1]),
            "different token ids",
        ),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
