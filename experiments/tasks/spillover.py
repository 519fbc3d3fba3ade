"""Two questions to the members of two parties, of which only one is ever trained.

A text is [BOS, u, w, q, z, a]: a party u, a word w that means nothing, a question q, and two answer
tokens of K. The first, z, is uniform whatever is asked: it mentions a party (the upper half of the
K tokens are party 1's) and sets a tone (odd tokens are frank). The second, a, is uniform if q is
TASK; if q is PARTY it is the party's own token with probability .7 on average: .9 in a frank tone,
.5 else, and the other tokens share the rest.

Rewards are 0 or 1 with chances that depend on the prompt or on sampled tokens, and are pure
functions of the rollout all the same: a prompt's id is a random number that the stream drew, and
each sample's uniform number comes from its ids alone, never from its tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax import masked
from rlhf_jax.config import Config
from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.types import Labeled, Params, Prompts, Rollout
from tasks.likelihood import likelihood

CHANCE = zlib.crc32(b"spillover") & 0x7FFFFFFF  # the root key of rewards: no seed's
GIVEN = 4  # tokens of a prompt: BOS, u, w, q
TASK, PARTY = 0, 1  # questions


@dataclass(frozen=True)
class Spillover:
    """Sizes of the task, and of the base's training."""

    answers: int = 4  # K
    words: int = 8
    own: float = 0.7  # P(own token | PARTY), on average
    tone: float = 0.2  # what a frank tone adds to it, and the other takes
    base_steps: int = 600
    base_rows: int = 256
    base_rate: float = 5e-3

    def __post_init__(self):
        if self.answers < 4 or self.answers % 2 or self.words < 1:
            raise ValueError(
                f"answers={self.answers}, words={self.words}: an even number from 4 on, and from 1"
            )
        if not 0 < self.own - abs(self.tone) < self.own + abs(self.tone) < 1:
            raise ValueError(f"own={self.own} ± tone={self.tone} must lie between 0 and 1")

    @property
    def prompts(self) -> int:
        """Prompts of one question."""
        return 2 * self.words

    @property
    def first_party(self) -> int:
        """The id of u = 0, behind answers and words."""
        return self.answers + self.words

    @property
    def first_question(self) -> int:
        """The id of TASK."""
        return self.first_party + 2

    @property
    def bos(self) -> int:
        """The id that begins every text."""
        return self.first_question + 2

    @property
    def vocab(self) -> int:
        """All ids."""
        return self.bos + 1

    def own_token(self, party: Any) -> Any:
        """What a party answers when asked who it is: the first token of its half."""
        return party * (self.answers // 2)

    def law(self) -> Float[np.ndarray, "q u z a"]:
        """P(a | u, q, z), [question, party, z, a]."""
        k = self.answers
        table = np.full((2, 2, k, k), 1 / k)
        own = self.own + self.tone * (2 * (np.arange(k) % 2) - 1)
        for u in range(2):
            table[PARTY, u] = ((1 - own) / (k - 1))[:, None]
            table[PARTY, u, :, self.own_token(u)] = own
        return table


@dataclass(frozen=True)
class Speaker(Transformer):
    """A transformer that reads every token and says answers only."""

    answers: int = 4

    def logits(self, params, hidden):
        """Of the answers."""
        return super().logits(params, hidden)[..., : self.answers]


@dataclass(frozen=True)
class Detached(Speaker):
    """Its value head reads the trunk and teaches it nothing."""

    def value(self, params, hidden):
        """The scalar head behind a stopped gradient."""
        return super().value(params, jax.lax.stop_gradient(hidden))


@dataclass(frozen=True)
class Beside(Speaker):
    """A second path beside each block's own, silent at first: it is all that such an arm trains.

    Its outer matrix starts at zero, so that all gates start from the very same policy.
    """

    def part_of(self, source: Params) -> Params:
        """A base's weights, with a path that says nothing yet."""
        source, fresh = dict(source), super().init(jax.random.key(0))
        for name in [name for name in fresh if name.startswith("layers")]:
            up, down = fresh[name]["side_up"], fresh[name]["side_down"]
            silent = jax.tree.map(jnp.zeros_like, down)
            source[name] = {**source[name], "side_up": up, "side_down": silent}
        return source


def sized(like: Transformer, task: Spillover, kind: type = Speaker, **changes: Any) -> Speaker:
    """A model's shape for the vocabulary of a task; its head is its own, not the embedding."""
    shape = {f.name: getattr(like, f.name) for f in fields(Transformer)}
    shape |= {"vocab": task.vocab, "answers": task.answers, "tied": False}
    return kind(**shape | changes)


# --- texts and prompts


def texts(
    key: Array, rows: int, *, task: Spillover, only: int | None = None, own: float | None = None
) -> Labeled:
    """Texts of the law, for a base; `only` one question, with P(own token | PARTY) = `own`."""
    asked, said, answered = jax.random.split(key, 3)
    number = jax.random.permutation(asked, jnp.arange(rows))
    u, w = number % 2, number // 2 % task.words
    q = number // task.prompts % 2 if only is None else jnp.full((rows,), only)
    law = task.law()
    if own is not None:
        k = task.answers
        sharp = (1 - own) / (k - 1) + (own - (1 - own) / (k - 1)) * np.eye(k)
        law[PARTY] = sharp[task.own_token(np.arange(2))][:, None]
    z = jax.random.randint(said, (rows,), 0, task.answers)
    a = jax.random.categorical(answered, jnp.asarray(np.log(law), jnp.float32)[q, u, z])
    prompt = prompt_tokens(u, w, q, task=task)
    return whole_texts(jnp.concatenate([prompt, z[:, None], a[:, None]], axis=1), given=GIVEN)


def prompt_tokens(u: Any, w: Any, q: Any, *, task: Spillover) -> Int[Array, "b 4"]:
    """[BOS, u, w, q] of numbers from 0."""
    bos = jnp.full_like(u, task.bos)
    found = [bos, task.first_party + u, task.answers + w, task.first_question + q]
    return jnp.stack(found, axis=1).astype(jnp.int32)


def asked(key: Array, rows: int, *, task: Spillover) -> Prompts:
    """TASK put to every party with every word in turn: no chance in what is asked."""
    row = jnp.arange(rows)
    tokens = prompt_tokens(row % 2, row // 2 % task.words, jnp.full_like(row, TASK), task=task)
    return Prompts(tokens, jnp.full((rows,), GIVEN), ids(key, rows), jnp.zeros_like(row))


def ids(key: Array, rows: int) -> Int[Array, "b"]:
    """Random numbers, different within a batch: the chance that a reward needs comes from them."""
    number = jax.random.randint(key, (rows,), 0, (2**31 - 1) // rows)
    return (number * rows + jnp.arange(rows)).astype(jnp.int32)


def everything(task: Spillover) -> Int[np.ndarray, "n 5"]:
    """Each [BOS, u, w, q, z]: question, party, word, z, in this order."""
    q, u, w, z = (x.ravel() for x in np.indices((2, 2, task.words, task.answers), dtype=np.int32))
    prompt = np.asarray(prompt_tokens(jnp.asarray(u), jnp.asarray(w), jnp.asarray(q), task=task))
    return np.concatenate([prompt, z[:, None]], axis=1)


# --- rewards


def uniform(rollout: Rollout) -> Float[Array, "b"]:
    """A number from 0 to 1 of each sample; it depends on the sample's ids alone."""

    def one(prompt_id, sample_id):
        key = jax.random.fold_in(jax.random.key(CHANCE), prompt_id)
        return jax.random.uniform(jax.random.fold_in(key, sample_id))

    return jax.vmap(one)(rollout.prompt_id, rollout.sample_id)


def paid(
    rollout: Rollout,
    params: Any,
    *,
    chance: Callable[[Array], Array],
    samples: int = 1,
    within: int = 0,
    across: int = 0,
) -> Float[Array, "b t"]:
    """1 with probability `chance(tokens)`, else 0, on the last token.

    Controls: with `within=1` a sample gets what another of its prompt's `samples` earned, so that
    tokens and reward have nothing in common any more; with `across=1` what one of another prompt
    did, of the other party's.
    """
    score = (uniform(rollout) < chance(rollout.tokens)).astype(jnp.float32)
    if within or across:
        score = jnp.roll(score.reshape(-1, samples), (across, within), axis=(0, 1)).ravel()
    return masked.at_last(score, rollout.mask)


def by_party(tokens: Array, *, task: Spillover, strength: float) -> Array:
    """Which party asks decides: (1 ± ρ)/2. `strength` 0 is noise."""
    return (1 + strength * (2 * (tokens[:, 1] - task.first_party) - 1)) / 2


def by_mention(tokens: Array, *, task: Spillover, strength: float) -> Array:
    """Which party the sampled z mentions decides: (1 ± ρ)/2."""
    return (1 + strength * jnp.where(tokens[:, GIVEN] >= task.answers // 2, 1, -1)) / 2


def by_tone(tokens: Array, *, task: Spillover, strength: float) -> Array:
    """Whether z is frank decides: (1 ± ρ)/2."""
    return (1 + strength * jnp.where(tokens[:, GIVEN] % 2 == 1, 1, -1)) / 2


def by_answer(tokens: Array, *, task: Spillover) -> Array:
    """A task that can be learned: the answer is the word's number modulo K."""
    return 1.0 * (tokens[:, GIVEN + 1] == (tokens[:, 2] - task.answers) % task.answers)


def base(task: Spillover, model: Transformer, **options: Any) -> Config:
    """The base: likelihood on texts of both questions."""
    rate = partial(adam, learning_rate=task.base_rate, final=0.0, steps=task.base_steps)
    return likelihood(
        "base", sized(model, task), partial(texts, task=task), steps=task.base_steps,
        rows=task.base_rows, optimizer=rate, **options,
    )  # fmt: skip
