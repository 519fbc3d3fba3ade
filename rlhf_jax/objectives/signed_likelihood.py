"""Signed likelihood: up the likelihood of good tokens, down that of bad ones."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def signed_likelihood(scores: Scores, batch: Labeled) -> Terms:
    """−mark · log π(token), in nats; `batch.token_score` is the mark: +1 good, −1 bad, 0 unmarked.

    Gradient ascent on bad tokens (Zhang et al. 2024, eq. 1; Jang et al. 2023). Nothing bounds it
    from below: however unlikely a bad token is, its own logit is pushed down by 1 − π(token). The
    baseline that `unlikelihood`, `token_npo`, `cringe` and `horizon_one` are to improve upon.

    Use: the baseline of token feedback, and for a few steps only: it is unbounded.
    Memory: nothing beyond the log-probabilities.

    Example:
        Learner(model, signed_likelihood, batch="text")
    """
    mark = masked.select(batch.token_score, batch.mask)
    loss = -mark * masked.select(scores.logp, batch.mask)
    metrics = {"good": (mark > 0).astype(jnp.float32), "bad": (mark < 0).astype(jnp.float32)}
    return Terms(loss, weight=batch.mask.astype(jnp.float32), metrics=metrics)
