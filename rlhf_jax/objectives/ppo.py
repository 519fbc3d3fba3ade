"""Proximal policy optimisation: the clipped surrogate."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Experience, Scores, Terms


def ppo(
    scores: Scores,
    batch: Experience,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
    entropy_coefficient: float = 0.0,
) -> Terms:
    """max(−Aρ, −A clip(ρ, 1 − ε, 1 + ε)), ρ = π/π_old, per token (Schulman et al. 2017, eq. 7).

    `clip_high` replaces the upper ε (Yu et al. 2025, DAPO); `dual_clip` c bounds the loss by −cA
    where A < 0 (Ye et al. 2020); `importance_cap` C multiplies it by min(π_old/π_sampler, C), for a
    sampler that disagrees with the trainer (Yao et al. 2025). Departs: log ρ is clamped to ±20.
    """
    if entropy_coefficient and scores.entropy is None:
        raise ValueError("entropy_coefficient needs scores.entropy, which this learner lacks")
    mask = batch.mask
    advantage = masked.select(batch.advantage, mask)
    old_logp = masked.select(batch.old_logp, mask)
    log_ratio = jnp.clip(masked.select(scores.logp, mask) - old_logp, -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    high = clip if clip_high is None else clip_high
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + high)
    loss = jnp.maximum(plain, clipped)
    metrics = {
        "ratio": ratio,
        "clip_fraction": (clipped > plain).astype(jnp.float32),
        "kl_k1": -log_ratio,  # of π_old‖π, nats per token
        "kl_k3": jnp.expm1(log_ratio) - log_ratio,
    }
    if dual_clip is not None:
        bound = -dual_clip * advantage
        metrics["dual_clip_fraction"] = ((advantage < 0) & (loss > bound)).astype(jnp.float32)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, bound), loss)
    if importance_cap is not None:
        gap = old_logp - masked.select(batch.behaviour_logp, mask)
        importance = jnp.minimum(jnp.exp(jnp.clip(gap, -20.0, 20.0)), importance_cap)
        metrics["importance"] = importance
        loss = loss * importance
    if scores.entropy is not None:
        metrics["entropy"] = masked.select(scores.entropy, mask)
        loss = loss - entropy_coefficient * metrics["entropy"]
    return Terms(loss, weight=mask.astype(jnp.float32), metrics=metrics)
