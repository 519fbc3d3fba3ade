"""Sampling from a policy: prefill and decode in one compiled program, no text, no host.

A sample depends on the weights, its prompt, the phase key and `(prompt_id, sample_id)` alone: the
random number of token `i` comes from `fold_in(fold_in(fold_in(key, prompt_id), sample_id), i)`, so
neither the batch it is in, nor its place there, nor the mesh changes it. `i` counts the tokens that
the policy chose: what an environment writes between them moves no random number.

Texts are written in slots. With as many slots as texts all begin at once and the loop ends with the
longest; with fewer a slot whose text has ended takes the next prompt, so that the cost follows the
tokens that are written. A step reads the whole cache, so a cache can have several sizes: all texts
grow into the next one, or each moves to a larger slot when it is too long for its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import environment as environments
from rlhf_jax.environment import Environment
from rlhf_jax.models import cache as caches
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import WRITERS, row_groups, split_rows
from rlhf_jax.types import Params, Prompts, Rollout
from rlhf_jax.writing import Desk, Slots, Texts, Writer, started

WAVE = 8  # a slot in so many is refilled at once: one prefill of several prompts


def generate(
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    model,
    length: int,
    sampling: Sampling,
    pad: int = 0,
    environment: Environment | None = None,
    context: Any = None,
    slots: int | None = None,
    samples: int = 1,
    windows: int = 1,
) -> Rollout:
    """Up to `length` tokens after each prompt; rows end at a stop id, which they keep.

    The response follows its prompt without a gap, padding is on the right, and the loop ends when
    every row has. Result arrays are `[b, p + length]`.

    An `environment` makes the prompts, of which only the names are then used, writes up to k tokens
    behind each one chosen, pays for it, and may end the row; it is given `context`, any pytree.
    Result arrays are `[b, p + length (1 + k)]`. What breaks its contract earns nan.

    `slots` texts are written at a time (None: all). `samples` says that so many rows in a row have
    the same prompt, which is then read once. The cache has so many sizes as there are `windows`,
    each with a loop of its own, so that a step reads what was written and not what may be; with
    slots, there are as many of each size. A cache of a model's own has one size.
    """
    prompts = split_rows(prompts, over=WRITERS)
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(
        prompts.prompt_id, prompts.sample_id
    )
    world, k, vocab = None, 0, getattr(model, "vocab", None)
    if environment is not None:
        world, prompts = environments.begin(
            environment, context, prompts, key, length=length, pad=pad, vocab=vocab
        )
        k = environment.forced
    b, p = prompts.tokens.shape
    capacity = p + length * (1 + k)
    plain = slots is None or slots >= b
    size, groups = b if plain else slots, 1 if plain else row_groups(WRITERS)
    check_slots(b, slots, samples=samples, groups=groups)
    wave = max(1, size // groups // WAVE // samples) * samples
    writer = Writer(
        params, model, prompts, keys, length, sampling, environment, context, capacity, samples,
        Desk(groups, plain), wave,
    )  # fmt: skip

    sizes = cache_sizes(p, length, 1 + k, windows=windows if caches.resizable(model) else 1)
    row = jnp.tile(jnp.arange(size // groups, dtype=jnp.int32), groups)
    cache = model.empty_cache(size, sizes[0][1])
    hidden, part = writer.begun(row, cache)
    slots = Slots(
        row=row,
        turn=jnp.zeros((size, 1), jnp.int32),
        count=jnp.zeros((size,), jnp.int32),
        hidden=hidden,
        cache=caches.inserted(cache, part),
        turns=jnp.int32(sizes[0][0]),
        following=jnp.full((groups,), size // groups, jnp.int32),
    )
    texts, slots = writer.choose(started(prompts, world, capacity, pad), slots)
    texts = (_together if plain else _in_turns)(writer, texts, slots, sizes)
    earned = jnp.zeros(texts.logp.shape, jnp.float32)
    if environment is not None:
        broken = texts.mask & ~texts.world.valid[:, None]
        earned = jnp.where(broken, jnp.nan, texts.world.earned)
    return Rollout(
        tokens=texts.tokens,
        mask=texts.mask,
        segments=(jnp.arange(capacity)[None] < texts.end[:, None]).astype(jnp.int32),
        logp=texts.logp,
        behaviour_logp=texts.behaviour_logp,
        temperature=jnp.full((b,), sampling.temperature, jnp.float32),
        ended=texts.done,
        prompt_id=prompts.prompt_id,
        sample_id=prompts.sample_id,
        earned=earned,
        steps=texts.finished + 1,
    )


def cache_sizes(prompt: int, length: int, turn: int, *, windows: int) -> list[tuple[int, int]]:
    """Of each size of the cache: turns of `turn` tokens, and tokens with the prompt."""
    turns = sorted({-(-length * i // windows) for i in range(1, windows + 1)})
    return [(n, prompt + n * turn) for n in turns]


def _together(writer: Writer, texts: Texts, slots: Slots, sizes: Sequence) -> Texts:
    """A slot for every text; their cache grows with the longest."""

    def more(carry):
        texts, slots = carry
        return writer.alive(texts, slots).any() & (texts.step <= slots.turns)

    def step(carry):
        texts, slots = carry
        return writer.choose(texts, writer.decode(texts, slots))

    for turns, room in sizes:
        cache = caches.lengthened(slots.cache, room)
        slots = slots._replace(cache=cache, turns=jnp.int32(turns))
        texts, slots = jax.lax.while_loop(more, step, (texts, slots))
    return texts


def _in_turns(writer: Writer, texts: Texts, slots: Slots, sizes: Sequence) -> Texts:
    """Fewer slots than texts, as many of each size: the next text begins where one ends.

    A text that is too long for its slot moves as soon as a larger one is free, and slots in which
    none waits for that write, the smallest first: so nearly all larger ones are taken when they do.
    """
    larger = [writer.larger(slots, room, *size) for (_, room), size in itertools.pairwise(sizes)]

    def move(carry, i):
        texts, tiers = carry
        return texts, (*tiers[:i], *writer.moved(texts, *tiers[i : i + 2]), *tiers[i + 2 :])

    def step(carry, i):
        texts, tiers = carry
        slots = writer.decode(texts, tiers[i])
        texts, slots = writer.choose(texts, slots if i else writer.refilled(texts, slots))
        return texts, (*tiers[:i], slots, *tiers[i + 1 :])

    ways = [partial(move, i=i) for i in range(len(larger))]
    ways += [partial(step, i=i) for i in range(len(sizes))]

    def first(carry):
        """The first of the ways that is possible, or their number."""
        texts, tiers = carry
        leaving = [writer.leaving(texts, slots) for slots in tiers]
        free = [writer.free(texts, slots) for slots in tiers]
        moves = [(a.any(1) & b.any(1)).any() for a, b in zip(leaving[:-1], free[1:], strict=True)]
        steps = [
            writer.busy(texts, slots).any() & ~a.any()
            for slots, a in zip(tiers, leaving, strict=True)
        ]
        return jnp.argmax(jnp.stack([*moves, *steps, jnp.bool_(True)]))

    def round(carry):  # a loop each: XLA copies what a choice between them would change
        for i, way in enumerate(ways):
            carry = jax.lax.while_loop(lambda carry, i=i: first(carry) == i, way, carry)
        return carry

    carry = texts, (slots, *larger)
    return jax.lax.while_loop(lambda carry: first(carry) < len(ways), round, carry)[0]


def check_slots(rows: int, slots: int | None, *, samples: int = 1, groups: int = 1) -> None:
    """Raises ValueError: if slots cannot be shared out over the parts of a mesh and its prompts."""
    if slots is not None and slots < 1:
        raise ValueError(f"{slots}: at least 1, or None for as many as there are texts")
    if slots is None or slots >= rows:
        return
    least = groups * samples
    if slots % least or rows % least:
        up = -(-slots // least) * least
        raise ValueError(
            f"{slots} slots for {rows} texts: both must be multiples of {samples} samples × "
            f"{groups} parts of the mesh that have rows of their own; try {up} slots"
        )
