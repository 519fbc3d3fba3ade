"""What models say about a batch: the only place where anything is shifted by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.sampling import log_probabilities
from rlhf_jax.types import Params, Scores, Sequences


def score(
    params: Mapping[str, Params],
    batch: Sequences,
    *,
    models: Mapping[str, Any],
    vocab: Callable | None = None,
    chunk: int = 2048,
) -> Scores:
    """What the model `self`, and every other named one, says about a batch.

    Logits exist for about `chunk` tokens at a time, under `jax.checkpoint`, so `[b, t, v]` is never
    alive. In the same pass `vocab(logits, batch_slice) -> {name: [c]}` may reduce the vocabulary:
    `logits[name]` is `[c, v]`, at the batch's temperature, for the c tokens of the slice. Only
    `self` carries gradient. Everything is 0 outside the batch's mask, whatever stands there.
    """
    flat = _flatten_groups(batch)
    shape = batch.tokens.shape
    params = {
        name: tree if name == "self" else jax.lax.stop_gradient(tree)
        for name, tree in params.items()
    }
    hidden = {
        name: models[name].apply(params[name], flat.tokens, segments=flat.segments).hidden
        for name in params
    }
    found: dict[str, dict[str, Array]] = {name: {} for name in params}
    extra = {}
    if any(models[name].lm_head for name in params):
        before = {name: _shift(hidden[name]) for name in params if models[name].lm_head}
        per_name, extra = _over_vocabulary(params, before, flat, models, vocab, chunk)
        found.update(per_name)
    for name in params:
        if models[name].value_head:
            after = models[name].value(params[name], hidden[name])
            found[name] |= {"value": _shift(after), "reward": after}

    def finish(x):  # select, so that neither a value nor a gradient leaks from padding
        return jnp.where(batch.mask, x.astype(jnp.float32).reshape(shape), 0.0)

    found, extra = jax.tree.map(finish, (found, extra))
    others = {
        name: Scores(**jax.lax.stop_gradient(found[name])) for name in params if name != "self"
    }
    return Scores(**found["self"], extra=extra, others=others)


def _shift(x: Array) -> Array:
    """Index t gets what was known before token t; nothing is known before the first."""
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def _flatten_groups(batch: Sequences) -> Sequences:
    """`[n, k, t]` to `[n·k, t]`; per-group fields are repeated for each member."""
    if batch.tokens.ndim == 2:
        return batch
    n, k, _ = batch.tokens.shape

    def one(x):
        return x.reshape(n * k, *x.shape[2:]) if x.ndim > 1 else jnp.repeat(x, k)

    return jax.tree.map(one, batch)


def _over_vocabulary(params, hidden, batch, models, vocab, chunk):
    """logp, entropy and what `vocab` wants, a few token columns at a time."""
    b, t = batch.tokens.shape
    width = max(1, min(t, chunk // b))
    temperature = getattr(batch, "temperature", jnp.ones((b,), jnp.float32))

    def columns(x):  # [b, t, ...] -> [chunks, b, width, ...]; rows keep their place on the mesh
        x = jnp.pad(x, ((0, 0), (0, -t % width)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, width, *x.shape[2:]), 1, 0)

    leaves, tree = jax.tree.flatten(batch)
    per_token = [x.ndim > 1 and x.shape[1] == t for x in leaves]
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
