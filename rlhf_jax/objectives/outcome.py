"""A critic of won and lost: logistic regression of the outcome on the state."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def of_the_text(batch: Labeled) -> Float[Array, "b t"]:
    """Every state has the outcome of its text: `score`."""
    return jnp.broadcast_to(batch.score[:, None], batch.mask.shape)


def of_the_state(batch: Labeled) -> Float[Array, "b t"]:
    """Every state has its own: `token_score`, for players in turn, each with the other's loss."""
    return batch.token_score


def outcome(
    scores: Scores,
    batch: Labeled,
    *,
    target: Callable = of_the_text,
    coefficient: float = 1.0,
) -> Terms:
    """−z log σ(V) − (1 − z) log(1 − σ(V)) in nats, z the outcome: 1 won, 0 lost, ½ drawn.

    The search-free regression of AlphaGo's value network on games of the policy, one position per
    game: `selection.one_position` as the learner's transform (Silver et al. 2016, eq. 3). V is a
    log-odds; it converges to the policy's own chance to win, not to that of best play.
    Departs from the paper: cross-entropy, not squares of tanh V.

    Args:
        target: `of_the_text` or `of_the_state`, or your own `batch -> [b, t]` within [0, 1].
        coefficient: of this term, beside others.
    Use: a value network of games won and lost.
    Memory: nothing beyond the values.

    Example:
        Learner(model, outcome, batch="games", transform=one_position)
    """
    if scores.value is None:
        raise ValueError("outcome needs scores.value: give this learner's model a value head")
    logit = masked.select(scores.value, batch.mask)
    z = masked.select(target(batch), batch.mask)
    win = jax.nn.sigmoid(logit)
    metrics = {
        "probability": win,
        "squared_error": (win - z) ** 2,  # Brier's
        "accuracy": ((logit > 0) == (z > 0.5)).astype(jnp.float32),
    }
    loss = jax.nn.softplus(logit) - z * logit
    weight = batch.mask.astype(jnp.float32)
    return Terms(loss, weight, scale=coefficient, metrics=metrics)
