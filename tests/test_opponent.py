"""An opponent that is a model: it answers inside the rollout, and its weights are arguments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal
from toy_environments import names_of

from rlhf_jax import environment, sharding
from rlhf_jax.environment import Environment
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling

LENGTH = 5
OPPONENT = Transformer(vocab=32, width=16, layers=1, heads=2, kv_heads=1, mlp=32, context=32)


def _talk_reset(key, context):
    prompt = jax.random.randint(key, (2,), 1, 32)
    history = jnp.zeros(2 + 2 * LENGTH, jnp.int32).at[:2].set(prompt)
    return (history, jnp.int32(2)), prompt


def _talk_step(state, token, context):
    """The opponent reads everything and says what it thinks most likely."""
    history, end = state
    history = history.at[end].set(token)
    hidden = OPPONENT.apply(context["opponent"], history[None]).hidden[0, end]
    said = jnp.argmax(OPPONENT.logits(context["opponent"], hidden)).astype(jnp.int32)
    reward = jnp.where(said == token, 1.0, 0.0)
    return (history.at[end + 1].set(said), end + 2), said[None], 1, reward, False


TALK = Environment(_talk_reset, _talk_step, forced=1, prompt=2, context=("opponent",))


@pytest.fixture(scope="module")
def talk(model, params):
    """`opponent's weights, mesh -> rollout`; one trace a mesh."""

    @chex.assert_max_traces(n=2)
    def once(params, prompts, opponent):
        return generate(
            params, prompts, jax.random.key(7), model=model, length=LENGTH,
            sampling=Sampling(), environment=TALK, context={"opponent": opponent},
        )  # fmt: skip

    compiled = jax.jit(once)

    def run(opponent, shape=None):
        if shape is None:
            return jax.device_get(compiled(params, names_of(), opponent))
        mesh = sharding.make_mesh(shape)
        with jax.set_mesh(mesh):
            prompts = jax.device_put(names_of(), sharding.rows(mesh))
            trees = jax.device_put((params, opponent), sharding.shardings((params, opponent), mesh))
            return jax.device_get(compiled(trees[0], prompts, trees[1]))

    return run


def test_an_opponent_reads_the_text_and_answers_and_may_be_another_one(talk):
    """`talk` allows one trace here."""
    found = {}
    for seed in (0, 1):
        weights = toys.weights(OPPONENT, seed)
        rollout = found[seed] = talk(weights)
        hidden = OPPONENT.apply(weights, rollout.tokens).hidden
        likeliest = np.asarray(OPPONENT.logits(weights, hidden).argmax(-1))
        assert_array_equal(rollout.mask.sum(1), LENGTH)
        assert_array_equal(np.flatnonzero(rollout.mask[0]), 2 + 2 * np.arange(LENGTH))
        assert_array_equal(rollout.tokens[:, 3::2], likeliest[:, 2::2][:, :LENGTH])
        assert_array_equal(rollout.earned[:, 2::2], rollout.tokens[:, 2::2] == likeliest[:, 2::2])
    assert_array_equal(found[0].tokens[:, :3], found[1].tokens[:, :3])
    assert (found[0].tokens[:, 3:] != found[1].tokens[:, 3:]).any(1).all()


def test_a_mesh_draws_the_same_tokens_with_an_opponent(talk):
    weights = toys.weights(OPPONENT, 0)
    one, split = talk(weights), talk(weights, (2, 2, 2, 1))
    assert_array_equal(split.tokens, one.tokens)
    assert_array_equal(split.mask, one.mask)
    assert_allclose(split.logp, one.logp, atol=1e-5)
    assert_array_equal(split.earned, one.earned)


def test_an_opponents_rows_stay_on_their_devices():
    """Each device computes for the rows that it holds, and for no other's."""
    mesh = sharding.make_mesh((8, 1, 1, 1))
    rows, same = sharding.rows(mesh), sharding.replicated(mesh)
    weights = jax.eval_shape(OPPONENT.init, jax.random.key(0))
    state = jax.eval_shape(
        jax.vmap(lambda i: _talk_reset(jax.random.key(i), {})[0]), jnp.arange(64)
    )
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda w, s, t: environment.answer(TALK, {"opponent": w}, s, t, vocab=32),
            in_shardings=(same, rows, rows), out_shardings=rows,
        )  # fmt: skip
        token = jax.ShapeDtypeStruct((64,), jnp.int32)
        program = run.lower(weights, state, token).compile().as_text()
    assert "all-gather" not in program and "all-reduce" not in program
    assert "all-to-all" not in program and "collective-permute" not in program
