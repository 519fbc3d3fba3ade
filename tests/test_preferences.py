"""Preferences without a reward model: hand cases, gradients at the start, and where each ends."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loop import probabilities, trained
from numpy.testing import assert_allclose, assert_array_equal
from toy_chain import MODEL, REFERENCE, REWARD, START, TEXTS, reference_params

from rlhf_jax import exact, masked
from rlhf_jax.config import Learner
from rlhf_jax.objectives import dpo, ipo, kto, kto_reference, mismatched, orpo, reward_model
from rlhf_jax.optimizer import adam
from rlhf_jax.types import Judged, Labeled, Pairs, Scores

sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
softplus = lambda x: np.logaddexp(0, np.asarray(x, np.float64))  # noqa: E731


def texts_of(*logp):
    """Arrays [..., t] of texts whose first token is given; nan ends a text early."""
    logp = np.insert(np.asarray(logp, np.float32), 0, np.nan, axis=-1)
    mask = ~np.isnan(logp)
    segments = mask.copy()
    segments[..., 0] = True
    return jnp.asarray(logp), {
        "tokens": jnp.zeros(mask.shape, jnp.int32),
        "mask": jnp.asarray(mask),
        "segments": jnp.asarray(segments, jnp.int32),
    }


def scored(logp, reference):
    return Scores(logp=logp, others={"reference": Scores(logp=reference)})


NAN = math.nan
# Two pairs of two texts; the policy gained 0.5, lost 1.5; gained 0.3 (in one token), gained 1.
REFERENCE_LOGP, ARRAYS = texts_of([[-1.0, -2.0], [-1.0, -1.0]], [[-0.7, NAN], [-3.0, -1.0]])
LOGP = REFERENCE_LOGP + jnp.array(
    [[[0.0, 0.5, 0.0], [0.0, -1.0, -0.5]], [[0, 0.3, 0], [0, 1.0, 0]]]
)
PAIRS = Pairs(**ARRAYS)
MARGIN = np.array([2.0, -0.7])


def total(fn, batch, reference=REFERENCE_LOGP):
    """Σ loss · weight as a function of logp, compiled with its gradient."""

    def value(logp):
        found = fn(scored(logp, reference), batch)
        found = found if isinstance(found, dict) else {"": found}
        terms = found.values()
        return sum(t.scale * masked.sum(t.loss * t.weight, t.weight != 0) for t in terms), found

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def test_dpo_by_hand():
    (_, terms), _ = total(partial(dpo, beta=0.5), PAIRS)(LOGP)
    assert_allclose(terms[""].loss, softplus(-0.5 * MARGIN), rtol=1e-6)
    metrics = terms[""].metrics
    assert_allclose(metrics["margin"], 0.5 * MARGIN, rtol=1e-6)
    assert_allclose(metrics["chosen"], [0.25, 0.15], rtol=1e-5)
    assert_allclose(metrics["rejected"], [-0.75, 0.5], rtol=1e-5)
    assert_array_equal(metrics["accuracy"], [1.0, 0.0])


def test_conservative_dpo_is_a_mixture_of_both_labels():
    (_, terms), _ = total(partial(dpo, beta=0.5, smoothing=0.2), PAIRS)(LOGP)
    expected = 0.8 * softplus(-0.5 * MARGIN) + 0.2 * softplus(0.5 * MARGIN)
    assert_allclose(terms[""].loss, expected, rtol=1e-6)


def test_at_the_reference_dpo_is_log_2_and_its_gradient_is_half_beta_up_and_down():
    (_, terms), grad = total(partial(dpo, beta=0.3), PAIRS)(REFERENCE_LOGP)
    assert_allclose(terms[""].loss, math.log(2), rtol=1e-6)
    up_and_down = np.array([-0.15, 0.15])[None, :, None] * np.asarray(PAIRS.mask)
    assert_allclose(grad, up_and_down, rtol=1e-6)


def test_dpo_is_a_reward_model_whose_reward_is_beta_times_the_log_ratio():
    (value, _), _ = total(partial(dpo, beta=0.5), PAIRS)(LOGP)
    gap = jnp.where(PAIRS.mask, LOGP - REFERENCE_LOGP, 0.0)
    reward = Scores(reward=masked.at_last(0.5 * gap.sum(-1), PAIRS.mask))
    assert_allclose(value, reward_model(reward, PAIRS).loss.sum(), rtol=1e-6)


def test_a_comparison_with_an_empty_member_has_no_weight_and_no_gradient():
    batch = PAIRS.replace(mask=PAIRS.mask.at[0, 1].set(False))
    for fn in (dpo, ipo, orpo):
        (_, terms), grad = total(fn, batch)(LOGP)
        last = list(terms.values())[-1]
        assert_array_equal(last.weight, [0.0, 1.0])
        assert_array_equal(grad[0, 1], 0.0)
        if fn is not orpo:  # there the chosen text keeps its likelihood
            assert_array_equal(grad[0], 0.0)


# Six texts of one token, of known worth: every comparison can be enumerated.
WORTH = np.array([0.0, 1.0, -0.5, 2.0, 0.3, -1.0])
SAID = np.array([0.3, 0.1, 0.2, 0.05, 0.25, 0.1])


def expected_gradient(fn, policy, k, preferred):
    """∇ by the policy's logits of E loss: k texts drawn from SAID, `preferred` says P(first)."""
    groups = np.array(list(itertools.product(range(6), repeat=k)))
    weight = SAID[groups].prod(1) * preferred(WORTH[groups]) * k  # any of k could have come first
    tokens = np.stack([np.zeros_like(groups), groups], -1)
    mask = np.broadcast_to([False, True], tokens.shape)
    batch = Pairs(*(jnp.asarray(x) for x in (tokens, mask, np.ones_like(tokens))))

    def at(logits):
        logp = jax.nn.log_softmax(logits)[tokens[:, :, 1]]
        return jnp.stack([jnp.zeros_like(logp), logp], -1)

    @jax.jit
    @jax.grad
    def gradient(logits):
        terms = fn(scored(at(logits), at(jnp.log(SAID))), batch)
        return (weight * terms.loss).sum()

    return np.abs(gradient(jnp.log(policy))).max()


