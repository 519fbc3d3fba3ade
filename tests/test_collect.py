"""From a rollout and its rewards to experience: scores, KL, and what reaches the advantages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal
from toy_environments import JUMPS

from rlhf_jax import masked, objectives
from rlhf_jax.advantages import gae
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.rewards import KL
from rlhf_jax.step import collect, evaluate, opinions
from rlhf_jax.types import Control, Rollout

TABLE = toys.Table(32)
CRITIC = toys.Table(32, value_head=True)
MODELS = {"policy": TABLE, "reference": TABLE, "critic": CRITIC}


def rollout_of(rows=16, **fields):
    made = toys.experience(rows)
    kept = {name: getattr(made, name) for name in Rollout.__dataclass_fields__}
    return Rollout(**(kept | fields))


def control_of(kl=0.0, mean=0.0, std=1.0):
    return Control(jnp.float32(kl), jnp.float32(mean), jnp.float32(std))


@pytest.fixture(scope="module")
def tables():
    """Weights by name; the critic's values are its state's."""
    rng = np.random.default_rng(0)

    return {n: toys.markov(rng.normal(size=(32, 32)), rng.normal(size=32)) for n in MODELS}


def collected(rollout, reward, tables, control=None, **spec):
    spec = {"advantage": partial(gae, trace=0.95), "kl": KL(adaptive=False)} | spec
    rollouts = Rollouts(reward=None, length=8, **spec)

    @jax.jit
    def run(rollout, reward, tables, control):
        said = opinions(rollout, tables, spec=rollouts, models=MODELS)
        return collect(rollout, reward, said, control, spec=rollouts)

    return jax.device_get(run(rollout, reward, tables, control or control_of()))


def test_tokens_between_which_an_environment_writes_are_all_scored(tables):
    """Four in every second place: with the tokens before them they are eight of twelve."""
    rollout = rollout_of(mask=np.tile(np.isin(np.arange(12), (4, 6, 8, 10)), (16, 1)))

    def said(length):
        spec = Rollouts(reward=None, length=length, environment=JUMPS)
        return jax.jit(partial(opinions, spec=spec, models=MODELS))(rollout, tables)

    jax.tree.map(partial(assert_allclose, atol=1e-6), said(4), said(12))


def last_token(score, rollout):
    return np.asarray(masked.at_last(jnp.asarray(score, jnp.float32), jnp.asarray(rollout.mask)))


def test_a_reward_of_0_7_arrives_as_0_7(tables):
    rollout = rollout_of()
    experience, _, metrics = collected(rollout, last_token(np.full(16, 0.7), rollout), tables)
    assert experience.reward.dtype == experience.advantage.dtype == np.float32
    assert_array_equal(experience.reward.sum(1), np.float32(0.7))
    assert_array_equal(experience.reward[~rollout.mask], 0.0)
    assert_allclose(metrics["rollout/reward"], np.float32(0.7), rtol=1e-6)
    assert metrics["rollout/reward_std"] < 1e-6


def test_the_rewards_sum_to_the_score_minus_beta_times_the_kl(tables):
    rollout = rollout_of()
    score = np.random.default_rng(0).normal(size=16).astype(np.float32)
    experience, control, metrics = collected(
        rollout, last_token(score, rollout), tables, control_of(kl=0.3)
    )
    kl = (experience.old_logp - experience.ref_logp).sum(1)
    assert np.abs(kl).min() > 0.01
    assert_allclose(experience.reward.sum(1), score - 0.3 * kl, atol=1e-5)
    assert_allclose(metrics["rollout/kl"], kl.mean(), rtol=1e-5)
    assert_allclose(metrics["rollout/return"], (score - 0.3 * kl).mean(), rtol=1e-4)
    assert metrics["rollout/kl_coefficient"] == control.kl_coefficient == np.float32(0.3)
    gap = np.abs(rollout.logp - experience.old_logp)[rollout.mask]
    assert_allclose(metrics["rollout/mismatch"], gap.max(), rtol=1e-6)
    assert_allclose(metrics["rollout/length"], rollout.mask.sum(1).mean(), rtol=1e-6)


def test_each_model_says_what_its_own_weights_say(tables):
    """Policy, reference and critic by hand, at the rollout's temperature."""
    rollout = rollout_of()
    experience, *_ = collected(rollout, np.zeros((16, 12), np.float32), tables)
    for name, found in (("policy", experience.old_logp), ("reference", experience.ref_logp)):
        x = np.asarray(tables[name]["head"]["kernel"], np.float64) / 0.7
        logp = x - np.log(np.exp(x).sum(1, keepdims=True))
        for row, t in np.argwhere(rollout.mask):
            expected = logp[rollout.tokens[row, t - 1], rollout.tokens[row, t]]
            assert_allclose(found[row, t], expected, atol=1e-5)
    values = np.asarray(tables["critic"]["value_head"]["kernel"])[:, 0]
    expected = np.where(rollout.mask, np.roll(values[rollout.tokens], 1, axis=1), 0)
    assert_array_equal(experience.value, expected)


