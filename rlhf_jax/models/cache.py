"""Keys and values of earlier tokens, in the layout that a decoding step reads fastest.

All rows write their next token into the same entry, so that a write is one slice and no scatter;
an entry remembers the place of its token in the text, −1 if it holds none. What a token sees is
decided by these places, so a row may have holes: padding, or turns in which it said nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import softmax
from rlhf_jax.sharding import split_rows


class Cache(NamedTuple):
    """Entries 0 … `used` − 1 of each row are written; `layers` is one pair a layer, or stacked."""

    used: Int[Array, ""]
    places: Int[Array, "b s"]  # of each entry's token in its text; −1: no token
    layers: Any  # keys [b, kv_heads, head_dim, s] and values [b, kv_heads, s, head_dim]


def empty(rows: int, length: int, *, layers: int, heads: int, size: int, dtype, stacked: bool):
    """Room for `length` tokens a row."""
    ahead = (layers,) if stacked else ()

    def pair():
        keys = jnp.zeros((*ahead, rows, heads, size, length), dtype)
        values = jnp.zeros((*ahead, rows, heads, length, size), dtype)
        return split_rows((keys, values), axis=len(ahead))

    places = split_rows(jnp.full((rows, length), -1, jnp.int32))
    return Cache(jnp.int32(0), places, pair() if stacked else tuple(pair() for _ in range(layers)))


def placed(cache: Cache, positions: Int[Array, "b t"]) -> Cache:
    """The cache in which the next t entries hold tokens of these places; −1 is padding."""
    positions = positions.astype(jnp.int32)
    places = jax.lax.dynamic_update_slice(cache.places, positions, (0, cache.used))
    return cache._replace(places=places)


def written(
    pair: tuple[Array, Array],
    used: Int[Array, ""],
    key: Float[Array, "b t g k"],
    value: Float[Array, "b t g k"],
    layer: Int[Array, ""] | None,
) -> tuple[tuple[Array, Array], Array, Array]:
    """One layer's keys and values with the next t entries; `layer` is its index in stacked ones.

    Returns what is kept, and this layer's keys and values.
    """
    keys, values = pair
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    if layer is None:
        keys = jax.lax.dynamic_update_slice(keys, key, (0, 0, 0, used))
        values = jax.lax.dynamic_update_slice(values, value, (0, 0, used, 0))
        return (keys, values), keys, values
    keys = jax.lax.dynamic_update_slice(keys, key[None], (layer, 0, 0, 0, used))
    values = jax.lax.dynamic_update_slice(values, value[None], (layer, 0, 0, used, 0))
    read = jax.lax.dynamic_index_in_dim
    return (keys, values), read(keys, layer, keepdims=False), read(values, layer, keepdims=False)


def attention(
    query: Float[Array, "b t h k"],
    keys: Float[Array, "b g k s"],
    values: Float[Array, "b g s k"],
    mask: Bool[Array, "b t s"],
    *,
    cap: float | None = None,
) -> Float[Array, "b t h k"]:
    """Softmax attention over a cache, float32 logits, key heads not repeated.

    One query a row is a product of a matrix and a vector: memory decides, and XLA:CPU reads the
    cache once in a sum of products, where its matrix kernels first make a copy in another order.
    """
    b, t, h, size = query.shape
    grouped = query.reshape(b, t, keys.shape[1], -1, size)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    if t == 1:
        each = grouped[:, 0].astype(wide)
        logit = (each[..., None] * keys.astype(wide)[:, :, None]).sum(-2)[..., None, :]
    else:
        logit = jnp.einsum("btgnk,bgks->bgnts", grouped, keys, preferred_element_type=wide)
    weight = softmax(logit * size**-0.5, mask[:, None, None], cap=cap)
    if t == 1:
        found = (weight[:, :, :, 0, :, None] * values.astype(wide)[:, :, None]).sum(-2)
        return found.astype(query.dtype).reshape(b, 1, h, size)
    found = jnp.einsum("bgnts,bgsk->btgnk", weight.astype(values.dtype), values)
    return found.reshape(query.shape)
