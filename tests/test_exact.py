"""PPO with a KL penalty on 64 texts: it ends at π₀ exp(r/β)/Z, which enumeration knows."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose
from toy_chain import (
    BETA,
    BOS,
    MODEL,
    OUTPUTS,
    REFERENCE,
    REWARD,
    START,
    reference_params,
    reward_of,
)

from rlhf_jax import exact, masked, objectives, phases
from rlhf_jax.advantages import gae
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.step import collect, opinions, update
from rlhf_jax.types import Control, Prompts

ROWS, STEPS = 256, 350
ADAM = partial(adam, learning_rate=2e-3, final=0.02, steps=STEPS * 2 * 4)
MODELS = {"policy": MODEL, "reference": REFERENCE}


def step(state, key, discount):
    """From prompts to the next policy, as a run does it: sample, reward, collect, update."""
    learner, control = state
    parts = {
        "policy": objectives.ppo,
        "value": partial(objectives.value, clip=None, coefficient=0.3),
    }
    spec = Learner(
        MODEL,
        partial(objectives.combine, **parts),
        optimizer=ADAM,
        epochs=2,
        minibatches=4,
    )

    def advantage(reward, value, mask, prompt_id):
        """GAE at discount 1 or 0, one program for both; whitened."""
        some = [gae(reward, value, mask, discount=d, trace=0.95) for d in (0.0, 1.0)]
        raw, target = jax.tree.map(lambda a, b: jnp.where(discount > 0, b, a), *some)
        return masked.whiten(raw, mask), target

    rollouts = Rollouts(
        reward=None, length=3, value="policy", kl=KL(BETA, adaptive=False), advantage=advantage
    )
    row = jnp.arange(ROWS)
    prompts = Prompts(jnp.full((ROWS, 1), BOS), jnp.ones_like(row), row, jnp.zeros_like(row))
    drawn, shuffled = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    rollout = generate(learner.params, prompts, drawn, model=MODEL, length=3, sampling=Sampling())
    reward = masked.at_last(reward_of(rollout.tokens).astype(jnp.float32), rollout.mask)
    params = {"policy": learner.params, "reference": reference_params()}
    said = opinions(rollout, params, spec=rollouts, models=MODELS)
    experience, control, metrics = collect(rollout, reward, said, control, spec=rollouts)
    learner, _ = update(learner, {}, experience, shuffled, learner=spec, models=MODELS)
    return (learner, control), metrics


@pytest.fixture(scope="module")
def trained():
    """`discount -> the probability of each text after training`, one compiled program for all."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})  # it runs for long
    def run(key, discount):
        start = phases.init_learner(key, learner=Learner(MODEL, None, optimizer=ADAM))
        state = start, Control(jnp.float32(BETA), jnp.float32(0), jnp.float32(1))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(STEPS))
        (learner, _), metrics = jax.lax.scan(lambda s, k: step(s, k, discount), state, keys)
        return learner.params, metrics

    def texts(discount, seed=0):
        params, metrics = run(jax.random.key(seed), discount)
        assert metrics["rollout/mismatch"].max() < 1e-4
        return exact.probabilities(params, OUTPUTS, model=MODEL)

    return texts


def tilted(beta):
    return exact.tilted(START, REWARD, beta=beta)


def by_position(q):
    return exact.kl_by_position(q, START, OUTPUTS)[1:]


def test_ppo_reaches_the_tilted_reference(trained):
    """KL(policy‖optimum) ≤ 2e-3 nats; six seeds ended between 5e-5 and 4e-4."""
    q = trained(1.0)
    reached = exact.kl(q, tilted(BETA))
    assert reached <= 2e-3
    assert_allclose(by_position(q), by_position(tilted(BETA)), atol=0.01)
    # A penalty that is wrong by 5 % ends 1.7e-3 away and would be told apart.
    for wrong in (0.95 * BETA, 1.05 * BETA):
        assert exact.kl(tilted(wrong), tilted(BETA)) > 1.6e-3
        assert exact.kl(q, tilted(wrong)) > 2 * reached


def test_with_discount_0_only_the_last_token_learns_from_a_reward_at_the_end(trained):
    """Horizon 1: the first two positions stay the reference, the third is tilted by the reward."""
    q = trained(0.0)
    first, second, third = by_position(q)
    assert first <= 1e-3 and second <= 1e-3
    assert_allclose(third, 0.53, atol=0.03)
    myopic = exact.horizon_optimum(START, REWARD, OUTPUTS, beta=BETA, horizon=1)
    assert_allclose(q @ REWARD, myopic @ REWARD, atol=0.03)
