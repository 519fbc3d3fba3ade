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

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import environment as environments
from rlhf_jax.environment import Environment, World
from rlhf_jax.models import cache as caches
from rlhf_jax.sampling import Sampling, draw, filtered, log_probabilities
from rlhf_jax.sharding import row_groups
from rlhf_jax.types import Params, Prompts, Rollout

WAVE = 8  # a slot in so many is refilled at once: one prefill of several prompts


class _Texts(NamedTuple):
    """What is written, all of it: n texts."""

    index: Int[Array, "n"]  # tokens that the policy chose
    end: Int[Array, "n"]  # tokens in the text
    done: Bool[Array, "n"]  # a stop token, or the environment said so
    finished: Int[Array, "n"]  # step of the loop in which its last token was chosen, from 0
    tokens: Int[Array, "n t"]
    mask: Bool[Array, "n t"]
    logp: Float[Array, "n t"]
    behaviour_logp: Float[Array, "n t"]
    world: World | None  # None: no environment


class _Slots(NamedTuple):
    """Who writes: s slots, each at one text. The n / g texts of a group have their own s / g."""

    row: Int[Array, "s"]  # within its group, the text that it writes; n / g: none
    turn: Int[Array, "s 1+k"]  # the token chosen last, and what the environment wrote behind it
    count: Int[Array, "s"]  # how many it wrote
    hidden: Float[Array, "s d"]  # what the next token is chosen from
    cache: Any
    following: Int[Array, "g"]  # of each group, the first text that nobody has begun
    step: Int[Array, ""]


class _Desk(NamedTuple):
    """How slots read and write what belongs to their texts; static, so nothing where it is plain.

    Groups are the parts of a mesh that share rows: a slot never touches another part's texts, and
    no array of texts crosses the mesh in a step.
    """

    groups: int
    plain: bool  # slot i writes text i, from the beginning to the end

    def read(self, x: Array, row: Array) -> Array:
        """Of [n, ...], what belongs to each slot's text: [s, ...]."""
        if self.plain:
            return x
        found = jax.vmap(lambda x, i: x[jnp.minimum(i, len(x) - 1)])(*self._split(x, row))
        return found.reshape(row.shape[0], *x.shape[1:])

    def write(self, x: Array, row: Array, value: Array) -> Array:
        """[n, ...] in which each slot's text has the slot's value [s, ...]."""
        if self.plain:
            return value
        put = jax.vmap(lambda x, i, v: x.at[i].set(v, mode="drop"))
        return put(*self._split(x, row, value)).reshape(x.shape)

    def write_at(self, x: Array, row: Array, at: Array, value: Array) -> Array:
        """[n, t] in which each slot's text has `value` [s] or [s, k] at the places `at`."""
        if self.plain:
            return x.at[row.reshape(-1, *(1,) * (at.ndim - 1)), at].set(value, mode="drop")

        def put(x, i, at, value):
            return x.at[i.reshape(-1, *(1,) * (at.ndim - 1)), at].set(value, mode="drop")

        return jax.vmap(put)(*self._split(x, row, at, value)).reshape(x.shape)

    def _split(self, *arrays):
        return [x.reshape(self.groups, -1, *x.shape[1:]) for x in arrays]


def _start(prompts: Prompts, world: World | None, capacity: int, pad: int) -> _Texts:
    """Texts before the first response token."""
    b, p = prompts.tokens.shape
    prompt = jnp.arange(capacity)[None, :] < prompts.length[:, None]
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, capacity - p)), constant_values=pad)
    zeros, none = jnp.zeros((b, capacity), jnp.float32), jnp.zeros((b,), jnp.int32)
    return _Texts(
        index=none,
        end=prompts.length.astype(jnp.int32),
        done=jnp.zeros((b,), bool),
        finished=none,
        tokens=jnp.where(prompt, padded, pad).astype(jnp.int32),
        mask=jnp.zeros((b, capacity), bool),
        logp=zeros,
        behaviour_logp=zeros,
        world=world,
    )