def tilt(worth, beta):
    return exact.tilted(SAID, worth, beta=beta)


@pytest.mark.parametrize("k", [2, 3])
def test_dpo_ends_at_the_tilted_reference(k):
    first = lambda worth: np.exp(worth[:, 0]) / np.exp(worth).sum(1)  # noqa: E731
    gradient = partial(expected_gradient, partial(dpo, beta=0.4), k=k, preferred=first)
    assert gradient(tilt(WORTH, 0.4)) < 1e-6
    assert gradient(tilt(WORTH, 0.5)) > 1e-3
    assert gradient(SAID) > 1e-3


def test_ipo_ends_where_the_reference_is_tilted_by_the_chance_to_win():
    beats = sigmoid(WORTH[:, None] - WORTH[None, :])
    wins = beats @ SAID  # P(text ≻ a text of the sampler)
    first = lambda worth: sigmoid(worth[:, 0] - worth[:, 1])  # noqa: E731
    gradient = partial(expected_gradient, partial(ipo, tau=0.4), k=2, preferred=first)
    assert gradient(tilt(wins, 0.4)) < 1e-6
    assert gradient(tilt(WORTH, 0.4)) > 1e-3
    assert gradient(SAID) > 1e-3


def test_ipo_by_hand_and_its_end_at_a_margin_of_half_over_tau():
    (_, terms), _ = total(partial(ipo, tau=0.5), PAIRS)(LOGP)
    assert_allclose(terms[""].loss, (MARGIN - 1.0) ** 2, rtol=1e-5)
    there = REFERENCE_LOGP.at[:, 0, 1].add(1 / (2 * 0.2))
    (value, _), grad = total(partial(ipo, tau=0.2), PAIRS)(there)
    assert_allclose(value, 0.0, atol=1e-10)
    assert_allclose(grad, 0.0, atol=1e-5)


def test_ipo_of_means_divides_each_texts_log_ratio_by_its_tokens():
    (_, terms), _ = total(partial(ipo, tau=0.5, reduce=masked.mean), PAIRS)(LOGP)
    assert_allclose(terms[""].loss, [(0.25 + 0.75 - 1) ** 2, (0.3 - 0.5 - 1) ** 2], atol=1e-6)


def test_certain_labels_leave_ipo_an_end_and_dpo_none():
    far = REFERENCE_LOGP.at[:, 0, 1].add(30.0)
    for fn, sign in ((partial(dpo, beta=0.2), -1), (partial(ipo, tau=0.2), 1)):
        _, grad = total(fn, PAIRS)(far)
        assert np.all(sign * np.asarray(grad[:, 0, 1]) > 0)


def test_smoothed_dpo_ends_at_the_log_odds_of_its_labels():
    there = REFERENCE_LOGP.at[:, 0, 1].add(math.log(0.9 / 0.1) / 0.2)
    _, grad = total(partial(dpo, beta=0.2, smoothing=0.1), PAIRS)(there)
    assert_allclose(grad, 0.0, atol=1e-6)


