"""Negative preference optimisation, token by token: gradient ascent that ends by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def token_npo(
    scores: Scores,
    batch: Labeled,
    *,
    threshold: float,
    beta: float = 0.1,
    alpha: float = 1.0,
    reference: str = "reference",
) -> Terms:
    """−log π on good tokens, α (2/β) log(1 + (π/π_ref)^β) on bad ones (Zhang et al. 2024, eq. 3).

    In nats. The gradient on a bad token is that of signed likelihood times
    2 (π/π_ref)^β / (1 + (π/π_ref)^β): 1 at the reference, 0 once the token is forgotten; for β → 0
    it is signed likelihood's. The learner needs `scores=("reference",)`.
    Departs from the paper: a ratio per token and not per text, likelihood on the good tokens, and
    one mean over both. A token is bad if its own score is below `threshold`.

    Args:
        threshold: a token whose own score is below it is bad.
        beta: of the ratio; the paper's 0.1. Small: closer to signed likelihood, and further from
            the reference.
        alpha: weight of the bad tokens.
        reference: whose probability a bad token is held against.
    Use: marks on tokens, where forgetting must not destroy the model.
    Memory: the reference's forward pass.

    Example:
        Learner(model, partial(token_npo, threshold=0.0), batch="text", scores=("reference",))
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0; its limit at 0 is signed_likelihood")
    if reference not in scores.others:
        raise ValueError(
            f'token_npo needs scores=("{reference}",) on its learner, for the probabilities '
            f"before; it has {sorted(scores.others)}"
        )
    logp = masked.select(scores.logp, batch.mask)
    log_ratio = logp - masked.select(scores[reference].logp, batch.mask)
    good = masked.select(batch.token_score, batch.mask) >= threshold
    bad_loss = (2.0 / beta) * jax.nn.softplus(beta * log_ratio)
    metrics = {"good": good.astype(jnp.float32), "log_ratio": log_ratio}
    loss = jnp.where(good, -logp, alpha * bad_loss)
    return Terms(loss, weight=batch.mask.astype(jnp.float32), metrics=metrics)
