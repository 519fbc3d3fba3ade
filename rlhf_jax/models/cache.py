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
    """What a row remembers; `layers` is one pair a layer, or stacked.

    The entry behind the last is `first`: what was written longest ago is written over.
    """

    used: Int[Array, ""]  # the entry that is written next
    first: Int[Array, ""]
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
    kept = pair() if stacked else tuple(pair() for _ in range(layers))
    return Cache(jnp.int32(0), jnp.int32(0), places, kept)


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


def grown(cache: Cache, tokens: int, layers: Any) -> Cache:
    """The cache behind so many tokens more."""
    used, end = cache.used + tokens, cache.places.shape[1]
    return cache._replace(used=jnp.where(used + tokens > end, cache.first, used), layers=layers)


def room(cache: Any, prompt: int, capacity: int) -> int:
    """Length of a cache whose rows `inserted` can put into this one."""
    return prompt if isinstance(cache, Cache) else capacity


def repeated(cache: Any, times: int) -> Any:
    """Every row `times` times in a row."""
    return _map(lambda x: jnp.repeat(x, times, axis=0), cache) if times > 1 else cache


def inserted(cache: Any, part: Any, rows: Int[Array, "g r"] | None = None) -> Any:
    """Rows that forget what they held and hold what `part` does, in their first entries.

    `rows` None: all of them, and the next entries are those behind. Else those of each of g equal
    groups of rows, numbered within the group; a number out of range is no row.
    """
    if not isinstance(cache, Cache) and rows is None:
        return part

    def put(x, new):
        block = tuple(slice(0, n) for n in new.shape[1:])
        if rows is None:
            return x.at[(slice(None), *block)].set(new)
        g, r = rows.shape

        def each(x, new, rows):
            return x.at[(rows, *block)].set(new, mode="drop")

        split = x.reshape(g, -1, *x.shape[1:]), new.reshape(g, r, *new.shape[1:])
        return jax.vmap(each)(*split, rows).reshape(x.shape)

    if not isinstance(cache, Cache):
        return jax.tree.map(put, cache, part)
    length = part.places.shape[1]
    behind = ((0, 0), (0, cache.places.shape[1] - length))
    wide = jnp.pad(part.places, behind, constant_values=-1)
    found = _map(put, cache, part._replace(places=wide))
    if rows is None:
        found = found._replace(used=jnp.int32(length), first=jnp.int32(length))
    return found


def _map(fn, cache: Any, *others: Any) -> Any:
    """`fn` of arrays whose first axis is the rows."""
    if not isinstance(cache, Cache):
        return jax.tree.map(fn, cache, *others)
    over = fn if isinstance(cache.layers[0], tuple) else jax.vmap(fn)  # stacked: layers in front
    layers = jax.tree.map(over, cache.layers, *(other.layers for other in others))
    places = fn(cache.places, *(other.places for other in others))
    return cache._replace(places=places, layers=layers)


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