def _chosen(desk, texts, slots, token, logp, behaviour, stop, live) -> tuple[_Texts, _Slots]:
    """Write a token of the policy behind every text that goes on."""
    row, capacity = slots.row, texts.tokens.shape[1]
    end, index, done, finished = (
        desk.read(x, row) for x in (texts.end, texts.index, texts.done, texts.finished)
    )
    at = jnp.where(live, end, capacity)  # out of range: drop
    ended = jnp.zeros_like(live)
    for one in stop:
        ended |= token == one

    def of_token(x):
        return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]

    texts = texts._replace(
        index=desk.write(texts.index, row, index + live),
        end=desk.write(texts.end, row, end + live),
        done=desk.write(texts.done, row, done | (ended & live)),
        finished=desk.write(texts.finished, row, jnp.where(live, slots.step, finished)),
        tokens=desk.write_at(texts.tokens, row, at, token),
        mask=desk.write_at(texts.mask, row, at, live),
        logp=desk.write_at(texts.logp, row, at, of_token(logp)),
        behaviour_logp=desk.write_at(texts.behaviour_logp, row, at, of_token(behaviour)),
    )
    return texts, slots._replace(turn=token[:, None], step=slots.step + 1)


def _answered(desk, texts, slots, answer, live) -> tuple[_Texts, _Slots]:
    """Write what the environment says behind the token just chosen, if the text went on."""
    row, capacity = slots.row, texts.tokens.shape[1]
    place = jnp.arange(answer.forced.shape[1])[None]
    end, done, valid = (desk.read(x, row) for x in (texts.end, texts.done, texts.world.valid))
    written = (place < answer.count[:, None]) & live[:, None]
    at = jnp.where(written, end[:, None] + place, capacity)
    paid = jnp.where(live, end - 1, capacity)
    world = World(
        state=jax.tree.map(lambda x, new: desk.write(x, row, new), texts.world.state, answer.state),
        earned=desk.write_at(texts.world.earned, row, paid, answer.reward),
        valid=desk.write(texts.world.valid, row, valid & (answer.valid | ~live)),
    )
    texts = texts._replace(
        end=desk.write(texts.end, row, jnp.where(live, end + answer.count, end)),
        done=desk.write(texts.done, row, done | (answer.done & live)),
        tokens=desk.write_at(texts.tokens, row, at, answer.forced),
        world=world,
    )
    turn = jnp.concatenate([slots.turn, answer.forced], axis=1)
    return texts, slots._replace(turn=turn, count=answer.count)


