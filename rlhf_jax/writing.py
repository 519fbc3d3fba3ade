"""How texts are written: slots, each at one text, and the parts of a step of the loop.

Everything here runs inside `rollout.generate`'s compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import environment as environments
from rlhf_jax.environment import Environment, World
from rlhf_jax.models import cache as caches
from rlhf_jax.models.transformer import apply_at
from rlhf_jax.sampling import Sampling, draw, filtered, log_probabilities
from rlhf_jax.types import Params, Prompts


class Texts(NamedTuple):
    """What is written, all of it: n texts."""

    index: Int[Array, "n"]  # tokens that the policy chose
    end: Int[Array, "n"]  # tokens in the text
    done: Bool[Array, "n"]  # a stop token, or the environment said so
    finished: Int[Array, "n"]  # step in which its last token was chosen, from 0
    tokens: Int[Array, "n t"]
    mask: Bool[Array, "n t"]
    logp: Float[Array, "n t"]
    behaviour_logp: Float[Array, "n t"]
    step: Int[Array, ""]  # how often a token was chosen until now
    world: World | None  # None: no environment


class Slots(NamedTuple):
    """Who writes: s slots, each at one text. The n / g texts of a group have their own s / g."""

    row: Int[Array, "s"]  # within its group, the text that it writes; n / g: none
    turn: Int[Array, "s 1+k"]  # the token chosen last, and what the environment wrote behind it
    count: Int[Array, "s"]  # how many it wrote
    hidden: Float[Array, "s d"]  # what the next token is chosen from
    cache: Any
    turns: Int[Array, ""]  # of a text, for which the cache has room
    following: Int[Array, "g"]  # of each group, the first text that nobody has begun


class Desk(NamedTuple):
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
        if self.plain:  # row by row, so that a mesh sees that no row needs another's
            return jax.vmap(lambda x, at, v: x.at[at].set(v, mode="drop"))(x, at, value)

        def put(x, i, at, value):
            return x.at[i.reshape(-1, *(1,) * (at.ndim - 1)), at].set(value, mode="drop")

        return jax.vmap(put)(*self._split(x, row, at, value)).reshape(x.shape)

    def _split(self, *arrays):
        return [x.reshape(self.groups, -1, *x.shape[1:]) for x in arrays]


def started(prompts: Prompts, world: World | None, capacity: int, pad: int) -> Texts:
    """Texts before the first response token."""
    b, p = prompts.tokens.shape
    prompt = jnp.arange(capacity)[None, :] < prompts.length[:, None]
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, capacity - p)), constant_values=pad)
    zeros, none = jnp.zeros((b, capacity), jnp.float32), jnp.zeros((b,), jnp.int32)
    return Texts(
        index=none,
        end=prompts.length.astype(jnp.int32),
        done=jnp.zeros((b,), bool),
        finished=none,
        tokens=jnp.where(prompt, padded, pad).astype(jnp.int32),
        mask=jnp.zeros((b, capacity), bool),
        logp=zeros,
        behaviour_logp=zeros,
        step=jnp.int32(0),
        world=world,
    )


def _chosen(desk, texts, slots, token, logp, behaviour, stop, live) -> tuple[Texts, Slots]:
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
        finished=desk.write(texts.finished, row, jnp.where(live, texts.step, finished)),
        tokens=desk.write_at(texts.tokens, row, at, token),
        mask=desk.write_at(texts.mask, row, at, live),
        logp=desk.write_at(texts.logp, row, at, of_token(logp)),
        behaviour_logp=desk.write_at(texts.behaviour_logp, row, at, of_token(behaviour)),
        step=texts.step + 1,
    )
    return texts, slots._replace(turn=token[:, None])


def _answered(desk, texts, slots, answer, live) -> tuple[Texts, Slots]:
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
class Writer:
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
    desk: Desk
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
        last = (size - 1)[:, None]
        given = {"positions": positions, "cache": room}
        hidden, part = apply_at(self.model, self.params, tokens, last, **given)
        return jnp.repeat(hidden[:, 0], self.samples, axis=0), caches.repeated(part, self.samples)

    def alive(self, texts, slots):
        """Slots whose text goes on."""
        going = ~texts.done & (texts.index < self.length)
        return self.desk.read(going, slots.row) & (slots.row < self.queue)

    def free(self, texts, slots):
        """[g, s / g]: slots whose text has ended."""
        return ~self.alive(texts, slots).reshape(self.desk.groups, -1)

    def waiting(self, slots):
        """[g]: there are prompts that nobody has begun."""
        return slots.following < self.queue

    def busy(self, texts, slots):
        """[g]: there is something to write."""
        return ~self.free(texts, slots).all(1) | self.waiting(slots)

    def choose(self, texts, slots):
        """Draw the next token of every text that goes on; let the environment answer."""
        desk, row, live = self.desk, slots.row, self.alive(texts, slots)
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
        unsaid = ~self.alive(texts, slots)[:, None] | (place > slots.count[:, None])
        at = jnp.where(unsaid, -1, at)
        given = {"positions": at, "cache": slots.cache}
        newest = slots.count[:, None] if slots.turn.shape[1] > 1 else None
        hidden, cache = apply_at(self.model, self.params, slots.turn, newest, **given)
        return slots._replace(hidden=hidden[:, 0], cache=cache)

    def refilled(self, texts, slots):
        """The next prompts of each queue take free slots, `wave` at once, where so many are."""
        free = self.free(texts, slots)
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

    def larger(self, slots, held, turns, room):
        """As many slots of `room`, all free, for texts that had so much as is `held`."""
        cache = caches.behind(self.model.empty_cache(slots.row.shape[0], room), held)
        return slots._replace(
            row=jnp.full_like(slots.row, self.queue),
            cache=cache,
            turns=jnp.int32(turns),
            following=jnp.full_like(slots.following, self.queue),
        )

    def leaving(self, texts, slots):
        """[g, s / g]: slots whose text goes on, without room for its next turn."""
        index = self.desk.read(texts.index, slots.row)
        return (self.alive(texts, slots) & (index > slots.turns)).reshape(self.desk.groups, -1)

    def moved(self, texts, slots, above):
        """Texts that are leaving go on in free slots `above`, `wave` at once."""

        def first(which):
            place = jnp.argsort(~which, axis=1, stable=True)[:, : self.wave]
            return place, jnp.take_along_axis(which, place, axis=1)

        (out, left), (into, free) = (
            first(self.leaving(texts, slots)),
            first(self.free(texts, above)),
        )
        none = slots.row.shape[0]  # out of range: drop
        out, into = (jnp.where(left & free, at, none) for at in (out, into))

        def put(old, new):
            return caches.inserted(old, caches.taken(new, out), into)

        names = ("row", "turn", "count", "hidden", "cache")
        above = above._replace(**{n: put(getattr(above, n), getattr(slots, n)) for n in names})
        nobody = jnp.full(out.size, self.queue, jnp.int32)
        return slots._replace(row=caches.inserted(slots.row, nobody, out)), above
