"""Environments in the rollout: who wrote which token, who is paid for it, and what changes neither.

The key game, of which the best play is known, is proved here too: by hand, and by training.
"""

import json
from dataclasses import dataclass, replace
from functools import partial

import chex
import free_play
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import advantages, environment, objectives, phases, sharding
from rlhf_jax import train as training
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner, Rollouts, check
from rlhf_jax.data import streams
from rlhf_jax.environment import Environment
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_environment
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.score import score
from rlhf_jax.types import Prompts

ROWS, LENGTH = 16, 5


def names_of(rows=ROWS, samples=2, first=0):
    """Prompts of one token that no environment reads."""
    prompt_id, sample_id = np.divmod(first * samples + np.arange(rows, dtype=np.int32), samples)
    return Prompts(np.zeros((rows, 1), np.int32), np.ones(rows, np.int32), prompt_id, sample_id)


# --- every token known: the policy counts upwards, the environment skips some numbers


def _jump_reset(key, context):
    """1, 3, or 5 with a 0 before it."""
    start = 1 + 2 * jax.random.randint(key, (), 0, 3)
    return {}, jnp.where(start == 5, jnp.array([0, 5]), jnp.stack([start, -1]))


def _jump_step(state, token, context):
    """After a multiple of 3 two tokens, after the next number one, then none; done from 12 on."""
    count = jnp.array([2, 1, 0])[token % 3]
    forced = jnp.where(count == 2, jnp.stack([token + 2, token + 4]), token + 1)
    return state, forced, count, token / 10, token >= 12


JUMPS = Environment(_jump_reset, _jump_step, forced=2, prompt=2)
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


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"count": 3}, 0),
        ({"count": -1}, 0),
        ({"forced": 20}, 0),
        ({"forced": -1}, 0),
        ({"reward": jnp.inf}, 0),
    ],
)
def test_what_breaks_the_contract_is_paid_with_no_number_in_its_own_row_only(change, row):
    """A count that does not fit, a token that is no word, a reward that is no number."""

    def step(state, token, context):
        kept, forced, count, reward, done = _jump_step(state, token, context)
        bad = token == 3  # said in rows that start with 1
        forced = jnp.where(bad, change.get("forced", forced), forced)
        count = jnp.where(bad, change.get("count", count), count)
        return kept, forced, count, jnp.where(bad, change.get("reward", reward), reward), done

    found = generate(
        toys.chain(20), names_of(), jax.random.key(0), model=Words(20), length=3,
        sampling=Sampling(), environment=replace(JUMPS, step=step),
    )  # fmt: skip
    bad = np.asarray(found.tokens[:, 0]) == 1
    finite = np.isfinite(np.asarray(found.earned)).all(1)
    assert bad.any()
    assert_array_equal(finite, ~bad)


@dataclass(frozen=True)
class Words(toys.Table):
    """A table that says how many words it knows."""

    @property
    def vocab(self):
        return self.size


@pytest.mark.parametrize("prompt", [[-1, -1], [-1, 4], [20, -1]])
def test_a_prompt_that_is_none_is_paid_with_no_number(prompt):
    broken = replace(JUMPS, reset=lambda key, context: ({}, jnp.array(prompt)))
    found = generate(
        toys.chain(20), names_of(2), jax.random.key(0), model=Words(20), length=1,
        sampling=Sampling(), environment=broken,
    )  # fmt: skip
    assert np.isnan(found.earned[found.mask]).all() and found.mask.any(1).all()


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


# --- an opponent that is a model


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
    one, split = talk(weights), talk(weights, (2, 2, 2))
    assert_array_equal(split.tokens, one.tokens)
    assert_array_equal(split.mask, one.mask)
    assert_allclose(split.logp, one.logp, atol=1e-5)
    assert_array_equal(split.earned, one.earned)


def test_an_opponents_rows_stay_on_their_devices():
    """Each device computes for the rows that it holds, and for no other's."""
    mesh = sharding.make_mesh((8, 1, 1))
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


# --- mistakes


