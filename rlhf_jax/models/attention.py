"""Attention kernels: `(query, key, value, mask) -> [b, t, heads, head_dim]`.

One of them is `Transformer.attention`, or an argument of `apply`. Those that change where gradients
go say what `dot_attention` says: forward they are the same kernel, so sampler and trainer agree.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.sharding import token_groups

QUERY_PARTS, QUERIES = 4, 32  # whole texts are read in so many parts, of at least so many queries


def dot_attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    mask: Bool[Array, "b t s"],
) -> Float[Array, "b t h k"]:
    """Softmax attention with float32 logits; a row without any key stays finite."""

    def library(query, key, value, mask):
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])

    # XLA:CPU makes one product of matrices out of the own form, and several copies of the other.
    return jax.lax.platform_dependent(
        query, key, value, mask, cpu=grouped_attention, default=library
    )


def grouped_attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    mask: Bool[Array, "b t s"],
    *,
    cap: float | None = None,
) -> Float[Array, "b t h k"]:
    """The same, the queries of one key head side by side, so that no key is repeated.

    With `cap` logits are cap · tanh(logit / cap) (Gemma 2), which no fused kernel has. Where t = s
    nothing behind a query may be in its mask: a part of the queries reads no later keys.
    """
    t = query.shape[1]
    whole = t != key.shape[1] or token_groups() > 1
    n = t if whole else max(QUERIES, -(-t // QUERY_PARTS))

    def part(i):
        rows = slice(i, i + n)
        seen = slice(None) if whole else slice(i + n)
        return _grouped(query[:, rows], key[:, seen], value[:, seen], mask[:, rows, seen], cap)

    return jnp.concatenate([part(i) for i in range(0, t, n)], axis=1)


def _grouped(query, key, value, mask, cap):
    (b, t, h, size), g = query.shape, key.shape[2]
    # [b, g, t · h/g, k]: the heads that share a key are rows of one product. Tokens go first: a
    # mesh that splits them splits the rows.
    rows = query.reshape(b, t, g, h // g, size).transpose(0, 2, 1, 3, 4).reshape(b, g, -1, size)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    found = _mixed(rows, key, value, mask) if cap is None else _mix(rows, key, value, mask, cap)[0]
    return found.reshape(b, g, t, -1, size).transpose(0, 2, 1, 3, 4).reshape(query.shape)


def _mix(rows, key, value, mask, cap=None):
    """What rows [b, g, q, k] read, and their weights [b, g, q, s]; q is t times h/g."""
    b, g, q, size = rows.shape
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    logit = jnp.einsum("bgqk,bgsk->bgqs", rows, key, preferred_element_type=wide)
    logit = logit.reshape(b, g, mask.shape[1], -1, mask.shape[2]) * size**-0.5
    weight = softmax(logit, mask[:, None, :, None], cap=cap)
    weight = weight.reshape(b, g, q, -1).astype(value.dtype)
    return jnp.einsum("bgqs,bgsk->bgqk", weight, value), weight


@jax.custom_vjp
def _mixed(rows, key, value, mask):
    return _mix(rows, key, value, mask)[0]


def _mixed_forward(rows, key, value, mask):
    found, weight = _mix(rows, key, value, mask)
    return found, (rows, key, value, mask, weight, found)


def _mixed_backward(kept, grad):
    """The derivative in which Σ_s w dw is Σ_k o do, a smaller sum (Dao et al. 2022, app. B.4)."""
    rows, key, value, mask, weight, found = kept
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    mean = (grad.astype(wide) * found.astype(wide)).sum(axis=-1, keepdims=True)
    by_weight = jnp.einsum("bgqk,bgsk->bgqs", grad, value, preferred_element_type=wide)
    by_logit = weight.astype(wide) * (by_weight - mean) * rows.shape[-1] ** -0.5
    shape = by_logit.shape
    # A row may see nothing at all.
    by_logit = by_logit.reshape(*shape[:2], mask.shape[1], -1, mask.shape[2])
    by_logit = jnp.where(mask[:, None, :, None], by_logit, 0).reshape(shape).astype(rows.dtype)
    return (
        jnp.einsum("bgqs,bgsk->bgqk", by_logit, key),
        jnp.einsum("bgqs,bgqk->bgsk", by_logit, rows),
        jnp.einsum("bgqs,bgqk->bgsk", weight, grad),
        None,
    )


_mixed.defvjp(_mixed_forward, _mixed_backward)


def softmax(
    logit: Float[Array, "*n s"], mask: Bool[Array, "*n s"], *, cap: float | None = None
) -> Float[Array, "*n s"]:
    """Weights of the last axis where `mask`; finite where it is nowhere true."""
    if cap is not None:
        logit = cap * jnp.tanh(logit / cap)
    low = 0.7 * jnp.finfo(logit.dtype).min
    return jax.nn.softmax(jnp.where(mask, logit, low), axis=-1)


def myopic(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    mask: Bool[Array, "b t s"],
) -> Float[Array, "b t h k"]:
    """Earlier positions are read but not taught: keys and values of s < t carry no gradient to t.

    With it in every layer the loss at position t has a gradient of exactly 0 by the hidden states
    at s < t: no position can prepare what a later one needs (Wu, Morris & Levine 2024, myopic
    descent). A position's own key and value stay live. A position is an input: the loss of token t
    is the one at position t − 1. Decoding with a cache, where nobody differentiates, is plain.
    """
    if query.shape[1] != key.shape[1]:
        return dot_attention(query, key, value, mask)
    return gradient_where(query, key, value, mask, _own(mask))


def free_play(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    mask: Bool[Array, "b t s"],
    *,
    tokens: int,
    start: int = 0,
) -> Float[Array, "b t h k"]:
    """No later position teaches `tokens` early ones through their keys and values.

    They are the positions `start` to `start + tokens − 1` of each text, counted from 0 at its first
    token, prompt and environment included, for a kernel knows positions and not who chose them:
    with a prompt of p tokens, `start=p` is the first token that was chosen. Their own losses still
    teach them; `rlhf_jax.advantages.free_play` takes that away too. Decoding with a cache is plain.
    """
    if tokens < 0 or start < 0:
        raise ValueError(f"tokens={tokens}, start={start}: both at least 0")
    if query.shape[1] != key.shape[1]:
        return dot_attention(query, key, value, mask)
    # A token sees itself and what precedes it in its text, so what it sees tells its index.
    index = mask.sum(axis=-1) - 1
    early = (index >= start) & (index < start + tokens)
    return gradient_where(query, key, value, mask, _own(mask) | ~early[:, None, :])


def gradient_where(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    mask: Bool[Array, "b t s"],
    live: Bool[Array, "b t s"],
) -> Float[Array, "b t h k"]:
    """`dot_attention` in which query t has a gradient by key and value s where `live`, else 0.

    Exactly 0, not a small number. Costs two more products of the size of attention's own, and the
    weights [b, heads, t, s] are alive, as they are in `dot_attention` off the fused kernels.
    """
    b, t, _, size = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, size)
    seen, live = mask[:, None, None], live[:, None, None]
    still_key, still_value = jax.lax.stop_gradient((key, value))

    def logits(key):
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return jnp.einsum("btgnk,bsgk->bgnts", grouped, key, preferred_element_type=wide)

    def mixed(weight, value):
        return jnp.einsum("bgnts,bsgk->btgnk", weight, value).reshape(query.shape)

    # The two products are equal, and the compiler makes one of them; their gradients differ.
    logit = jnp.where(live, logits(key), logits(still_key)) * (size**-0.5)
    weight = softmax(logit, seen).astype(value.dtype)
    taught = jax.lax.stop_gradient(jnp.where(live, weight, 0))
    return mixed(weight, still_value) + mixed(taught, value - still_value)  # + 0, and a gradient


def _own(mask: Bool[Array, "b t s"]) -> Bool[Array, "b t s"]:
    return jnp.broadcast_to(jnp.eye(mask.shape[1], dtype=bool)[None], mask.shape)
