"""Maximum likelihood: supervised fine-tuning."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Scores, Sequences, Terms


def mle(scores: Scores, batch: Sequences) -> Terms:
    """−log π(token), in nats per token.

    Use: supervised fine-tuning; and whatever a transform of the data makes of it: conditioning on
        control tokens, filtering, best-of-n, distillation from samples.
    Memory: nothing beyond the log-probabilities.

    Example:
        Learner(model, mle, batch="text")
    """
    loss = -masked.select(scores.logp, batch.mask)
    return Terms(loss, weight=batch.mask.astype(jnp.float32))
