"""Reward- and advantage-weighted regression: likelihood, more of it where more was earned."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.aggregate import over_tokens
from rlhf_jax.types import Experience, Labeled, Scores, Terms


def of_score(scores: Scores, batch: Labeled) -> Float[Array, "b t"]:
    """A = the text's score, on each of its tokens: reward-weighted regression."""
    del scores
    return masked.select(jnp.broadcast_to(batch.score[:, None], batch.mask.shape), batch.mask)


def above_value(scores: Scores, batch: Labeled) -> Float[Array, "b t"]:
    """A = score − V, no gradient through V: advantage-weighted, with `score_value` for V."""
    if scores.value is None:
        raise ValueError("above_value needs scores.value: give this learner's model a value head")
    value = jax.lax.stop_gradient(masked.select(scores.value, batch.mask))
    return of_score(scores, batch) - value


def of_experience(scores: Scores, batch: Experience) -> Float[Array, "b t"]:
    """A = the advantage that came with the samples."""
    del scores
    return masked.select(batch.advantage, batch.mask)


def weighted_regression(
    scores: Scores,
    batch: Labeled | Experience,
    *,
    beta: float,
    cap: float = 20.0,
    advantage: Callable = of_score,
    aggregate: Callable = over_tokens,
) -> Terms:
    """−min(exp(A/β), cap) log π(token), in nats (Peters & Schaal 2007; Peng et al. 2019, eq. 9).

    On texts of p its optimum is p exp(A/β)/Z, the tilt that RL with a KL penalty of β has, without
    a reference and from fixed data; for β → ∞ it is `mle`. Reward-weighted regression has the score
    for A, advantage-weighted what it exceeds V by: V makes weights less extreme and, being the same
    for all that a state can be followed by, leaves the optimum where it is.
    The weights are part of the loss and not divided by their sum: `prepare=partial(self_normalised,
    beta=…)` makes their mean 1 over the batch.

    Args:
        beta: β, in units of A; 0.05 of a normalised advantage in Peng et al.
        cap: the largest weight; Peng et al.'s 20. It has to lie above what exp(A/β) reaches for the
            optimum to be the tilt.
        advantage: `(scores, batch) -> [b, t]`: `of_score`, `above_value` or `of_experience`.
        aggregate: `over_tokens`, … of `rlhf_jax.aggregate`.
    Use: texts with scores, nothing sampled; or samples of an older policy, several steps on each.
    Memory: log-probabilities only; `above_value` the value head.

    Example:
        policy = partial(weighted_regression, beta=1.0, advantage=above_value)
        Learner(model, partial(combine, policy=policy, value=score_value), batch="text")
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0; its limit at 0 is selection.best_share")
    if not cap > 0:
        raise ValueError(f"cap={cap}: the largest weight, above 0")
    exponent = advantage(scores, batch) / beta
    weight = jnp.exp(jnp.minimum(exponent, math.log(cap)))  # before exp: no overflow
    loss = -weight * masked.select(scores.logp, batch.mask)
    capped = (exponent > math.log(cap)).astype(jnp.float32)
    metrics = {"weight": weight, "squared_weight": weight**2, "capped": capped}
    weight, count = aggregate(batch)
    return Terms(loss, weight, count, metrics=metrics)


def self_normalised(
    scores: Scores, batch: Labeled | Experience, *, beta: float
) -> Labeled | Experience:
    """Subtracts β log mean exp(A/β), so that the mean uncapped weight is 1: a `prepare`.

    A is a text's score, the mean over texts; or a token's advantage, the mean over tokens. Weights
    of `above_value` are not made for it: `score_value` would learn the shifted score.

    Args:
        beta: that of the objective.
    """
    del scores
    of_tokens = isinstance(batch, Experience)
    found = batch.advantage if of_tokens else batch.score
    present = batch.mask if of_tokens else batch.mask.any(axis=1)
    exponent = jnp.where(present, found / beta, -jnp.inf)
    log_mean = jax.nn.logsumexp(exponent) - jnp.log(jnp.maximum(jnp.sum(present), 1))
    shifted = masked.select(found - beta * log_mean, present)
    return batch.replace(**{"advantage" if of_tokens else "score": shifted})
