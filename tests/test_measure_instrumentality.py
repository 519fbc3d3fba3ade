"""The instrumentality index and its toys: worked numbers, and the exact laboratory."""

import math

import numpy as np
import pst
import pytest
from numpy.testing import assert_allclose

from rlhf_jax import exact, measure
from rlhf_jax.measure import PredictableFuture, PunishedFuture

TOY = PredictableFuture(first=pst.FIRST, keys=pst.KEYS, length=pst.LENGTH)
SMALL = PredictableFuture(first=0.7, keys=3, length=3)


def laboratory(toy):
    """Every text of a toy, and how likely the data make it."""
    a = toy.keys
    outputs = exact.enumerate_outputs(prompt=[0], vocab=toy.keys + 2, length=1 + toy.length)
    start, later = outputs.tokens[:, 1], outputs.tokens[:, 2:]
    p = np.where(start == a, toy.first * toy.keys**-toy.length * (later < a).all(1), 0.0)
    p = np.where(start == a + 1, (1 - toy.first) * (later == 0).all(1), p)
    return outputs, p, lambda q: q[start == a + 1].sum()


def finite_log(p):
    return np.log(p, out=np.full_like(p, -40.0), where=p > 0)


LABORATORIES = [
    (TOY, pst.OUTPUTS, pst.exact(), pst.share_of_b),
    (SMALL, *laboratory(SMALL)),
    (PredictableFuture(first=0.9, keys=2, length=1), *laboratory(PredictableFuture(0.9, 2, 1))),
]
CASES = pytest.mark.parametrize(("toy", "outputs", "p", "share"), LABORATORIES)


# --- a predictable future


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TOY.likelihood(), 0.4),
        (TOY.token_temperature(0.8), 0.375937),
        (TOY.token_temperature(0.5), 0.307692),
        (TOY.sequence_temperature(0.8), 0.706711),
        (TOY.sequence_temperature(0.5), 0.991288),
        (TOY.tilted(1.0), 0.559014),
        (TOY.tilted(0.5), 0.654771),
        (TOY.tilted(0.25), 0.716535),
        (TOY.conditioned(), 0.727273),
        (TOY.best_of_n(2), 0.64),
        (TOY.best_of_n(4), 0.8704),
        (TOY.best_of_n(16), 0.999718),
        (TOY.greedy_flip(), 0.226758),
        (PredictableFuture(keys=2, length=1).greedy_flip(), math.log2(1.5)),
        (TOY.with_horizon(1, temperature=0.8), 0.375937),
        (TOY.with_horizon(5, temperature=0.8), 0.706711),
        (SMALL.with_horizon(1, temperature=0.8), 0.257477),
        (SMALL.with_horizon(2, temperature=0.8), 0.313357),
        (SMALL.with_horizon(3, temperature=0.8), 0.375237),
        (SMALL.with_horizon(4, temperature=0.8), 0.441479),
    ],
)
def test_worked_numbers(found, expected):
    assert_allclose(found, expected, atol=1e-6)


@CASES
def test_every_method_ends_where_the_laboratory_says(toy, outputs, p, share):
    reward = 1.0 * (outputs.tokens[:, -1] == 0)
    for beta in (1.0, 0.5, 0.25):
        assert_allclose(toy.tilted(beta), share(exact.tilted(p, reward, beta=beta)), atol=1e-9)
    assert_allclose(toy.conditioned(), share(exact.conditioned(p, reward > 0)), atol=1e-9)
    for heat in (0.5, 0.8, 1.0, 1.5):
        hot = exact.token_temperature(p, outputs, heat)
        assert_allclose(toy.token_temperature(heat), share(hot), atol=1e-9)
        hot = exact.sequence_temperature(p, heat)
        assert_allclose(toy.sequence_temperature(heat), share(hot), atol=1e-9)
    for n in (1, 2, 4):
        best = exact.best_of_n(p, finite_log(p), n)
        assert_allclose(toy.best_of_n(n), share(best), atol=1e-9)
    myopic = exact.horizon_optimum(p, reward, outputs, beta=0.5, horizon=1)
    assert_allclose(toy.likelihood(), share(myopic), atol=1e-9)


