"""The key game: what is best in it, and that policies learn it. See `free_play.py`."""

from functools import partial

import free_play
import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax import advantages, objectives
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
