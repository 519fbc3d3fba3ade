"""A policy learns what a search found: the apprentice of expert iteration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.types import Scores, Searched, Terms

LEAST = -1e9  # stands for log 0


def visit_counts_vocab(
    logits: dict[str, Float[Array, "c v"]], batch: Searched, *, temperature: float = 1.0
) -> dict[str, Float[Array, "c"]]:
    """−Σ_a ν_a log π_a, ν ∝ visits^{1/τ}, and the entropy of ν, which it ends at; in nats.

    A learner's `vocab`; the results are scores.extra["search_cross_entropy"], ["search_entropy"].

    Args:
        temperature: τ of the visits; AlphaZero's 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if batch.visits.shape[-1] != logits["self"].shape[-1]:
        raise ValueError(
            f"visits speak of {batch.visits.shape[-1]} moves and the policy of "
            f"{logits['self'].shape[-1]} tokens: one column per token of the vocabulary"
        )
    here = batch.mask[:, None]
    logp = jax.nn.log_softmax(masked.select(logits["self"], here))
    visits = masked.select(batch.visits, here)
    tried = visits > 0
    target = jnp.log(jnp.where(tried, visits, 1.0)) / temperature
    target = jax.nn.log_softmax(jnp.where(tried, target, LEAST))
    p = jnp.where(tried, jnp.exp(target), 0.0)
    return {
        "search_cross_entropy": -jnp.sum(p * jnp.maximum(logp, LEAST), axis=-1),
        "search_entropy": -jnp.sum(jnp.where(tried, p * target, 0.0), axis=-1),
    }


def visit_counts(scores: Scores, batch: Searched) -> Terms:
    """−Σ_a ν_a log π_a per searched state, in nats, ν the search's share of visits.

    The policy's part of AlphaZero's loss (Silver et al. 2018, eq. 1) and of expert iteration's
    (Anthony et al. 2017, §3.3); its gradient by the logits is π − ν. The learner needs
    `vocab=visit_counts_vocab`; the value's part is `outcome`:
    `partial(combine, policy=visit_counts, value=outcome)`.

    Use: a policy that learns from a search over the same states.
    Memory: the visits [b, t, v] in the batch, and a chunk of them beside the logits: for
        vocabularies of moves.

    Example:
        both = partial(combine, policy=visit_counts, value=outcome)
        Learner(model, both, batch="searched", vocab=visit_counts_vocab)
    """
    if "search_cross_entropy" not in scores.extra:
        raise ValueError("visit_counts needs vocab=visit_counts_vocab on its learner")
    names = ("search_cross_entropy", "search_entropy")
    searched = batch.mask & (batch.visits > 0).any(axis=-1)
    loss, entropy = (masked.select(scores.extra[name], searched) for name in names)
    metrics = {"kl": loss - entropy, "search_entropy": entropy}
    return Terms(loss, weight=searched.astype(jnp.float32), metrics=metrics)
