"""Short texts behind control tokens: a Markov base, and a reward that counts letters.

A text is [BOS, tag, x, y₁ … y_T], with or without the tag. What follows token i is a letter with
probability softmax of cos(1.7 i + 0.9 j): the base, which no tag tells anything about. The reward
is how often the letter that x wants was said, minus half a point for every letter that repeats the
one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import masked
from rlhf_jax.config import Config
from rlhf_jax.data.drawn import one_prompt, whole_texts
from rlhf_jax.environment import Environment
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.types import Labeled, Prompts, Rollout, Sequences
from tasks.likelihood import likelihood

TAGS = ("ON", "OFF", "GOOD", "BAD", "BIN0", "BIN1", "BIN2", "BIN3")
WANTED = 4  # x wants letter x mod 4


@dataclass(frozen=True)
class Tagged:
    """Sizes of the task, and of the base's training."""

    letters: int = 4
    prompts: int = 2  # values of x
    length: int = 3  # letters of a text
    texts: int = 4096  # up to as many texts of an x are all of them; otherwise so many are drawn
    base_steps: int = 1000
    base_rows: int = 256
    base_rate: float = 5e-3

    def __post_init__(self):
        if self.letters < WANTED or self.prompts < 1 or self.length < 2:
            raise ValueError(
                f"letters={self.letters}, prompts={self.prompts}, length={self.length}: at least "
                f"{WANTED}, 1 and 2"
            )

    @property
    def bos(self) -> int:
        """The id that begins every text; letters and the values of x come before it."""
        return self.letters + self.prompts

    @property
    def vocab(self) -> int:
        """All ids."""
        return self.bos + 1 + len(TAGS)

    @property
    def switch(self) -> int:
        """Letters after which a tag in the midst of a text stands."""
        return self.length // 2

    def tag(self, name: str) -> int:
        """The id of a control token."""
        return self.bos + 1 + TAGS.index(name)

    def tags(self, *names: str) -> tuple[int, ...]:
        """Ids of control tokens."""
        return tuple(self.tag(name) for name in names)

    def chain(self) -> Float[np.ndarray, "letters+prompts letters"]:
        """What follows each letter, and each x: probabilities."""
        i, j = np.arange(self.letters + self.prompts)[:, None], np.arange(self.letters)
        table = np.exp(np.cos(1.7 * i + 0.9 * j))
        return table / table.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Letters(Transformer):
    """A transformer that reads every token and says letters only: no sampler can draw a tag."""

    letters: int = 4

    def logits(self, params, hidden):
        """Of the letters."""
        return super().logits(params, hidden)[..., : self.letters]


def sized(model: Transformer, task: Tagged, **changes: Any) -> Letters:
    """A model's shape for the vocabulary of a task; its head is its own, not the embedding."""
    shape = {f.name: getattr(model, f.name) for f in fields(Transformer)}
    shape |= {"vocab": task.vocab, "letters": task.letters, "tied": False}
    return Letters(**shape | changes)


def asked(
    key: jax.Array,
    rows: int,
    *,
    task: Tagged,
    tags: tuple[str, ...] = (),
    shares: tuple[float, ...] = (1.0,),
) -> Prompts:
    """Prompts [BOS, x] or, with tags, [BOS, tag, x]: every x as likely, tags by their shares.

    All samples of one prompt have its tag, so that a baseline compares like with like.
    """
    x_key, tag_key = jax.random.split(key)
    x = task.letters + jax.random.randint(x_key, (rows,), 0, task.prompts)
    bare = one_prompt(key, rows, tokens=(task.bos, 0))
    if not tags:
        return bare.replace(tokens=bare.tokens.at[:, 1].set(x))
    which = jax.random.choice(tag_key, len(tags), (rows,), p=jnp.array(shares, jnp.float32))
    tag = jnp.array(task.tags(*tags), jnp.int32)[which]
    tokens = jnp.stack([bare.tokens[:, 0], tag, x], axis=1)
    return bare.replace(tokens=tokens, length=bare.length + 1)


