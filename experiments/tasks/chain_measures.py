"""What a credit horizon makes of the chain: exact, on all its texts, against where it must end."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from scipy.optimize import brentq

from rlhf_jax import exact
from rlhf_jax.score import score
from rlhf_jax.study import Trained
from tasks.chain import Chain

STRETCH = 64.0  # how far beyond the policy its line from the base is followed


def horizon(
    trained: Trained, *, task: Chain, beta: float, reach: int, dense: bool, inside: bool
) -> dict[str, float | np.ndarray]:
    """Of an arm whose credit reaches `reach` tokens, its reward `dense` or at the end.

    `target` is the optimum on what the trained base says, `inside` the one with KL in the return;
    `level` the reward where KL is that of the optimum of a horizon of 1 with reward at the end.
    """
    outputs, model = task.outputs, trained.config.learners["policy"].model
    base, p = (
        exact.probabilities(tree["policy"], outputs, model=model)
        for tree in (trained.before["chain_base"], trained.weights)
    )
    reward = task.token_reward if dense else task.reward
    target = exact.horizon_optimum(
        base, reward, outputs, beta=beta, horizon=reach, kl_in_return=inside
    )
    shortest = exact.horizon_optimum(base, task.reward, outputs, beta=beta, horizon=1)
    expected, kl = float(p @ task.reward), exact.kl(p, base)
    values = {"value": _values(trained, p, task)} if "critic" in trained.weights else {}
    return values | {
        "kl": exact.kl_by_position(p, base, outputs)[1:],
        "target_kl": exact.kl_by_position(target, base, outputs)[1:],
        "distance": exact.kl(p, target),
        "reward": expected,
        "objective": expected - beta * kl,
        "best": exact.tilted_value(base, task.reward, beta=beta),
        "start": float(base @ task.reward),
        "level": reward_at(exact.kl(shortest, base), base, p, task),
    }


def reward_at(kl: float, base: np.ndarray, p: np.ndarray, task: Chain) -> float:
    """E[r] where the line from base to policy, in logits, is `kl` nats from the base.

    What a policy has learned, for the same price as another; less than the best for that price.
    """

    def above(s):
        return exact.kl(between(base, p, s, task.outputs), base) - kl

    high = 1.0
    while above(high) < 0 and high < STRETCH:
        high *= 2
    s = brentq(above, 0.0, high) if above(high) > 0 else high
    return float(between(base, p, s, task.outputs) @ task.reward)


def between(base: np.ndarray, p: np.ndarray, s: float, outputs: exact.Outputs) -> np.ndarray:
    """Token by token ∝ base^(1 − s) p^s: 0 is the base, 1 the policy."""
    mixed = (1 - s) * exact.conditionals(base, outputs) + s * exact.conditionals(p, outputs)
    total = np.zeros(len(outputs))
    for at in np.flatnonzero(outputs.mask.any(axis=0)):
        row, state = outputs.steps(at)
        score = mixed[row, at]
        log_q = score - np.log(np.bincount(state, np.exp(score)))[state]
        total += log_q[outputs.prefix[:, at + 1]]
    found = np.exp(total)
    return found / found.sum()


def _values(trained: Trained, p: np.ndarray, task: Chain) -> np.ndarray:
    """E|V| of the critic in the state before each token, under the policy."""
    critic = trained.config.learners["critic"].model
    found = _valued(trained.weights["critic"], task.outputs.batch(), model=critic)
    return p @ np.abs(np.asarray(found, np.float64))[:, 1:]


@partial(jax.jit, static_argnames="model")
def _valued(params, batch, *, model):
    return score({"self": params}, batch, models={"self": model}).value
