"""The policy gradient itself."""

from __future__ import annotations

from collections.abc import Callable

import jax

from rlhf_jax import masked
from rlhf_jax.aggregate import over_sequences
from rlhf_jax.ratios import sampler_importance
from rlhf_jax.types import Experience, Scores, Terms


def reinforce(
    scores: Scores,
    batch: Experience,
    *,
    importance_cap: float | None = None,
    entropy_coefficient: float = 0.0,
    aggregate: Callable = over_sequences,
) -> Terms:
    """−A log π per token, in reward · nats (Williams 1992, eq. 11, with A = G − baseline).

    The baseline belongs to the rollouts' `advantage`: `reward_to_go` without a critic has none and
    with one has V; `batch_mean`, `leave_one_out` (RLOO) and `credit_horizon` are the others. The
    gradient is right for one optimiser step on fresh samples; later steps need `ppo`.
    `importance_cap` C multiplies the loss by min(π/π_sampler, C), without gradient, for a sampler
    that disagrees with the trainer (Yao et al. 2025).

    Args:
        importance_cap: C, such as 2. None: off.
        entropy_coefficient: of an entropy bonus, reward per nat.
        aggregate: `over_tokens`, … of `rlhf_jax.aggregate`; the sum over a text's tokens makes it
            the gradient of the text's probability.
    Use: rollouts, one optimiser step each: RLOO, and anything to be compared with theory.
    Memory: nothing beyond the log-probabilities.

    Example:
        Learner(model, partial(reinforce, importance_cap=2.0))
    """
    if entropy_coefficient and scores.entropy is None:
        raise ValueError("entropy_coefficient needs scores.entropy, which this learner lacks")
    mask = batch.mask
    logp = masked.select(scores.logp, mask)
    loss = -masked.select(batch.advantage, mask) * logp
    metrics = {}
    if importance_cap is not None:
        own = jax.lax.stop_gradient(logp)
        metrics["importance"] = sampler_importance(batch, own, importance_cap)
        loss = loss * metrics["importance"]
    if scores.entropy is not None:
        metrics["entropy"] = masked.select(scores.entropy, mask)
        loss = loss - entropy_coefficient * metrics["entropy"]
    weight, count = aggregate(batch)
    return Terms(loss, weight, count, metrics=metrics)
