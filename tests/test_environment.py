"""Environments in the rollout: who wrote a token, who is paid, and what changes no sample."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal
from toy_environments import JUMPS, names_of

from rlhf_jax import environment
from rlhf_jax.environment import Environment
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score

ROWS, LENGTH = 16, 5


# --- every token known: the policy counts upwards, the environment skips some numbers


WORKED = {  # start: text, where the policy spoke, did it end within four tokens
    1: ([1, 2, 3, 5, 7, 8, 9, 11, 13], [1, 2, 5, 6], False),
    3: ([3, 4, 5, 6, 8, 10, 11, 12, 14, 16], [1, 3, 6, 7], True),
    0: ([0, 5, 6, 8, 10, 11, 12, 14, 16], [2, 5, 6], True),
}


@partial(jax.jit, static_argnames=("environment", "length"))
def _count_up(prompts, stop, *, environment, length):
    settings = Sampling(stop=stop)
    return generate(
        toys.chain(20), prompts, jax.random.key(0), model=toys.Table(20), length=length,
        sampling=settings, pad=9, environment=environment,
    )  # fmt: skip


def count_up(stop=-1, environment=JUMPS, length=4):
    return jax.device_get(_count_up(names_of(), (stop,), environment=environment, length=length))


def assert_row(rollout, row, text, spoken):
    used = len(text)
    assert_array_equal(rollout.tokens[row, :used], text)
    assert_array_equal(rollout.tokens[row, used:], 9)
    assert_array_equal(rollout.segments[row], np.arange(14) < used)
    assert_array_equal(np.flatnonzero(rollout.mask[row]), spoken)
    paid = np.zeros(14, np.float32)
    paid[spoken] = np.array(text, np.float32)[spoken] / 10
    assert_allclose(rollout.earned[row], paid, rtol=1e-6)


def test_forced_tokens_stand_behind_the_one_that_caused_them_outside_the_mask():
    rollout = count_up()
    assert set(rollout.tokens[:, 0]) == set(WORKED)
    for row, start in enumerate(rollout.tokens[:, 0]):
        text, spoken, ended = WORKED[int(start)]
        assert_row(rollout, row, text, spoken)
        assert rollout.ended[row] == ended
    assert_allclose(rollout.logp, 0, atol=1e-6)  # the model was asked with the last forced token


def test_a_stop_id_ends_a_row_after_what_the_environment_says_to_it():
    rollout = count_up(stop=6)
    ends = {1: 9, 3: 6, 0: 5}  # tokens of text: behind the 6 stand 8 and 10
    places = {1: 4, 3: 2, 0: 1}
    for row, start in enumerate(rollout.tokens[:, 0]):
        text, spoken, _ = WORKED[int(start)]
        assert_row(rollout, row, text[: ends[int(start)]], spoken[: places[int(start)]])
        assert rollout.ended[row] == (start != 1)


@pytest.mark.parametrize("k", [0, 2])
def test_an_environment_that_says_nothing_changes_no_sample(k):
    """Nor do the tokens it could have said, or its pay."""

    def reset(key, context):
        return key, jnp.array([3, 1, -1])

    def step(state, token, context):
        return state, jnp.zeros(k, jnp.int32), 0, 1.0, False

    flat = toys.markov(np.random.default_rng(0).normal(size=(12, 12)))
    names = names_of()
    given = names.replace(tokens=np.tile([[3, 1, 0]], (ROWS, 1)), length=names.length + 1)
    run = partial(generate, flat, model=toys.Table(12), length=7, sampling=Sampling(stop=(5,)))
    plain = jax.jit(run)(given, jax.random.key(4))
    asked = Environment(reset, step, forced=k, prompt=3)
    found = jax.jit(partial(run, environment=asked))(names, jax.random.key(4))
    for name in ("tokens", "mask", "segments", "logp", "behaviour_logp"):
        assert_array_equal(getattr(found, name)[:, :10], getattr(plain, name), err_msg=name)
        assert not np.asarray(getattr(found, name)[:, 10:]).any()
    assert_array_equal(found.ended, plain.ended)
    assert_array_equal(found.earned[:, :10], plain.mask.astype(np.float32))
    assert_array_equal(plain.earned, 0.0)


# --- chance in every place, and a transformer as the policy


def _dice_reset(key, context):
    key, width, words = jax.random.split(key, 3)
    prompt = jax.random.randint(words, (3,), 1, 32)
    used = jax.random.randint(width, (), 1, 4)
    return {"key": key}, jnp.where(jnp.arange(3) < used, prompt, -1)


def _dice_step(state, token, context):
    key, many, words, pay, end = jax.random.split(state["key"], 5)
    forced = jax.random.randint(words, (2,), 1, 32) ^ (token % 2)
    done = jax.random.uniform(end) < 0.1
    return (
        {"key": key}, forced, jax.random.randint(many, (), 0, 3),
        context["scale"] * jax.random.normal(pay), done,
    )  # fmt: skip


DICE = Environment(_dice_reset, _dice_step, forced=2, prompt=3)


def replayed(asked, context, key, rollout):
    """The texts, written down row by row in plain Python from what the policy said."""
    reset, step = jax.jit(asked.reset), jax.jit(asked.step)
    capacity = rollout.tokens.shape[1]
    tokens, mask, earned = (np.zeros(rollout.tokens.shape, x) for x in (np.int32, bool, np.float32))
    segments, ended = np.zeros_like(tokens), np.zeros(len(tokens), bool)
    for row, name in enumerate(rollout.prompt_id):
        own = jax.random.fold_in(jax.random.fold_in(key, name), environment.OF_ENVIRONMENT)
        state, prompt = reset(own, context)
        text = [int(x) for x in prompt if x >= 0]
        for said in rollout.tokens[row][rollout.mask[row]]:
            assert not ended[row]
            state, forced, count, reward, done = step(state, said, context)
            mask[row, len(text)], earned[row, len(text)] = True, reward
            text += [int(said), *forced[:count].tolist()]
            ended[row] = done
        assert ended[row] or mask[row].sum() == LENGTH
        tokens[row], segments[row] = (
            text + [0] * (capacity - len(text)),
            np.arange(capacity) < len(text),
        )
    return {"tokens": tokens, "mask": mask, "earned": earned, "segments": segments, "ended": ended}


@pytest.fixture(scope="module")
def dice(model, params):
    """Rollouts with dice: the one compiled sampler of several tests."""

    @chex.assert_max_traces(n=1)
    def once(prompts, key, scale):
        return generate(
            params, prompts, key, model=model, length=LENGTH, sampling=Sampling(0.8),
            environment=DICE, context={"scale": scale},
        )  # fmt: skip

    compiled = jax.jit(once)
    return lambda prompts, scale=1.0: jax.device_get(compiled(prompts, jax.random.key(5), scale))


def test_a_rollout_is_what_python_writes_down_turn_by_turn(dice):
    found = dice(names_of())
    expected = replayed(DICE, {"scale": 1.0}, jax.random.key(5), found)
    for name, x in expected.items():
        assert_allclose(getattr(found, name), x, atol=1e-6, err_msg=name)
    holes = (found.segments > 0) & ~found.mask & (np.cumsum(found.mask, 1) > 0)
    assert holes.any(1).sum() > 10 and len(set(found.segments.sum(1))) > 4
    assert found.ended.any() and not found.ended.all()


def test_the_sampler_and_the_trainer_agree_on_logp_between_holes(dice, model, params):
    found = dice(names_of())
    logp = jax.jit(lambda r: score({"self": params}, r, models={"self": model}).logp)(found)
    assert_allclose(found.logp, logp, atol=1e-4)
    assert (found.logp[found.mask] < -0.1).mean() > 0.8


def test_samples_of_one_prompt_meet_one_problem_and_another_prompt_another(dice):
    found = dice(names_of())
    prompt = np.where(np.cumsum(found.mask, 1) > 0, 0, found.tokens)[:, :3]
    assert_array_equal(prompt[::2], prompt[1::2])
    assert len({tuple(x) for x in prompt.tolist()}) == ROWS // 2
    assert (found.tokens[::2] != found.tokens[1::2]).any(1).all()


def test_neither_the_order_of_rows_nor_strangers_change_a_sample(dice):
    whole = dice(names_of())
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = dice(jax.tree.map(lambda x: x[order], names_of()))
    strangers = dice(
        jax.tree.map(lambda a, b: np.concatenate([a[8:], b[8:]]), names_of(), names_of(first=70))
    )
    for name in ("tokens", "mask", "earned", "ended"):
        assert_array_equal(getattr(shuffled, name), getattr(whole, name)[order])
        assert_array_equal(getattr(strangers, name)[:8], getattr(whole, name)[8:])


def test_a_context_takes_effect_without_compiling_again(dice):
    """`dice` allows one trace."""
    one, other = dice(names_of(), 1.0), dice(names_of(), 3.0)
    assert_array_equal(one.tokens, other.tokens)
    assert_allclose(3 * one.earned, other.earned, rtol=1e-5)
    assert np.abs(one.earned).sum() > 1
