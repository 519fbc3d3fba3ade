import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import masked

MASK = jnp.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], bool)
X = jnp.arange(15.0).reshape(3, 5) ** 1.5
KEPT = np.asarray(X)[np.asarray(MASK)]


def test_sum_mean_and_biased_variance_are_those_of_the_kept_numbers():
    assert_allclose(masked.sum(X, MASK), KEPT.sum(), rtol=1e-6)
    assert_allclose(masked.mean(X, MASK), KEPT.mean(), rtol=1e-6)
    assert_allclose(masked.var(X, MASK), KEPT.var(), rtol=1e-6)


def test_along_an_axis_every_row_has_its_own_and_a_row_of_nothing_has_0():
    x, rows = np.asarray(X), [np.flatnonzero(m) for m in np.asarray(MASK)]
    assert_allclose(masked.sum(X, MASK, axis=1), [x[i, r].sum() for i, r in enumerate(rows)])
    assert_allclose(masked.mean(X, MASK, axis=1), [x[0, rows[0]].mean(), 0.0, x[2, rows[2]].mean()])
    expected = [x[0, rows[0]].var(), 0.0, x[2, rows[2]].var()]
    assert_allclose(masked.var(X, MASK, axis=1), expected, rtol=1e-5)


def test_whitened_numbers_have_mean_0_and_variance_1():
    white = np.asarray(masked.whiten(X, MASK))
    assert_allclose(white[np.asarray(MASK)], (KEPT - KEPT.mean()) / KEPT.std(), rtol=1e-5)
    assert_array_equal(white[~np.asarray(MASK)], 0.0)


def test_whitening_without_shift_keeps_the_mean():
    white = np.asarray(masked.whiten(X, MASK, shift_mean=False))[np.asarray(MASK)]
    assert_allclose(white, (KEPT - KEPT.mean()) / KEPT.std() + KEPT.mean(), rtol=1e-5)


def test_whitening_adds_1e_8_to_the_variance():
    x = jnp.array([1.0, -1.0]) * 1e-4
    assert_allclose(masked.whiten(x, x != 0), [1 / np.sqrt(2), -1 / np.sqrt(2)], rtol=1e-5)
    equal = masked.whiten(jnp.full((2, 2), 0.7), jnp.ones((2, 2), bool))
    assert_allclose(equal, 0.0, atol=1e-3)


def test_the_last_masked_token_not_the_last_column():
    assert_array_equal(masked.last_index(MASK), [3, 0, 4])
    assert_array_equal(masked.last(X, MASK), [X[0, 3], 0.0, X[2, 4]])
    assert_array_equal(np.argwhere(masked.is_last(MASK)), [[0, 3], [2, 4]])
    groups = jnp.stack([MASK, MASK[::-1]], 1)
    assert_array_equal(masked.last_index(groups), [[3, 4], [0, 0], [4, 3]])


def test_a_score_lands_on_the_last_masked_token_and_can_be_read_back():
    score = jnp.array([0.7, 5.0, -1.0])
    landed = masked.at_last(score, MASK)
    assert_array_equal(landed, np.float32([[0, 0, 0, 0.7, 0], [0] * 5, [0, 0, 0, 0, -1.0]]))
    assert_array_equal(masked.last(landed, MASK), [np.float32(0.7), 0.0, -1.0])


FUNCTIONS = {
    "select": masked.select,
    "sum": masked.sum,
    "mean": masked.mean,
    "var": masked.var,
    "var of rows": lambda x, mask: masked.var(x, mask, axis=1),
    "whiten": masked.whiten,
    "last": masked.last,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_nan_touches_neither_value_nor_gradient_of(name):
    fn = FUNCTIONS[name]
    spoilt = jnp.where(MASK, X, jnp.nan)
    assert_array_equal(fn(spoilt, MASK), fn(X, MASK))
    gradient = jax.grad(lambda x: jnp.sum(fn(x, MASK) ** 3))
    assert_allclose(gradient(spoilt), gradient(X), rtol=1e-6)
    assert_array_equal(gradient(spoilt)[~MASK], 0.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_empty_mask_gives_0_and_no_nan_in(name):
    nothing = jnp.zeros_like(MASK)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(FUNCTIONS[name](x, nothing)))(X)
    assert value == 0.0
    assert_array_equal(grad, 0.0)


def test_sums_are_in_float32_whatever_comes_in():
    ones = jnp.ones((1, 5000), jnp.bfloat16)  # bfloat16 cannot count beyond 256
    total = masked.sum(ones, jnp.ones(ones.shape, bool))
    assert total.dtype == jnp.float32
    assert total == 5000.0
    counts = jnp.arange(5)[None]
    assert masked.mean(counts, counts > 2) == 3.5
    assert masked.last(counts, counts > 2).dtype == jnp.float32