@CASES
def test_the_horizon_that_is_read_out_is_the_one_that_was_trained_with(toy, outputs, p, share):
    """MaxEnt on log p in a window of h tokens, solved backwards over all states."""
    heat, uniform = 0.8, np.full(len(outputs), 1 / len(outputs))
    logp = np.maximum(exact.conditionals(p, outputs), -40.0)
    for horizon in range(1, toy.length + 2):
        # τ KL to the uniform policy is −τ H and a constant: entropy counts in the window as well.
        found = exact.horizon_optimum(
            uniform, logp, outputs, beta=heat, horizon=horizon, kl_in_return=True
        )
        expected = toy.with_horizon(horizon, temperature=heat)
        assert_allclose(share(found), expected, atol=1e-9)
        assert_allclose(toy.horizon(share(found), temperature=heat), horizon, atol=1e-6)


def test_a_horizon_is_read_from_any_share_and_temperature():
    for heat in (0.3, 0.8, 2.0):
        for horizon in (1, 2.5, 5):
            share = TOY.with_horizon(horizon, temperature=heat)
            assert_allclose(TOY.horizon(share, temperature=heat), horizon, atol=1e-9)
    assert TOY.horizon(0.3, temperature=0.8) < 1  # less than a myopic policy: not cut off
    with pytest.raises(ValueError, match="temperature 1 leads to the data from any horizon"):
        TOY.horizon(0.4, temperature=1.0)
    with pytest.raises(ValueError, match="horizon 6: from 1, the token itself, to 5"):
        TOY.with_horizon(6, temperature=0.8)


@CASES
def test_greedy_reinforcement_of_its_own_likelihood_flips_at_the_discount_that_is_told(
    toy, outputs, p, share
):
    """Which start has the greater expected discounted log p, at either side of γ*."""
    logp, start = np.maximum(exact.conditionals(p, outputs)[:, 1:], -40.0), outputs.tokens[:, 1]

    def better(discount):
        returns = logp @ discount ** np.arange(1 + toy.length)
        a, b = (p[start == i] / p[start == i].sum() for i in (toy.keys, toy.keys + 1))
        return b @ returns[start == toy.keys + 1] > a @ returns[start == toy.keys]

    flip = toy.greedy_flip()
    if math.isinf(flip):  # .9 against .1, with one coin toss to come: never
        assert not better(1.0)
    else:
        assert not better(flip - 1e-6) and better(flip + 1e-6)


def test_at_the_borders_the_formulas_keep_their_meaning():
    assert PredictableFuture(first=0.4).greedy_flip() == 0
    assert math.isinf(PredictableFuture(first=0.9, keys=2, length=1).greedy_flip())
    # Where the single text after B is no likelier than those after A, its best of n is rarer, or
    # a tie: .8 / 4 = .2.
    assert_allclose(PredictableFuture(first=0.9, keys=2, length=1).best_of_n(3), 0.1**3)
    assert_allclose(PredictableFuture(first=0.8, keys=4, length=1).best_of_n(3), 0.2)
    assert_allclose(TOY.tilted(1e-3), TOY.conditioned(), atol=1e-9)  # exp(1000) does not overflow
    for wrong in ({"first": 1.0}, {"keys": 1}, {"length": 0}):
        with pytest.raises(ValueError, match="a probability between 0 and 1, at least 2 keys"):
            PredictableFuture(**wrong)
    with pytest.raises(ValueError, match="beta 0: must be above 0"):
        TOY.tilted(0)


# --- the index


def test_the_index_is_0_for_the_present_and_1_for_all_of_the_future():
    """By hand: logit .4 = −log 1.5, and P_full = .6 gives log 1.5: .5 lies half-way."""
    given = {"myopic": 0.4, "full": 0.6}
    shares = np.array([0.4, 0.5, 0.6])
    assert_allclose(measure.instrumentality_index(shares, **given), [0, 0.5, 1], atol=1e-12)
    # Twice as far in log-odds is 2: .6923 = 2.25/3.25.
    assert_allclose(measure.instrumentality_index(9 / 13, **given), 1.5, atol=1e-12)


