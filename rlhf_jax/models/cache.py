"""Keys and values of earlier tokens, in the layout that a decoding step reads fastest.

All rows write their next token into the same entry, so that a write is one slice and no scatter;
an entry remembers the place of its token in the text, −1 if it holds none. What a token sees is
decided by these places, so a row may have holes: padding, or turns in which it said nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.attention import softmax
from rlhf_jax.sharding import WRITERS, split, split_rows


class Cache(NamedTuple):
    """What a row remembers; `layers` is one pair a layer, or stacked.

    Where there is no room left the next entry is `first`: what was written longest ago is written
    over.
    """

    used: Int[Array, ""]  # the entry that is written next, if there is room
    first: Int[Array, ""]
    places: Int[Array, "b s"]  # of each entry's token in its text; −1: no token
    layers: Any  # keys [b, kv_heads, head_dim, s] and values [b, kv_heads, s, head_dim]


class Codes(NamedTuple):
    """Keys or values as whole numbers of an eighth of the size, and what they are multiples of."""

    code: Array  # int8
    unit: Array  # of a token and head: the same shape, but 1 for head_dim


def empty(rows: int, length: int, *, layers: int, heads: int, size: int, dtype, stacked: bool):
    """Room for `length` tokens a row; of dtype int8, `Codes`."""
    ahead = (layers,) if stacked else ()

    def zeros(shape, axis):
        found = jnp.zeros((*ahead, *shape), dtype)
        if found.dtype != jnp.int8:
            return found
        single = tuple(1 if i == axis else n for i, n in enumerate(shape))
        return Codes(found, jnp.zeros((*ahead, *single), jnp.float32))

    def pair():
        both = zeros((rows, heads, size, length), 2), zeros((rows, heads, length, size), 3)
        return jax.tree.map(lambda x: split(x, *(None,) * len(ahead), *WRITERS, "tensor"), both)

    places = split_rows(jnp.full((rows, length), -1, jnp.int32), over=WRITERS)
    kept = pair() if stacked else tuple(pair() for _ in range(layers))
    return Cache(jnp.int32(0), jnp.int32(0), places, kept)


def placed(cache: Cache, positions: Int[Array, "b t"]) -> Cache:
    """The cache in which the next t entries hold tokens of these places; −1 is padding."""
    positions = positions.astype(jnp.int32)
    fits = cache.used + positions.shape[1] <= cache.places.shape[1]
    used = jnp.where(fits, cache.used, cache.first)
    places = jax.lax.dynamic_update_slice_in_dim(cache.places, positions, used, axis=1)
    return cache._replace(places=places, used=used)


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

    def put(kept, new, at):
        if layer is not None:
            new, at = new[None], (layer, *at)
        return jax.lax.dynamic_update_slice(kept, new, [jnp.int32(i) for i in at])

    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    key, value = _stored(key, keys, axis=2), _stored(value, values, axis=3)
    keys = jax.tree.map(partial(put, at=(0, 0, 0, used)), keys, key)
    values = jax.tree.map(partial(put, at=(0, 0, used, 0)), values, value)
    if layer is None:
        return (keys, values), keys, values
    read = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    return (keys, values), jax.tree.map(read, keys), jax.tree.map(read, values)


def _stored(x: Array, like: Any, axis: int) -> Any:
    """In the cache's numbers: cast, or coded by the largest of a token's head."""
    if not isinstance(like, Codes):
        return x.astype(like.dtype)
    wide = x.astype(jnp.float32)
    unit = jnp.abs(wide).max(axis=axis, keepdims=True) / 127
    return Codes(jnp.round(wide / jnp.where(unit > 0, unit, 1.0)).astype(jnp.int8), unit)


def plain(x: Any, dtype: Any) -> Array:
    """Keys or values of a cache as numbers."""
    return (x.code * x.unit if isinstance(x, Codes) else x).astype(dtype)


def grown(cache: Cache, tokens: int, layers: Any) -> Cache:
    """The cache behind so many tokens more."""
    return cache._replace(used=cache.used + tokens, layers=layers)


def room(cache: Any, prompt: int, capacity: int) -> int:
    """Length of a cache whose rows `inserted` can put into this one."""
    return prompt if isinstance(cache, Cache) else capacity


def resizable(model: Any) -> bool:
    """The model's cache is one of these, not one of its own."""
    return isinstance(jax.eval_shape(lambda: model.empty_cache(1, 1)), Cache)