def test_scoring_a_rollout_in_parts_changes_nothing(tables):
    rollout = rollout_of()
    reward = last_token(np.arange(16), rollout)
    whole = collected(rollout, reward, tables, control_of(0.1))
    parts = collected(rollout, reward, tables, control_of(0.1), microbatches=4)
    jax.tree.map(partial(assert_allclose, atol=1e-5, rtol=1e-6), parts, whole)


def test_scoring_rows_no_wider_than_they_are_changes_nothing(tables):
    rollout = rollout_of()
    reward = last_token(np.arange(16), rollout)
    whole = collected(rollout, reward, tables, control_of(0.1))
    parts = collected(rollout, reward, tables, control_of(0.1), microbatches=4, widths=(7, 10))
    jax.tree.map(partial(assert_allclose, atol=1e-5, rtol=1e-6), parts, whole)


def test_without_rescoring_the_sampler_has_the_old_log_probabilities(tables):
    """Those before filters; nobody looks at the policy's weights, and all the rest is the same."""
    rollout = rollout_of()
    rollout = rollout.replace(behaviour_logp=rollout.logp + 1)
    reward = last_token(np.arange(16), rollout)
    whole, _, _ = collected(rollout, reward, tables)
    others = {name: tables[name] for name in ("reference", "critic")}
    found, _, metrics = collected(rollout, reward, others, rescore=False)
    assert_array_equal(found.old_logp, np.where(rollout.mask, rollout.logp, 0.0))
    for name in ("ref_logp", "value", "reward", "advantage", "target"):
        assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    assert not {"rollout/entropy", "rollout/mismatch"} & set(metrics)


def test_an_adaptive_coefficient_follows_the_kl_and_a_fixed_one_does_not(tables):
    rollout = rollout_of()
    reward = np.zeros((16, 12), np.float32)
    kl = KL(adaptive=True, target=1.0, horizon=100)
    _, control, metrics = collected(rollout, reward, tables, control_of(0.3), kl=kl)
    error = np.clip(metrics["rollout/kl"] / 1.0 - 1, -0.2, 0.2)
    assert error == np.float32(0.2) or error == np.float32(-0.2)
    assert_allclose(control.kl_coefficient, 0.3 * (1 + error * 16 / 100), rtol=1e-6)
    assert metrics["rollout/kl_coefficient"] == np.float32(0.3)  # of this step


def test_normalising_and_shaping_come_before_the_kl_and_leave_the_score_metric_alone(tables):
    def shifted(reward, rollout):
        return reward + masked.at_last(jnp.ones(16), rollout.mask)

    rollout = rollout_of()
    reward = last_token(np.full(16, 5.0), rollout)
    control = control_of(kl=0.2, mean=1.0, std=2.0)
    experience, _, metrics = collected(
        rollout, reward, tables, control, normalise=8, shaping=(shifted,)
    )
    kl = (experience.old_logp - experience.ref_logp).sum(1)
    assert_allclose(experience.reward.sum(1), (5 - 1) / 2 + 1 - 0.2 * kl, atol=1e-5)
    assert_allclose(metrics["rollout/reward"], 5.0, rtol=1e-6)


def test_without_a_reference_there_is_no_kl_and_without_a_critic_no_value(tables):
    rollout = rollout_of()
    reward = last_token(np.ones(16), rollout)
    only = {"policy": tables["policy"]}
    experience, _, metrics = collected(
        rollout, reward, only, control_of(kl=0.5), reference=None, value=None
    )
    assert metrics["rollout/kl"] == 0
    assert_array_equal(experience.reward, reward)
    assert_array_equal(experience.value, 0.0)
    assert_allclose(experience.target.max(1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_before_the_first_update_the_kl_is_0_and_every_ratio_1(
    model, params, identity, temperature
):
    """Actor = reference; and the ratio with other chunks and parts than `collect` scored with."""
    heat = np.full(16, temperature, np.float32)
    experience, metrics, found = identity(rollout_of(temperature=heat))
    assert np.abs(experience.old_logp - experience.ref_logp).max() < 1e-5
    assert abs(metrics["rollout/kl"]) < 1e-5
    assert np.abs(experience.old_logp).max() > 1
    assert_allclose(found["ratio"], 1.0, atol=1e-5)
    assert found["clip_fraction"] == 0
    assert_allclose(found["kl_k3"], 0.0, atol=1e-9)


@pytest.fixture(scope="module")
def identity(model, params):
    spec = Rollouts(reward=None, length=8, value=None, kl=KL(adaptive=False))
    models = {"policy": model, "reference": model}
    learner = Learner(model, objectives.ppo, microbatches=2, chunk=24)

    @jax.jit
    def run(rollout):
        both = {"policy": params, "reference": jax.tree.map(jnp.copy, params)}
        reward = masked.at_last(jnp.ones(16), rollout.mask)
        said = opinions(rollout, both, spec=spec, models=models)
        experience, _, metrics = collect(rollout, reward, said, control_of(0.1), spec=spec)
        return experience, metrics, evaluate(params, {}, experience, learner=learner, models={})

    return lambda rollout: jax.device_get(run(rollout))