# Four texts by themselves, good or bad; the last is empty.
JUDGED_REFERENCE, JUDGED_ARRAYS = texts_of([-1.0, -2.0], [-1.0, -1.0], [-0.5, NAN], [NAN, NAN])
JUDGED = Labeled(
    **JUDGED_ARRAYS,
    score=jnp.array([1.0, -1.0, 0.0, 5.0]),
    token_score=jnp.zeros(JUDGED_REFERENCE.shape),
)
JUDGED_LOGP = JUDGED_REFERENCE + jnp.array([[0, 0.5, 0.5], [0, -0.25, 0], [0, 2.25, 0], [0, 0, 0]])
RATIO = np.array([1.0, -0.25, 2.25])


def test_the_reference_point_is_the_mean_log_ratio_but_never_below_0():
    prepare = jax.jit(lambda logp: kto_reference(scored(logp, JUDGED_REFERENCE), JUDGED))
    assert_allclose(prepare(JUDGED_LOGP).reference_point, np.full(4, 1.0), rtol=1e-6)
    assert_array_equal(prepare(JUDGED_REFERENCE - 1.0).reference_point, np.zeros(4))
    assert not prepare(JUDGED_LOGP).probe.any()


def test_kto_by_hand():
    batch = kto_reference(scored(JUDGED_LOGP, JUDGED_REFERENCE), JUDGED)
    fn = partial(kto, beta=0.5, desirable=2.0, undesirable=3.0)
    (_, terms), _ = total(fn, batch, JUDGED_REFERENCE)(JUDGED_LOGP)
    gain = 0.5 * (RATIO - 1.0)
    bad = 3 * (1 - sigmoid(-gain[1:]))  # a score at the threshold, 0, is not desirable
    assert_allclose(terms[""].loss[:3], [2 * (1 - sigmoid(gain[0])), *bad], rtol=1e-6)
    assert_array_equal(terms[""].weight, [1.0, 1.0, 1.0, 0.0])
    assert_allclose(terms[""].metrics["rejected"][:3], [0.0, *0.5 * RATIO[1:]], rtol=1e-6)


def test_at_the_reference_kto_is_half_lambda_and_its_gradient_a_quarter_of_beta_lambda():
    batch = kto_reference(scored(JUDGED_REFERENCE, JUDGED_REFERENCE), JUDGED)
    fn = partial(kto, beta=0.4, desirable=1.5, undesirable=2.0)
    (_, terms), grad = total(fn, batch, JUDGED_REFERENCE)(JUDGED_REFERENCE)
    assert_array_equal(batch.reference_point, 0.0)
    assert_allclose(terms[""].loss[:3], [0.75, 1.0, 1.0], rtol=1e-6)
    each = np.array([-1.5, 2.0, 2.0, 0.0])[:, None] * 0.1 * np.asarray(JUDGED.mask)
    assert_allclose(grad, each, rtol=1e-6)


def test_a_text_far_from_the_reference_point_no_longer_teaches():
    batch = kto_reference(scored(JUDGED_REFERENCE, JUDGED_REFERENCE), JUDGED)
    _, grad = total(partial(kto, beta=1.0), batch, JUDGED_REFERENCE)(JUDGED_REFERENCE + 25.0)
    assert_allclose(grad, 0.0, atol=1e-8)


# Rows of 6: prompts of 1 and 3 tokens, responses of 3, 2; one without a response.
ROWS = Labeled(
    tokens=jnp.array([[9, 1, 2, 3, 0, 0], [9, 8, 7, 4, 5, 0], [9, 6, 0, 0, 0, 0]]),
    mask=jnp.array([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6], bool),
    segments=jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]),
    score=jnp.zeros(3),
    token_score=jnp.zeros((3, 6)),
)


