"""Measures of distributions over enumerated texts: entropy, divergences, values, credit.

`p [n]` is a distribution over the texts of an `Outputs`, `reward` is `[n]`, or `[n, t]` by token.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from rlhf_jax.exact.outputs import Outputs


def conditionals(p: Float[np.ndarray, "n"], outputs: Outputs) -> Float[np.ndarray, "n t"]:
    """Of each token given those before it: log p, 0 outside the mask; −inf where p says neither."""
    p = distribution(p, len(outputs))
    mass = np.stack([np.bincount(x, p)[x] for x in outputs.prefix.T], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(mass[:, 1:] > 0, np.log(mass[:, 1:]) - np.log(mass[:, :-1]), -np.inf)
    return np.where(outputs.mask, np.minimum(found, 0.0), 0.0)


def entropy(p: Float[np.ndarray, "n"]) -> float:
    """−Σ p log p, nats per text."""
    p = distribution(p)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def kl(p: Float[np.ndarray, "n"], q: Float[np.ndarray, "n"]) -> float:
    """KL(p‖q) = Σ p log(p/q), nats per text; inf where p says what q cannot."""
    p = distribution(p)
    q = distribution(q, len(p))
    possible = p > 0
    p, q = p[possible], q[possible]
    return float((p * (np.log(p) - np.log(q))).sum()) if (q > 0).all() else float("inf")


def kl_by_position(
    p: Float[np.ndarray, "n"], q: Float[np.ndarray, "n"], outputs: Outputs
) -> Float[np.ndarray, "t"]:
    """E_p KL(p(·|prefix)‖q(·|prefix)) of each token, nats; the sum over tokens is `kl(p, q)`."""
    p = distribution(p, len(outputs))
    q, possible = conditionals(q, outputs), p > 0
    gap = conditionals(p, outputs)[possible] - q[possible]
    return (p[possible, None] * gap).sum(axis=0)


def kl_between_and_within(
    p: Float[np.ndarray, "n"], q: Float[np.ndarray, "n"], statistic: Float[np.ndarray, "n"]
) -> tuple[float, float]:
    """KL(p‖q) as KL of the statistic's distributions + E KL among texts of one level (chain rule).

    With the reward as the statistic, the second part is what a method changes for nothing.
    """
    between = kl(levels(p, statistic)[1], levels(q, statistic)[1])
    return between, kl(p, q) - between


def levels(
    p: Float[np.ndarray, "n"], statistic: Float[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """The values a statistic takes, ascending, and their probabilities; equal to 9 decimals."""
    value, index = np.unique(np.round(statistic, 9), return_inverse=True)
    return value, np.bincount(index, distribution(p, len(index)))


def state_values(
    p: Float[np.ndarray, "n"], reward: np.ndarray, outputs: Outputs
) -> Float[np.ndarray, "n t"]:
    """V(state before token t) = E_p[what is still to come | prefix]; 0 outside the mask.

    States that p never reaches have value 0.
    """
    p, reward = distribution(p, len(outputs)), token_rewards(reward, outputs)
    to_come = np.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
    found = [_mean(p, to_come[:, i], x) for i, x in enumerate(outputs.prefix.T[:-1])]
    return np.where(outputs.mask, np.stack(found, axis=1), 0.0)


def advantages(
    p: Float[np.ndarray, "n"], reward: np.ndarray, outputs: Outputs
) -> Float[np.ndarray, "n t"]:
    """A = r + V′ − V under p itself: a martingale's steps, so that Var(R) = Σ_t E A_t².

    The credit that each token truly deserves: 0 for one that does not matter.
    """
    reward, value = token_rewards(reward, outputs), state_values(p, reward, outputs)
    later = np.pad(value[:, 1:], ((0, 0), (0, 1)))
    return np.where(outputs.mask, reward + later - value, 0.0)


def token_rewards(reward: np.ndarray, outputs: Outputs) -> Float[np.ndarray, "n t"]:
    """Rewards by token; one number per text lands on its last token.

    Raises:
        ValueError: if the shape is neither [n] nor [n, t], or a token's reward depends on what
            comes after it.
    """
    reward, mask = np.asarray(reward, np.float64), outputs.mask
    if reward.shape == mask.shape[:1]:
        last = mask & (np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
        return np.where(last, reward[:, None], 0.0)
    if reward.shape != mask.shape:
        raise ValueError(
            f"a reward is one number per text [{len(mask)}] or one per token {list(mask.shape)}; "
            f"this one is {list(reward.shape)}"
        )
    reward = np.where(mask, reward, 0.0)
    for at in range(mask.shape[1]):
        row, _ = outputs.steps(at)
        wrong = ~np.isclose(reward[:, at], reward[row, at][outputs.prefix[:, at + 1]])
        if wrong.any():
            text = outputs.tokens[np.flatnonzero(wrong)[0], : at + 1].tolist()
            raise ValueError(
                f"the reward of the last token of {text} depends on what comes after it; give one "
                "number per text instead"
            )
    return reward


def distribution(p: np.ndarray, n: int | None = None) -> Float[np.ndarray, "n"]:
    """`p` in float64.

    Raises:
        ValueError: unless it is `[n]`, not negative, and sums to 1.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or (n is not None and len(p) != n):
        expected = "one number per text" if n is None else f"[{n}], one number per text"
        raise ValueError(f"a distribution is {expected}; this one is {list(p.shape)}")
    if not (p >= 0).all() or not abs(p.sum() - 1) < 1e-6:
        raise ValueError(
            f"a distribution has no negative number and sums to 1; this one has least {p.min()} "
            f"and sum {p.sum()}. Divide by the sum, or condition on what was left out"
        )
    return p


def _mean(p, x, group):
    """E_p[x | group] at each text of the group; 0 where the group is impossible."""
    mass, total = np.bincount(group, p), np.bincount(group, p * x)
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)[group]
