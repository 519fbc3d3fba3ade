"""A text whose reward one early token decides: all credit behind that token is wasted.

Sixteen tokens of the same chain as in `chain.py`; after the last one the text is paid 1 if its
fifth token is one of the first four ids, else 0. Whatever follows the fifth token has an advantage
of exactly 0 under every policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.transformer import Output, Transformer
from tasks.chain import Speaker, law, speaker


@dataclass(frozen=True)
class Local:
    """The task in a size."""

    vocab: int = 16  # tokens a text is made of; the start is one more
    length: int = 16
    place: int = 5  # the token that decides, from 1
    good: int = 4  # ids below this one are paid for there

    def __post_init__(self):
        if not 1 <= self.place < self.length or not 0 < self.good < self.vocab:
            raise ValueError(
                f"place={self.place} must be a token before the last of {self.length}, and "
                f"good={self.good} fewer than the {self.vocab} ids"
            )

    @property
    def start(self) -> int:
        """The token that every text starts with and that is never drawn."""
        return self.vocab

    @property
    def behind(self) -> float:
        """The share of tokens that cannot matter: 11/16."""
        return 1 - self.place / self.length

    def reward_of(self, tokens: Any) -> Any:
        """What each text earns, [b]; numpy and JAX alike."""
        return 1.0 * (tokens[:, self.place] < self.good)

    def model(self, like: Transformer, **changes: Any) -> Speaker:
        """A model for it, of the shape of another: `like` decides all but the vocabulary."""
        return speaker(like, self.vocab, **changes)


def values(steps: np.ndarray, task: Local) -> np.ndarray:
    """V of a Markov policy before each token up to the one that decides, [place, vocab + 1].

    `steps` [place, vocab + 1, vocab] says what follows which token there; backwards, V(i) =
    Σ_j P(j | i) V(j), and before the last of them V(i) = P(good | i).
    """
    found = [steps[-1][:, : task.good].sum(axis=1)]
    for step in steps[-2::-1]:
        found.insert(0, step @ found[0][: task.vocab])
    return np.stack(found)


@dataclass(frozen=True)
class Oracle:
    """A critic that knows: no weights, and the value of every state by dynamic programming.

    Behind the token that decides it is right about every policy; before, about the chain itself,
    and therefore a baseline that leaves every policy's gradient unbiased.
    """

    task: Local
    vocab: int

    lm_head: ClassVar[bool] = False
    value_head: ClassVar[bool] = True

    def init(self, key):
        """No weights."""
        return {}

    def part_of(self, params):
        """What it takes of the weights it starts from: nothing."""
        return {}

    def apply(self, params, tokens, *, positions=None, segments=None, cache=None):
        """The value after each token, as the hidden state."""
        task = self.task
        steps = np.broadcast_to(law(task.vocab), (task.place, task.vocab + 1, task.vocab))
        table = jnp.asarray(values(steps, task), jnp.float32)
        before = table[jnp.arange(task.place)[None], tokens[:, : task.place]]
        paid = jnp.where(tokens[:, task.place, None] < task.good, 1.0, 0.0)
        behind = jnp.broadcast_to(paid, (tokens.shape[0], tokens.shape[1] - task.place))
        return Output(jnp.concatenate([before, behind], axis=1)[..., None], None)

    def value(self, params, hidden: jax.Array) -> jax.Array:
        """The hidden state is the value."""
        return hidden[..., 0]
