"""Texts that are left out: a learner's `transform` clears the mask of what scored too little.

Rows keep their place, so shapes stay what they are; the trainer divides by the tokens that remain.
To choose among the samples of one prompt there is `selection`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rlhf_jax import masked
from rlhf_jax.conditioning import best_share_edge
from rlhf_jax.types import Experience, Labeled, Sequences


def above(batch: Labeled, key: jax.Array | None = None, *, threshold: float) -> Labeled:
    """Only texts whose score is `threshold` or more: filtered fine-tuning."""
    del key
    return _only(batch, batch.score >= threshold)


def best(batch: Labeled, key: jax.Array | None = None, *, share: float) -> Labeled:
    """Only the best `share` of the batch's texts, by score (expert iteration: Anthony et al. 2017).

    Equal scores stay or go together, so the share is the nearest one possible, at least one text.
    """
    del key
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: above 0, and 1 keeps every text")
    if share == 1:
        return batch
    return _only(batch, batch.score >= best_share_edge(batch, share=share))


def informative(
    batch: Experience, key: jax.Array | None = None, *, tolerance: float = 0.0
) -> Experience:
    """Only prompts whose samples did not all earn the same (DAPO: Yu et al. 2025, §3.2).

    The others have advantage 0 under a group's baseline and would only enlarge the denominator.
    What a sample earned is the sum of `reward`: with a KL penalty in it no two are equal, so charge
    KL as a loss, or allow a `tolerance`. A prompt with one sample goes too.
    Departs: nothing is sampled to replace them; the batch has fewer tokens.
    """
    del key
    earned, present = masked.sum(batch.reward, batch.mask, axis=1), batch.mask.any(axis=1)
    same = (batch.prompt_id[:, None] == batch.prompt_id[None]) & present[None]
    most = jnp.max(jnp.where(same, earned[None], -jnp.inf), axis=1)
    least = jnp.min(jnp.where(same, earned[None], jnp.inf), axis=1)
    return _only(batch, most - least > tolerance)


def _only(batch: Sequences, keep: Bool[Array, "b"]) -> Sequences:
    return batch.replace(mask=batch.mask & keep[:, None])
