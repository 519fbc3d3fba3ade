"""PPO with a KL penalty on 64 texts: it ends at π₀ exp(r/β)/Z, which enumeration knows.

Four tokens, three positions; π₀ is a Markov chain, and as the reference a table, not a transformer.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose

from rlhf_jax import masked, objectives, phases
from rlhf_jax.advantages import gae
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.score import score
from rlhf_jax.step import collect, update
from rlhf_jax.types import Control, Prompts, Sequences

BETA, BOS, ROWS, STEPS = 0.5, 4, 256, 350

# What follows token i (row 4: the start) in the reference: softmax of cos(1.7 i + 0.9 j).
CHAIN = np.exp(np.cos(1.7 * np.arange(5)[:, None] + 0.9 * np.arange(4)))
CHAIN /= CHAIN.sum(1, keepdims=True)
TEXTS = np.array(list(itertools.product([BOS], range(4), range(4), range(4))))
LOG_START = np.log(CHAIN[TEXTS[:, :-1], TEXTS[:, 1:]])  # [64, 3]
START = np.exp(LOG_START.sum(1))


def reward_of(tokens):
    """Twos, minus half a point for every token that repeats the one before."""
    return (tokens[:, 1:] == 2).sum(1) - 0.5 * (tokens[:, 1:] == tokens[:, :-1]).sum(1)


REWARD = reward_of(TEXTS)


def tilted(beta):
    """π₀ exp(r/β)/Z."""
    p = START * np.exp(REWARD / beta)
    return p / p.sum()


def kl(p, q):
    return (p * np.log(p / q)).sum()


def conditionals(p):
    """log p of every text's tokens given those before, [64, 3]."""
    cube = p.reshape(4, 4, 4)
    first = np.broadcast_to(cube.sum((1, 2))[:, None, None], (4, 4, 4))
    second = np.broadcast_to(cube.sum(2)[:, :, None], (4, 4, 4))
    return np.log(np.stack([first, second / first, cube / second], -1)).reshape(64, 3)


def by_position(p):
    """KL to the reference, position by position."""
    return (p[:, None] * (conditionals(p) - LOG_START)).sum(0)


def myopic():
    """Horizon 1, reward at the end only: π₀ until the last token, which is tilted by r."""
    last = np.exp(LOG_START[:, 2] + REWARD / BETA).reshape(16, 4)
    last /= last.sum(1, keepdims=True)
    return np.exp(LOG_START[:, :2].sum(1)) * last.reshape(64)


def test_enumeration_gives_the_known_numbers():
    assert_allclose((START * REWARD).sum(), 0.171913, atol=1e-6)
    optimum = tilted(BETA)
    assert_allclose((optimum * REWARD).sum(), 1.359942, atol=1e-6)
    assert_allclose(kl(optimum, START), 1.060783, atol=1e-6)
    assert_allclose(by_position(optimum), [0.436538, 0.287681, 0.336563], atol=1e-6)
    assert_allclose(by_position(myopic()), [0, 0, 0.530549], atol=1e-6)
    assert_allclose((myopic() * REWARD).sum(), 0.690357, atol=1e-6)


class FourTokens(Transformer):
    """Reads five tokens, says four: the start is never drawn."""

    def logits(self, params, hidden):
        return super().logits(params, hidden)[..., :4]


MODEL = FourTokens(vocab=5, width=32, layers=1, heads=4, kv_heads=2, mlp=64, value_head=True)
ADAM = partial(adam, learning_rate=2e-3, final=0.02, steps=STEPS * 2 * 4)
MODELS = {"policy": MODEL, "reference": toys.Table(5)}


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
    params = {"policy": learner.params, "reference": toys.markov(np.log(CHAIN), np.zeros(5))}
    experience, control, metrics = collect(
        rollout, reward, params, control, spec=rollouts, models=MODELS
    )
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

    tokens = jnp.asarray(TEXTS, jnp.int32)
    batch = Sequences(tokens, tokens != BOS, jnp.ones_like(tokens))
    logp = jax.jit(lambda params: score({"self": params}, batch, models={"self": MODEL}).logp)

    def texts(discount, seed=0):
        params, metrics = run(jax.random.key(seed), discount)
        q = np.exp(np.asarray(logp(params), np.float64).sum(1))
        assert_allclose(q.sum(), 1, atol=1e-5)
        assert metrics["rollout/mismatch"].max() < 1e-4
        return q / q.sum()

    return texts


def test_ppo_reaches_the_tilted_reference(trained):
    """KL(policy‖optimum) ≤ 2e-3 nats; six seeds ended between 5e-5 and 4e-4."""
    q = trained(1.0)
    reached = kl(q, tilted(BETA))
    assert reached <= 2e-3
    assert_allclose(by_position(q), by_position(tilted(BETA)), atol=0.01)
    # A penalty that is wrong by 5 % ends 1.7e-3 away and would be told apart.
    for wrong in (0.95 * BETA, 1.05 * BETA):
        assert kl(tilted(wrong), tilted(BETA)) > 1.6e-3
        assert kl(q, tilted(wrong)) > 2 * reached


def test_with_discount_0_only_the_last_token_learns_from_a_reward_at_the_end(trained):
    """Horizon 1: the first two positions stay the reference, the third is tilted by the reward."""
    q = trained(0.0)
    first, second, third = by_position(q)
    assert first <= 1e-3 and second <= 1e-3
    assert_allclose(third, 0.53, atol=0.03)
    assert_allclose((q * REWARD).sum(), (myopic() * REWARD).sum(), atol=0.03)
