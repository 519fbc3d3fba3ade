"""How far one policy is from another on given tokens: importance ratios, estimates of KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import masked
from rlhf_jax.types import Rollout

LIMIT = 20.0  # log-ratios are clamped to ± this: e²⁰ is finite in float32, and its square too


def token_log_ratio(
    logp: Float[Array, "b t"], old_logp: Float[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t"]:
    """Log-ratio π/π_old of each token, nats, within ±20; 0 outside the mask."""
    return jnp.clip(masked.select(logp, mask) - masked.select(old_logp, mask), -LIMIT, LIMIT)


def sequence_log_ratio(
    logp: Float[Array, "b t"], old_logp: Float[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t"]:
    """The mean over a text of its tokens' log π/π_old, on each of them (GSPO: Zheng et al. 2025).

    Equation 7 there; with a token's own advantage it is GSPO-token (eq. 14): the value is the
    text's, the gradient of each token goes through its own log-probability.
    """
    gap = masked.select(logp, mask) - masked.select(old_logp, mask)
    whole = jax.lax.stop_gradient(masked.mean(gap, mask, axis=-1))[..., None]
    own = masked.select(logp, mask)
    return masked.select(jnp.clip(whole, -LIMIT, LIMIT) + own - jax.lax.stop_gradient(own), mask)


def sampler_importance(
    batch: Rollout, old_logp: Float[Array, "b t"], cap: float
) -> Float[Array, "b t"]:
    """min(π_old/π_sampler, cap) of each token: corrects a sampler that differs from the trainer.

    Truncated importance sampling (Ionides 2008; for language models Yao et al. 2025); the sampler's
    probability is `behaviour_logp`, after top-k and top-p.
    """
    return jnp.minimum(jnp.exp(token_log_ratio(old_logp, batch.behaviour_logp, batch.mask)), cap)


def k1(logp: Array, ref_logp: Array) -> Array:
    """Log-ratio d = log π − log π_ref, nats: unbiased for KL(π‖π_ref) on samples of π."""
    return logp - ref_logp


def k2(logp: Array, ref_logp: Array) -> Array:
    """½ d², nats: never negative, biased, little variance (Schulman 2020)."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Array, ref_logp: Array) -> Array:
    """e^{−d} − 1 + d, nats: never negative, unbiased (Schulman 2020). Departs: |d| ≤ 20."""
    d = jnp.clip(logp - ref_logp, -LIMIT, LIMIT)
    return jnp.expm1(-d) + d
