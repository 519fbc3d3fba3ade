"""Proximal policy optimisation: the clipped surrogate."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.aggregate import over_tokens
from rlhf_jax.ratios import sampler_importance, token_log_ratio
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
    log_ratio: Callable = token_log_ratio,
    aggregate: Callable = over_tokens,
) -> Terms:
    """max(−Aρ, −A clip(ρ, 1 − ε, 1 + ε)), ρ = π/π_old, per token (Schulman et al. 2017, eq. 7).

    `clip_high` replaces the upper ε (Yu et al. 2025, DAPO); `dual_clip` c bounds the loss by −cA
    where A < 0 (Ye et al. 2020); `importance_cap` C multiplies it by min(π_old/π_sampler, C), for a
    sampler that disagrees with the trainer (Yao et al. 2025); `log_ratio` may be that of the whole
    text (`ratios.sequence_log_ratio`: GSPO); `aggregate` says what a token weighs. GRPO and its kin
    are this with arguments: see `presets`. Departs: log ρ is clamped to ±20.

    Args:
        clip: ε; the paper's 0.2, and everybody's since.
        clip_high: ε above 1; DAPO's 0.28. None: `clip`.
        dual_clip: c > 1; the paper's 3. None: off.
        importance_cap: C, such as 2. None: off, right for a sampler that agrees with the trainer.
        entropy_coefficient: of an entropy bonus, reward per nat; 0.01 in the paper's Atari runs,
            usually 0 for language models.
        log_ratio: of π to π_old: `token_log_ratio` or `sequence_log_ratio`.
        aggregate: `over_tokens`, … of `rlhf_jax.aggregate`; GRPO's is `over_sequence_means`.
    Use: rollouts with any reward, when samples serve several optimiser steps.
    Memory: log-probabilities only; the critic, if any, is a learner of its own or a head.

    Example:
        Learner(model, partial(ppo, clip=0.2), epochs=4, minibatches=4)
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: above 1, such as 3, or None")
    if entropy_coefficient and scores.entropy is None:
        raise ValueError("entropy_coefficient needs scores.entropy, which this learner lacks")
    mask = batch.mask
    advantage = masked.select(batch.advantage, mask)
    old_logp = masked.select(batch.old_logp, mask)
    moved = log_ratio(scores.logp, old_logp, mask)
    ratio = jnp.exp(moved)
    high = clip if clip_high is None else clip_high
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - clip, 1.0 + high)
    loss = jnp.maximum(plain, clipped)
    metrics = {
        "ratio": ratio,
        "clip_fraction": (clipped > plain).astype(jnp.float32),
        "kl_k1": -moved,  # of π_old‖π, nats per token
        "kl_k3": jnp.expm1(moved) - moved,
    }
    if dual_clip is not None:
        bound = -dual_clip * advantage
        metrics["dual_clip_fraction"] = ((advantage < 0) & (loss > bound)).astype(jnp.float32)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, bound), loss)
    if importance_cap is not None:
        metrics["importance"] = sampler_importance(batch, old_logp, importance_cap)
        loss = loss * metrics["importance"]
    if scores.entropy is not None:
        metrics["entropy"] = masked.select(scores.entropy, mask)
        loss = loss - entropy_coefficient * metrics["entropy"]
    weight, count = aggregate(batch)
    return Terms(loss, weight, count, metrics=metrics)
