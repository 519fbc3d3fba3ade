"""Objectives against numbers worked out by hand, and against rlax."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from reference import import_rlax

from rlhf_jax import advantages, masked, rewards
from rlhf_jax.objectives import (
    combine,
    mle,
    ppo,
    presets,
    reference_kl,
    reference_kl_vocab,
    reward_model,
    unlikelihood,
    value,
)
from rlhf_jax.testing import random_batch
from rlhf_jax.types import Experience, Labeled, Pairs, Scores


def row(*numbers):
    return jnp.array([[0.0, *numbers]])


def experience(**fields):
    """One row whose tokens after the first are masked in, every field 0 unless given."""
    t = next(iter(fields.values())).shape[1]
    zero, one = jnp.zeros((1, t)), jnp.zeros((1,), jnp.int32)
    token = dict.fromkeys(
        (
            "logp",
            "behaviour_logp",
            "earned",
            "old_logp",
            "ref_logp",
            "value",
            "reward",
            "advantage",
            "target",
        ),
        zero,
    )
    return Experience(
        tokens=zero.astype(jnp.int32),
        mask=jnp.arange(t)[None] > 0,
        segments=jnp.ones((1, t), jnp.int32),
        temperature=jnp.ones((1,)),
        ended=jnp.array([True]),
        prompt_id=one,
        sample_id=one,
        steps=one,
        group_tokens=jnp.full((1,), t - 1.0),
        **(token | fields),
    )


def labeled(token_score):
    t = token_score.shape[1]
    return Labeled(
        tokens=jnp.zeros((1, t), jnp.int32),
        mask=jnp.arange(t)[None] > 0,
        segments=jnp.ones((1, t), jnp.int32),
        score=jnp.zeros((1,)),
        token_score=token_score,
    )


def mean(terms):
    """What the trainer makes of terms."""
    used = terms.weight != 0
    count = terms.weight if terms.count is None else terms.count
    return terms.scale * masked.sum(terms.loss * terms.weight, used) / count.sum()


def test_mle_is_minus_logp():
    terms = mle(Scores(logp=row(-0.5, -2.0)), labeled(row(0.0, 0.0)))
    assert_allclose(terms.loss[0, 1:], [0.5, 2.0])
    assert mean(terms) == 1.25


RATIO = row(*np.log([1.5, 0.5, 1.5, 0.5, 1.1, 6.0]))
ADVANTAGE = row(1.0, 1.0, -1.0, -1.0, 2.0, -1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [-1.2, -0.5, 1.5, 0.8, -2.2, 6.0]),
        ({"clip": 0.6}, [-1.5, -0.5, 1.5, 0.5, -2.2, 6.0]),
        ({"clip_high": 0.28}, [-1.28, -0.5, 1.5, 0.8, -2.2, 6.0]),
        ({"clip_high": 0.0}, [-1.0, -0.5, 1.5, 0.8, -2.0, 6.0]),
        ({"dual_clip": 3.0}, [-1.2, -0.5, 1.5, 0.8, -2.2, 3.0]),
    ],
)
def test_ppo_by_hand(options, expected):
    terms = ppo(Scores(logp=RATIO), experience(advantage=ADVANTAGE), **options)
    assert_allclose(terms.loss[0, 1:], expected, rtol=1e-6)


def test_ppo_has_no_gradient_where_the_clip_binds():
    def loss(logp):
        return ppo(Scores(logp=logp), experience(advantage=ADVANTAGE)).loss.sum()

    assert_allclose(jax.grad(loss)(RATIO)[0, 1:], [0.0, -0.5, 1.5, 0.0, -2.2, 6.0], rtol=1e-6)


def test_ppo_metrics_by_hand():
    batch = experience(advantage=ADVANTAGE)
    metrics = ppo(Scores(logp=RATIO), batch, dual_clip=3.0).metrics
    assert_allclose(metrics["ratio"][0, 1:], [1.5, 0.5, 1.5, 0.5, 1.1, 6.0], rtol=1e-6)
    assert_allclose(metrics["clip_fraction"][0, 1:], [1, 0, 0, 1, 0, 0])
    assert_allclose(metrics["dual_clip_fraction"][0, 1:], [0, 0, 0, 0, 0, 1])
    assert_allclose(metrics["kl_k1"][0, 1], -math.log(1.5), rtol=1e-6)
    assert_allclose(metrics["kl_k3"][0, 1], 0.5 - math.log(1.5), rtol=1e-6)


def test_ppo_subtracts_its_entropy():
    scores = Scores(logp=row(0.0, 0.0), entropy=row(1.0, 3.0))
    terms = ppo(scores, experience(advantage=row(1.0, 2.0)), entropy_coefficient=0.1)
    assert_allclose(terms.loss[0, 1:], [-1.1, -2.3], rtol=1e-6)


def test_importance_weights_between_trainer_and_sampler_are_truncated():
    batch = experience(
        advantage=row(1.0, 1.0, 1.0),
        behaviour_logp=row(*np.log([2.0, 0.5, 0.1])),
        old_logp=row(0.0, 0.0, 0.0),
    )
    terms = ppo(Scores(logp=row(0.0, 0.0, 0.0)), batch, importance_cap=3.0)
    assert_allclose(terms.metrics["importance"][0, 1:], [0.5, 2.0, 3.0], rtol=1e-6)
    assert_allclose(terms.loss[0, 1:], [-0.5, -2.0, -3.0], rtol=1e-6)


def test_log_ratios_are_clamped_to_20():
    terms = ppo(Scores(logp=row(100.0, -100.0)), experience(advantage=row(-1.0, 1.0)))
    assert_allclose(terms.metrics["ratio"][0, 1:], [math.exp(20), math.exp(-20)], rtol=1e-6)


def test_ppo_agrees_with_rlax():
    rlax = import_rlax()
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    logp = jax.tree.map(jnp.asarray, random_batch(Experience, seed=1)).logp
    full = batch.replace(mask=jnp.ones_like(batch.mask))
    ours = jax.value_and_grad(lambda x: mean(ppo(Scores(logp=x), full)))
    theirs = jax.value_and_grad(
        lambda x: rlax.clipped_surrogate_pg_loss(
            jnp.exp(x - full.old_logp).reshape(-1), full.advantage.reshape(-1), 0.2
        )
    )
    for got, expected in zip(ours(logp), theirs(logp), strict=True):
        assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_on_policy_ppo_has_the_reinforce_gradient():
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    grad = jax.grad(lambda logp: mean(ppo(Scores(logp=logp), batch)))(batch.old_logp)
    expected = -jnp.where(batch.mask, batch.advantage, 0.0) / batch.mask.sum()
    assert_allclose(grad, expected, rtol=1e-6)


def test_value_by_hand():
    batch = experience(value=row(0.0, 0.0, 0.0, 1.0), target=row(1.0, 1.0, -1.0, 1.0))
    scores = Scores(value=row(0.5, 0.1, 0.5, 1.0))
    expected = [0.5 * 0.8**2, 0.5 * 0.9**2, 0.5 * 1.5**2, 0.0]
    assert_allclose(value(scores, batch).loss[0, 1:], expected, rtol=1e-6)
    assert_allclose(value(scores, batch).metrics["clip_fraction"][0, 1:], [1, 0, 0, 0])
    plain = value(scores, batch, clip=None, coefficient=0.1)
    assert_allclose(plain.loss[0, 1:], [0.125, 0.405, 1.125, 0.0], rtol=1e-6)
    assert_allclose(mean(plain), 0.1 * 1.655 / 4, rtol=1e-6)


def test_a_clipped_value_that_moved_towards_its_target_has_no_gradient():
    batch = experience(value=row(0.0, 0.0), target=row(1.0, -1.0))
    grad = jax.grad(lambda v: value(Scores(value=v), batch).loss.sum())(row(0.5, 0.5))
    assert_allclose(grad[0, 1:], [0.0, 1.5], rtol=1e-6)


def test_value_clip_of_0_is_not_no_clip():
    batch = experience(value=row(0.0), target=row(1.0))
    assert value(Scores(value=row(0.5)), batch, clip=0.0).loss[0, 1] == 0.5


def test_the_means_of_value_metrics_give_the_explained_variance():
    target, guess = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.5, 2.0, 2.5, 5.0])
    batch = experience(value=row(*guess), target=row(*target))
    m = {k: x[0, 1:].mean() for k, x in value(Scores(value=row(*guess)), batch).metrics.items()}
    explained = 1 - m["squared_error"] / (m["squared_target"] - m["target"] ** 2)
    assert_allclose(explained, 1 - np.mean((target - guess) ** 2) / target.var(), rtol=1e-6)


def pairs(*scores):
    """Groups whose members end at different tokens; 99 stands where nobody may look."""
    scores = jnp.array(scores)
    n, k = scores.shape
    end = 2 + jnp.arange(k)[None, :, None]
    index = jnp.broadcast_to(jnp.arange(k + 3), (n, k, k + 3))
    batch = Pairs(
        tokens=jnp.zeros(index.shape, jnp.int32),
        mask=(index > 0) & (index <= end),
        segments=jnp.ones(index.shape, jnp.int32),
    )
    return Scores(reward=jnp.where(index == end, scores[:, :, None], 99.0)), batch


def test_reward_model_on_pairs_is_bradley_terry():
    terms = reward_model(*pairs([1.0, -1.0], [0.0, 0.0], [-1.0, 2.0]))
    assert_allclose(terms.loss, np.log1p(np.exp([-2.0, 0.0, 3.0])), rtol=1e-6)
    assert_allclose(terms.metrics["accuracy"], [1.0, 0.5, 0.0])
    assert_allclose(terms.metrics["margin"], [2.0, 0.0, -3.0])
    assert_allclose(terms.metrics["score"], [0.0, 0.0, 0.5])
    assert_allclose(terms.weight, [1.0, 1.0, 1.0])


def test_reward_model_on_more_members_is_softmax_cross_entropy():
    scores = np.array([[1.0, 0.5, -2.0], [0.0, 3.0, 1.0]])
    expected = np.log(np.exp(scores).sum(1)) - scores[:, 0]
    terms = reward_model(*pairs(*scores.tolist()))
    assert_allclose(terms.loss, expected, rtol=1e-6)
    assert_allclose(terms.metrics["margin"], [0.5, -3.0])  # over the best of the others
    assert_allclose(terms.metrics["accuracy"], [1.0, 0.0])


def test_a_confident_reward_model_still_has_a_loss():
    assert_allclose(reward_model(*pairs([15.0, -15.0])).loss, [math.exp(-30)], rtol=1e-5)


def test_reward_model_centres_the_sum_of_scores():
    terms = reward_model(*pairs([3.0, -1.0]), centre=0.01)
    assert_allclose(terms.loss, [math.log1p(math.exp(-4)) + 0.04], rtol=1e-6)


def test_the_gradient_of_a_comparison_reaches_the_last_tokens_only():
    scores, batch = pairs([1.0, -1.0])
    grad = jax.grad(lambda r: reward_model(Scores(reward=r), batch).loss.sum())(scores.reward)
    p = 1 / (1 + math.exp(2))
    assert_allclose(grad, np.where(masked.is_last(batch.mask), [[[-p], [p]]], 0.0), rtol=1e-5)


def test_a_comparison_with_an_empty_member_has_weight_0():
    scores, batch = pairs([1.0, -1.0], [1.0, -1.0])
    terms = reward_model(scores, batch.replace(mask=batch.mask.at[0, 1].set(False)))
    assert_allclose(terms.weight, [0.0, 1.0])


def test_unlikelihood_by_hand():
    logp = row(math.log(0.25), math.log(0.25), -1e-5, -50.0, 0.0)
    batch = labeled(row(1.0, -1.0, -1.0, -1.0, -1.0))
    terms = unlikelihood(Scores(logp=logp), batch, threshold=0.0)
    most = -math.log(-math.expm1(-1e-6))
    expected = [-math.log(0.25), -math.log(0.75), -math.log(-math.expm1(-1e-5)), 0.0, most]
    assert_allclose(terms.loss[0, 1:], expected, rtol=1e-5, atol=1e-20)
    assert_allclose(terms.metrics["good"][0, 1:], [1, 0, 0, 0, 0])
    twice = unlikelihood(Scores(logp=logp), batch, threshold=0.0, alpha=2.0)
    assert_allclose(twice.loss[0, 2], -2 * math.log(0.75), rtol=1e-5)


def test_a_token_at_the_threshold_is_good():
    terms = unlikelihood(Scores(logp=row(-1.0)), labeled(row(0.5)), threshold=0.5)
    assert terms.loss[0, 1] == 1.0


def test_unlikelihood_pushes_good_up_and_bad_down():
    batch = labeled(row(1.0, -1.0))
    logp = row(math.log(0.5), math.log(0.2))
    grad = jax.grad(lambda x: unlikelihood(Scores(logp=x), batch, threshold=0.0).loss.sum())(logp)
    assert_allclose(grad[0, 1:], [-1.0, 0.2 / 0.8], rtol=1e-5)


P, Q = np.array([0.75, 0.25, 0.0]), np.array([0.5, 0.25, 0.25])
KL = 0.75 * math.log(1.5)


def kl_of(logits, reference):
    batch = labeled(row(0.0))
    flat = jax.tree.map(lambda x: x.reshape(-1)[-1:], batch)
    found = reference_kl_vocab({"self": logits[None], "reference": reference[None]}, flat)
    return found["reference_kl"][0]


def test_the_exact_kl_by_hand_and_its_sign():
    assert_allclose(kl_of(jnp.log(P), jnp.log(Q)), KL, rtol=1e-6)
    assert_allclose(kl_of(jnp.log(Q) + 3.0, jnp.log(Q)), 0.0, atol=1e-6)
    # of the policy from the reference, not the other way round
    backwards = kl_of(jnp.log(Q), jnp.log(jnp.array([0.25, 0.5, 0.25])))
    assert_allclose(backwards, 0.5 * math.log(2) + 0.25 * math.log(0.5), rtol=1e-6)


def test_the_exact_kl_has_its_closed_form_gradient():
    p = np.array([0.6, 0.3, 0.1])
    grad = jax.grad(kl_of)(jnp.log(p) + 7.0, jnp.log(Q))  # logits need not be normalised
    kl = np.sum(p * np.log(p / Q))
    assert_allclose(grad, p * (np.log(p / Q) - kl), rtol=1e-4, atol=1e-7)


def test_reference_kl_scales_what_vocab_found():
    scores = Scores(extra={"reference_kl": row(1.0, 3.0)})
    assert_allclose(mean(reference_kl(scores, labeled(row(0.0, 0.0)), coefficient=0.5)), 1.0)


def test_combine_keeps_parts_and_their_own_denominators_apart():
    batch = experience(advantage=row(1.0, 1.0), target=row(1.0, 1.0))
    scores = Scores(logp=row(0.0, 0.0), value=row(0.0, 0.0))
    parts = partial(combine, policy=ppo, critic=partial(value, coefficient=0.1))
    nested = combine(scores, batch, all=parts, again=ppo)
    assert list(nested) == ["all/policy", "all/critic", "again"]
    assert nested["all/critic"].scale == 0.1
    assert_allclose(nested["all/policy"].loss, nested["again"].loss)


@pytest.mark.parametrize("preset", [presets.ZIEGLER_2019, presets.TRL_PPO, presets.VERL_PPO])
def test_a_preset_can_be_spread_and_names_its_source(preset):
    assert "github.com" in preset.source
    batch = experience(advantage=row(1.0), target=row(1.0))
    ppo(Scores(logp=row(0.0)), batch, **preset.ppo)
    value(Scores(value=row(0.0)), batch, **preset.value)
    advantages.gae(batch.reward, batch.value, batch.mask, **preset.gae)
    assert rewards.KL(**preset.kl).initial in (0.15, 0.05, 0.0)
    with pytest.raises(TypeError):
        preset.ppo["clip"] = 0.3
