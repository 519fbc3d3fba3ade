"""A reward model of tokens, from marks on tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def token_reward_model(scores: Scores, batch: Labeled, *, threshold: float = 0.0) -> Terms:
    """−log σ(±s) in nats per marked token: + where it was marked good, − where bad.

    s is the score after the token, so σ(s) is the probability that people mark it good (Lightman et
    al. 2023, a process reward model, with tokens for steps). A token is good above `threshold`, bad
    below, and nobody's opinion at it: weight 0. For marks of −1, 0 and 1 that is 0.

    Args:
        threshold: marks above it are good, below it bad, and at it absent.
    Use: marks on tokens, to train a dense reward.
    Memory: a model without lm_head computes no logits.

    Example:
        Learner(model, token_reward_model, batch="text")
    """
    if scores.reward is None:
        raise ValueError(
            "token_reward_model needs scores.reward: give this learner's model a value head"
        )
    mark = jnp.sign(masked.select(batch.token_score, batch.mask) - threshold)
    marked = batch.mask & (mark != 0)
    margin = mark * masked.select(scores.reward, marked)
    metrics = {
        "accuracy": 0.5 * ((margin > 0).astype(jnp.float32) + (margin >= 0).astype(jnp.float32)),
        "score": masked.select(scores.reward, marked),
        "good": (mark > 0).astype(jnp.float32),
    }
    return Terms(jax.nn.softplus(-margin), weight=marked.astype(jnp.float32), metrics=metrics)
