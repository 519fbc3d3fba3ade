"""A reward model from comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax import comparisons, masked
from rlhf_jax.types import Pairs, Scores, Terms


def reward_model(
    scores: Scores,
    batch: Pairs,
    *,
    reduce: Callable = masked.last,
    error: float = 0.0,
    centre: float = 0.0,
) -> Terms:
    """−log softmax(s)₀ in nats per group; member 0 is preferred (Ziegler et al. 2019, eq. 1).

    s is the score after each member's last masked token; two members make Bradley–Terry,
    softplus(s₁ − s₀). With `reduce=masked.sum` it is the sum of the scores after each token, which
    makes them token rewards (Christiano et al. 2017, eq. 1); long texts can gather more. A group
    with an empty member has weight 0.

    Args:
        reduce: `masked.last`, or `masked.sum` for a reward of tokens.
        error: e, the share of answers given at random: −log[(1 − e) softmax(s)₀ + e/k], at most
            log(k/e). Christiano et al. have 0.1 (§2.2.3). 0: off.
        centre: weight of (Σ s)², since comparisons leave the origin free; Eisenstein et al. 2023;
            0.01 is usual. 0: off.
    Use: comparisons of whole texts, to train the reward of PPO.
    Memory: a model without lm_head computes no logits.

    Example:
        Learner(model, partial(reward_model, centre=0.01), batch="pairs")
    """
    if scores.reward is None:
        raise ValueError("reward_model needs scores.reward: give this learner's model a value head")
    if not 0 <= error < 1:
        raise ValueError(f"error={error}: a share of random answers, from 0 to below 1")
    whole = comparisons.whole(batch)
    score = reduce(scores.reward, batch.mask & whole[:, None, None], axis=-1)
    loss = comparisons.first_is_best(score)
    if error > 0:
        at_random = math.log(error / score.shape[1])
        loss = -jnp.logaddexp(math.log1p(-error) - loss, at_random)
    loss = loss + centre * score.sum(axis=-1) ** 2
    metrics = {
        **{name: comparisons.metrics(score)[name] for name in ("accuracy", "margin")},
        "score": score.mean(axis=-1),
    }
    return Terms(loss, weight=whole.astype(jnp.float32), metrics=metrics)
