"""What is worth asking: an ensemble's doubts about comparisons, an argument's about premises."""

import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import acquisition
from rlhf_jax.acquisition import all_of, any_of

P = jnp.array([0.9, 0.5, 0.5, 0.2, 0.05])
IMPORTANCE = [0.4275, 0.7695, 0.1045, 0.2612, 0.4950]
INFORMATION = [0.035645, 0.338407, 0.005490, 0.022796, 0.032934]


def root(p):
    """(a and b) or (c and d) or e."""
    return any_of(all_of(p[0], p[1]), all_of(p[2], p[3]), p[4])


def entropy(*p):
    return -sum(x * math.log(x) for x in p if x > 0)


def test_the_importance_of_premises_is_birnbaums():
    assert_allclose(root(P), 0.529750, rtol=1e-6)
    assert_allclose(acquisition.importance(root, P), IMPORTANCE, atol=5e-5)


def test_importance_is_what_an_answer_changes():
    for i in range(5):
        change = root(P.at[i].set(1.0)) - root(P.at[i].set(0.0))
        assert_allclose(acquisition.importance(root, P)[i], change, rtol=1e-5)


def test_information_about_the_conclusion():
    assert_allclose(acquisition.mutual_information(root, P), INFORMATION, atol=1e-6)


def joint():
    """All 32 worlds: their probability, premises and conclusion, in float64."""
    p = np.asarray(P, np.float64)
    worlds = np.array(list(product([0, 1], repeat=5)))
    probability = np.where(worlds, p, 1 - p).prod(1)
    a, b, c, d, e = worlds.T
    return probability, worlds, (a & b) | (c & d) | e


def test_information_agrees_with_the_table_of_all_worlds():
    probability, worlds, conclusion = joint()
    found = acquisition.mutual_information(root, P)
    for i in range(5):
        cells = [
            probability[(worlds[:, i] == x) & (conclusion == y)].sum()
            for x in (0, 1)
            for y in (0, 1)
        ]
        x, y = (
            [cells[0] + cells[1], cells[2] + cells[3]],
            [cells[0] + cells[2], cells[1] + cells[3]],
        )
        assert_allclose(found[i], entropy(*x) + entropy(*y) - entropy(*cells), atol=1e-6)


def test_the_variance_removed_is_that_of_the_conclusions_probability_after_the_answer():
    probability, worlds, conclusion = joint()
    found = acquisition.variance_removed(root, P)
    for i in range(5):
        after = [
            (probability * conclusion)[worlds[:, i] == x].sum()
            / probability[worlds[:, i] == x].sum()
            for x in (0, 1)
        ]
        p = float(P[i])
        mean = (1 - p) * after[0] + p * after[1]
        expected = (1 - p) * (after[0] - mean) ** 2 + p * (after[1] - mean) ** 2
        assert_allclose(found[i], expected, rtol=1e-5)


def names(scores):
    return "".join("abcde"[i] for i in acquisition.top(scores, 5))


def test_each_measure_has_its_own_order():
    assert names(acquisition.mutual_information(root, P)) == "baedc"
    assert names(acquisition.weighted_entropy(root, P)) == "badec"
    assert names(acquisition.binary_entropy(P))[:2] == "bc"  # even, and the earlier one first


def test_a_certain_premise_and_an_irrelevant_one_are_worth_nothing():
    p = jnp.array([1.0, 0.5, 0.0])
    for name in ("mutual_information", "variance_removed", "weighted_entropy"):
        measure = getattr(acquisition, name)
        found = measure(lambda p: any_of(p[0], p[2]) + 0.0 * p[1], p)
        assert_allclose(found, 0.0, atol=1e-6)


def test_the_top_ones_come_first():
    assert_array_equal(acquisition.top(jnp.array([1.0, 3.0, 2.0, 3.0]), 3), [1, 3, 2])


def logit(p):
    return math.log(p / (1 - p))


# Two models, four pairs: they agree, are sure of opposites, both find it even, differ a little.
PROBABILITY = np.array([[0.9, 0.999999, 0.5, 0.6], [0.9, 0.000001, 0.5, 0.8]])
SCORES = jnp.array([[[logit(p) + 3.0, 3.0] for p in row] for row in PROBABILITY])


def test_the_variance_of_an_ensemble_by_hand():
    assert_allclose(acquisition.variance(SCORES), PROBABILITY.var(0), atol=1e-6)


def test_bald_by_hand():
    each = np.array([[entropy(p, 1 - p) for p in row] for row in PROBABILITY])
    mean = PROBABILITY.mean(0)
    whole = np.array([entropy(p, 1 - p) for p in mean])
    assert_allclose(acquisition.entropy(SCORES), whole, atol=1e-5)
    found = acquisition.bald(SCORES)
    assert_allclose(found, whole - each.mean(0), atol=1e-5)
    assert_allclose(found[1], math.log(2), atol=1e-4)  # sure of opposites: one bit
    assert_allclose(found[2], 0.0, atol=1e-6)  # both find it even: nothing to learn of the models


def test_an_even_pair_has_the_highest_entropy_and_the_lowest_variance():
    assert int(acquisition.top(acquisition.entropy(SCORES), 2)[0]) in (1, 2)
    assert int(acquisition.top(-acquisition.variance(SCORES), 4)[-1]) == 1


@pytest.mark.parametrize("measure", ["variance", "bald", "entropy"])
def test_measures_ignore_a_models_origin_and_the_order_of_texts(measure):
    fn = getattr(acquisition, measure)
    scores = jax.random.normal(jax.random.key(0), (3, 5, 4))
    moved = scores + jnp.array([1.0, -2.0, 30.0])[:, None, None]
    assert_allclose(fn(moved), fn(scores), atol=1e-5)
    assert_allclose(fn(scores[:, :, ::-1]), fn(scores), atol=1e-6)


def test_sure_models_give_finite_numbers():
    sure = jnp.array([[[1e4, -1e4]], [[-1e4, 1e4]]])
    assert_allclose(acquisition.bald(sure), [math.log(2)], rtol=1e-6)
    assert_allclose(acquisition.variance(sure), [0.25])