def _wrong(**changes):
    def step(state, token, context):
        found = dict(zip(("state", "forced", "count", "reward", "done"),
                         _jump_step(state, token, context), strict=True))  # fmt: skip
        return tuple((found | changes).values())

    return {"step": step}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reset": lambda key, context: jnp.zeros(2)}, r"reset must return a tuple: state, prompt"),
        ({"prompt": 3}, r"reset must return prompt of shape \[3\], not \[2\]"),
        ({"forced": 1}, r"step must return forced of shape \[1\], not \[2\]"),
        ({"step": lambda *x: _jump_step(*x)[:4]}, "tuple: state, forced, count, reward, done"),
        (_wrong(reward=np.zeros(1)), r"step must return reward of shape \[\], not \[1\]"),
        (_wrong(count=np.zeros(2)), r"count of shape \[\], not \[2\]"),
        (_wrong(done=np.zeros(2, bool)), r"done of shape \[\], not \[2\]"),
        (_wrong(state={"a": 1}), "state of the structure that it was given"),
    ],
)
def test_an_environment_of_another_shape_is_answered_before_anything_runs(change, message):
    with pytest.raises(ValueError, match=message):
        environment.check(replace(JUMPS, **change), {})


def test_a_state_that_changes_its_type_is_shown():
    def reset(key, context):
        return {"gold": jnp.int32(0)}, jnp.array([1])

    def step(state, token, context):
        return {"gold": state["gold"] + 0.5}, jnp.zeros(0, jnp.int32), 0, 0.0, False

    with pytest.raises(ValueError, match=r"state\['gold'\] was int32\[\] and became float32\[\]"):
        environment.check(Environment(reset, step, forced=0, prompt=1), {})


@pytest.mark.parametrize("change", [{"forced": -1}, {"prompt": 0}])
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=r"must be at least"):
        replace(JUMPS, **change)


# --- whole runs


def run_of(**changes):
    """Two steps of the key game, in which the reference has a say: it is asked for its opinion."""
    model = free_play.Player(vocab=8, context=16)
    spec = {
        "length": 3, "prompts": "episodes", "samples": 4, "value": None, "show": 2,
        "environment": replace(free_play.key_game(probes=2, price=0.25), context=("reference",)),
        "kl": KL(0.1, adaptive=False), "advantage": advantages.leave_one_out,
    }  # fmt: skip
    return Config(
        "keys",
        steps=2,
        learners={"policy": Learner(model, objectives.ppo)},
        data={"episodes": partial(streams.episodes, batch=4)},
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(from_environment, **(spec | changes)),
        mesh=(1, 1, 1),
    )


def test_a_run_plays_learns_and_shows_what_was_said_by_whom(tmp_path):
    training.train(run_of(), tmp_path, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["rollout/length"] == 3 and row["rollout/ended"] == 1
        assert row["rollout/mismatch"] < 1e-4 and -0.5 <= row["rollout/reward"] <= 1
        assert np.isfinite(row["policy/grad_norm"])
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4  # 2, first and last


def test_a_run_with_a_broken_environment_stops_and_shows_the_row(tmp_path):
    def step(state, token, context):
        kept, forced, _, reward, done = whole.step(state, token, context)
        return kept, forced, 2, reward, done

    whole = run_of().rollouts.environment
    config = run_of(environment=replace(whole, step=step))
    with pytest.raises(
        training.RunError, match=r"rollouts.environment: in row 0 .*count outside 0"
    ):
        training.train(config, tmp_path, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"length": 8},
            r"prompts of up to 1 .*length=8 times 1 \+ 1 tokens make 17, .*16; shorten",
        ),
        ({"environment": TALK}, r"environment.context: there is no 'opponent'; valid: policy, ref"),
        ({"transform": lambda prompts, key: prompts}, r"rollouts.transform: .* reset returns"),
    ],
)
def test_an_experiment_that_cannot_be_is_answered_at_once(change, message):
    check(run_of(length=7), devices=1)
    with pytest.raises(ConfigError, match=message):
        check(run_of(**change), devices=1)


def test_an_environment_that_does_not_fit_is_found_before_the_first_step():
    broken = run_of(environment=replace(free_play.key_game(probes=2, price=0.0), forced=2))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    with pytest.raises(ValueError, match=r"forced of shape \[2\], not \[1\]"):
        phases.build(broken, mesh)


