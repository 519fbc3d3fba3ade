"""Drift and its laws, against exact enumeration and simulated policies; where gradients go."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose
from scipy.special import log_softmax, rel_entr, softmax

from rlhf_jax import measure
from rlhf_jax.models.transformer import Transformer

RNG = np.random.default_rng(0)
BEFORE, AFTER = RNG.normal(size=(2, 6, 5))
LABEL = np.array([0, 1, 1, 0, 1, 0])


# --- what has moved


def test_the_kl_of_a_row_is_that_of_scipy_from_logits_or_log_probabilities():
    p, q = softmax(BEFORE, axis=1), softmax(AFTER, axis=1)
    expected = rel_entr(p, q).sum(axis=1)
    assert_allclose(measure.row_kl(BEFORE, AFTER), expected, atol=1e-12)
    assert_allclose(measure.row_kl(np.log(p), np.log(q) + 3), expected, atol=1e-12)
    # Numbers worked by hand: coins (.5, .5) and (.25, .75).
    coins = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert_allclose(measure.row_kl(*coins), np.log(2 / np.sqrt(3)), atol=1e-12)


def test_a_tiny_drift_keeps_its_digits():
    """½ Var_p(δ) to second order: 1e-16 nats, where a difference of logarithms is all rounding."""
    step = 1e-8 * RNG.normal(size=(6, 5))
    p = softmax(BEFORE, axis=1)
    spread = (p * step**2).sum(1) - (p * step).sum(1) ** 2
    assert_allclose(measure.row_kl(BEFORE, BEFORE + step), spread / 2, rtol=0.2)


def test_impossible_tokens_count_as_they_should():
    never = np.array([[0.0, 0.0, -np.inf]]), np.log([[0.25, 0.25, 0.5]])
    assert_allclose(measure.row_kl(*never), np.log(2), atol=1e-12)
    assert np.isinf(measure.row_kl(np.zeros((1, 2)), np.array([[0.0, -np.inf]])))
    gone = np.array([[0.0, 0.0, -np.inf]])
    assert_allclose(measure.row_kl(gone, gone), 0, atol=1e-12)
    with pytest.raises(ValueError, match="are of the same rows"):
        measure.row_kl(BEFORE, AFTER[:, :4])


def test_drift_is_split_by_label():
    kl = measure.row_kl(BEFORE, AFTER)
    found = measure.drift_by_label(BEFORE, AFTER, LABEL)
    assert_allclose([found[0], found[1]], [kl[[0, 3, 5]].mean(), kl[[1, 2, 4]].mean()])
    named = measure.drift_by_label(BEFORE, AFTER, np.array(list("abbaba")))
    assert named == {"a": found[0], "b": found[1]}
    with pytest.raises(ValueError, match="one label for each of 6 rows"):
        measure.drift_by_label(BEFORE, AFTER, LABEL[:5])


def test_the_shift_is_what_one_side_gains_over_the_other():
    """By hand: label 1 gains .2 of its own token, label 0 loses .1 of its own: .3."""
    before = np.log([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2]])
    after = np.log([[0.6, 0.2, 0.2], [0.05, 0.9, 0.05]])
    own = np.array([0, 1])
    assert_allclose(measure.signed_shift(before, after, np.array([0, 1]), own=own), 0.3)
    assert_allclose(measure.signed_shift(before, after, np.array([1, 0]), own=own), -0.3)
    # One token for all rows: .9 − .7 less .2 − .2.
    assert_allclose(measure.signed_shift(before, after, np.array([0, 1]), own=1), 0.2)
    with pytest.raises(ValueError, match=r"between two labels; there are \[0\]"):
        measure.signed_shift(before, after, np.zeros(2, int), own=0)


# --- how it grows


def test_noise_grows_with_slope_1_and_a_trend_with_slope_2():
    steps = np.array([10, 20, 40, 80])
    found = measure.growth_exponent(steps, np.stack([3e-5 * steps, 1e-6 * steps**2]))
    assert_allclose(found, [1, 2], atol=1e-12)
    assert_allclose(measure.growth_exponent(steps, 2.0 * steps**1.5), 1.5)
    log = np.log(steps), np.log([1.0, 3, 2, 7])
    assert_allclose(measure.growth_exponent(steps, [1, 3, 2, 7]), np.polyfit(*log, 1)[0])
    for wrong, message in (
        ((steps, [0, 1, 2, 3]), "has no logarithm"),
        ((steps, [1, 2, 3]), r"drift \[..., m\] after m different steps"),
        (([5, 5], [1, 2]), "at least 2"),
        (([0, 5], [1, 2]), "leave out those before training"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.growth_exponent(*wrong)


def test_the_crossover_is_where_the_trend_has_caught_up_with_the_noise():
    steps = np.array([5.0, 10, 20, 40])
    found = measure.measured_crossover(steps, np.stack([2 * steps + 0.1 * steps**2, 2 * steps]))
    assert_allclose(found[0], 20)
    assert found[1] > 1e10  # no trend: inf, or what rounding leaves
    assert measure.measured_crossover(steps, 3 * steps - 0.01 * steps**2) == np.inf
    assert measure.measured_crossover(steps, steps**2) < 1e-9


TABLE = {"rate": 0.5, "rows": 256, "outcomes": 4}


def expected_kl(*, rate, rows, win):
    """Exact E[KL(uniform‖π)] after one step, over all batches of `rows` tokens with rewards."""
    k, total = len(win), 0.0
    outcomes = [(y, r) for y in range(k) for r in (0, 1)]
    chance = [(win[y] if r else 1 - win[y]) / k for y, r in outcomes]
    for batch in product(range(2 * k), repeat=rows):
        theta = np.zeros(k)
        for i in batch:
            y, r = outcomes[i]
            theta += rate / rows * (r - 0.5) * (np.eye(k)[y] - 1 / k)
        total += np.prod([chance[i] for i in batch]) * (-np.log(k) - log_softmax(theta).mean())
    return total


@pytest.mark.parametrize(("outcomes", "rows"), [(2, 1), (3, 2), (4, 3)])
def test_noise_moves_a_policy_as_far_as_enumeration_says(outcomes, rows):
    """One step, all batches; to second order in the rate, which is small here."""
    found = expected_kl(rate=1e-2, rows=rows, win=np.full(outcomes, 0.5))
    given = {"rate": 1e-2, "rows": rows, "outcomes": outcomes, "second_moment": 0.25}
    assert_allclose(measure.null_drift(1, **given), found, rtol=1e-4)


def test_a_correlation_adds_what_enumeration_says():
    win = np.array([0.8, 0.8, 0.2, 0.2])  # ρ = .6
    found = expected_kl(rate=1e-2, rows=3, win=win)
    noise = measure.null_drift(1, rate=1e-2, rows=3, outcomes=4, second_moment=0.25)
    trend = measure.correlated_drift(1, rate=1e-2, outcomes=4, correlation=0.6)
    # Of the noise, the mean is no part: (1 − ρ²/(K − 1)) of it, here .88.
    assert_allclose(noise * (1 - 0.36 / 3) + trend, found, rtol=1e-3)


def simulated(runs, steps, *, correlation, rate=0.5, rows=256, seed=0):
    """KL(uniform‖π) of softmax tables after each number of steps, trained by REINFORCE and SGD."""
    rng, win = np.random.default_rng(seed), (1 + correlation * np.array([1, 1, -1, -1])) / 2
    theta, found = np.zeros((runs, 4)), []
    for step in range(1, max(steps) + 1):
        p = np.exp(theta)
        p /= p.sum(1, keepdims=True)
        drawn = rng.multinomial(rows, p)
        credit = rng.binomial(drawn, win) - 0.5 * drawn
        theta += rate / rows * (credit - p * credit.sum(1, keepdims=True))
        if step in steps:
            found.append(-np.log(4) - log_softmax(theta, axis=1).mean(1))
    return np.stack(found, axis=1)


def test_simulated_drift_is_what_was_worked_out():
    """Pure noise: .00458 within Monte Carlo error; with a correlation ρ = .025: .05341 less 6 %.

    The rest is of higher order: as a policy moves, the tokens that lose are drawn less often.
    """
    noise = measure.null_drift(200, **TABLE, second_moment=0.25)
    trend = measure.correlated_drift(200, rate=0.5, outcomes=4, correlation=0.025)
    assert_allclose([noise, noise + trend], [0.00458, 0.05341], atol=5e-6)
    null, found = (simulated(4000, [200], correlation=rho)[:, 0] for rho in (0.0, 0.025))
    errors = [x.std() / np.sqrt(len(x)) for x in (null, found)]
    assert abs(null.mean() - noise) < 3 * errors[0] < 2e-4
    assert abs(null.mean() - 0.00477) < 3 * np.hypot(errors[0], 1e-4)
    assert abs(found.mean() - 0.05089) < 3 * np.hypot(errors[1], 4e-4)
    assert 0.9 < found.mean() / (noise + trend) < 1
    # A third as strong, where higher orders are small: within Monte Carlo error.
    weak = simulated(4000, [200], correlation=0.008)[:, 0]
    trend = measure.correlated_drift(200, rate=0.5, outcomes=4, correlation=0.008)
    assert abs(weak.mean() - noise - trend) < 3 * weak.std() / np.sqrt(4000) < 4e-4


def test_the_crossover_of_a_simulation_is_the_one_that_is_told():
    """ρ = .05: (K − 1)/ρ² = 1200 episodes, 37.5 steps of 32 rows."""
    assert_allclose(measure.crossover(outcomes=4, correlation=0.05), 1200)
    given = {"rate": 0.1, "outcomes": 4}
    noise = measure.null_drift(37.5, **given, rows=32, second_moment=0.25)
    assert_allclose(noise, measure.correlated_drift(37.5, **given, correlation=0.05))
    assert measure.crossover(outcomes=4, correlation=0.0) == np.inf
    steps = [10, 20, 40, 80]
    curve = simulated(4000, steps, correlation=0.05, rate=0.1, rows=32)
    at = measure.measured_crossover(np.array(steps), curve.mean(axis=0))
    assert abs(32 * at / 1200 - 1) < 0.15
    slopes = measure.growth_exponent(np.array(steps), curve)
    assert slopes.shape == (4000,)
    mean = measure.growth_exponent(np.array(steps), curve.mean(axis=0))
    assert 1.2 < mean < 1.8  # between noise and trend


def test_under_a_kl_penalty_drift_decays_with_the_half_life_that_is_told():
    """Exact gradient steps of −β KL(π‖uniform) on a softmax table: η = .5, β = .1, K = 4."""
    given = {"rate": 0.5, "beta": 0.1, "outcomes": 4}
    assert_allclose(measure.contraction(**given), 0.9875)
    assert_allclose(measure.half_life(**given), 55.1, atol=0.01)
    theta = 1e-3 * np.array([1.0, -0.5, 0.2, -0.7])
    start, uniform = theta.copy(), np.zeros((1, 4))
    for _ in range(55):
        logp = log_softmax(theta)
        gain = -0.1 * (logp + np.log(4))
        theta = theta + 0.5 * np.exp(logp) * (gain - np.exp(logp) @ gain)
    assert_allclose(theta / start, 0.9875**55, rtol=2e-3)
    left = measure.row_kl(theta[None], uniform) / measure.row_kl(start[None], uniform)
    assert_allclose(left, 0.25, rtol=5e-3)  # second order: a quarter at half of the logits
    assert measure.half_life(rate=0.5, beta=0.0, outcomes=4) == np.inf
    with pytest.raises(ValueError, match=r"a step leaves -0.25 of the drift"):
        measure.half_life(rate=5.0, beta=1.0, outcomes=4)


# --- where the gradient goes

MODEL = Transformer(vocab=32, width=16, layers=2, heads=2, kv_heads=1, mlp=24, side_mlp=8)
PARAMS = toys.weights(MODEL)
TOKENS, _ = toys.padding(3, 5, shortest=5)


def stacked(params):
    return toys.stacked(params, 2)


def test_shares_of_the_squared_gradient_norm_are_those_of_arithmetic():
    grads = {
        "embed": {"embedding": np.full((2, 2), 1.0)},  # 4
        "layers_0": {"side_up": {"kernel": np.full((3,), 2.0)}, "up": {"kernel": np.ones(4)}},
        "layers_1": {"side_down": {"kernel": np.full((2,), 2.0)}},  # 12 + 4, and 8
    }
    groups = {"side": "side_", "first": ["layers_0/", "never"]}
    found = measure.gradient_share(grads, groups)
    assert_allclose([found["side"], found["first"], found["rest"]], np.array([20, 4, 4]) / 28)
    with pytest.raises(ValueError, match=r"the patterns of \['value'\] match no parameter that"):
        measure.gradient_share(grads, groups | {"value": "value_head"})


def test_scanned_layers_have_the_same_shares_and_norms():
    grads = jax.tree.map(lambda x: x - 0.1, PARAMS)
    groups = {"side": "side_", "last": "layers_1"}
    found = measure.gradient_share(stacked(grads), groups)
    assert found == pytest.approx(measure.gradient_share(grads, groups))
    norms = measure.update_norms(stacked(PARAMS), stacked(grads))
    assert norms == pytest.approx(measure.update_norms(PARAMS, grads))
    assert set(norms) == {"embed", "layers_0", "layers_1", "final_norm"}


def test_the_norm_of_an_update_is_that_of_all_of_a_layers_weights():
    before = {"layers_0": {"a": np.array([3.0]), "b": np.array([4.0])}, "head": np.zeros(2)}
    after = {"layers_0": {"a": np.array([0.0]), "b": np.array([8.0])}, "head": np.zeros(2)}
    assert measure.update_norms(before, after) == {"layers_0": 5.0, "head": 0.0}
    relative = measure.update_norms(before, after, relative=True)
    assert relative == {"layers_0": 1.0, "head": 0.0}


def loss(model, params):
    """A function of all that a model says."""
    logp = measure.next_logp(params, TOKENS, model=model)
    return (logp[:, :-1, 3] ** 2).sum()


@jax.jit
def gradients(params):
    return measure.residual_gradients(
        lambda model: loss(model, params), model=MODEL, rows=3, tokens=5
    )


def test_gradients_by_the_stream_are_those_of_finite_differences():
    found = np.asarray(gradients(PARAMS), np.float64)
    assert found.shape == (2, 3, 5, 16)
    step = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)

    @jax.jit
    def moved(size):
        shifted = replace(MODEL, tap=lambda layer, h: h + size * jnp.asarray(step)[layer])
        return loss(shifted, PARAMS)

    difference = (moved(1e-2) - moved(-1e-2)) / 2e-2
    assert_allclose((found * step).sum(), difference, rtol=5e-3)
    # The last position says nothing that counts, so that no layer gets a gradient there.
    assert (found[:, :, -1] == 0).all() and (abs(found[:, :, :-1]).max(-1) > 0).all()


def test_scanned_layers_and_the_models_own_tap_have_their_gradients_too():
    own = replace(MODEL, scan=True, tap=lambda layer, h: jnp.where(layer == 1, 3.0 * h, h))

    @partial(jax.jit, static_argnames="model")
    def scanned(params, *, model):
        given = {"model": model, "rows": 3, "tokens": 5}
        return measure.residual_gradients(lambda m: loss(m, params), **given)

    found = scanned(stacked(PARAMS), model=replace(own, tap=None))
    assert_allclose(found, gradients(PARAMS), rtol=1e-3, atol=1e-4)
    # Through a tap that triples the last layer, before a norm that does not care.
    tapped = scanned(stacked(PARAMS), model=own)
    assert_allclose(3 * tapped[1], gradients(PARAMS)[1], rtol=1e-3, atol=1e-4)


def test_a_projection_is_the_part_along_a_direction():
    gradient = np.array([[3.0, 4.0], [3.0, -4.0]])
    found = measure.projection(gradient, np.array([1.0, 0.0]))
    assert found == measure.Projection(3.0, pytest.approx(18 / 50))
    found = measure.projection(gradient, np.array([0.0, 1.0]))
    assert found == measure.Projection(0.0, pytest.approx(32 / 50))
    assert np.isnan(measure.projection(np.zeros((2, 2)), np.array([1.0, 0.0])).share)
    with pytest.raises(ValueError, match=r"a direction has length 1; this one 2.000000"):
        measure.projection(gradient, np.array([2.0, 0.0]))


def test_a_gradient_that_teaches_a_feature_points_along_its_probe():
    """Logistic loss of a label by the stream's first axis; the probe finds that axis."""
    rng = np.random.default_rng(4)
    label = rng.integers(0, 2, 600)
    x = rng.normal(size=(600, 8))
    x[:, 0] += 3 * (label - 0.5)
    unit = measure.direction(measure.probe(x, label))
    gradient = np.zeros((600, 8))
    gradient[:, 0] = 1 / (1 + np.exp(-x[:, 0])) - label
    assert measure.projection(gradient, unit).share > 0.97
    assert measure.projection(rng.normal(size=(600, 8)), unit).share == pytest.approx(
        1 / 8, abs=0.03
    )
