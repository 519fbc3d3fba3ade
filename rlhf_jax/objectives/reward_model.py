"""A reward model from comparisons."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import comparisons, masked
from rlhf_jax.types import Pairs, Scores, Terms


def reward_model(scores: Scores, batch: Pairs, *, centre: float = 0.0) -> Terms:
    """−log softmax(s)₀ in nats per group; member 0 is preferred (Ziegler et al. 2019, eq. 1).

    s is the score after each member's last masked token; two members make Bradley–Terry,
    softplus(s₁ − s₀). `centre` adds centre · (Σ s)², since comparisons leave the origin free
    (Eisenstein et al. 2023). A group with an empty member has weight 0.
    """
    if scores.reward is None:
        raise ValueError("reward_model needs scores.reward: give this learner's model a value head")
    whole = comparisons.whole(batch)
    score = masked.last(scores.reward, batch.mask & whole[:, None, None])
    loss = comparisons.first_is_best(score) + centre * score.sum(axis=-1) ** 2
    metrics = {
        **{name: comparisons.metrics(score)[name] for name in ("accuracy", "margin")},
        "score": score.mean(axis=-1),
    }
    return Terms(loss, weight=whole.astype(jnp.float32), metrics=metrics)