def test_episodes_are_names_that_count_up_on_any_number_of_processes():
    def take(n, **options):
        stream = iter(streams.episodes(**({"seed": 0, "shard": (0, 1), "batch": 4} | options)))
        return [next(stream) for _ in range(n)]

    whole = take(3)
    assert_array_equal(np.concatenate([x.prompt_id for x in whole]), np.arange(12))
    for batch in whole:
        assert_array_equal(batch.tokens, np.zeros((4, 1)))
        assert_array_equal(batch.length, 1)
        assert_array_equal(batch.sample_id, 0)
    halves = zip(take(3, shard=(0, 2)), take(3, shard=(1, 2)), strict=True)
    for batch, (one, other) in zip(whole, halves, strict=True):
        assert_array_equal(batch.prompt_id, np.concatenate([one.prompt_id, other.prompt_id]))


# --- the key game: what is best, and that it is found


def break_even(keys, probes):
    """The price above which no question is worth asking, by bisection on the optimum."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        worth = free_play.optimum(keys=keys, probes=probes, price=middle) > 1 / keys + 1e-12
        low, high = (middle, high) if worth else (low, middle)
    return low


@pytest.mark.parametrize(
    ("keys", "probes"), [(4, 1), (4, 2), (4, 3), (6, 4), (10, 1)], ids=lambda x: str(x)
)
def test_questions_are_worth_asking_below_one_over_k_minus_half_of_n_minus_one(keys, probes):
    assert_allclose(break_even(keys, probes), 1 / (keys - (probes - 1) / 2), atol=1e-9)
    free = free_play.optimum(keys=keys, probes=probes, price=0.0)
    assert_allclose(free, min((probes + 1) / keys, 1))


@pytest.mark.parametrize(
    ("price", "value"), [(0.0, 1.0), (0.2, 0.55), (0.3, 0.325), (0.35, 0.25), (0.4, 0.25)]
)
def test_the_best_player_of_four_keys_and_three_questions_earns_what_is_known(price, value):
    """By dynamic programming, and by playing: ask for 0, 1, 2 until a HIT; commit to what is left.

    One of four keys is found with each question, the fourth needs none more: 9/4 questions.
    """
    assert_allclose(free_play.optimum(keys=4, probes=3, price=price), value, atol=1e-12)
    if price > break_even(4, 3):
        return
    game, passes = free_play.key_game(probes=3, price=price), 4
    earned = []
    for right in range(4):
        state, known, total = {"right": jnp.int32(right), "slot": jnp.int32(0)}, None, 0.0
        for guess in range(3):
            said = guess if known is None else passes
            state, forced, count, reward, done = game.step(state, jnp.int32(said), {})
            assert bool(count) == (known is None) and not done
            known = guess if count and forced[0] == 5 else known  # 5: HIT
            total += float(reward)
        *_, count, reward, done = game.step(state, jnp.int32(3 if known is None else known), {})
        assert done and not count
        earned.append(total + float(reward))
    assert_allclose(np.mean(earned), value, atol=1e-6)


PLAYER = free_play.Player()


def player(*, price, probes=2, advantage=advantages.leave_one_out, shaping=(), model=PLAYER,
           answers=True, seed=0, steps=200):  # fmt: skip
    """Exact success and expected questions of a trained policy, after 200 steps of 32 × 8 games."""
    learner = Learner(
        model,
        objectives.ppo,
        optimizer=partial(adam, learning_rate=3e-3, final=0.02, steps=2 * steps),
        minibatches=2,
    )
    rollouts = Rollouts(
        from_environment,
        length=probes + 1,
        environment=free_play.key_game(probes=probes, price=price, answers=answers),
        reference=None,
        value=None,
        kl=KL(0.0, adaptive=False),
        shaping=shaping,
        advantage=advantage,
    )
    weights, metrics = loop.trained(
        {"policy": learner},
        steps=steps,
        key=jax.random.key(seed),
        rollouts=rollouts,
        prompts=loop.prompts_of(256, 8),
    )
    assert metrics["rollout/mismatch"].max() < 1e-4
    return free_play.outcomes(model, weights["policy"], probes=probes, answers=answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "success", "questions"),
    [
        ({"price": 0.0}, 0.75, 2.0),
        ({"price": 0.4}, 0.25, 0.0),
    ],
    ids=["free", "priced"],
)
def test_a_policy_learns_to_ask_where_asking_is_free_and_not_where_it_costs_too_much(
    arm, success, questions
):
    """Twelve trainings ended within .003 of success and .005 of questions."""
    found = player(**arm)
    assert_allclose(found[0], success, atol=0.02)
    assert_allclose(found[1], questions, atol=0.05)
