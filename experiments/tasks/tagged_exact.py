"""Exact answers about the task of `tagged`: dynamic programming, enumeration, and heads fitted.

The reward is additive over neighbouring letters, so a tilt of the chain by it is again a Markov
chain, and the reward's distribution follows from the states (last letter, reward so far): both at
any size. Models are no chains: what they say is written down for all texts, where these are few,
and otherwise for texts drawn from known chains, with importance weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from rlhf_jax.exact.outputs import batch_logp
from rlhf_jax.types import Params
from tasks.tagged import WANTED, Letters, Tagged, letter_rewards, texts_behind

TILTS = (1.0, 0.5)  # prices of the chains that texts are drawn from, beside the chain itself


# ---- the chain


def step_rewards(task: Tagged) -> Float[np.ndarray, "x letters+prompts letters"]:
    """What letter j earns behind token i, for each x."""
    x, j = np.arange(task.prompts)[:, None, None], np.arange(task.letters)
    i = np.arange(task.letters + task.prompts)[:, None]
    return 1.0 * (j == x % WANTED) - 0.5 * (i == j)


def reward_levels(task: Tagged) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "x m"]]:
    """The values that r can take, and P(r | x) of the chain, forwards over (last letter, r)."""
    half = np.arange(-(task.length - 1), 2 * task.length + 1)  # r in half points
    chain, earned = task.chain(), np.rint(2 * step_rewards(task)).astype(int)
    found = []
    for x in range(task.prompts):
        p = np.zeros((len(chain), len(half)))
        p[task.letters + x, task.length - 1] = 1.0
        for _ in range(task.length):
            after = np.zeros_like(p)
            for i, j in np.ndindex(chain.shape):
                after[j] += chain[i, j] * np.roll(p[i], earned[x, i, j])
            p = after
        found.append(p.sum(axis=0))
    return half / 2, np.array(found)


def quantiles(task: Tagged, shares: tuple[float, ...]) -> tuple[float, ...]:
    """For each share, the level of r that has nearest to it below it, over all x; ascending."""
    half, p = reward_levels(task)
    below = p.mean(axis=0).cumsum()
    there = p.mean(axis=0) > 1e-12
    level, least = half[there][1:], below[there][:-1]
    return tuple(float(level[np.abs(least - share).argmin()]) for share in shares)


class Tilted(NamedTuple):
    """The chain tilted by exp(r/β): a chain whose table depends on the place and on x."""

    log_table: Float[np.ndarray, "x t letters+prompts letters"]
    log_z: Float[np.ndarray, "x"]


def tilted_chain(task: Tagged, beta: float) -> Tilted:
    """π(j | i, t, x) ∝ P(j | i) exp(r(i, j, x)/β) Z(j, t + 1, x), backwards; β = ∞: the chain."""
    score = np.log(task.chain())[None] + step_rewards(task) / beta
    ahead = np.zeros((task.prompts, task.letters + task.prompts))
    tables = []
    for _ in range(task.length):
        joint = score + ahead[:, None, : task.letters]
        ahead = logsumexp(joint, axis=2)
        tables.append(joint - ahead[:, :, None])
    x = np.arange(task.prompts)
    return Tilted(np.stack(tables[::-1], axis=1), ahead[x, task.letters + x])


def chain_logp(
    tilted: Tilted, letters: Int[np.ndarray, "x n t"], task: Tagged
) -> Float[np.ndarray, "x n"]:
    """Log-probability of texts, nats."""
    x, n, t = letters.shape
    first = np.broadcast_to(task.letters + np.arange(x)[:, None, None], (x, n, 1))
    before = np.concatenate([first, letters[:, :, :-1]], axis=2)
    at = np.arange(x)[:, None, None], np.arange(t)[None, None]
    return tilted.log_table[at[0], at[1], before, letters].sum(axis=2)


def drawn_letters(
    tilted: Tilted, n: int, rng: np.random.Generator, task: Tagged
) -> Int[np.ndarray, "x n t"]:
    """Texts of such a chain."""
    last = np.broadcast_to(task.letters + np.arange(task.prompts)[:, None], (task.prompts, n))
    x, found = np.arange(task.prompts)[:, None], []
    for t in range(task.length):
        upto = np.exp(tilted.log_table[x, t, last]).cumsum(axis=2)
        last = (rng.random((task.prompts, n, 1)) > upto[:, :, :-1]).sum(axis=2)
        found.append(last)
    return np.stack(found, axis=2)


# ---- texts, and what models say of them


class Support(NamedTuple):
    """Texts of each x: all of them, or a sample with importance weights 1/(n q)."""

    letters: Int[np.ndarray, "x n t"]
    log_weight: Float[np.ndarray, "x n"]
    reward: Float[np.ndarray, "x n"]


@lru_cache
def support(task: Tagged) -> Support:
    """All texts if there are at most `task.texts`, else as many from the chain and two tilts."""
    size = task.letters**task.length
    if size <= task.texts:
        power = task.letters ** np.arange(task.length - 1, -1, -1)
        one = np.arange(size)[:, None] // power % task.letters
        letters = np.broadcast_to(one, (task.prompts, *one.shape))
        log_weight = np.zeros(letters.shape[:2])
    else:
        rng, chains = np.random.default_rng(0), [tilted_chain(task, b) for b in (np.inf, *TILTS)]
        counts = np.diff(np.linspace(0, task.texts, len(chains) + 1).astype(int))
        parts = [drawn_letters(c, n, rng, task) for c, n in zip(chains, counts, strict=True)]
        letters = np.concatenate(parts, axis=1)
        # Balance heuristic: every text weighs as if drawn from the mixture of the chains.
        mixed = [chain_logp(c, letters, task) + np.log(n)
                 for c, n in zip(chains, counts, strict=True)]  # fmt: skip
        log_weight = -logsumexp(mixed, axis=0)
    batch = texts_behind(letters, task=task, tag=None)
    reward = np.asarray(letter_rewards(batch.tokens, batch.mask, task=task), np.float64)
    return Support(letters, log_weight, reward.sum(axis=1).reshape(letters.shape[:2]))


def normalised(score: Float[np.ndarray, "x n"]) -> Float[np.ndarray, "x n"]:
    """exp(score)/Z for each x."""
    return np.exp(log_softmax(score, axis=1))


def chain_law(task: Tagged) -> Float[np.ndarray, "x n"]:
    """The generator's distribution over the texts."""
    texts = support(task)
    logp = chain_logp(tilted_chain(task, np.inf), texts.letters, task)
    return normalised(logp + texts.log_weight)


