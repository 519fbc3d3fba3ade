"""One token: log-probabilities at a temperature, the filter, and the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.sampling import Sampling, draw, filtered, log_probabilities


def test_log_probabilities_are_a_log_softmax_at_the_rows_own_temperature():
    logits = np.random.default_rng(0).normal(size=(3, 7)) * 4
    heat = np.array([0.5, 1.0, 2.0])
    x = logits / heat[:, None]
    expected = x - np.log(np.exp(x).sum(1, keepdims=True))
    found = log_probabilities(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(heat, jnp.float32))
    assert found.dtype == jnp.float32
    found = log_probabilities(jnp.asarray(logits, jnp.float32), jnp.asarray(heat, jnp.float32))
    assert_allclose(found, expected, atol=1e-5)


def kept(logp, settings):
    """What a filter keeps, token by token in float64; None where rounding could decide."""
    p = np.exp(np.asarray(logp, np.float64))
    for token in settings.banned:
        if token >= 0:
            p[token] = 0
    order = [i for i in np.argsort(-p, kind="stable") if p[i] > 0]
    if settings.top_k:
        order = [i for i in order if p[i] >= p[order[min(settings.top_k, len(order)) - 1]]]
    mass = p[order].sum()
    least, total = None, 0.0
    for i in order[: settings.top_k or None]:
        if least is not None and settings.top_p < 1:
            if abs(total - settings.top_p) < 1e-5:
                return None
            if total > settings.top_p:
                break
        least, total = p[i], total + p[i] / mass
    return {i for i in order if p[i] >= least}


def test_the_filter_keeps_what_float64_arithmetic_keeps():
    run = jax.jit(filtered)
    rng = np.random.default_rng(1)
    decided = 0
    for _ in range(200):
        settings = Sampling(
            top_k=int(rng.integers(0, 60)),
            top_p=float(rng.choice([rng.random(), 1.0, 0.0])),
            banned=tuple(int(x) for x in rng.integers(-1, 50, 2)),
        )
        logits = rng.normal(size=(1, 50)) * rng.uniform(0.1, 5)
        if rng.random() < 0.3:
            logits = np.round(logits)  # ties
        logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
        found = np.asarray(run(logp, settings))[0]
        expected = kept(logp[0], settings)
        if expected is not None:
            decided += 1
            assert set(np.flatnonzero(found > -np.inf)) == expected, settings
        assert_allclose(np.exp(found.astype(np.float64)).sum(), 1, rtol=1e-5)
        support = np.flatnonzero(found > -np.inf)
        gap = found[support] - np.asarray(logp[0])[support]
        assert_allclose(gap, gap[0], atol=1e-4)  # renormalised, nothing else
    assert decided > 180


def test_top_k_alone_keeps_a_long_tail():
    """top_p = 1 means all, also where a float32 sum of probabilities has long reached 1."""
    logp = jax.nn.log_softmax(-0.05 * jnp.arange(600.0))[None]
    found = filtered(logp, Sampling(top_k=590))
    assert int((found > -jnp.inf).sum()) == 590


def test_draws_have_the_distributions_frequencies():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=50) * 1.5
    logits[rng.permutation(50)[:15]] = -np.inf
    logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    n = 40_000
    uniform = jnp.asarray(rng.random(n), jnp.float32)
    tokens = np.asarray(jax.jit(draw)(jnp.broadcast_to(logp, (n, 50)), uniform))
    p = np.exp(np.asarray(logp, np.float64))
    count = np.bincount(tokens, minlength=50)
    possible = p > 0
    assert count[~possible].sum() == 0
    chi_square = ((count - n * p)[possible] ** 2 / (n * p[possible])).sum()
    freedom = possible.sum() - 1  # 34; mean 34, deviation 8.2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom), chi_square


@pytest.mark.parametrize("vocab", [1, 2, 7, 50, 257])
def test_a_token_of_probability_zero_is_never_drawn_not_at_the_ends_either(vocab):
    rng = np.random.default_rng(vocab)
    run = jax.jit(draw)
    ends = np.array([0.0, 1e-30, 0.5, 1 - 2.0**-24, 1.0], np.float32)
    for _ in range(20):
        logits = rng.normal(size=(5, vocab)) * 3
        logits[rng.random((5, vocab)) < 0.7] = -np.inf
        logits[np.arange(5), rng.integers(0, vocab, 5)] = 0
        logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
        tokens = np.asarray(run(logp, ends))
        assert (logits[np.arange(5), tokens] > -np.inf).all()


def test_rounding_in_a_long_cumulative_sum_draws_no_impossible_token():
    """With 400 blocks the sum over them rises, by rounding, at blocks whose mass is exactly 0."""
    width, rows = 400, 64
    rng = np.random.default_rng(0)
    block = rng.exponential(size=(rows, width)).astype(np.float32) ** 3
    block[rng.random((rows, width)) < 0.5] = 0
    block /= block.sum(1, keepdims=True)
    logp = np.full((rows, width, width), -np.inf, np.float32)
    logp[:, :, 7] = np.where(block > 0, np.log(np.maximum(block, 1e-30)), -np.inf)
    logp = jnp.asarray(logp.reshape(rows, -1))
    mass = jnp.exp(logp).reshape(rows, width, width).sum(-1)
    total, mass = np.asarray(jnp.cumsum(mass, -1)), np.asarray(mass)
    rises = (np.diff(total, axis=1) > 0) & (mass[:, 1:] == 0)
    row, at = np.nonzero(rises)
    row, first = np.unique(row, return_index=True)
    at = at[first]
    assert len(row) > 10
    target = total[row, at] / mass.sum(1, dtype=np.float32)[row]
    for nudge in (-6e-8, 0.0, 6e-8):
        uniform = np.zeros(rows, np.float32)
        uniform[row] = target + nudge
        tokens = jax.jit(draw)(logp, uniform)
        assert (jnp.take_along_axis(logp, tokens[:, None], axis=1) > -jnp.inf).all()