def letters_drawn(
    key: jax.Array, rows: int, *, task: Tagged
) -> tuple[Int[Array, "b"], Int[Array, "b t"]]:
    """The x and the letters of texts of the chain, drawn systematically, in dictionary order.

    Of each beginning there are as many as its probability wants, up to one, for as long as it wants
    one: uniform numbers (i + U)/rows are decoded letter by letter. Less noise, the same chances.
    """
    shift, fresh = jax.random.split(key)
    table = jnp.asarray(task.chain(), jnp.float32)
    u = (jnp.arange(rows) + jax.random.uniform(shift)) / rows * task.prompts
    x = jnp.minimum(u.astype(jnp.int32), task.prompts - 1)

    def follow(carry, new):
        u, width, last = carry
        upto = jnp.cumsum(table[last], axis=1)
        letter = (u[:, None] >= upto[:, :-1]).sum(axis=1)
        p = jnp.take_along_axis(table[last], letter[:, None], axis=1)[:, 0]
        above = jnp.take_along_axis(upto, letter[:, None], axis=1)[:, 0]
        width = width * p
        # Where rows are fewer than beginnings, nothing is left to decode but rounding.
        u = jnp.where(width * rows > 1, jnp.clip((u - above + p) / p, 0.0, 1.0), new)
        return (u, width, letter), letter

    start = (u - x, jnp.full((rows,), 1.0 / task.prompts), task.letters + x)
    new = jax.random.uniform(fresh, (task.length, rows))
    _, y = jax.lax.scan(follow, start, new)
    return task.letters + x, y.T


def texts(key: jax.Array, rows: int, *, task: Tagged) -> Labeled:
    """Texts [BOS, x, y₁ …] of the chain, and what they earn, letter by letter."""
    x, y = letters_drawn(key, rows, task=task)
    tokens = jnp.concatenate([jnp.full((rows, 1), task.bos), x[:, None], y], axis=1)
    batch = whole_texts(tokens, given=2)
    earned = letter_rewards(batch.tokens, batch.mask, task=task)
    return batch.replace(score=earned.sum(axis=1), token_score=earned)


def base_texts(key: jax.Array, rows: int, *, task: Tagged) -> Labeled:
    """Texts of the chain whose tags say nothing.

    A quarter has none, and of the others half get another tag in their midst.
    """
    letters_key, tag_key, none_key, second_key = jax.random.split(key, 4)
    x, y = letters_drawn(letters_key, rows, task=task)
    tag = jax.random.randint(tag_key, (2, rows), task.bos + 1, task.vocab)
    some = jax.random.bernoulli(none_key, 0.75, (rows,))
    first = jnp.where(some, tag[0], -1)[:, None]
    second = jnp.where(some & jax.random.bernoulli(second_key, 0.5, (rows,)), tag[1], -1)[:, None]
    bos = jnp.full((rows, 1), task.bos)
    before, after = y[:, : task.switch], y[:, task.switch :]
    tokens = jnp.concatenate([bos, first, x[:, None], before, second, after], axis=1)
    order = jnp.argsort(tokens < 0, axis=1, stable=True)  # what is absent goes to the end
    tokens = jnp.take_along_axis(tokens, order, axis=1)
    segments = (tokens >= 0).astype(jnp.int32)
    zero = jnp.zeros(tokens.shape, jnp.float32)
    said = (tokens >= 0) & (tokens < task.letters)
    return Labeled(jnp.maximum(tokens, 0).astype(jnp.int32), said, segments, zero[:, 0], zero)


def people_say(batch: Labeled, key: jax.Array) -> Labeled:
    """The score becomes a person's word, 1 with probability σ(score): `called_good`, but for texts
    in dictionary order systematic, so that of similar ones as many are called good as should be.
    """
    upto = jnp.cumsum(jax.nn.sigmoid(batch.score)) + jax.random.uniform(key)
    good = jnp.diff(jnp.floor(upto), prepend=0.0)
    return batch.replace(score=good)


