"""Policy gradients: what a token weighs, how far the policy moved, and where the credit goes."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_chain
import toys
from loop import prompts_of, trained
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import exact, masked
from rlhf_jax.advantages import (
    batch_mean,
    credit_horizon,
    gae,
    group_relative,
    leave_one_out,
    reward_to_go,
)
from rlhf_jax.aggregate import (
    over_length,
    over_prompts,
    over_sequence_means,
    over_sequences,
    over_tokens,
)
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.objectives import (
    combine,
    mle,
    ppo,
    presets,
    reference_kl,
    reference_kl_vocab,
    reinforce,
    sampled_kl,
)
from rlhf_jax.optimizer import adam
from rlhf_jax.ratios import k1, k2, k3, sequence_log_ratio, token_log_ratio
from rlhf_jax.rewards import KL, max_entropy
from rlhf_jax.score import score
from rlhf_jax.step import collect, opinions
from rlhf_jax.testing import random_batch
from rlhf_jax.types import Control, Experience, Rollout, Scores

LENGTH = np.array([1, 3, 0, 2])
MASK = jnp.asarray((np.arange(4) > 0) & (np.arange(4) <= LENGTH[:, None]))


def experience(**fields):
    """Rows of 1, 3, 0 and 2 tokens; the first two are samples of one prompt."""
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    batch = jax.tree.map(lambda x: x[:4, :4] if x.ndim > 1 else x[:4], batch)
    given = {
        "mask": MASK,
        "segments": MASK.astype(jnp.int32),
        "prompt_id": jnp.array([7, 7, 8, 9]),
        "group_tokens": jnp.array([4.0, 4.0, 0.0, 2.0]),
    }
    return batch.replace(**(given | fields))


def value_of(terms):
    """What the trainer makes of terms."""
    count = terms.weight if terms.count is None else terms.count
    return terms.scale * masked.sum(terms.loss * terms.weight, terms.weight != 0) / count.sum()


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (over_tokens, (1 + 9 + 5) / 6),
        (over_sequences, (1 + 9 + 5) / 3),
        (over_sequence_means, (1 + 9 / 3 + 5 / 2) / 3),
        (over_prompts, ((1 + 9) / 4 + 5 / 2) / 2),
        (partial(over_length, length=5), (1 + 9 + 5) / (5 * 3)),
    ],
)
def test_five_ways_to_weigh_tokens_by_hand(aggregate, expected):
    """Losses 1 · 2 3 4 · 1 4 of three texts, the first two of one prompt, and an empty row."""
    loss = jnp.array([[0, 1, 0, 0], [0, 2, 3, 4], [0, 0, 0, 0], [0, 1, 4, 0.0]])
    batch = experience(advantage=jnp.ones((4, 4)))
    terms = reinforce(Scores(logp=-loss), batch, aggregate=aggregate)
    assert_allclose(value_of(terms), expected, rtol=1e-6)
    assert_array_equal(terms.weight[~MASK], 0.0)


def test_reinforce_by_hand():
    """−A log π summed over tokens, averaged over texts that have any."""
    batch = experience(advantage=jnp.full((4, 4), 2.0))
    logp = jnp.where(MASK, -0.5, jnp.nan)
    assert_allclose(value_of(reinforce(Scores(logp=logp), batch)), 2.0 * 0.5 * 6 / 3)
    bonus = reinforce(Scores(logp=logp, entropy=jnp.ones((4, 4))), batch, entropy_coefficient=0.1)
    assert_allclose(value_of(bonus), 2.0 - 0.1 * 6 / 3)


def test_reinforce_with_advantage_1_is_likelihood():
    batch = experience(advantage=jnp.ones((4, 4)))
    scores = Scores(logp=jnp.asarray(random_batch(Experience).logp[:4, :4]))
    found = value_of(reinforce(scores, batch, aggregate=over_tokens))
    assert_allclose(found, value_of(mle(scores, batch)), rtol=1e-6)


def test_reinforce_corrects_a_sampler_that_disagrees():
    logp = jnp.log(jnp.where(MASK, 0.4, 1.0))
    drawn = jnp.log(jnp.array([[1, 0.8, 1, 1], [1, 0.4, 0.2, 0.01], [1] * 4, [1, 0.4, 0.4, 1.0]]))
    batch = experience(advantage=jnp.ones((4, 4)), behaviour_logp=drawn)
    terms = reinforce(Scores(logp=logp), batch, importance_cap=2.5)
    assert_allclose(terms.metrics["importance"][1, 1:], [1.0, 2.0, 2.5], rtol=1e-6)

    def loss(x):
        return value_of(reinforce(Scores(logp=x), batch, importance_cap=2.5))

    expected = -terms.metrics["importance"] / 3  # the ratio itself carries no gradient
    assert_allclose(jax.grad(loss)(logp)[MASK], expected[MASK], rtol=1e-6)


def test_the_ratio_of_a_text_is_the_geometric_mean_and_its_gradient_that_of_gspo():
    batch = experience(advantage=jnp.array([[1.5], [-0.5], [0], [2.0]]) * jnp.ones((4, 4)))
    logp = batch.old_logp + 0.3 * random_batch(Experience, seed=5).advantage[:4, :4]
    ratio = jnp.exp(sequence_log_ratio(logp, batch.old_logp, MASK))
    gap = np.where(MASK, logp - batch.old_logp, 0)
    geometric = np.exp(gap.sum(1) / np.maximum(LENGTH, 1))
    assert_allclose(np.where(MASK, ratio, 0), np.where(MASK, geometric[:, None], 0), rtol=1e-5)

    options = {"log_ratio": sequence_log_ratio, "aggregate": over_sequence_means, "clip": 0.1}

    def ours(x):
        return value_of(ppo(Scores(logp=x), batch, **options))

    def theirs(x):  # eq. 5 of Zheng et al. 2025, written for whole texts
        s = jnp.exp(masked.mean(x - batch.old_logp, MASK, axis=1))
        a = batch.advantage[:, 1]
        loss = -jnp.minimum(s * a, jnp.clip(s, 0.9, 1.1) * a)
        return jnp.sum(jnp.where(MASK.any(1), loss, 0)) / 3

    assert_allclose(ours(logp), theirs(logp), rtol=1e-5)
    assert_allclose(jax.grad(ours)(logp), jax.grad(theirs)(logp), rtol=1e-4, atol=1e-7)


def test_at_ratio_1_tokens_and_texts_have_the_gradient_of_reinforce():
    batch = experience()
    for log_ratio in (token_log_ratio, sequence_log_ratio):
        for aggregate in (over_tokens, over_sequences, over_sequence_means):

            def clipped(x, log_ratio=log_ratio, aggregate=aggregate):
                scores = Scores(logp=x)
                return value_of(ppo(scores, batch, log_ratio=log_ratio, aggregate=aggregate))

            def plain(x, aggregate=aggregate):
                return value_of(reinforce(Scores(logp=x), batch, aggregate=aggregate))

            got, expected = jax.grad(clipped)(batch.old_logp), jax.grad(plain)(batch.old_logp)
            assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


# ----------------------------------------------------------------------------------------- KL


PI, REF = np.array([0.3, -0.2, 0.5]), np.array([0.0, 0.4, -0.1])


def expected_gradient(loss):
    """Σ_v π(v) ∇θ loss(log π(v), log π_ref(v)) of a softmax policy, exactly."""
    ref = jax.nn.log_softmax(jnp.asarray(REF))

    def over_tokens(theta, p):
        return jnp.sum(p * loss(jax.nn.log_softmax(theta), ref))

    theta = jnp.asarray(PI)
    return jax.grad(over_tokens)(theta, jax.nn.softmax(theta))


def as_loss(estimator):
    def loss(logp, ref_logp):
        batch = experience(mask=jnp.ones((4, 4), bool), ref_logp=jnp.tile(ref_logp, (4, 2))[:, :4])
        scores = Scores(logp=jnp.tile(logp, (4, 2))[:, :4])
        return sampled_kl(scores, batch, estimator=estimator).loss[0, :3]

    return loss


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (k1, (0.0, 0.0, 0.0)),
        (k2, (0.022440, -0.179420, 0.156980)),
        (k3, (0.059208, -0.224725, 0.165516)),
    ],
)
def test_what_an_estimator_of_kl_is_worth_as_a_loss(estimator, expected):
    """k1: nothing. k2: ∇KL(π‖π_ref). k3: ∇KL(π_ref‖π) = π − π_ref."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (PI, REF))
    exact = {k1: 0 * p, k2: p * (np.log(p / q) - np.sum(p * np.log(p / q))), k3: p - q}
    found = expected_gradient(as_loss(estimator))
    assert_allclose(found, expected, atol=1e-5)
    assert_allclose(found, exact[estimator], atol=1e-6)


