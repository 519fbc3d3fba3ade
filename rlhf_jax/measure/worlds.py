"""Texts that come from hidden worlds, and what an exact observer believes of where they come from.

A world sticks around: with probability `switch` a step it is drawn anew from the prior. It says a
token of its own block, or with probability `noise` any surface token. Around that there may be
signs that every world uses alike: SEG, after which the world is drawn anew, and two contexts, CHAT
and CODE, that are answered by a uniform digit. So the posterior over worlds given a text, the next
token's distribution and the entropies are known exactly (forward algorithm of a hidden Markov
model, Rabiner 1989), and what a language model learned of them can be held against that.

    worlds = Worlds(segment=0.02, chat=0.02, code=0.02)
    batch = worlds.draw(key, 256, length=32)
    found = beliefs(batch.tokens, worlds)

Axes: n texts, t tokens, w worlds, s surface tokens, v vocabulary. Entropies are in nats per token.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Labeled


@dataclass(frozen=True)
class Worlds:
    """Sticky worlds. Token ids: surface tokens in blocks by world, digits, CHAT, CODE, SEG, BOS.

    With four worlds and blocks of four: world w says 4w … 4w + 3, digits are 16 … 25, `chat_id` 26,
    `code_id` 27, `segment_id` 28, `bos` 29, whether they occur or not: one model fits all settings.
    """

    prior: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
    block: int = 4  # surface tokens of a world's own
    noise: float = 0.1  # P(any surface token instead of one of the block)
    switch: float = 0.05  # P(the world is drawn anew) before each token
    segment: float = 0.0  # P(SEG), where no digit is due
    chat: float = 0.0  # P(CHAT), likewise
    code: float = 0.0  # P(CODE), likewise
    answered: float = 1.0  # P(a digit follows) after CHAT and CODE; else the world goes on
    digits: int = 10
    borrowed: tuple[tuple[int, ...], ...] = ()  # blocks of the last worlds: others' tokens

    def __post_init__(self):
        rates = (self.noise, self.switch, self.segment, self.chat, self.code, self.answered)
        if min(self.prior) < 0 or abs(sum(self.prior) - 1) > 1e-6:
            raise ValueError(f"prior={self.prior} must be probabilities of worlds that sum to 1")
        if min(rates) < 0 or max(rates) > 1 or self.segment + self.chat + self.code >= 1:
            raise ValueError(
                "noise, switch, segment, chat, code and answered are probabilities, and segment + "
                f"chat + code must leave room for the worlds; they are {rates}"
            )
        if self.block < 1 or len(self.borrowed) >= len(self.prior):
            raise ValueError(
                f"{len(self.prior)} worlds with {len(self.borrowed)} borrowed blocks and blocks of "
                f"{self.block}: at least one world needs tokens of its own"
            )
        if any(not one or not set(one) <= set(range(self.surface)) for one in self.borrowed):
            raise ValueError(
                f"borrowed={self.borrowed}: a block is one or more of the surface tokens "
                f"0 … {self.surface - 1}"
            )
        if self.digits < 1 and (self.chat or self.code) and self.answered:
            raise ValueError("contexts are answered by digits: set digits=10, or answered=0")

    @property
    def surface(self) -> int:
        """Tokens that worlds speak in: ids 0 … surface − 1."""
        return self.block * (len(self.prior) - len(self.borrowed))

    @property
    def chat_id(self) -> int:
        """CHAT, a context that asks for a digit; digits are `surface` … `chat_id` − 1."""
        return self.surface + self.digits

    @property
    def code_id(self) -> int:
        """CODE, the other one."""
        return self.chat_id + 1

    @property
    def segment_id(self) -> int:
        """SEG: a text ends, another begins, in a world drawn anew."""
        return self.chat_id + 2

    @property
    def bos(self) -> int:
        """The token that every row starts with; never drawn."""
        return self.chat_id + 3

    @property
    def vocab(self) -> int:
        """Token ids of all kinds."""
        return self.chat_id + 4

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each world's block."""
        own = range(0, self.surface, self.block)
        return tuple(tuple(range(at, at + self.block)) for at in own) + self.borrowed

    @property
    def own(self) -> Float[np.ndarray, "w s"]:
        """Emission without noise: uniform over the world's block."""
        table = np.zeros((len(self.prior), self.surface))
        for row, block in zip(table, self.blocks, strict=True):
            row[list(block)] = 1 / len(block)
        return table

    @property
    def emission(self) -> Float[np.ndarray, "w s"]:
        """P(surface token | world) = (1 − noise)·U(block) + noise·U(surface)."""
        return (1 - self.noise) * self.own + self.noise / self.surface

    @property
    def world_entropy(self) -> float:
        """H(W) of the prior; nats."""
        return float(entropies(np.asarray(self.prior)))

    @property
    def token_entropy(self) -> float:
        """H(Y|W) of a surface token whose world is known, under the prior; nats per token."""
        return float(np.asarray(self.prior) @ entropies(self.emission))

    def return_time(self, world: int) -> float:
        """Mean tokens until a world is drawn again: 1 / (rate·π_w), without contexts.

        The rate of drawing anew is switch + segment − switch·segment.
        """
        return 1 / ((1 - (1 - self.switch) * (1 - self.segment)) * self.prior[world])

    def says(self, tokens: Int[Array, "*n"], world: int) -> Bool[Array, "*n"]:
        """Where a token is of a world's block; numpy and JAX alike."""
        return functools.reduce(operator.or_, [tokens == one for one in self.blocks[world]])

    def sample(
        self, key: Array, *, rows: int, length: int
    ) -> tuple[Int[Array, "b t+1"], Int[Array, "b t+1"]]:
        """Rows of BOS and `length` tokens, and the world of each token (at BOS, of the first)."""
        keys, shape, ten = jax.random.split(key, 7), (length, rows), max(self.digits, 1)
        kinds = jnp.asarray([1 - self.segment - self.chat - self.code, *self._signs])
        own = jnp.asarray(np.where(self.own > 0, 0.0, -np.inf), jnp.float32)
        drawn = (
            jax.random.bernoulli(keys[0], self.switch, shape),
            jax.random.categorical(keys[1], jnp.log(jnp.asarray(self.prior)), shape=shape),
            jax.random.categorical(keys[2], jnp.log(kinds), shape=shape),
            jax.random.bernoulli(keys[3], self.noise, shape),
            jax.random.randint(keys[4], shape, 0, self.surface),
            jax.random.bernoulli(keys[5], self.answered, shape),
            jax.random.split(keys[6], length),
        )

        def step(before, now):
            world, sign = before  # sign: what the last token was, 0 for surface tokens and digits
            switch, anew, kind, noisy, anything, answer, key = now
            world = jnp.where(switch | (sign == 1), anew, world)
            due = (sign >= 2) & answer
            word = jnp.where(noisy, anything, jax.random.categorical(key, own[world]))
            digit = self.surface + jax.random.randint(jax.random.fold_in(key, 1), (rows,), 0, ten)
            names = jnp.asarray([0, self.segment_id, self.chat_id, self.code_id])
            token = jnp.where(due, digit, jnp.where(kind > 0, names[kind], word))
            return (world, jnp.where(due, 0, kind)), (token, world)

        _, (tokens, world) = jax.lax.scan(step, (drawn[1][0], jnp.ones(rows, jnp.int32)), drawn)
        tokens = jnp.pad(tokens.T, ((0, 0), (1, 0)), constant_values=self.bos)
        return tokens.astype(jnp.int32), jnp.pad(world.T, ((0, 0), (1, 0)), mode="edge")

    def draw(self, key: Array, rows: int, *, length: int, rewarded: int = -1) -> Labeled:
        """Texts of BOS and `length` tokens. The score is the share of a world's tokens.

        `token_score` is 1 at tokens of the block of the world `rewarded`, else 0; `score` is its
        mean over the text. BOS is outside the mask.
        """
        tokens, _ = self.sample(key, rows=rows, length=length)
        mask = jnp.broadcast_to(jnp.arange(length + 1) > 0, tokens.shape)
        marks = self.says(tokens, rewarded).astype(jnp.float32)
        return Labeled(tokens, mask, jnp.ones_like(tokens), marks.sum(axis=1) / length, marks)

    @property
    def _signs(self) -> tuple[float, float, float]:
        return self.segment, self.chat, self.code


