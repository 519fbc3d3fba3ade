"""What models say about a batch: the only place where anything is shifted by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.models.blocks import taken
from rlhf_jax.models.transformer import apply_at
from rlhf_jax.sampling import log_probabilities
from rlhf_jax.sharding import (
    WRITERS,
    by_group,
    row_groups,
    split_rows,
    token_groups,
    whole_rows,
)
from rlhf_jax.types import Params, Scores, Sequences


def score(
    params: Mapping[str, Params],
    batch: Sequences,
    *,
    models: Mapping[str, Any],
    vocab: Callable | None = None,
    chunk: int = 2048,
    width: int | None = None,
    most: int | None = None,
    pieces: int | None = None,
) -> Scores:
    """What the model `self`, and every other named one, says about a batch.

    A device has logits of about `chunk` tokens at a time, under `jax.checkpoint`, so `[b, t, v]` is
    never alive. In the same pass `vocab(logits, batch_slice) -> {name: [c]}` may reduce the
    vocabulary: `logits[name]` is `[c, v]`, at the batch's temperature, for the slice's c tokens.
    Only `self` carries gradient. Everything is 0 outside the batch's mask, whatever stands there.

    Behind the first `width` tokens there is only padding, and no row has more than `most` tokens
    in the mask, which stand in at most `pieces`: the rest is not computed (None: all of it is).
    """
    shape = batch.tokens.shape
    whole = _lengthened(_narrowed(_flatten_groups(batch), width))
    # A scanned model would compute all of it, and rows would be cut twice for nothing.
    scanned = all(getattr(models[name], "scan", False) for name in params)
    read = None if scanned else _read(whole.mask, most, pieces)
    flat = _taken(whole, read, whole.tokens.shape[1])
    params = {
        name: tree if name == "self" else jax.lax.stop_gradient(tree)
        for name, tree in params.items()
    }
    hidden = {
        name: apply_at(
            models[name], params[name], whole.tokens, read, segments=whole.segments
        ).hidden
        for name in params
    }
    found: dict[str, dict[str, Array]] = {name: {} for name in params}
    extra = {}
    if any(models[name].lm_head for name in params):
        before = {name: _shift(hidden[name]) for name in params if models[name].lm_head}
        per_name, extra = _over_parts(params, before, flat, models, vocab, chunk, most)
        found.update(per_name)
    for name in params:
        if models[name].value_head:
            after = models[name].value(params[name], hidden[name])
            found[name] |= {"value": _shift(after), "reward": after}

    def finish(x):  # select, so that neither a value nor a gradient leaks from padding
        x = jnp.where(flat.mask, x.astype(jnp.float32), 0.0)
        x = _put(x, read, whole.tokens.shape[1])[:, : shape[-1]]
        # What follows looks along rows: their tokens lie together again.
        return split_rows(jnp.pad(x, ((0, 0), (0, shape[-1] - x.shape[1])))).reshape(shape)

    found, extra = jax.tree.map(finish, (found, extra))
    others = {
        name: Scores(**jax.lax.stop_gradient(found[name])) for name in params if name != "self"
    }
    return Scores(**found["self"], extra=extra, others=others)


def _shift(x: Array) -> Array:
    """Index t gets what was known before token t; nothing is known before the first."""
    # One operation, of which a mesh that splits tokens makes the exchange of one token.
    return jax.lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (1, -1, 0), *[(0, 0, 0)] * (x.ndim - 2)]
    )


def _flatten_groups(batch: Sequences) -> Sequences:
    """`[n, k, t]` to `[n·k, t]`; per-group fields are repeated for each member."""
    if batch.tokens.ndim == 2:
        return batch
    n, k, _ = batch.tokens.shape

    def one(x):
        return x.reshape(n * k, *x.shape[2:]) if x.ndim > 1 else jnp.repeat(x, k)

    return jax.tree.map(one, batch)


def _narrowed(batch: Sequences, width: int | None) -> Sequences:
    """The first `width` tokens of every row."""
    t = batch.tokens.shape[1]
    if width is None or width >= t:
        return batch
    return jax.tree.map(lambda x: x[:, :width] if _per_token(x, t) else x, batch)


def _lengthened(batch: Sequences) -> Sequences:
    """With so much padding behind that a mesh splits the tokens of a row evenly."""
    t, parts = batch.tokens.shape[1], token_groups()

    def one(x):
        behind = ((0, 0), (0, -t % parts)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, behind) if _per_token(x, t) else x

    return jax.tree.map(one, batch) if t % parts else batch


def _read(mask: Array, most: int | None, pieces: int | None) -> Array | None:
    """Places of the mask's tokens and of those before them, in their order, and others behind.

    None: all of them, or nobody knows; where a mesh splits rows each part would need others.
    """
    if most is None or token_groups() > 1:
        return None
    n = most + min(most, most if pieces is None else pieces)
    return _first(mask | jnp.pad(mask[:, 1:], ((0, 0), (0, 1))), n) if n < mask.shape[1] else None


def _first(wanted: Array, n: int) -> Array:
    """[b, n]: where `wanted` is true, in order; then where it is not."""
    return jnp.argsort(~wanted, axis=1, stable=True)[:, :n]


def _taken(tree: Any, places: Array | None, t: int) -> Any:
    """Tokens at these places; what a row has once stays."""
    return jax.tree.map(lambda x: taken(x, places) if _per_token(x, t) else x, tree)


def _put(x: Array, places: Array | None, t: int) -> Array:
    """[b, t] with x at these places, 0 elsewhere."""
    if places is None:
        return x
    return jnp.zeros((x.shape[0], t), x.dtype).at[jnp.arange(x.shape[0])[:, None], places].set(x)


def _per_token(x: Array, t: int) -> bool:
    return x.ndim > 1 and x.shape[1] == t


def _over_parts(params, hidden, batch, models, vocab, chunk, most):
    """`_over_masked`; where a mesh splits the tokens of a row, each part is a row of its own."""
    t, parts = batch.tokens.shape[1], token_groups()
    if parts == 1:
        return _over_masked(params, hidden, batch, models, vocab, chunk, most)

    def part(x):
        if _per_token(x, t):
            return by_group(x)
        return by_group(jnp.repeat(x[:, None], parts, axis=1))[:, 0]

    cut = jax.tree.map(part, (hidden, batch))
    return jax.tree.map(whole_rows, _over_masked(params, *cut, models, vocab, chunk, most))


def _over_masked(params, hidden, batch, models, vocab, chunk, most):
    """`_over_vocabulary` of the tokens in the mask, as far as it is known how many there are."""
    t = batch.tokens.shape[1]
    if most is None or most >= t:
        return _over_vocabulary(params, hidden, batch, models, vocab, chunk)
    places = _first(batch.mask, most)
    masked = _taken((hidden, batch), places, t)
    found = _over_vocabulary(params, *masked, models, vocab, chunk)
    return jax.tree.map(lambda x: _put(x, places, t), found)


def _over_vocabulary(params, hidden, batch, models, vocab, chunk):
    """logp, entropy and what `vocab` wants, a few token columns at a time."""
    b, t = batch.tokens.shape
    width = max(1, min(t, chunk * row_groups(WRITERS) // b))  # each device has its own rows
    temperature = getattr(batch, "temperature", jnp.ones((b,), jnp.float32))

    def columns(x):  # [b, t, ...] -> [chunks, b, width, ...]; rows keep their place on the mesh
        x = jnp.pad(x, ((0, 0), (0, -t % width)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, width, *x.shape[2:]), 1, 0)

    leaves, tree = jax.tree.flatten(batch)
    per_token = [_per_token(x, t) for x in leaves]
    row_leaves = [x for x, wide in zip(leaves, per_token, strict=True) if not wide]

    def one(hidden, token_leaves):
        def flat(x):
            return x.reshape(b * width, *x.shape[2:])

        heat = jnp.repeat(temperature, width)
        tokens, wide = iter(token_leaves), iter(row_leaves)
        part = tree.unflatten(
            flat(next(tokens)) if is_token else jnp.repeat(next(wide), width, axis=0)
            for is_token in per_token
        )
        logits, found = {}, {}
        for name, h in hidden.items():
            logp = log_probabilities(models[name].logits(params[name], flat(h)), heat)
            logits[name] = logp  # normalised: the same distribution, and what most reductions want
            found[name] = {
                "logp": jnp.take_along_axis(logp, part.tokens[:, None], axis=-1)[:, 0],
                # select: a token of probability 0 (-inf) adds nothing
                "entropy": -jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0).sum(-1),
            }
        extra = vocab(logits, part) if vocab is not None else {}
        return jax.tree.map(lambda x: x.reshape(b, width), (found, extra))

    chunks = -(-t // width)
    token_leaves = [x for x, wide in zip(leaves, per_token, strict=True) if wide]
    if chunks == 1:
        return one(hidden, token_leaves)
    xs = jax.tree.map(columns, (hidden, token_leaves))
    _, found = jax.lax.scan(lambda _, x: (None, jax.checkpoint(one)(*x)), None, xs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :t], found)
