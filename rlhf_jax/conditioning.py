"""Conditioning is a transform of data, not a loss: `Labeled -> Labeled`, then any objective."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.types import Labeled, Prompts


def condition(
    batch: Labeled,
    key: jax.Array,
    *,
    threshold: float,
    good: int,
    bad: int,
    drop: float = 0.01,
) -> Labeled:
    """Inserts `good` after BOS where score ≥ threshold, `bad` elsewhere (Korbak et al. 2023, §2).

    Rows grow by one column; the mask covers the text and not the token. With probability `drop` a
    row gets no token and one more column of padding, so that the model also speaks unconditioned.
    Rows hold one text each: a token put into a packed row would speak of its first text only.
    """
    tag = jnp.where(batch.score >= threshold, good, bad).astype(batch.tokens.dtype)
    keep = ~jax.random.bernoulli(key, drop, tag.shape)
    return _inserted(batch, tag, keep)


def tagged(prompts: Prompts, tag: int | Int[Array, "b"]) -> Prompts:
    """Prompts with a control token after BOS, to sample what a conditioned model says of it."""
    rows = prompts.tokens.shape[0]
    tag = jnp.broadcast_to(jnp.asarray(tag, prompts.tokens.dtype), (rows,))
    tokens = _insert(prompts.tokens, tag, jnp.ones((rows,), bool))
    return prompts.replace(tokens=tokens, length=prompts.length + 1)


def _inserted(batch: Labeled, tag: Int[Array, "b"], keep: Bool[Array, "b"]) -> Labeled:
    """Every per-token field moves with its token, those of a subclass included."""
    new = {}
    for field in dataclasses.fields(batch):
        x = getattr(batch, field.name)
        if getattr(x, "shape", None) == batch.tokens.shape:
            new[field.name] = _insert(x, jnp.zeros_like(x[:, 0]), keep)
    new["tokens"] = _insert(batch.tokens, tag, keep)
    new["segments"] = _insert(batch.segments, batch.segments[:, 0], keep)
    return batch.replace(**new)


def _insert(x, new, keep):
    """`new` at index 1 and the rest shifted right; where not `keep`, a 0 at the end instead."""
    with_new = jnp.concatenate([x[:, :1], new[:, None], x[:, 1:]], axis=1)
    without = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    return jnp.where(keep[:, None], with_new, without)