def law(
    params: Params,
    *,
    model: Letters,
    task: Tagged,
    tag: str | None = None,
    then: str | None = None,
    rows: int = 4096,
) -> Float[np.ndarray, "x n"]:
    """What a model says behind a tag, or none: its distribution over the texts of each x."""
    texts = support(task)
    batch = texts_behind(texts.letters, task=task, tag=tag, then=then)
    return of_batch(params, batch, model=model, task=task, rows=rows)


def of_batch(params, batch, *, model: Letters, task: Tagged, rows: int = 4096):
    """The same of texts as they stand, whatever tags are in them."""
    texts, found = support(task), []
    for start in range(0, len(batch.tokens), rows):
        # The last part is filled up with its own first row: one shape, one program.
        index = np.arange(start, start + min(rows, len(batch.tokens)))
        index = np.where(index < len(batch.tokens), index, start)
        part = jax.tree.map(lambda x, index=index: x[index], batch)
        found.append(np.asarray(batch_logp(params, part, model=model), np.float64).sum(axis=1))
    logp = np.concatenate(found)[: len(batch.tokens)].reshape(texts.reward.shape)
    return normalised(logp + texts.log_weight)


def tilt(p: Float[np.ndarray, "x n"], score: Float[np.ndarray, "x n"]) -> np.ndarray:
    """π₀ exp(score)/Z for each x: where RL at price 1 ends, and conditioning on e^score."""
    with np.errstate(divide="ignore"):
        return normalised(np.log(p) + score)


def kl(p: Float[np.ndarray, "x n"], q: Float[np.ndarray, "x n"]) -> float:
    """KL(p‖q), nats per text, the mean over x."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return float(terms.sum(axis=1).mean())


def variation(p: Float[np.ndarray, "x n"], q: Float[np.ndarray, "x n"]) -> float:
    """Total variation ½ Σ |p − q|, the mean over x."""
    return float(0.5 * np.abs(p - q).sum(axis=1).mean())


def mean(p: Float[np.ndarray, "x n"], value: Float[np.ndarray, "x n"]) -> float:
    """E_p of a number per text, the mean over x."""
    return float((p * value).sum(axis=1).mean())


def kl_within(p: Float[np.ndarray, "x n"], q: Float[np.ndarray, "x n"], level: np.ndarray) -> float:
    """What of KL(p‖q) is between texts of one level of `level` [x, n]."""
    between = 0.0
    for p_x, q_x, at in zip(p, q, level, strict=True):
        _, index = np.unique(np.round(at, 9), return_inverse=True)
        mass = np.stack([np.bincount(index, p_x), np.bincount(index, q_x)])[:, None]
        between += kl(*mass) / len(p)
    return kl(p, q) - between


# ---- one matrix, fitted


def fitted(
    features: Float[np.ndarray, "m k"],
    offset: Float[np.ndarray, "m v"],
    target: Float[np.ndarray, "m v"],
    weight: Float[np.ndarray, "m"],
    *,
    steps: int = 3000,
) -> float:
    """Least Σ weight · KL(target‖softmax(offset + features W)) over all W: a convex problem."""
    shape = features.shape[1], target.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(target > 0, target * np.log(target), 0.0).sum(axis=1) @ weight

    def loss(flat):
        logp = log_softmax(offset + features @ flat.reshape(shape), axis=1)
        value = own - ((target * logp).sum(axis=1) @ weight)
        slope = features.T @ (weight[:, None] * (np.exp(logp) - target))
        return value, slope.ravel()

    start = np.zeros(shape).ravel()
    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 30, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun)
