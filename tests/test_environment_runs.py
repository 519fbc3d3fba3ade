"""Runs with an environment, and what is answered to one that breaks its contract."""

import json
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import free_play
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_array_equal
from toy_environments import JUMPS, jump_reset, jump_step, names_of

from rlhf_jax import advantages, environment, objectives, phases, sharding
from rlhf_jax import train as training
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner, Rollouts
from rlhf_jax.data import streams, tokenizers
from rlhf_jax.environment import Environment
from rlhf_jax.inference import sample_texts
from rlhf_jax.rewards import KL, from_environment
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling

# --- what it says, while a rollout goes on


@dataclass(frozen=True)
class Words(toys.Table):
    """A table that says how many words it knows."""

    @property
    def vocab(self):
        return self.size


def _spoilt_reset(key, context):
    state, prompt = jump_reset(key, context)
    return state, jnp.where(prompt[0] == 1, jnp.stack([context["first"], -1]), prompt)


def _spoilt_step(state, token, context):
    """The jumps, but for what it says to a 3: that is, in rows that start with 1."""
    state, forced, count, reward, done = jump_step(state, token, context)
    forced = jnp.where(token == 3, context["forced"], forced)
    count = jnp.where(token == 3, context["count"], count)
    return state, forced, count, jnp.where(token == 3, context["reward"], reward), done


SPOILT = replace(JUMPS, reset=_spoilt_reset, step=_spoilt_step)
GOOD = {"first": 1, "forced": 5, "count": 2, "reward": 0.3}


@jax.jit
def spoilt(context):
    return generate(
        toys.chain(20), names_of(), jax.random.key(0), model=Words(20), length=3,
        sampling=Sampling(), environment=SPOILT, context=context,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"count": 3},
        {"count": -1},
        {"forced": 20},
        {"forced": -1},
        {"reward": np.inf},
        {"first": -1},
        {"first": 20},
        {"forced": 20, "count": 0},
    ],
    ids=str,
)
def test_what_breaks_the_contract_is_paid_with_no_number_in_its_own_row_only(change):
    """A count that does not fit, no prompt, a token that is no word, a reward that is no number."""
    right = np.asarray(spoilt(GOOD).tokens[:, 0]) != 1
    assert 0 < right.sum() < len(right)
    found = spoilt(GOOD | change)
    finite = np.isfinite(np.where(found.mask, found.earned, 0)).all(1)
    meant = not change or change.get("count") == 0  # what is not written may be anything
    assert_array_equal(finite, right | meant)
    assert found.mask.any(1).all()


# --- its shape, before one does


def _wrong(**changes):
    def step(state, token, context):
        found = dict(zip(("state", "forced", "count", "reward", "done"),
                         jump_step(state, token, context), strict=True))  # fmt: skip
        return tuple((found | changes).values())

    return {"step": step}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reset": lambda key, context: jnp.zeros(2)}, r"reset must return a tuple: state, prompt"),
        ({"prompt": 3}, r"reset must return prompt of shape \[3\], not \[2\]"),
        ({"forced": 1}, r"step must return forced of shape \[1\], not \[2\]"),
        ({"step": lambda *x: jump_step(*x)[:4]}, "tuple: state, forced, count, reward, done"),
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
    """Two steps of the key game, with the reference's weights at hand as an opponent's would be."""
    model = free_play.Player(context=16)
    game = free_play.key_game(probes=2, price=0.25)

    def step(state, token, context):
        state, forced, count, reward, done = game.step(state, token, context)
        seen = context["reference"]["embed"]["embedding"][0, 0]
        return state, forced, count, reward + 0 * seen, done

    spec = {
        "length": 3, "prompts": "episodes", "samples": 4, "value": None, "show": 2,
        "environment": replace(game, step=step, context=("reference",)),
        "kl": KL(0.1, adaptive=False), "advantage": advantages.leave_one_out,
    }  # fmt: skip
    return Config(
        "keys",
        steps=2,
        learners={"policy": Learner(model, objectives.ppo)},
        data={"episodes": partial(streams.episodes, batch=4)},
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(from_environment, **(spec | changes)),
        mesh=(1, 1, 1, 1),
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


def test_a_run_with_a_broken_environment_stops_and_shows_the_row():
    found = spoilt(GOOD | {"count": 3})
    row = int(np.argmin(np.isfinite(found.earned).all(1)))
    spec = SimpleNamespace(environment=SPOILT, policy="policy", sampling=None)
    run = SimpleNamespace(
        config=SimpleNamespace(rollouts=spec),
        phases=SimpleNamespace(reward=lambda *given: pytest.fail("it was paid")),
        tokenizer=tokenizers.load("bytes"),
    )
    with pytest.raises(
        training.RunError, match=rf"in row {row} .*outside 0 to 2\n.*tokens \[1, 2, 3"
    ):
        training.checked_reward(run, found, {})


def test_a_prompt_cannot_be_given_to_a_run_with_an_environment(tmp_path):
    with pytest.raises(ConfigError, match=r"an environment, which makes the prompts; .*samples"):
        sample_texts(run_of(), tmp_path, prompts=["hello"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"length": 8},
            r"prompts of up to 1 .*length=8 times 1 \+ 1 .* make 17, .*16; sh",
        ),
        (
            {"environment": replace(JUMPS, context=("rival",))},
            r"environment.context: there is no 'rival'; valid: policy, ref",
        ),
        ({"transform": lambda prompts, key: prompts}, r"rollouts.transform: .* reset returns"),
    ],
)
def test_an_experiment_that_cannot_be_is_answered_at_once(change, message):
    check(run_of(length=7), devices=1)
    with pytest.raises(ConfigError, match=message):
        check(run_of(**change), devices=1)


def test_an_environment_that_does_not_fit_is_found_before_the_first_step():
    broken = run_of(environment=replace(free_play.key_game(probes=2, price=0.0), forced=2))
    mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
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
