"""Every text that a small policy can say, and how likely a model makes each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.score import score
from rlhf_jax.types import Params, Sequences


@struct.dataclass
class Tempered(Sequences):
    """Texts whose log-probabilities are taken at a temperature."""

    temperature: Float[Array, "b"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """Every text that can follow one prompt, in the order of a dictionary; `enumerate_outputs`."""

    tokens: Int[np.ndarray, "n t"]  # the prompt included; `pad` behind texts that ended early
    mask: Bool[np.ndarray, "n t"]  # tokens the policy chose, a stop token included
    alphabet: tuple[int, ...] | None = None  # None: all of the vocabulary may be drawn

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def prefix(self) -> Int[np.ndarray, "n t+1"]:
        """Which state a text is in before token t: texts share a number if they agree so far."""
        new = np.zeros((len(self), self.tokens.shape[1] + 1), bool)
        new[1:, 1:] = np.logical_or.accumulate(self.tokens[1:] != self.tokens[:-1], axis=1)
        return np.cumsum(new, axis=0)

    def steps(self, at: int) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
        """The m states after token `at`: one text that goes through each, and the state before."""
        _, row = np.unique(self.prefix[:, at + 1], return_index=True)
        return row, self.prefix[row, at]

    def only(self, keep: Bool[np.ndarray, "n"]) -> Outputs:
        """Some of the texts."""
        return Outputs(self.tokens[keep], self.mask[keep], self.alphabet)

    def batch(self, temperature: float = 1.0) -> Tempered:
        """The texts as a batch of n rows."""
        used = self.mask | (np.arange(self.tokens.shape[1]) < self.mask.argmax(axis=1)[:, None])
        rows = jnp.full((len(self),), temperature, jnp.float32)
        arrays = (self.tokens.astype(np.int32), self.mask, used.astype(np.int32))
        return Tempered(*map(jnp.asarray, arrays), rows)


def enumerate_outputs(
    *,
    prompt: Sequence[int],
    vocab: int,
    length: int,
    stop: Sequence[int] = (),
    alphabet: Sequence[int] | None = None,
    pad: int = 0,
    limit: int = 1_000_000,
) -> Outputs:
    """All texts of up to `length` tokens after a prompt: those that reach it, those a stop ends.

    `alphabet` restricts what may be drawn; a model's other tokens are then banned, as by
    `Sampling(banned=...)`, and its probabilities renormalised token by token.

    Raises:
        ValueError: if there are more than `limit` texts, saying what to reduce; for ids outside the
            vocabulary; for an empty prompt.
    """
    if len(prompt) < 1 or length < 1:
        raise ValueError(f"needs a prompt of at least 1 token and length ≥ 1, not {length}")
    letters = tuple(range(vocab)) if alphabet is None else tuple(sorted(set(alphabet)))
    if not letters or not all(0 <= i < vocab for i in (*letters, *stop)):
        raise ValueError(f"stop {list(stop)} and alphabet {letters} must be ids below {vocab}")
    size, ends = len(letters), len(set(letters) & set(stop))

    def texts(length, size):
        going = size - min(ends, size)  # tokens after which a text goes on
        short = sum(going**i * (size - going) for i in range(length - 1))
        return short + going ** (length - 1) * size

    if texts(length, size) > limit:
        fitting = max((i for i in range(1, length) if texts(i, size) <= limit), default=0)
        narrow = max((i for i in range(1, size) if texts(length, i) <= limit), default=0)
        ways = [f"reduce length to {fitting}"] if fitting else []
        ways += [f"name an alphabet of {narrow} tokens"] if narrow else []
        raise ValueError(
            f"{size} tokens at up to {length} places make {texts(length, size):,} texts, more than "
            f"limit={limit:,}; {', '.join([*ways, 'or raise the limit'])}"
        )
    rows, ended = np.zeros((1, 0), np.int32), np.zeros(1, bool)
    chosen = np.zeros((1, 0), bool)
    for _ in range(length):
        children = np.where(ended, 1, size)
        parent = np.repeat(np.arange(len(rows)), children)
        child = np.arange(len(parent)) - (np.cumsum(children) - children)[parent]
        over = ended[parent]
        token = np.where(over, pad, np.array(letters)[child])
        rows = np.column_stack([rows[parent], token])
        chosen = np.column_stack([chosen[parent], ~over])
        ended = over | np.isin(token, np.array(stop, np.int64))
    before = np.broadcast_to(np.array(prompt, np.int32), (len(rows), len(prompt)))
    tokens = np.concatenate([before, rows.astype(np.int32)], axis=1)
    mask = np.concatenate([np.zeros(before.shape, bool), chosen], axis=1)
    return Outputs(tokens, mask, None if alphabet is None else letters)


def probabilities(
    params: Params,
    outputs: Outputs,
    *,
    model: Any,
    temperature: float = 1.0,
    rows: int = 4096,
) -> Float[np.ndarray, "n"]:
    """The distribution of a model over its texts, `rows` of them at a time.

    The model computes in float32; what rounding leaves of a sum of 1 is divided out.

    Raises:
        ValueError: if the model says something that was not enumerated.
    """
    logp = token_logp(params, outputs, model=model, temperature=temperature, rows=rows)
    p = np.exp(logp.sum(axis=1))
    if not abs(p.sum() - 1) < 1e-3:
        raise ValueError(
            f"the probabilities of the {len(p)} texts sum to {p.sum():.6f}, not 1: enumerate the "
            "model's own vocabulary and stop ids, or name the tokens it may say as the alphabet"
        )
    return p / p.sum()


def token_logp(
    params: Params,
    outputs: Outputs,
    *,
    model: Any,
    temperature: float = 1.0,
    rows: int = 4096,
) -> Float[np.ndarray, "n t"]:
    """What a model gives each token after those before it: log-probabilities, 0 outside the mask.

    `model` must be hashable (a frozen dataclass): it is a static argument of one compiled program.
    """
    batch = outputs.batch(temperature)
    found = []
    for start in range(0, len(outputs), rows):
        # The last part is filled up with its own first row: one shape, one program.
        index = np.arange(start, start + min(rows, len(outputs)))
        index = np.where(index < len(outputs), index, start)
        part = jax.tree.map(lambda x, index=index: x[index], batch)
        found.append(batch_logp(params, part, model=model, alphabet=outputs.alphabet))
    return np.concatenate([np.asarray(x, np.float64) for x in found])[: len(outputs)]


@partial(jax.jit, static_argnames=("model", "alphabet"))
def batch_logp(
    params: Params, batch: Sequences, *, model: Any, alphabet: tuple[int, ...] | None = None
) -> Float[Array, "b t"]:
    """The same of a batch, in JAX, with a gradient."""
    if alphabet is None:
        return score({"self": params}, batch, models={"self": model}).logp
    ids = np.array(alphabet)

    def allowed(logits, _):
        return {"allowed": jax.nn.logsumexp(logits["self"][:, ids], axis=-1)}

    scores = score({"self": params}, batch, models={"self": model}, vocab=allowed)
    return scores.logp - scores.extra["allowed"]
