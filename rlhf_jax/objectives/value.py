"""The critic's regression on returns."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Experience, Scores, Terms


def value(
    scores: Scores, batch: Experience, *, clip: float | None = 0.2, coefficient: float = 1.0
) -> Terms:
    """½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) per token (Ziegler et al. 2019's code).

    `clip=None` leaves ½ (V − R)². The metrics' means give the explained variance:
    1 − squared_error / (squared_target − target²).

    Args:
        clip: ε around the value of the rollout; Ziegler's 0.2, verl's 0.5. None: off.
        coefficient: of this term; Ziegler's 0.1 where policy and critic share a trunk.
    Use: the critic of PPO, as a learner of its own or combined with the policy on one trunk.
    Memory: nothing beyond the values; a critic without lm_head computes no logits at all.

    Example:
        Learner(model, partial(value, clip=0.2), epochs=4, minibatches=4)
    """
    if scores.value is None:
        raise ValueError("value needs scores.value: give this learner's model a value head")
    now, old, target = (
        masked.select(x, batch.mask) for x in (scores.value, batch.value, batch.target)
    )
    square = (now - target) ** 2
    worst = square
    if clip is not None:
        # Not old + clip(now − old): its rounding would count as clipping.
        clipped = jnp.clip(now, old - clip, old + clip)
        worst = jnp.maximum(square, (clipped - target) ** 2)
    metrics = {
        "value": now,
        "target": target,
        "squared_target": target**2,
        "squared_error": square,
        "clip_fraction": (worst > square).astype(jnp.float32),
    }
    weight = batch.mask.astype(jnp.float32)
    return Terms(0.5 * worst, weight=weight, scale=coefficient, metrics=metrics)
