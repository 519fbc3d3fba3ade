"""Generated texts against real ones: the batch a discriminator learns from, the reward it gives.

A policy that perfect discriminators of data pᵢ pay Σ wᵢ logit Dᵢ ends at Π pᵢ^wᵢ / Z, what all of
the data sets would say; one discriminator of the pooled data ends at Σ wᵢ pᵢ, what any would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.rewards import at_end, from_model
from rlhf_jax.selection import alike
from rlhf_jax.types import Contrast, Params, Rollout, Sequences


def real_and_generated(
    text: Sequences, rollout: Rollout, *, params: Mapping[str, Params], key: Array
) -> Contrast:
    """The rows of a stream, score 1, then those of the rollouts, score 0.

    For `Config.derived`, of a stream and "experience"; `discriminator` and `energy` learn from it.
    Let the mask of both cover what both could have said: a discriminator uses any difference.
    """
    del params, key
    real, generated = text.tokens.shape[0], rollout.tokens.shape[0]
    together = jax.tree.map(
        lambda a, b: jnp.concatenate([a.astype(b.dtype), b]),
        *(_bare(x) for x in alike(text, rollout)),
    )
    log_q = masked.sum(rollout.behaviour_logp, rollout.mask, axis=1)
    zero = jnp.zeros((real + generated,), jnp.float32)
    return Contrast(
        **together,
        score=zero.at[:real].set(1.0),
        token_score=jnp.zeros(together["tokens"].shape, jnp.float32),
        log_q=zero.at[real:].set(log_q),
    )


def _bare(batch):
    return {name: getattr(batch, name) for name in Sequences.__dataclass_fields__}


def logit(s: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Log D − log(1 − D): ends at log p − log q, so that its mean under q is −KL(q‖p)."""
    return s


def log_probability(s: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Log D, never positive: Goodfellow et al. 2014's generator that does not saturate."""
    return -jax.nn.softplus(-s)


def probability(s: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """D, in [0, 1] (SeqGAN: Yu et al. 2017)."""
    return jax.nn.sigmoid(s)


def from_discriminators(
    rollout: Rollout,
    params: Mapping[str, Params],
    *,
    model: Any,
    weights: Mapping[str, float],
    transform: Callable = logit,
    paid: Callable = at_end,
) -> Float[Array, "b t"]:
    """Σ wᵢ f(Dᵢ) over the learners named in `weights`, f `logit`, `log_probability`, `probability`.

    A reward, with the arguments bound by `partial`. `model` is that of all discriminators, or a
    mapping by their names; `paid` says which tokens get it: `rewards.at_end`, `each_prefix` or
    `gains`.
    """
    if not weights:
        raise ValueError("from_discriminators needs weights={name of a discriminator: number}")
    total = jnp.zeros(rollout.tokens.shape, jnp.float32)
    for name, weight in weights.items():
        one = model[name] if isinstance(model, Mapping) else model
        total += weight * from_model(
            rollout, params, model=one, learner=name, paid=lambda s, mask: paid(transform(s), mask)
        )
    return total
