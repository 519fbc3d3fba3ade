"""Conditioning is a transform of data, not a loss: `Labeled -> Labeled`, then any objective.

A control token says how good the text behind it is. A model that has learned from such texts is
asked for a good one by the same token in its prompt. Control tokens are ids of the model's own
vocabulary that no tokenizer makes; `rollouts.sampling.banned` keeps the model from saying them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.types import Labeled, Prompts, Sequences

Edges = Sequence[float] | Callable[[Labeled], Float[Array, "k"]]


def after_start(texts: Sequences | Prompts) -> Int[Array, "b"]:
    """The index of a text's first token: control tokens stand behind BOS."""
    return jnp.zeros(texts.tokens.shape[:1], jnp.int32)


def before_response(texts: Sequences | Prompts) -> Int[Array, "b"]:
    """The index of the prompt's last token: control tokens stand right before the response."""
    if isinstance(texts, Prompts):
        return texts.length - 1
    return jnp.maximum(jnp.argmax(texts.mask, axis=1) - 1, 0)


def condition(
    batch: Labeled,
    key: jax.Array,
    *,
    edges: Edges,
    tags: Sequence[int],
    drop: float = 0.01,
    learn_tag: bool = False,
    place: Callable = after_start,
) -> Labeled:
    """Inserts tags[k] into each text, k the number of edges at or below its score.

    Two tags, (bad, good), and one edge: conditional training (Korbak et al. 2023, §2). K tags, from
    worst to best, and K − 1 ascending edges: quantile tokens (Lu et al. 2022, §2), with edges from
    `quantile_edges`, or `partial(batch_edges, parts=K)` in place of numbers; their objective is
    `quark`.

    Rows grow by one column; the mask covers the text and, only if `learn_tag`, its tag. With
    probability `drop` a row gets no tag and one more column of padding, so that the model also
    speaks unconditioned. Rows hold one text each: a tag in a packed row would speak of the first.
    """
    tags = jnp.asarray(tags, batch.tokens.dtype)
    edges = edges_of(edges, batch, len(tags))
    keep = ~jax.random.bernoulli(key, drop, batch.score.shape) & (batch.segments[:, 0] > 0)
    here = _at(place(batch), batch.tokens.shape) & keep[:, None]
    tag = jnp.broadcast_to(tags[bin_of(batch.score, edges)][:, None], batch.tokens.shape)
    return inserted(batch, tag, here, room=1, learn=learn_tag)


def tagged(
    prompts: Prompts,
    key: jax.Array,
    *,
    tags: Sequence[int],
    probabilities: Sequence[float] | None = None,
    drop: float = 0.0,
    place: Callable = after_start,
) -> Prompts:
    """Prompts with a control token: a `Rollouts.transform`, to sample what was asked for.

    Of several tags each sample draws one, by `probabilities` or evenly, and none with probability
    `drop`. What it draws depends on the key, `prompt_id` and `sample_id` alone.
    """
    if not tags:
        raise ValueError("tags is empty: name the control tokens to ask for, best last")
    share = [1.0 / len(tags)] * len(tags) if probabilities is None else list(probabilities)
    if len(share) != len(tags) or not abs(sum(share) - 1.0) < 1e-6 or min(share) < 0:
        raise ValueError(
            f"probabilities={share} of tags={list(tags)}: needs one per tag, which add up to 1; "
            "the share of samples without a tag is `drop`"
        )
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(
        prompts.prompt_id, prompts.sample_id
    )
    tagless, which = jax.vmap(jax.random.uniform, in_axes=(0, None), out_axes=1)(keys, (2,))
    upto = jnp.cumsum(jnp.array(share, jnp.float32))[:-1]
    tag = jnp.asarray(tags, prompts.tokens.dtype)[bin_of(which, upto)]
    keep = tagless >= drop
    here = _at(place(prompts), prompts.tokens.shape) & keep[:, None]
    tokens = _put(prompts.tokens, jnp.broadcast_to(tag[:, None], here.shape), here, room=1)
    return prompts.replace(tokens=tokens, length=prompts.length + keep)


def untagged(batch: Sequences, key: jax.Array | None = None, *, tags: Sequence[int]) -> Sequences:
    """The texts without their control tokens; rows keep their width and end in padding.

    For samples that are to be tagged afresh by what they earned: see `chained`.
    """
    del key
    is_tag = (batch.tokens[:, :, None] == jnp.array(list(tags))[None, None]).any(-1)
    stays = ~(is_tag & (batch.segments > 0))
    order = jnp.argsort(~stays, axis=1, stable=True)
    inside = jnp.take_along_axis(stays, order, axis=1)

    def closed_up(x):
        wide = (..., *[None] * (x.ndim - 2))
        moved = jnp.take_along_axis(x, order[wide], axis=1)
        return jnp.where(inside[wide], moved, jnp.zeros((), x.dtype))

    return batch.replace(**{name: closed_up(x) for name, x in _per_token(batch).items()})


def called_good(batch: Labeled, key: jax.Array) -> Labeled:
    """The score becomes a person's word: 1, good, with probability σ(score), otherwise 0.

    For scores that stand for how well people like a text, before `condition` with edges=(0.5,). The
    model then learns p σ(score)/Z behind the good tag: what RL ends at with log σ(score) for reward
    and a KL penalty of 1 (Levine 2018, §2.4). Not the best texts only: some were called so by luck.
    """
    chance = jax.nn.sigmoid(batch.score.astype(jnp.float32))
    return batch.replace(score=jax.random.bernoulli(key, chance).astype(jnp.float32))