def test_the_coefficient_and_the_aggregate_of_a_kl_loss():
    batch = experience()
    logp = batch.ref_logp + 0.5
    terms = sampled_kl(
        Scores(logp=logp), batch, estimator=k2, coefficient=0.2, aggregate=over_sequences
    )
    assert_allclose(value_of(terms), 0.2 * 0.125 * 6 / 3, rtol=1e-5)
    assert_allclose(terms.metrics["kl"][MASK], 0.125, rtol=1e-5)


# ------------------------------------------------- the whole chain: every text, its gradient


@pytest.fixture(scope="module")
def chain():
    """A policy that is not the reference, every text of the chain, and both as arguments."""
    rng = np.random.default_rng(1)
    table = np.log(toy_chain.CHAIN) + 0.5 * rng.normal(size=(5, 4))
    tokens = jnp.asarray(toy_chain.TEXTS, jnp.int32)
    rows = len(tokens)
    mask = tokens != toy_chain.BOS
    zero = jnp.zeros(tokens.shape, jnp.float32)
    rollout = Rollout(
        tokens=tokens,
        mask=mask,
        segments=jnp.ones_like(tokens),
        logp=zero,
        behaviour_logp=zero,
        temperature=jnp.ones(rows),
        ended=jnp.ones(rows, bool),
        prompt_id=jnp.zeros(rows, jnp.int32),
        sample_id=jnp.arange(rows),
        earned=zero,
        steps=jnp.full(rows, tokens.shape[1]),
    )
    return toys.markov(table), rollout


