"""How the losses of tokens become one number: `batch -> (weight, count)`, never a mean.

The trainer divides Σ loss·weight by Σ count over the whole minibatch; with these two arrays that is
a mean over tokens, over sequences or over prompts. Every policy-gradient objective takes one of the
functions as `aggregate`. Rows without a masked token count nowhere.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.types import Experience, Sequences

Pair = tuple[Float[Array, "*n t"], Float[Array, "*n t"]]


def over_tokens(batch: Sequences) -> Pair:
    """Σ over all tokens / number of tokens: long texts weigh more (PPO)."""
    weight = batch.mask.astype(jnp.float32)
    return weight, weight


def over_sequences(batch: Sequences) -> Pair:
    """Mean over texts of the sum of their tokens: the log-likelihood ratio's own (REINFORCE)."""
    return batch.mask.astype(jnp.float32), _share(batch)


def over_sequence_means(batch: Sequences) -> Pair:
    """Mean over texts of the mean over their tokens: every text weighs the same (GRPO)."""
    return _share(batch), _share(batch)


def over_prompts(batch: Experience) -> Pair:
    """Mean over prompts of the mean over all tokens of their samples (DAPO: Yu et al. 2025, eq. 8).

    Reads `group_tokens`, counted by `collect` over the whole rollout, so that minibatches which
    part the samples of a prompt still give them its weight. A transform that clears masks
    (`selection`) does not count anew.
    """
    tokens = jnp.maximum(batch.group_tokens.astype(jnp.float32), 1.0)
    weight = jnp.where(batch.mask, 1.0 / tokens[:, None], 0.0)
    return weight, weight


def over_length(batch: Sequences, *, length: int) -> Pair:
    """Mean over texts of Σ tokens / `length`, one constant for all (Dr. GRPO: Liu et al. 2025)."""
    if length < 1:
        raise ValueError(f"length={length}: the rollouts' longest response, at least 1 token")
    return batch.mask.astype(jnp.float32), length * _share(batch)


def over_ends(batch: Sequences) -> Pair:
    """The last masked token of each text alone: for what is said of whole texts."""
    weight = masked.is_last(batch.mask).astype(jnp.float32)
    return weight, weight


def _share(batch):
    """1 / (the text's masked tokens) on each of them: sums to the number of texts."""
    length = jnp.sum(batch.mask, axis=-1, keepdims=True, dtype=jnp.float32)
    return jnp.where(batch.mask, 1.0 / jnp.maximum(length, 1.0), 0.0)