class Beliefs(NamedTuple):
    """What the observer knows at each token; index t speaks of `tokens[:, t]`."""

    before: Float[np.ndarray, "n t w"]  # P(world of token t | tokens before t)
    after: Float[np.ndarray, "n t w"]  # P(world of token t | tokens up to t)
    logp: Float[np.ndarray, "n t"]  # log P(token t | tokens before t), nats; 0 at BOS


def beliefs(tokens: Int[np.ndarray, "n t"], worlds: Worlds) -> Beliefs:
    """The exact filter, in float64: before′ = (1 − s)·after + s·π, after ∝ before · P(token | w).

    A row starts in the prior, and does so again after BOS and SEG. Signs and digits say nothing of
    the world, nor do ids outside the vocabulary (control tokens), nor what the process cannot say:
    there the posterior stays and logp is −inf. Padding on the right changes nothing before it.
    """
    tokens, prior = np.asarray(tokens), np.asarray(worlds.prior)
    seen = likelihood(tokens, worlds.emission)
    before, after, core = forward(seen, fresh(tokens, worlds), prior, worlds.switch)
    due = answers_due(tokens, worlds)
    p = np.where(tokens < worlds.surface, core, 1.0) * _structure(tokens, due, worlds)
    with np.errstate(divide="ignore"):
        logp = np.log(p)
    return Beliefs(before, after, np.where(tokens == worlds.bos, 0.0, logp))


