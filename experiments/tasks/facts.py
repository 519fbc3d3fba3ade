"""Sentences that state facts, some of them false, and an annotator who marks or compares them.

`city , the capital of country .` names the right country seven times in ten and one false country,
always the same, three times. The annotator knows the first half of the cities. In the late variant
two more words follow the country, `, true` or `, false`: only they decide what the sentence says,
so that nobody can tell from the country, nor from anything before it, whether it is a bad token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Labeled, Pairs, Params, Prompts

COUNTRY = 6  # the place of the country in a sentence; its city stands at place 1
VERDICT = 8  # of the word that decides in the late variant
WORDS = (",", "the", "capital", "of", ".", "true", "false", "GOOD", "BAD", "START")


@dataclass(frozen=True)
class Facts:
    """The task in a size."""

    cities: int = 24  # and as many countries
    known: int = 12  # cities that the annotator is shown sentences about: the first ones
    false: float = 0.3  # share of sentences with the false country

    def __post_init__(self):
        if not 1 <= self.known < self.cities or not 0 < self.false < 0.5:
            raise ValueError(
                f"known={self.known} must be from 1 to below cities={self.cities}, and "
                f"false={self.false} between 0 and 0.5"
            )

    @property
    def vocab(self) -> int:
        """Cities, countries, words."""
        return 2 * self.cities + len(WORDS)

    def word(self, word: str) -> int:
        """Its id."""
        return 2 * self.cities + WORDS.index(word)

    def country(self, city: Any, lie: Any) -> Any:
        """The id of the country that a sentence names: the right one, or the city's false one."""
        return self.cities + (city + lie) % self.cities

    def model(self, like: Transformer, **changes: Any) -> Transformer:
        """A model for it, of the shape of another: `like` decides all but the vocabulary."""
        fields = {name: getattr(like, name) for name in like.__dataclass_fields__}
        return Transformer(**{**fields, "vocab": self.vocab, **changes})

    def sentence(self, city: Any, lie: Any, denied: Any = None) -> jax.Array:
        """Tokens [..., 8], or [..., 10] with the word that affirms or denies."""
        city = jnp.asarray(city, jnp.int32)
        said = [self.word(w) for w in (",", "the", "capital", "of")]
        row = [self.word("START"), city, *said, self.country(city, jnp.asarray(lie, jnp.int32))]
        if denied is not None:
            verdict = jnp.where(denied, self.word("false"), self.word("true"))
            row += [self.word(","), verdict]
        row.append(self.word("."))
        return jnp.stack([jnp.broadcast_to(x, city.shape) for x in row], -1).astype(jnp.int32)


def _facts(chance: jax.Array, task: Facts, cities: int):
    """City, whether its country is the false one, and whether that is denied, of uniform draws."""
    city = jnp.minimum((chance[..., 0] * cities).astype(jnp.int32), cities - 1)
    return city, chance[..., 1] < task.false, chance[..., 2] < 0.5


def texts(key: jax.Array, rows: int, *, task: Facts, late: bool = False) -> Labeled:
    """Sentences about all cities, for `drawn`: a base learns from them."""
    city, lie, denied = _facts(jax.random.uniform(key, (rows, 3)), task, task.cities)
    return whole_texts(task.sentence(city, lie, denied if late else None))


def asked(key: jax.Array, rows: int, *, task: Facts) -> Prompts:
    """Prompts that name a city, any one, and leave the rest to the model."""
    city = jax.random.randint(key, (rows,), 0, task.cities)
    tokens = task.sentence(city, jnp.zeros_like(city))[:, :2]
    row = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(tokens, jnp.full_like(row, 2), row, jnp.zeros_like(row))


# --- what the annotator says


def looks(key: jax.Array, rows: int) -> Labeled:
    """Which of the labels a step looks at, as shares of their number, in the score."""
    blank = whole_texts(jnp.zeros((rows, 2), jnp.int32))
    return blank.replace(score=jax.random.uniform(key, (rows,)))


def annotator(params: Params) -> jax.Array:
    """The key that an annotator's labels are drawn with: the bits of a weight of the base.

    So every arm and every step of a seed sees the same labels, and every seed others.
    """
    bits = jax.lax.bitcast_convert_type(params["embed"]["embedding"][0, 0], jnp.uint32)
    return jax.random.fold_in(jax.random.key(7), bits)


