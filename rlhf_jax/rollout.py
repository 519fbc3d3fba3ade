"""Sampling from a policy: prefill and decode in one compiled program, no text, no host.

A sample depends on the weights, its prompt, the phase key and `(prompt_id, sample_id)` alone: the
random number of token `i` comes from `fold_in(fold_in(fold_in(key, prompt_id), sample_id), i)`, so
neither the batch it is in, nor its place there, nor the mesh changes it. `i` counts the tokens that
the policy chose: what an environment writes between them moves no random number.

Texts are written in slots. With as many slots as texts all begin at once and the loop ends with the
longest; with fewer a slot whose text has ended takes the next prompt, so that the cost follows the
tokens that are written.
"""

from __future__ import annotations

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
from rlhf_jax.writing import Desk, Slots, Writer, started

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
    the same prompt, which is then read once. Without slots the cache can grow in so many `windows`,
    each a loop of its own, so that a step reads what was written and not what may be.
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

    def more(carry):
        texts, slots = carry
        waiting = False if plain else writer.waiting(slots).any()
        return writer.alive(texts, slots.row).any() | waiting

    def step(carry):
        texts, slots = carry
        slots = writer.decode(texts, slots)
        return writer.choose(texts, slots if plain else writer.refilled(texts, slots))

    row = jnp.tile(jnp.arange(size // groups, dtype=jnp.int32), groups)
    rooms = [p + -(-(capacity - p) * i // windows) for i in range(1, windows + 1)]
    rooms = rooms if plain else [capacity]
    cache = model.empty_cache(size, rooms[0])
    hidden, part = writer.begun(row, cache)
    state = Slots(
        row=row,
        turn=jnp.zeros((size, 1), jnp.int32),
        count=jnp.zeros((size,), jnp.int32),
        hidden=hidden,
        cache=caches.inserted(cache, part),
        following=jnp.full((groups,), size // groups, jnp.int32),
        step=jnp.int32(0),
    )
    texts, slots = writer.choose(started(prompts, world, capacity, pad), state)
    for room in rooms:
        # A step's tokens must find room; where the room is all there is, they do.
        slots = slots._replace(cache=caches.lengthened(slots.cache, room))
        fits = (lambda slots: True) if room == capacity else partial(caches.fits, tokens=1 + k)
        texts, slots = jax.lax.while_loop(
            lambda carry, fits=fits: more(carry) & fits(carry[1].cache), step, (texts, slots)
        )
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
