"""A critic of texts with scores."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def score_value(scores: Scores, batch: Labeled, *, coefficient: float = 1.0) -> Terms:
    """½ (V − score)² per token: V becomes what a text so far will score in the end.

    The critic of advantage-weighted regression (Peng et al. 2019, eq. 6), whose return here is the
    score of the whole text.

    Args:
        coefficient: of the whole term, to weigh it against a policy's on one trunk.
    Use: beside `weighted_regression` with `above_value`. Samples with rewards have `value`; texts
        that are won or lost `outcome`.
    Memory: the value head alone.

    Example:
        Learner(model, partial(score_value, coefficient=0.5), batch="text")
    """
    if scores.value is None:
        raise ValueError("score_value needs scores.value: give this learner's model a value head")
    now = masked.select(scores.value, batch.mask)
    target = jnp.broadcast_to(batch.score[:, None], batch.mask.shape)
    square = (now - masked.select(target, batch.mask)) ** 2
    weight = batch.mask.astype(jnp.float32)
    metrics = {"value": now, "squared_error": square}
    return Terms(0.5 * square, weight=weight, scale=coefficient, metrics=metrics)