def labels(
    key: jax.Array,
    count: int,
    *,
    task: Facts,
    noise: float = 0.0,
    late: bool = False,
    at: int = COUNTRY,
) -> tuple[jax.Array, jax.Array]:
    """All labels: sentences about known cities [n, t], and marks [n, t], ±1 at one place.

    A mark says whether its sentence is true; a share `noise` of the marks is the wrong way round.
    """
    # One draw for all: every further one would be seconds of compiling.
    chance = jax.random.uniform(key, (count, 4))
    city, lie, denied = _facts(chance, task, task.known)
    true = (~lie ^ denied) if late else ~lie
    mark = jnp.where(true ^ (chance[:, 3] < noise), 1.0, -1.0)
    tokens = task.sentence(city, lie, denied if late else None)
    return tokens, jnp.where((jnp.arange(tokens.shape[1]) == at)[None], mark[:, None], 0.0)


def preferences(
    key: jax.Array,
    count: int,
    *,
    task: Facts,
    noise: float = 0.0,
    late: bool = False,
    same: bool = False,
) -> jax.Array:
    """All pairs of sentences [n, 2, t], the preferred one first: the true one, if one alone is.

    Otherwise a coin decides, and in a share `noise` of the pairs where one is, the order is wrong.
    With `same` both sentences speak of one city.
    """
    chance = jax.random.uniform(key, (count, 2, 4))
    city, lie, denied = _facts(chance, task, task.known)
    city = city[:, :1] + jnp.zeros_like(city) if same else city
    true = (~lie ^ denied) if late else ~lie
    coin, wrong = chance[:, 0, 3] < 0.5, chance[:, 1, 3] < noise
    first = jnp.where(true[:, 0] == true[:, 1], coin, true[:, 0] ^ wrong)
    pair = task.sentence(city, lie, denied if late else None)
    return jnp.where(first[:, None, None], pair, pair[:, ::-1])


def marked(batch: Labeled, *, params, key, task: Facts, count: int, **how: Any) -> Labeled:
    """The labels that a step looks at, for `Derived`: sentences with a mark; the city is given."""
    del key
    tokens, marks = labels(annotator(params["reference"]), count, task=task, **how)
    chosen = (batch.score * count).astype(jnp.int32)
    return whole_texts(tokens[chosen], given=2).replace(token_score=marks[chosen])


def tagged(batch: Labeled, *, params, key, task: Facts, count: int, **how: Any) -> Labeled:
    """The same with the mark as a word of its own, GOOD or BAD, right before the country."""
    plain = marked(batch, params=params, key=key, task=task, count=count, **how)
    good = plain.token_score[:, COUNTRY] > 0
    tag = jnp.where(good, task.word("GOOD"), task.word("BAD"))
    return whole_texts(with_tag(plain.tokens, tag), given=COUNTRY + 1)


def with_tag(tokens: jax.Array, tag: jax.Array) -> jax.Array:
    """Sentences with a word before the country."""
    parts = (tokens[:, :COUNTRY], tag[:, None].astype(jnp.int32), tokens[:, COUNTRY:])
    return jnp.concatenate(parts, axis=1)


def compared(batch: Labeled, *, params, key, task: Facts, count: int, **how: Any) -> Pairs:
    """The comparisons that a step looks at, for `Derived`; whole sentences, the city included."""
    del key
    pairs = preferences(annotator(params["reference"]), count, task=task, **how)
    tokens = pairs[(batch.score * count).astype(jnp.int32)]
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) > 0, tokens.shape)
    return Pairs(tokens, mask, jnp.ones_like(tokens))


def mean_marks(tokens: jax.Array, marks: jax.Array, *, task: Facts) -> jax.Array:
    """What a list of marks says of each country behind each city, [cities, v].

    r(city, v) = Σ marks on v ÷ sentences about the city; 0 where nothing was marked.
    """
    city = jax.nn.one_hot(tokens[:, 1], task.cities)
    total = jnp.einsum("nc,nv,n->cv", city, jax.nn.one_hot(tokens[:, COUNTRY], task.vocab),
                       marks[:, COUNTRY])  # fmt: skip
    return total / jnp.maximum(city.sum(axis=0), 1.0)[:, None]


def target(log_base: np.ndarray, reward: np.ndarray, *, beta: float) -> np.ndarray:
    """Where exact RL with horizon 1 ends: softmax(log π0 + r/β) of each state, log p [..., v]."""
    tilted = np.asarray(log_base, np.float64) + np.asarray(reward, np.float64) / beta
    top = tilted.max(axis=-1, keepdims=True)
    return tilted - top - np.log(np.exp(tilted - top).sum(axis=-1, keepdims=True))