def test_mismatched_rows_are_prompts_with_the_responses_of_others():
    two = jax.tree.map(lambda x: x[:2], ROWS)  # of two rows, the other one
    found = jax.jit(mismatched)(two, jax.random.key(0))
    assert_array_equal(found.tokens[:2], ROWS.tokens[:2])
    assert_array_equal(found.tokens[2:], [[9, 4, 5, 0, 0, 0], [9, 8, 7, 1, 2, 3]])
    assert_array_equal(found.mask[2:], [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    assert_array_equal(found.segments[2:], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert_array_equal(found.probe, [False, False, True, True])


def test_the_reference_point_is_taken_on_mismatched_rows_if_there_are_any():
    batch = Judged(
        **JUDGED_ARRAYS,
        score=JUDGED.score,
        token_score=JUDGED.token_score,
        probe=jnp.array([False, False, True, True]),
        reference_point=jnp.zeros(4),
    )
    batch = kto_reference(scored(JUDGED_LOGP, JUDGED_REFERENCE), batch)
    assert_allclose(batch.reference_point, np.full(4, 2.25), rtol=1e-6)
    (_, terms), grad = total(partial(kto, beta=0.1), batch, JUDGED_REFERENCE)(JUDGED_LOGP)
    assert_array_equal(terms[""].weight, [1.0, 1.0, 0.0, 0.0])
    assert_array_equal(grad[2:], 0.0)


def test_orpo_by_hand():
    logp, arrays = texts_of([[math.log(0.8), math.log(0.2)], [math.log(0.25), NAN]])
    (_, terms), _ = total(orpo, Pairs(**arrays), logp)(logp)
    p = 0.4  # geometric mean of 0.8 and 0.2
    odds = (p / (1 - p)) / (0.25 / 0.75)
    assert_allclose(terms["odds"].loss, [math.log(1 + 1 / odds)], rtol=1e-6)
    assert_allclose(terms["odds"].metrics["margin"], [math.log(odds)], rtol=1e-6)
    assert terms["odds"].scale == 0.1
    likelihood = terms["likelihood"]
    assert_array_equal(likelihood.weight, [[[0, 1, 1], [0, 0, 0]]])
    assert_allclose(likelihood.loss[0, 0, 1:], [-math.log(0.8), -math.log(0.2)], rtol=1e-6)


def test_the_odds_of_a_nearly_certain_text_keep_their_digits():
    logp, arrays = texts_of([[-1e-4], [-20.0]])
    (_, terms), _ = total(orpo, Pairs(**arrays), logp)(logp)
    margin = -1e-4 - math.log(-math.expm1(-1e-4)) + 20 + math.log1p(-math.exp(-20))
    assert_allclose(terms["odds"].metrics["margin"], [margin], rtol=1e-6)


@pytest.mark.parametrize("fn", [dpo, ipo])
def test_who_forgets_the_reference_is_told_to_score_it(fn):
    with pytest.raises(ValueError, match=r'scores=\("reference",\) on its learner'):
        fn(Scores(logp=LOGP), PAIRS)


def test_who_forgets_the_reference_point_is_told_to_prepare_it():
    with pytest.raises(ValueError, match="prepare=kto_reference"):
        kto(scored(JUDGED_LOGP, JUDGED_REFERENCE), JUDGED)


def test_hyperparameters_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"smoothing=1\.0"):
        dpo(scored(LOGP, REFERENCE_LOGP), PAIRS, smoothing=1.0)
    with pytest.raises(ValueError, match="tau=0"):
        ipo(scored(LOGP, REFERENCE_LOGP), PAIRS, tau=0.0)


def compared(key, *, rows):
    """Pairs of the chain's texts, labelled by Bradley and Terry."""
    who = jax.random.categorical(jax.random.fold_in(key, 0), jnp.log(START), shape=(rows, 2))
    worth = jnp.asarray(REWARD, jnp.float32)[who]
    first = jax.random.bernoulli(
        jax.random.fold_in(key, 1), jax.nn.sigmoid(worth @ jnp.array([1.0, -1.0]))
    )
    tokens = jnp.asarray(TEXTS, jnp.int32)[jnp.where(first[:, None], who, who[:, ::-1])]
    mask = jnp.broadcast_to(jnp.arange(4) > 0, tokens.shape)
    return Pairs(tokens, mask, jnp.ones_like(tokens))


@pytest.mark.slow
def test_a_transformer_trained_by_dpo_ends_at_the_tilted_reference():
    beta = 0.5
    policy = Learner(
        MODEL,
        partial(dpo, beta=beta),
        batch="pairs",
        scores=("reference",),
        optimizer=partial(adam, learning_rate=3e-3, final=0.02, steps=900),
    )
    params, _ = trained(
        {"policy": policy},
        steps=900,
        key=jax.random.key(0),
        data={"pairs": partial(compared, rows=512)},
        frozen={"reference": reference_params()},
        frozen_models={"reference": REFERENCE},
    )
    found = probabilities(MODEL, params["policy"], TEXTS)
    optimum = exact.tilted(START, REWARD, beta=beta)
    assert exact.kl(optimum, START) > 1.0
    assert exact.kl(found / found.sum(), optimum) < 0.03
    assert_allclose(found @ REWARD, optimum @ REWARD, atol=0.08)
