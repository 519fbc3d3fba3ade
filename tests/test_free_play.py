"""The key game: what is best in it, and that policies learn it. See `free_play.py`."""

from functools import partial

import free_play
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax import advantages, objectives, rewards
from rlhf_jax.config import Learner, Rollouts
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_environment


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
    game, words = free_play.key_game(probes=3, price=price), free_play.Words(4)
    hit, miss, nothing, _ = words.heard
    earned = []
    for right in range(4):
        state, known, total = {"right": jnp.int32(right), "slot": jnp.int32(0)}, None, 0.0
        for guess in range(3):
            said, expected = words.passes, nothing
            if known is None:
                said, expected = guess, hit if guess == right else miss
            state, forced, count, reward, done = game.step(state, jnp.int32(said), {})
            assert forced[0] == expected and count == 1 and not done
            known = guess if forced[0] == hit else known
            total += float(reward)
        commit = jnp.int32(5 + (3 if known is None else known))
        *_, count, reward, done = game.step(state, commit, {})
        assert done and not count
        earned.append(total + float(reward))
    assert_allclose(np.mean(earned), value, atol=1e-6)


def test_what_blind_questions_are_worth_is_known():
    assert_allclose(free_play.blind(keys=4, probes=2), 0.6875)
    assert_allclose(free_play.blind(keys=4, probes=3), 0.828125)
    assert_allclose(free_play.blind(keys=4, probes=3, passing=0.9), 0.323141, atol=1e-6)


def trained(advantage=advantages.leave_one_out, shaping=(), *, price=0.0, steps=200, **model):
    """Exact success and expected questions of a policy after 200 steps of 32 keys × 8 games."""
    player = free_play.Player(**model)
    learner = Learner(
        player,
        objectives.ppo,
        optimizer=partial(adam, learning_rate=3e-3, final=0.02, steps=2 * steps),
        minibatches=2,
    )
    rollouts = Rollouts(
        from_environment,
        length=player.probes + 1,
        environment=free_play.key_game(probes=player.probes, price=price, answers=player.answers),
        reference=None,
        value=None,
        kl=KL(0.0, adaptive=False),
        shaping=shaping,
        advantage=advantage,
    )
    weights, metrics = loop.trained(
        {"policy": learner},
        steps=steps,
        key=jax.random.key(0),
        rollouts=rollouts,
        prompts=loop.prompts_of(256, 8),
    )
    assert metrics["rollout/mismatch"].max() < 1e-4
    return free_play.outcomes(player, weights["policy"])


ESSAY = {"shaping": (partial(rewards.free_play, tokens=2),)}
STOPPED = {"advantage": partial(advantages.free_play, advantage=advantages.leave_one_out, tokens=2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "success", "fewest", "most"),
    [
        ({"price": 0.4} | ESSAY, 0.75, 1.75, 2.0),
        ({"price": 0.4}, 0.25, 0.0, 0.0),
        ({"passing": -30.0, "steps": 300} | STOPPED, 0.6875, 2.0, 2.0),
        ({"answers": False}, 0.25, 0.0, 2.0),
    ],
    ids=["free", "priced", "stopped", "pauses"],
)
def test_play_is_learned_if_credit_reaches_it_and_it_costs_nothing(arm, success, fewest, most):
    """Where a question costs more than it is worth, none is asked; while it is free, all are.

    After a HIT the next one may be left out, so that 7/4 are enough. Where gradients are stopped
    instead, questions stay what they were, even, and the policy learns to use what it hears.
    Pauses, in which no one answers, teach nothing.
    """
    found = trained(**arm)
    assert_allclose(found[0], success, atol=0.02)
    assert fewest - 0.05 <= found[1] <= most + 0.05