MODELS = {"policy": toys.Table(5), "reference": toy_chain.REFERENCE}


def gradient_of_return(params, rollout, beta):
    """∇ of Σ_y π(y) (R(y) − β log π(y)/π₀(y)), summed over all 64 texts."""

    def total(params):
        scores = score({"self": params}, rollout, models={"self": MODELS["policy"]})
        logp = scores.logp.sum(1)
        gain = toy_chain.REWARD - beta * (logp - np.log(toy_chain.START))
        return jnp.sum(jnp.exp(logp) * gain)

    return jax.grad(total)(params)["head"]["kernel"]


def expected_update(params, rollout, objective, beta, vocab=None, **spec):
    """−Σ_y π(y) ∇ loss of the text y, with the experience that `collect` makes of it."""
    trees = {"policy": params, "reference": toy_chain.reference_params()}
    spec = Rollouts(reward=None, length=3, value=None, **spec)
    reward = masked.at_last(jnp.asarray(toy_chain.REWARD, jnp.float32), rollout.mask)
    control = Control(jnp.float32(beta), jnp.float32(0), jnp.float32(1))
    said = opinions(rollout, trees, spec=spec, models=MODELS)
    batch, _, _ = collect(rollout, reward, said, control, spec=spec)
    weight = jnp.exp(batch.old_logp.sum(1))

    def loss(params):
        names = {"self": params, "reference": trees["reference"]}
        models = {"self": MODELS["policy"], "reference": MODELS["reference"]}
        scores = score(names, batch, models=models, vocab=vocab)
        terms = objective(scores, batch)
        terms = terms if isinstance(terms, dict) else {"": terms}
        # The trainer's value of a minibatch that is this text alone.
        counts = {n: t.weight if t.count is None else t.count for n, t in terms.items()}
        rows = [t.scale * (t.loss * t.weight).sum(1) / counts[n].sum(1) for n, t in terms.items()]
        return -jnp.sum(weight * sum(rows))

    return jax.grad(loss)(params)["head"]["kernel"]


KL_EVERYWHERE = {
    "k1 in the reward": (reinforce, {}, {}),
    "exact in the reward, the token's own share as a loss": (
        partial(
            combine,
            policy=reinforce,
            kl=partial(reference_kl, coefficient=0.5, aggregate=over_sequences),
        ),
        {"kl": KL(exact=True)},
        {"vocab": reference_kl_vocab},
    ),
}  # fmt: skip


