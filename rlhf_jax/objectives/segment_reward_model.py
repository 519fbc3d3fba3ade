"""A reward model of tokens, from comparisons of whole texts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Pairs, Scores, Terms


def segment_reward_model(scores: Scores, batch: Pairs, *, error: float = 0.0) -> Terms:
    """−log[(1 − e) softmax(Σ_t r)₀ + e/k] in nats per group of k; member 0 is preferred.

    Christiano et al. 2017, eq. 1, with the `error` e = 0.1 of their §2.2.3: so often a person
    answers at random, and no answer costs more than log(k/e). r is the score after each token, and
    a text's rewards add up over its mask; long texts can gather more. With texts of one token, and
    no error, it is `reward_model`. A group with an empty member has weight 0.
    """
    if scores.reward is None:
        raise ValueError(
            "segment_reward_model needs scores.reward: give this learner's model a value head"
        )
    if not 0 <= error < 1:
        raise ValueError(f"error={error}: a share of random answers, from 0 to below 1")
    whole = batch.mask.any(axis=-1).all(axis=-1)
    total = masked.sum(scores.reward, batch.mask & whole[:, None, None], axis=-1)
    first, rest = total[:, 0], total[:, 1:]
    # softplus of differences, not logsumexp minus score: exact for confident models too.
    loss = jax.nn.softplus(jax.nn.logsumexp(rest - first[:, None], axis=-1))
    if error > 0:
        at_random = math.log(error / total.shape[1])
        loss = -jnp.logaddexp(math.log1p(-error) - loss, at_random)
    margin = first - rest.max(axis=-1)
    metrics = {
        "accuracy": 0.5 * ((margin > 0).astype(jnp.float32) + (margin >= 0).astype(jnp.float32)),
        "margin": margin,
        "score": total.mean(axis=-1),
    }
    return Terms(loss, weight=whole.astype(jnp.float32), metrics=metrics)