def behind(cache: Cache, length: int) -> Cache:
    """The same, in which the next entry is the one behind so many, which are not written over."""
    return cache._replace(used=jnp.int32(length), first=jnp.int32(length))


def lengthened(cache: Any, length: int) -> Any:
    """The same with room for `length` tokens a row."""
    if not isinstance(cache, Cache):
        return cache
    more = length - cache.places.shape[1]

    def entries(x, axis):  # from the end: layers may stand in front
        behind = [(0, 0)] * x.ndim
        behind[axis] = (0, more)
        return jnp.pad(x, behind)

    def both(pair):
        keys, values = pair
        longer = jax.tree.map(partial(entries, axis=-1), keys)
        return longer, jax.tree.map(partial(entries, axis=-2), values)

    stacked = jax.tree.leaves(cache.layers)[0].ndim > 4
    places = jnp.pad(cache.places, ((0, 0), (0, more)), constant_values=-1)
    layers = both(cache.layers) if stacked else tuple(map(both, cache.layers))
    return cache._replace(places=places, layers=layers)


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
    more = ((0, 0), (0, cache.places.shape[1] - length))
    wide = jnp.pad(part.places, more, constant_values=-1)
    found = _map(put, cache, part._replace(places=wide))
    return behind(found, length) if rows is None else found


def taken(cache: Any, rows: Int[Array, "g r"]) -> Any:
    """These rows of each of g equal groups, numbered within the group; out of range: any."""

    def each(x):
        split = x.reshape(rows.shape[0], -1, *x.shape[1:])
        found = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(split, rows)
        return found.reshape(-1, *x.shape[1:])

    return _map(each, cache)


def _map(fn, cache: Any, *others: Any) -> Any:
    """`fn` of arrays whose first axis is the rows."""
    if not isinstance(cache, Cache):
        return jax.tree.map(fn, cache, *others)
    stacked = jax.tree.leaves(cache.layers)[0].ndim > 4  # layers in front
    over = jax.vmap(fn) if stacked else fn
    layers = jax.tree.map(over, cache.layers, *(other.layers for other in others))
    places = fn(cache.places, *(other.places for other in others))
    return cache._replace(places=places, layers=layers)


def attention(
    query: Float[Array, "b t h k"],
    keys: Float[Array, "b g k s"] | Codes,
    values: Float[Array, "b g s k"] | Codes,
    mask: Bool[Array, "b t s"],
    *,
    cap: float | None = None,
) -> Float[Array, "b t h k"]:
    """Softmax attention over a cache, float32 logits, key heads not repeated.

    One query a row is a product of a matrix and a vector: memory decides, and XLA:CPU reads the
    cache once in a sum of products, where its matrix kernels first make a copy in another order.
    """
    b, t, _, size = query.shape
    key, key_unit = keys if isinstance(keys, Codes) else (keys, None)
    value, value_unit = values if isinstance(values, Codes) else (values, None)
    g, wide = key.shape[1], jnp.promote_types(query.dtype, jnp.float32)
    # [b, g, t · h/g, k]: the heads that share a key are rows of one product.
    rows = query.reshape(b, t, g, -1, size).transpose(0, 2, 1, 3, 4).reshape(b, g, -1, size)
    if t == 1:
        logit = (rows.astype(wide)[..., None] * key.astype(wide)[:, :, None]).sum(-2)
    else:
        key = key.astype(query.dtype)
        logit = jnp.einsum("bgqk,bgks->bgqs", rows, key, preferred_element_type=wide)
    if key_unit is not None:  # of a whole head: it can be multiplied behind the sum
        logit = logit * key_unit
    logit = logit.reshape(b, g, t, -1, key.shape[-1]) * size**-0.5
    weight = softmax(logit, mask[:, None, :, None], cap=cap).reshape(*rows.shape[:3], -1)
    if value_unit is not None:
        weight = weight * jnp.swapaxes(value_unit, 2, 3)
    if t == 1:
        found = (weight[..., None] * value.astype(wide)[:, :, None]).sum(-2).astype(query.dtype)
    else:
        weight, value = weight.astype(query.dtype), value.astype(query.dtype)
        found = jnp.einsum("bgqs,bgsk->bgqk", weight, value)
    return found.reshape(b, g, t, -1, size).transpose(0, 2, 1, 3, 4).reshape(query.shape)