@pytest.mark.parametrize("placement", KL_EVERYWHERE)
def test_the_expected_gradient_is_that_of_the_penalised_return(chain, placement):
    objective, spec, options = KL_EVERYWHERE[placement]
    spec = {"advantage": reward_to_go} | spec
    found = expected_update(*chain, objective, 0.5, **options, **spec)
    assert_allclose(found, gradient_of_return(*chain, 0.5), atol=2e-6)


def test_exact_kl_in_the_reward_alone_forgets_the_tokens_own_share(chain):
    spec = {"advantage": reward_to_go, "kl": KL(exact=True)}
    found = expected_update(*chain, reinforce, 0.5, **spec)
    assert np.abs(found - gradient_of_return(*chain, 0.5)).max() > 0.01


def test_gae_at_trace_1_without_a_critic_has_the_same_expectation(chain):
    found = expected_update(*chain, reinforce, 0.5, advantage=partial(gae, trace=1.0))
    assert_allclose(found, gradient_of_return(*chain, 0.5), atol=2e-6)


@pytest.mark.parametrize(("estimator", "same"), [(k1, True), (k2, False), (k3, False)])
def test_only_k1_in_the_reward_is_the_gradient_of_the_kl(chain, estimator, same):
    spec = {"advantage": reward_to_go, "kl": KL(estimator=estimator)}
    gap = expected_update(*chain, reinforce, 0.5, **spec) - gradient_of_return(*chain, 0.5)
    assert (np.abs(gap).max() < 2e-6) == same


# ------------------------------------------------------------------------------ advantages


def returns(reward, mask, horizon, discount):
    """Rewards of each masked token and the horizon − 1 masked ones after it, by loops."""
    found = np.zeros(mask.shape)
    for row in range(len(mask)):
        at = np.flatnonzero(mask[row])
        for i in range(len(at)):
            later = at[i : i + horizon]
            found[row, at[i]] = sum(discount**k * reward[row, s] for k, s in enumerate(later))
    return found


@pytest.mark.parametrize("horizon", [1, 2, 3, 50])
@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_credit_horizon_is_a_window_over_chosen_tokens(horizon, discount):
    batch = random_batch(Experience)
    reward, value, mask = (jnp.asarray(x) for x in (batch.reward, batch.value, batch.mask))
    reward = jnp.where(mask, reward, jnp.nan)  # nobody looks there
    advantage, target = credit_horizon(reward, value, mask, horizon=horizon, discount=discount)
    expected = returns(batch.reward, batch.mask, horizon, discount)
    assert_allclose(target, expected, rtol=1e-5, atol=1e-6)
    assert_allclose(advantage, np.where(mask, expected - batch.value, 0), rtol=1e-5, atol=1e-6)


def test_a_horizon_beyond_the_text_is_reward_to_go():
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    wide = credit_horizon(batch.reward, batch.value, batch.mask, horizon=7, discount=0.9)
    whole = reward_to_go(batch.reward, batch.value, batch.mask, discount=0.9)
    for got, expected in zip(wide, whole, strict=True):
        assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_with_reward_at_the_end_a_horizon_gives_exactly_nothing_to_earlier_tokens():
    mask = jnp.array([[False, True, True, False, True, True]])
    reward = masked.at_last(jnp.array([0.7]), mask)
    _, target = credit_horizon(reward, jnp.zeros_like(reward), mask, horizon=2)
    assert_array_equal(target, np.float32([[0, 0, 0, 0, 0.7, 0.7]]))


def test_a_horizon_of_0_is_refused():
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    with pytest.raises(ValueError, match="horizon=0: at least 1"):
        credit_horizon(batch.reward, batch.value, batch.mask, horizon=0)


GROUP = jnp.array([3, 3, 5, 3])
OUTCOME = masked.at_last(jnp.array([1.0, 0.0, 9.0, 5.0]), jnp.ones((4, 2), bool))


def baselines(fn):
    advantage, _ = fn(OUTCOME, jnp.zeros((4, 2)), jnp.ones((4, 2), bool), GROUP)
    assert_array_equal(advantage[:, 0], advantage[:, 1])
    return advantage[:, 0]


