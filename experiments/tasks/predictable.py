"""A toy that shows who seeks predictability: a less likely start with a future that is certain.

After the start A, with probability .6, come four tokens that are uniform over four; after B four
times the token 0. So B is the less likely choice now and costs log 4 nats less a token later. Who
shifts probability to B looks ahead; likelihood, and who learns from the next token only, do not.

In the shuffled control the same starts and the same continuations are drawn independently, so that
nothing can be gained by a choice (Krueger et al. 2020 swap environments for the same reason).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import masked
from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.exact import Outputs, enumerate_outputs
from rlhf_jax.measure import PredictableFuture

ENUMERABLE = 1_000_000  # texts; of longer ones the branches behind A and B are sampled
SAMPLED = 4096  # texts of each branch


@dataclass(frozen=True)
class Predictable:
    """Sizes. Tokens are 0 … keys − 1, then A, B, BOS; behind them two control tokens."""

    first: float = 0.6  # P(A)
    keys: int = 4
    length: int = 4  # tokens behind the start
    shuffled: bool = False

    def __post_init__(self):
        self.future  # noqa: B018  (it refuses impossible sizes)

    @property
    def a(self) -> int:
        """The likelier start."""
        return self.keys

    @property
    def b(self) -> int:
        """The start with the certain future."""
        return self.keys + 1

    @property
    def bos(self) -> int:
        """What every text begins with."""
        return self.keys + 2

    @property
    def tags(self) -> tuple[int, int]:
        """Control tokens: of a text that earned nothing, of one that did."""
        return self.keys + 4, self.keys + 3

    @property
    def vocab(self) -> int:
        """Without the control tokens, which are the two ids above."""
        return self.keys + 3

    @property
    def future(self) -> PredictableFuture:
        """The closed forms, built on the data."""
        return PredictableFuture(self.first, self.keys, self.length)


def draw(key, rows, *, task: Predictable):
    """Texts with their reward as the score: a draw for `rlhf_jax.data.drawn`."""
    first = jax.random.uniform(jax.random.fold_in(key, 0), (rows,)) < task.first
    digits = jax.random.randint(jax.random.fold_in(key, 1), (rows, task.length), 0, task.keys)
    uncertain = first
    if task.shuffled:
        uncertain = jax.random.uniform(jax.random.fold_in(key, 2), (rows,)) < task.first
    start = jnp.where(first, task.a, task.b)[:, None]
    tokens = jnp.concatenate(
        [jnp.full_like(start, task.bos), start, jnp.where(uncertain[:, None], digits, 0)], axis=1
    )
    return whole_texts(tokens, reward_of(tokens))


def reward_of(tokens):
    """1 where the last token is 0, which is free behind B: [b]; numpy and JAX alike."""
    return 1.0 * (tokens[:, -1] == 0)


def at_the_end(rollout, params):
    """The reward of a text, on its last token."""
    del params
    return masked.at_last(reward_of(rollout.tokens).astype(jnp.float32), rollout.mask)


class Texts(NamedTuple):
    """Texts that stand for all: a sum over all is a sum over these, each so many times."""

    outputs: Outputs
    times: np.ndarray  # [n]

    @property
    def start(self) -> np.ndarray:
        """Each text's first token, [n]."""
        return self.outputs.tokens[:, 1]


@lru_cache
def texts(task: Predictable) -> Texts:
    """All texts if they can be enumerated, or the likely ones: their all-zero and uniform ends.

    The uniform ends of a start are sampled, and stand for keys^length of them; what a model says
    outside of the data's alphabet is then left out.
    """
    length = 1 + task.length
    if task.vocab**length <= ENUMERABLE:
        found = enumerate_outputs(prompt=[task.bos], vocab=task.vocab, length=length)
        return Texts(found, np.ones(len(found)))
    random, rows = np.random.default_rng(0), []
    for start in (task.a, task.b):
        ends = random.integers(0, task.keys, (SAMPLED, task.length))
        ends[0] = 0
        ends[1:, 0] += (ends[1:] == 0).all(axis=1)  # the other texts: none is all zeros
        rows.append(np.column_stack([np.full((SAMPLED, 2), [task.bos, start]), ends]))
    each = (float(task.keys) ** task.length - 1) / (SAMPLED - 1)
    times = np.tile(np.where(np.arange(SAMPLED) == 0, 1.0, each), 2)
    tokens = np.concatenate(rows).astype(np.int32)
    mask = np.broadcast_to(np.arange(tokens.shape[1]) > 0, tokens.shape)
    return Texts(Outputs(tokens, mask), times)


def exact(task: Predictable) -> np.ndarray:
    """The data's probability of each of `texts`."""
    tokens = texts(task).outputs.tokens
    digits, zeros = (tokens[:, 2:] < task.keys).all(1), (tokens[:, 2:] == 0).all(1)
    uniform = digits * float(task.keys) ** -task.length
    share = {task.a: task.first, task.b: 1 - task.first}
    start = np.array([share.get(token, 0.0) for token in range(task.vocab)])[tokens[:, 1]]
    if task.shuffled:
        return start * (task.first * uniform + (1 - task.first) * zeros)
    return start * np.where(tokens[:, 1] == task.a, uniform, zeros)


def share_of_b(p: np.ndarray, task: Predictable) -> float:
    """P(the text starts with B) under probabilities of `texts`."""
    found = texts(task)
    return float((found.times * p)[found.start == task.b].sum())
