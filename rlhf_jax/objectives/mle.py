"""Maximum likelihood: supervised fine-tuning."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Scores, Sequences, Terms


def mle(scores: Scores, batch: Sequences) -> Terms:
    """−log π(token), in nats per token."""
    loss = -masked.select(scores.logp, batch.mask)
    return Terms(loss, weight=batch.mask.astype(jnp.float32))