def test_baselines_by_hand():
    assert_allclose(baselines(leave_one_out), [-1.5, -3.0, 0.0, 4.5])
    assert_allclose(baselines(partial(group_relative, normalise=False)), [-1.0, -2.0, 0.0, 3.0])
    std = math.sqrt((1 + 4 + 9) / 3)
    expected = np.array([-1.0, -2.0, 0.0, 3.0]) / (std + 1e-4)
    assert_allclose(baselines(group_relative), expected, rtol=1e-5)
    assert_allclose(baselines(batch_mean), [-2.75, -3.75, 5.25, 1.25])
    expected = np.array([-2.75, -3.75, 5.25, 1.25]) * 4 / 3
    assert_allclose(baselines(partial(batch_mean, own=False)), expected, rtol=1e-6)


def test_max_entropy_pays_for_surprise():
    made = jax.tree.map(jnp.asarray, toys.experience())
    reward = jnp.zeros(made.mask.shape)
    paid = max_entropy(reward, made, temperature=0.3)
    assert_allclose(paid, -0.3 * np.where(made.mask, made.logp, 0), rtol=1e-6)


# --------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", ["GRPO", "DR_GRPO", "DAPO", "GSPO", "RLOO"])
def test_a_published_variant_is_arguments(name):
    variant = getattr(presets, name)
    batch = jax.tree.map(jnp.asarray, random_batch(Experience))
    advantage, _ = variant.advantage(batch.reward, batch.value, batch.mask, batch.prompt_id // 3)
    terms = variant.objective(Scores(logp=batch.logp), batch.replace(advantage=advantage))
    terms = terms.values() if isinstance(terms, dict) else [terms]
    assert all(np.isfinite(value_of(t)) for t in terms)
    assert "20" in variant.source


# ------------------------------------------------------------- trained: where a horizon of 2 ends


HORIZON_2 = {
    "KL inside the return": (ppo, KL(toy_chain.BETA, adaptive=False), {}, True),
    "KL of the token alone": (
        partial(combine, policy=ppo, kl=partial(reference_kl, coefficient=toy_chain.BETA)),
        KL(0.0, adaptive=False),
        {"vocab": reference_kl_vocab, "scores": ("reference",)},
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("placement", HORIZON_2)
def test_a_horizon_of_2_ends_where_dynamic_programming_says(placement):
    """KL by position: (.020, .445, .323) inside the return, (0, .298, .376) of the token alone."""
    objective, kl, fields, inside = HORIZON_2[placement]
    steps = 600
    learner = Learner(
        toy_chain.MODEL,
        objective,
        optimizer=partial(adam, learning_rate=2e-3, final=0.02, steps=8 * steps),
        epochs=2,
        minibatches=4,
        **fields,
    )

    def reward(rollout, params):
        return masked.at_last(toy_chain.reward_of(rollout.tokens) * 1.0, rollout.mask)

    params, _ = trained(
        {"policy": learner},
        steps=steps,
        key=jax.random.key(0),
        rollouts=Rollouts(
            reward, 3, value=None, kl=kl, advantage=partial(credit_horizon, horizon=2)
        ),
        prompts=prompts_of(512, bos=toy_chain.BOS),
        frozen={"reference": toy_chain.reference_params()},
        frozen_models={"reference": toy_chain.REFERENCE},
    )
    found = exact.probabilities(params["policy"], toy_chain.OUTPUTS, model=toy_chain.MODEL)
    optimum = exact.horizon_optimum(
        toy_chain.START, toy_chain.REWARD, toy_chain.OUTPUTS,
        beta=toy_chain.BETA, horizon=2, kl_in_return=inside,
    )  # fmt: skip
    known = [0.020368, 0.445386, 0.323310] if inside else [0.0, 0.297773, 0.375772]
    by_position = exact.kl_by_position(optimum, toy_chain.START, toy_chain.OUTPUTS)[1:]
    assert_allclose(by_position, known, atol=1e-6)
    assert exact.kl(found, optimum) < 5e-3
    reached = exact.kl_by_position(found, toy_chain.START, toy_chain.OUTPUTS)[1:]
    assert_allclose(reached, known, atol=0.02)