@dataclass(frozen=True)
class _Writer:
    """What stays the same while texts are written, and the parts of a step."""

    params: Params
    model: Any
    prompts: Prompts
    keys: Array  # [n]
    length: int
    sampling: Sampling
    environment: Environment | None
    context: Any
    capacity: int
    samples: int
    desk: _Desk
    wave: int  # slots of a group that are refilled at once

    @property
    def queue(self) -> int:
        """Texts of a group."""
        return self.prompts.length.shape[0] // self.desk.groups

    def begun(self, row, cache):
        """What the first token of these texts is chosen from, and what `cache` is to hold."""
        prompts, p = self.prompts, self.prompts.tokens.shape[1]
        if self.desk.plain:
            tokens, size = prompts.tokens[:: self.samples], prompts.length[:: self.samples]
        else:
            row = row[:: self.samples]
            tokens, size = (self.desk.read(x, row) for x in (prompts.tokens, prompts.length))
        place = jnp.arange(p)[None]
        positions = jnp.where(place < size[:, None], place, -1)
        room = self.model.empty_cache(tokens.shape[0], caches.room(cache, p, self.capacity))
        hidden, part = self.model.apply(self.params, tokens, positions=positions, cache=room)
        last = jnp.take_along_axis(hidden, (size - 1)[:, None, None], axis=1)[:, 0]
        return jnp.repeat(last, self.samples, axis=0), caches.repeated(part, self.samples)

    def alive(self, texts, row):
        """Slots whose text goes on."""
        going = ~texts.done & (texts.index < self.length)
        return self.desk.read(going, row) & (row < self.queue)

    def waiting(self, slots):
        """[g]: there are prompts that nobody has begun."""
        return slots.following < self.queue

    def choose(self, texts, slots):
        """Draw the next token of every text that goes on; let the environment answer."""
        desk, row, live = self.desk, slots.row, self.alive(texts, slots.row)
        heat = jnp.full(row.shape, self.sampling.temperature, jnp.float32)
        logp = log_probabilities(self.model.logits(self.params, slots.hidden), heat)
        behaviour = filtered(logp, self.sampling)
        own = jax.vmap(jax.random.fold_in)(desk.read(self.keys, row), desk.read(texts.index, row))
        token = draw(behaviour, jax.vmap(jax.random.uniform)(own))
        stop = [jnp.asarray(i, jnp.int32) for i in self.sampling.stop]
        texts, slots = _chosen(desk, texts, slots, token, logp, behaviour, stop, live)
        if self.environment is None:
            return texts, slots
        state = jax.tree.map(lambda x: desk.read(x, row), texts.world.state)
        vocab = getattr(self.model, "vocab", None)
        said = environments.answer(self.environment, self.context, state, token, vocab=vocab)
        return _answered(desk, texts, slots, said, live)

    def decode(self, texts, slots):
        """Read what was written last."""
        end = self.desk.read(texts.end, slots.row)
        place = jnp.arange(slots.turn.shape[1])[None]
        at = (end - 1 - slots.count)[:, None] + place
        unsaid = ~self.alive(texts, slots.row)[:, None] | (place > slots.count[:, None])
        at = jnp.where(unsaid, -1, at)
        hidden, cache = self.model.apply(self.params, slots.turn, positions=at, cache=slots.cache)
        newest = jnp.take_along_axis(hidden, slots.count[:, None, None], axis=1)[:, 0]
        return slots._replace(hidden=newest, cache=cache)

    def refilled(self, texts, slots):
        """The next prompts of each queue take free slots, `wave` at once, where so many are."""
        free = ~self.alive(texts, slots.row).reshape(self.desk.groups, -1)
        wanted = (free.sum(1) >= self.wave) & self.waiting(slots)

        def take(slots):
            taken = jnp.argsort(~free, axis=1, stable=True)[:, : self.wave]
            taken = jnp.where(wanted[:, None], taken, free.shape[1])  # out of range: drop
            row = slots.following[:, None] + jnp.arange(self.wave)[None]
            row = jnp.minimum(row, self.queue).reshape(-1)
            hidden, part = self.begun(row, slots.cache)
            return slots._replace(
                row=caches.inserted(slots.row, row, taken),
                hidden=caches.inserted(slots.hidden, hidden, taken),
                cache=caches.inserted(slots.cache, part, taken),
                following=slots.following + jnp.where(wanted, self.wave, 0),
            )

        return jax.lax.cond(wanted.any(), take, lambda slots: slots, slots)


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
    size, groups = b if plain else slots, 1 if plain else row_groups()
    check_slots(b, slots, samples=samples, groups=groups)
    wave = max(1, size // groups // WAVE // samples) * samples
    writer = _Writer(
        params, model, prompts, keys, length, sampling, environment, context, capacity, samples,
        _Desk(groups, plain), wave,
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
    state = _Slots(
        row=row,
        turn=jnp.zeros((size, 1), jnp.int32),
        count=jnp.zeros((size,), jnp.int32),
        hidden=hidden,
        cache=caches.inserted(cache, part),
        following=jnp.full((groups,), size // groups, jnp.int32),
        step=jnp.int32(0),
    )
    texts, slots = writer.choose(_start(prompts, world, capacity, pad), state)
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
