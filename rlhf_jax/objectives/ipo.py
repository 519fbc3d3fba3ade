"""Identity preference optimisation: DPO's regression, which stays finite on certain labels."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax import comparisons, masked
from rlhf_jax.types import Pairs, Scores, Terms


def ipo(
    scores: Scores,
    batch: Pairs,
    *,
    tau: float = 0.1,
    reduce: Callable = masked.sum,
    reference: str = "reference",
) -> Terms:
    """(h₀ − h₁ − 1/(2τ))², h = Σ log π/π_ref of a text, nats² per pair (Azar et al. 2024, eq. 17).

    Member 0 is preferred. A pair that is always labelled alike ends at the margin 1/(2τ), where DPO
    has no end; under noisy labels the optimum is π_ref exp(P(text ≻ μ)/τ)/Z. With
    `reduce=masked.mean` h is the mean over tokens, as TRL has it (τ is then a token's). Departs for
    more than two members: the mean over the others. Needs `scores=("reference",)`; the metrics are
    of τ h. A group with an empty member has weight 0.

    Args:
        tau: τ, the KL price; the paper's experiments range over 0.1 … 1.
        reduce: `masked.sum`, the paper's, or `masked.mean`, TRL's.
        reference: whose probability a text is held against.
    Use: comparisons that are nearly deterministic, on which DPO runs away.
    Memory: the reference's forward pass, on both texts of a pair.

    Example:
        Learner(model, partial(ipo, tau=0.1), batch="pairs", scores=("reference",))
    """
    if not tau > 0:
        raise ValueError(f"tau={tau}: must be above 0")
    weight = comparisons.whole(batch).astype(jnp.float32)
    ratio = comparisons.log_ratio(scores, batch, reference=reference, reduce=reduce)
    loss = ((ratio[:, :1] - ratio[:, 1:] - 0.5 / tau) ** 2).mean(axis=-1)
    return Terms(loss, weight, metrics=comparisons.metrics(tau * ratio))