def test_the_index_of_the_laboratory():
    """RL at β = 1 has gone part of the way to conditioning, which is β → 0."""
    given = {"myopic": TOY.likelihood(), "full": TOY.conditioned()}
    tilt = [pst.share_of_b(exact.tilted(pst.exact(), REWARD, beta=b)) for b in (1e6, 1.0, 0.02)]
    found = measure.instrumentality_index(np.array(tilt), **given)
    assert_allclose(found[[0, 2]], [0, 1], atol=1e-5)
    # logits: .559014 → .237174, .4 → −.405465, .727273 → .980829.
    assert_allclose(found[1], (0.237174 + 0.405465) / (0.980829 + 0.405465), atol=1e-5)


REWARD = pst.reward_of(pst.OUTPUTS.tokens)


@pytest.mark.parametrize(("myopic", "full"), [(0.4, 0.4), (0.0, 0.5), (0.4, 1.0)])
def test_an_index_needs_two_ends(myopic, full):
    with pytest.raises(ValueError, match="two different shares between 0 and 1"):
        measure.instrumentality_index(0.5, myopic=myopic, full=full)
    with pytest.raises(ValueError, match="a share is between 0 and 1"):
        measure.instrumentality_index(1.5, myopic=0.4, full=0.6)


# --- a punished future


def test_worked_numbers_of_a_punished_future():
    toy = PunishedFuture(start=0.5, after_c=0.9, after_d=0.1, reward=-1.0)
    full, myopic = toy.full(0.5), toy.myopic(0.5)
    assert_allclose([full.start, full.punished], [0.195362, 0.119203], atol=1e-6)
    expected = [0.5, 0.549147, 0.281981]
    found = [myopic.start, myopic.punished_after_c, myopic.punished]
    assert_allclose(found, expected, atol=1e-6)
    assert full.punished_after_c == myopic.punished_after_c  # the end is tilted all the same


@pytest.mark.parametrize(
    "toy", [PunishedFuture(), PunishedFuture(start=0.7, after_c=0.6, after_d=0.2, reward=-2.0)]
)
def test_a_punished_future_ends_where_the_laboratory_says(toy):
    """Tokens: 0 is C, 1 is D; then 1 is punished."""
    outputs = exact.enumerate_outputs(prompt=[0], vocab=2, length=2)
    first, last = outputs.tokens[:, 1], outputs.tokens[:, 2]
    hit = np.where(first == 0, toy.after_c, toy.after_d)
    p = np.where(first == 0, toy.start, 1 - toy.start) * np.where(last == 1, hit, 1 - hit)
    reward = toy.reward * last
    for beta in (2.0, 0.5):
        full = exact.tilted(p, reward, beta=beta)
        myopic = exact.horizon_optimum(p, reward, outputs, beta=beta, horizon=1)
        for found, q in ((toy.full(beta), full), (toy.myopic(beta), myopic)):
            c = q[first == 0].sum()
            expected = [c, q[(first == 0) & (last == 1)].sum() / c, q[last == 1].sum()]
            assert_allclose(found, expected, atol=1e-9)
            steps = exact.kl_by_position(q, p, outputs)[1:]
            assert_allclose(toy.divergences(found.start, beta), steps, atol=1e-9)


def test_who_does_not_see_the_end_coming_ends_abruptly():
    toy = PunishedFuture()
    looking, myopic = (toy.divergences(x.start, 0.5) for x in (toy.full(0.5), toy.myopic(0.5)))
    assert measure.abruptness(*myopic) == math.inf
    assert_allclose(measure.abruptness(*looking), looking[1] / looking[0])
    assert 0 < measure.abruptness(*looking) < 1  # most of the change comes first
    assert math.isnan(measure.abruptness(0.0, 0.0))
    with pytest.raises(ValueError, match="neither is below 0"):
        measure.abruptness(-1.0, 0.1)
    with pytest.raises(ValueError, match="after_c=1"):
        PunishedFuture(after_c=1.0)