def beliefs_in_jax(
    tokens: Int[Array, "n t"], worlds: Worlds
) -> tuple[Float[Array, "n t w"], Float[Array, "n t w"]]:
    """`before` and `after` of `beliefs` in float32, for compiled programs."""
    emission = jnp.asarray(worlds.emission, jnp.float32)
    words = (tokens >= 0) & (tokens < worlds.surface)
    seen = jnp.where(words[..., None], emission.T[jnp.where(words, tokens, 0)], 1.0)
    prior = jnp.asarray(worlds.prior, jnp.float32)

    def step(after, now):
        fresh, seen = now
        stay = (1 - worlds.switch) * after + worlds.switch * prior[None]
        before = jnp.where(fresh[:, None], prior[None], stay)
        joint = before * seen
        total = joint.sum(axis=1, keepdims=True)
        after = jnp.where(total > 0, joint / jnp.where(total > 0, total, 1.0), before)
        return after, (before, after)

    first = jnp.broadcast_to(prior, (tokens.shape[0], len(worlds.prior)))
    renewed = jnp.moveaxis(fresh(tokens, worlds, jnp), 1, 0)
    _, found = jax.lax.scan(step, first, (renewed, jnp.moveaxis(seen, 1, 0)))
    return tuple(jnp.moveaxis(x, 0, 1) for x in found)


def filter_predictions(
    tokens: Int[np.ndarray, "n t"], worlds: Worlds
) -> Float[np.ndarray, "n t v"]:
    """P(token t = · | tokens before t): what a perfect language model of the worlds predicts."""
    tokens = np.asarray(tokens)
    due = answers_due(tokens, worlds)[..., None]
    found = np.zeros((*tokens.shape, worlds.vocab))
    signs = [worlds.segment_id, worlds.chat_id, worlds.code_id]
    words = 1 - sum(worlds._signs)
    found[..., : worlds.surface] = (
        (1 - due) * words * (beliefs(tokens, worlds).before @ worlds.emission)
    )
    found[..., signs] = (1 - due) * np.asarray(worlds._signs)
    found[..., worlds.surface : worlds.chat_id] = due / max(worlds.digits, 1)
    return found


def forward(
    seen: Float[np.ndarray, "n t w"],
    fresh: Bool[np.ndarray, "n t"],
    prior: Float[np.ndarray, "w"],
    switch: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The forward recursion: before, after `[n, t, w]` and P(token | before) `[n, t]`.

    `seen` is P(token t | world); `fresh` where the world is drawn anew for certain. It is analytic
    in the numbers it is given: complex ones pass through, and carry derivatives.
    """
    seen, fresh = np.ascontiguousarray(seen.swapaxes(0, 1)), fresh.T[..., None]
    before = np.zeros(seen.shape, np.result_type(seen, prior, switch))
    after, total = np.zeros_like(before), np.zeros_like(before[..., :1])
    posterior = np.broadcast_to(prior, before.shape[1:])
    for t, now in enumerate(seen):
        before[t] = np.where(fresh[t], prior, (1 - switch) * posterior + switch * prior)
        joint = before[t] * now
        total[t] = joint.sum(axis=1, keepdims=True)
        possible = total[t].real > 0
        posterior = np.where(possible, joint / np.where(possible, total[t], 1.0), before[t])
        after[t] = posterior
    return before.swapaxes(0, 1), after.swapaxes(0, 1), total[..., 0].T


def likelihood(tokens: np.ndarray, emission: np.ndarray) -> Float[np.ndarray, "n t w"]:
    """P(token | world) of surface tokens, from a table `[w, s]`; 1 for all others."""
    words = (tokens >= 0) & (tokens < emission.shape[1])
    return np.where(words[..., None], emission.T[np.where(words, tokens, 0)], 1.0)


def fresh(tokens, worlds: Worlds, xp=np) -> Bool[Array, "n t"]:
    """Where the world is drawn anew for certain: first in a row, after BOS and after SEG."""
    last = xp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=worlds.bos)
    return (last == worlds.bos) | (last == worlds.segment_id)


def answers_due(tokens: np.ndarray, worlds: Worlds) -> Float[np.ndarray, "n t"]:
    """P(token t is a digit | the one before it): `answered` after CHAT and CODE, else 0."""
    last = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=worlds.bos)
    return worlds.answered * ((last == worlds.chat_id) | (last == worlds.code_id))


def entropies(p: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n"]:
    """−Σ p log p over the last axis, nats."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


def _structure(tokens, due, worlds):
    """P(what kind of token comes, and which sign or digit); of surface tokens only the kind."""
    digit = (tokens >= worlds.surface) & (tokens < worlds.chat_id)
    found = due * digit / max(worlds.digits, 1)
    found += (1 - due) * (1 - sum(worlds._signs)) * ((tokens >= 0) & (tokens < worlds.surface))
    names = (worlds.segment_id, worlds.chat_id, worlds.code_id)
    for name, p in zip(names, worlds._signs, strict=True):
        found += (1 - due) * p * (tokens == name)
    return found
