"""Texts that come from hidden worlds: a process of which everything is known exactly.

A world sticks around: with probability `switch` a step it is drawn anew from the prior. It says a
token of its own block, or with probability `noise` any surface token. Around that there may be
signs that every world uses alike: SEG, after which the world is drawn anew, and two contexts, CHAT
and CODE, that are answered by a uniform digit. So the posterior over worlds given a text, the next
token's distribution and the entropies are known (`world_filter.py`), and what a language model
learned of them can be held against that.

    worlds = Worlds(segment=0.02, chat=0.02, code=0.02)
    batch = worlds.draw(key, 256, length=32)
    found = beliefs(batch.tokens, worlds)

Axes: n texts, t tokens, w worlds, s surface tokens, v vocabulary. Entropies are in nats per token.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
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
    def signs(self) -> tuple[float, float, float]:
        """P(SEG), P(CHAT), P(CODE), where no digit is due."""
        return self.segment, self.chat, self.code

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
        # One draw of uniform numbers, all choices by inverse distribution functions.
        switch, anew, kind, noisy, word, answer, digit = jax.random.uniform(key, (7, length, rows))
        kinds = [1 - self.segment - self.chat - self.code, *self.signs]
        size = jnp.asarray([len(block) for block in self.blocks])
        widest = max(map(len, self.blocks))
        words = jnp.asarray([(*one, *[0] * (widest - len(one))) for one in self.blocks])
        names = jnp.asarray([0, self.segment_id, self.chat_id, self.code_id])
        drawn = (
            switch < self.switch,
            _chosen(anew, self.prior),
            _chosen(kind, kinds),
            noisy < self.noise,
            word,
            answer < self.answered,
            self.surface + _whole(digit, max(self.digits, 1)),
        )

        def step(before, now):
            world, sign = before  # sign: what the last token was, 0 for surface tokens and digits
            switch, anew, kind, noisy, word, answer, digit = now
            world = jnp.where(switch | (sign == 1), anew, world)
            own = words[world, _whole(word, size[world])]
            word = jnp.where(noisy, _whole(word, self.surface), own)
            due = (sign >= 2) & answer
            token = jnp.where(due, digit, jnp.where(kind > 0, names[kind], word))
            return (world, jnp.where(due, 0, kind)), (token, world)

        _, (tokens, world) = jax.lax.scan(step, (drawn[1][0], jnp.zeros_like(drawn[2][0])), drawn)
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


def entropies(p: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n"]:
    """−Σ p log p over the last axis, nats."""
    return scipy.special.entr(p).sum(axis=-1)


def _chosen(u, p):
    """The index that a uniform number chooses from probabilities."""
    bounds = np.cumsum(p)[:-1].astype(np.float32)
    return sum(((u >= bound).astype(jnp.int32) for bound in bounds), jnp.zeros(u.shape, jnp.int32))


def _whole(u, n):
    """A uniform number in [0, 1) as one of 0 … n − 1; products may round up to n."""
    return jnp.minimum((u * n).astype(jnp.int32), n - 1)