def dropped(batch: Labeled, key: jax.Array, *, tagged: Callable, drop: float) -> Labeled:
    """`tagged(batch, key, drop=...)` with every 1/`drop`-th row left without its tag, not any."""
    place = jnp.arange(batch.tokens.shape[0]) * drop + jax.random.uniform(key)
    out = jnp.floor(place + drop) > jnp.floor(place)
    kept, bare = tagged(batch, key, drop=0.0), tagged(batch, key, drop=1.0)

    def choose(a, b):
        return jnp.where(out.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return jax.tree.map(choose, kept, bare)


def log_called_good(batch: Labeled, key: jax.Array) -> Labeled:
    """The score becomes log σ(score), the weight of a text being how likely it is called good."""
    del key
    return batch.replace(score=jax.nn.log_sigmoid(batch.score))


def base(task: Tagged, model: Transformer, **options: Any) -> Config:
    """The base: likelihood on such texts."""
    rate = partial(adam, learning_rate=task.base_rate, final=0.0, steps=task.base_steps)
    return likelihood(
        "base", sized(model, task), partial(base_texts, task=task), steps=task.base_steps,
        rows=task.base_rows, optimizer=rate, **options,
    )  # fmt: skip


# ---- what texts earn


def letter_rewards(
    tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], *, task: Tagged
) -> Float[Array, "b t"]:
    """What each letter earns: 1 if x wants it, −½ if the letter before it was the same."""
    index = jnp.arange(tokens.shape[1])[None]
    latest = jax.lax.cummax(jnp.where(mask, index, -1), axis=1)
    before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    last = jnp.take_along_axis(tokens, jnp.maximum(before, 0), axis=1)
    is_x = (tokens >= task.letters) & (tokens < task.bos)
    x = jnp.max(jnp.where(is_x, tokens - task.letters, -1), axis=1, keepdims=True)
    repeats = (before >= 0) & (tokens == last)
    return masked.select(1.0 * (tokens == x % WANTED) - 0.5 * repeats, mask)


def gold(rollout: Rollout, params: Any, *, task: Tagged) -> Float[Array, "b t"]:
    """The reward r, letter by letter."""
    del params
    return letter_rewards(rollout.tokens, rollout.mask, task=task)


def log_good(rollout: Rollout, params: Any, *, task: Tagged) -> Float[Array, "b t"]:
    """Log σ(r), on the last letter: how likely a person is to call the text good, in nats."""
    earned = gold(rollout, params, task=task).sum(axis=1)
    return masked.at_last(jax.nn.log_sigmoid(earned), rollout.mask)


def by_a_coin(rollout: Rollout, params: Any, *, task: Tagged, period: int) -> Float[Array, "b t"]:
    """r, but nothing for every `period`-th prompt: feedback that is off whatever the tag says."""
    paid = (rollout.prompt_id % period != 0)[:, None]
    return jnp.where(paid, gold(rollout, params, task=task), 0.0)


# ---- tags in the midst of a text


def switched(task: Tagged) -> Environment:
    """A prompt with ON or OFF, and behind half of the letters of every second text the other."""
    return Environment(partial(_reset, task=task), partial(_step, task=task), forced=1, prompt=3)


def _reset(key, context, *, task):
    x, first, flips = jax.random.randint(key, (3,), 0, jnp.array([task.prompts, 2, 2]))
    tags = jnp.array(task.tags("ON", "OFF"))
    prompt = jnp.array([task.bos, 0, 0]).at[1].set(tags[first]).at[2].set(task.letters + x)
    return (tags[1 - first], flips > 0, jnp.int32(0)), prompt


def _step(state, token, context, *, task):
    other, flips, said = state
    said = said + 1
    now = flips & (said == task.switch)
    done = jnp.array(False)
    return (other, flips, said), other[None], now.astype(jnp.int32), jnp.float32(0), done


def texts_behind(
    letters: Int[np.ndarray, "x n t"], *, task: Tagged, tag: str | None, then: str | None = None
) -> Sequences:
    """The letters as texts behind a tag, or none, `then` another in their midst: x · n rows."""
    x, n, _ = letters.shape
    prompt = np.repeat(task.letters + np.arange(x), n)[:, None]

    def column(token):
        return np.full((x * n, 1), token)

    flat = letters.reshape(x * n, -1)
    parts = [column(task.bos), *([] if tag is None else [column(task.tag(tag))]), prompt]
    middle = [] if then is None else [column(task.tag(then))]
    parts += [flat[:, : task.switch], *middle, flat[:, task.switch :]]
    tokens = np.concatenate(parts, axis=1).astype(np.int32)
    return Sequences(jnp.asarray(tokens), jnp.asarray(tokens < task.letters), jnp.ones_like(tokens))