def chained(batch: Sequences, key: jax.Array, *, transforms: Sequence[Callable]) -> Sequences:
    """Transforms one after another, each with a key of its own.

    Quark (Lu et al. 2022) learns from fresh samples, `Derived(selection.with_score)`, by
    `transforms=(partial(untagged, tags=tags), partial(condition, tags=tags, edges=…))`, with
    `partial(tagged, tags=tags[-1:])` as the rollouts' transform.
    """
    for i, transform in enumerate(transforms):
        batch = transform(batch, jax.random.fold_in(key, i))
    return batch


def quantile_edges(
    scores: Shaped[Any, "n"], *, parts: int, present: Bool[Array, "n"] | None = None
) -> Float[Array, "k"]:
    """The parts − 1 scores at which the upper parts begin, of `parts` equally large ones.

    Equal scores are never parted: an edge is the boundary between two different scores nearest to
    the share it should have below it, so with many ties parts are unequal, some of them empty, but
    the best are never mixed with the worst. If all are equal they belong to the last part.
    For a config: `edges=tuple(quantile_edges(scores, parts=4).tolist())`.
    """
    if parts < 2:
        raise ValueError(f"parts={parts}: at least 2")
    scores = jnp.asarray(scores, jnp.float32)
    present = jnp.ones(scores.shape, bool) if present is None else present
    return boundaries(scores, present, jnp.arange(1, parts) / parts)


def batch_edges(batch: Labeled, *, parts: int) -> Float[Array, "k"]:
    """`quantile_edges` of a batch's own texts: `edges=partial(batch_edges, parts=4)`."""
    return quantile_edges(batch.score, parts=parts, present=batch.mask.any(axis=1))


def edges_of(edges: Edges, batch: Labeled, tags: int) -> Float[Array, "k"]:
    """The numbers that K tags need: K − 1 of them, ascending."""
    if not callable(edges) and list(edges) != sorted(edges):
        raise ValueError(f"edges={list(edges)}: must ascend, for tags from worst to best")
    found = edges(batch) if callable(edges) else jnp.array(list(edges), jnp.float32)
    if found.shape != (tags - 1,):
        raise ValueError(
            f"{found.size} edges part scores into {found.size + 1} bins, but there are {tags} tags;"
            f" give {tags - 1} edges, or {found.size + 1} tags"
        )
    return found


def bin_of(x: Float[Array, "*n"], edges: Float[Array, "k"]) -> Int[Array, "*n"]:
    """How many edges are at or below x: 0 … K − 1."""
    return (x[..., None] >= edges[(None,) * x.ndim]).sum(-1, dtype=jnp.int32)


def inserted(
    batch: Sequences,
    tag: Int[Array, "b t"],
    after: Bool[Array, "b t"],
    *,
    room: int,
    learn: bool = False,
) -> Sequences:
    """`tag[i]` behind token i where `after`, in rows `room` columns wider.

    Every per-token field moves with its token, those of a subclass included; a tag belongs to the
    segment of the token before it, and its own fields are 0.
    """
    zero = {name: jnp.zeros_like(x) for name, x in _per_token(batch).items()}
    if learn:
        zero["mask"] = jnp.broadcast_to(batch.mask.any(axis=1, keepdims=True), batch.mask.shape)
    new = zero | {"tokens": tag, "segments": batch.segments}
    return batch.replace(
        **{name: _put(x, new[name], after, room) for name, x in _per_token(batch).items()}
    )


def _put(x, new, after, room):
    """Row by row: `new[i]` behind `x[i]` where `after`, zeros at the end."""
    width = x.shape[1] + room

    def row(x, new, after):
        at = jnp.arange(len(x)) + jnp.cumsum(after) - after
        out = jnp.zeros((width, *x.shape[1:]), x.dtype).at[at].set(x, mode="drop")
        return out.at[jnp.where(after, at + 1, width)].set(new.astype(x.dtype), mode="drop")

    return jax.vmap(row)(x, new, after)


def _per_token(batch):
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    shape = batch.tokens.shape
    return {name: x for name, x in fields.items() if getattr(x, "shape", ())[:2] == shape}


def _at(index, shape):
    return jnp.arange(shape[1])[None] == index[:, None]


def boundaries(
    scores: Float[Array, "n"],
    present: Bool[Array, "n"],
    shares: Float[Array, "k"],
    *,
    least: bool = False,
) -> Float[Array, "k"]:
    """For each share, the score above the boundary that has nearest to that share below it.

    Boundaries lie between different scores; with `least` there is one below them all.
    """
    ordered = jnp.sort(jnp.where(present, scores, jnp.inf))
    n = jnp.sum(present)
    place = jnp.arange(len(scores))
    first = jnp.full((1,), least)
    rises = jnp.concatenate([first, ordered[1:] > ordered[:-1]]) & (place < n)
    away = jnp.abs(place[None] - shares[:, None] * n)
    # Without a boundary argmin is 0: the least score of all.
    return ordered[jnp.argmin(jnp.where(rises[None], away, jnp.inf), axis=1)]
