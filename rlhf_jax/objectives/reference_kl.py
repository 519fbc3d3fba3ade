"""The exact KL to the reference, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.aggregate import over_tokens
from rlhf_jax.types import Scores, Sequences, Terms


def reference_kl_vocab(
    logits: dict[str, Float[Array, "c v"]], batch: Sequences
) -> dict[str, Float[Array, "c"]]:
    """Σ_v π (log π − log π_ref) per token, in nats; `logits["reference"]` must be scored.

    A learner's `vocab`, beside `scores=("reference",)`; the result is scores.extra["reference_kl"].
    """
    if "reference" not in logits:
        raise ValueError(
            f'reference_kl_vocab needs a model named "reference" in the learner\'s scores; '
            f"it has {sorted(set(logits) - {'self'})}"
        )
    here = batch.mask[:, None]
    logp = jax.nn.log_softmax(masked.select(logits["self"], here))
    ref_logp = jax.nn.log_softmax(masked.select(logits["reference"], here))
    possible = logp > -jnp.inf  # 0 · (−inf) is nan: tokens the policy cannot say add nothing
    gap = jnp.where(possible, logp, 0.0) - jnp.where(possible, ref_logp, 0.0)
    return {"reference_kl": jnp.sum(jnp.where(possible, jnp.exp(logp), 0.0) * gap, axis=-1)}


def reference_kl(
    scores: Scores,
    batch: Sequences,
    *,
    coefficient: float = 1.0,
    aggregate: Callable = over_tokens,
) -> Terms:
    """β KL(π‖π_ref) per token, in nats, with its exact gradient at the sampled prefixes.

    Differs from a penalty on the reward: the gradient of a token's KL stays with that token. With
    `KL(exact=True)` in the rollouts earlier tokens pay as well, and both together, with the policy
    term's `aggregate`, have the gradient of the whole text's KL with less noise than its samples
    (Amini et al. 2025).

    Args:
        coefficient: β, loss per nat; with `whitened` advantages in units of their deviation, not of
            the reward, so that the optimum moves, which a penalty on the reward does not do.
        aggregate: that of the term beside it: for `reinforce`, `aggregate.over_sequences`.
    Use: an anchor on any text, or the local regulariser of a credit horizon.
    Memory: the reference's forward pass, and its log-probabilities of a chunk over the vocabulary.

    Example:
        Learner(
            model,
            partial(combine, policy=ppo, kl=partial(reference_kl, coefficient=0.1)),
            vocab=reference_kl_vocab,
            scores=("reference",),
        )
    """
    if "reference_kl" not in scores.extra:
        raise ValueError(
            'reference_kl needs vocab=reference_kl_vocab and scores=("reference",) on its learner'
        )
    kl = masked.select(scores.extra["reference_kl"], batch.mask)
    weight, count = aggregate(batch)
    return Terms(kl, weight, count, scale=coefficient, metrics={"kl": kl})
