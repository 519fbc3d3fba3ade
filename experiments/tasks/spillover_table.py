"""Tokens that share nothing: rows of a table, each a softmax of K, where drift has closed forms.

Every row is asked as often as every other, and its reward is 1 with probability (1 ± ρ)/2, by the
half of the K tokens that was drawn. Many rows are many independent runs in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax import advantages, measure
from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn
from rlhf_jax.models.transformer import Output
from rlhf_jax.objectives import reinforce
from rlhf_jax.optimizer import sgd
from rlhf_jax.rewards import KL
from rlhf_jax.study import Trained
from rlhf_jax.types import Params, Prompts
from tasks.spillover import ids, paid


@dataclass(frozen=True)
class Rows:
    """Logits of what follows each of `rows` tokens, uniform at first."""

    rows: int = 256
    answers: int = 4
    lm_head: bool = True
    value_head: bool = False
    context: int = 8

    @property
    def vocab(self) -> int:
        """All ids: answers are the first of the tokens that a row belongs to."""
        return self.rows

    def init(self, key: Array) -> Params:
        """Uniform."""
        del key
        return {"head": {"kernel": jnp.zeros((self.rows, self.answers), jnp.float32)}}

    def apply(self, params, tokens, *, positions=None, segments=None, cache=None):
        """Which row."""
        return Output(jax.nn.one_hot(tokens, self.rows), cache)

    def logits(self, params, hidden):
        """Of the answers."""
        return hidden @ params["head"]["kernel"]

    def empty_cache(self, rows: int, length: int):
        """Nothing is remembered."""
        return jnp.zeros((rows, length), jnp.float32)


@dataclass(frozen=True)
class Uniform(Rows):
    """The same table before anything was learned, whatever it is filled from: a reference."""

    def part_of(self, source: Params) -> Params:
        """Uniform again."""
        return jax.tree.map(jnp.zeros_like, source)


@dataclass(frozen=True)
class Table:
    """Sizes of the tabular arms."""

    rows: int = 256
    answers: int = 4  # K
    rate: float = 0.05  # η of one row; the trainer's is this times their number
    correlation: float = 0.5  # ρ, while there is one
    steps: int = 80  # with it
    after: int = 110  # and without
    beta: float = 1.0  # of the arm that goes back: reward per nat

    def decay(self) -> float:
        """What a step of the arm with KL leaves, 1 − ηβ/K."""
        return measure.contraction(rate=self.rate, beta=self.beta, outcomes=self.answers)


def questions(key: Array, rows: int) -> Prompts:
    """Each row once."""
    row = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(row[:, None], jnp.ones_like(row), ids(key, rows), jnp.zeros_like(row))


def by_half(tokens: Array, *, answers: int, strength: float) -> Array:
    """(1 ± ρ)/2 by the half that the drawn token lies in."""
    return (1 + strength * jnp.where(tokens[:, 1] >= answers // 2, 1, -1)) / 2


def run(
    name: str,
    table: Table,
    *,
    strength: float,
    beta: float = 0.0,
    start: str | None = None,
    **options,
) -> Config:
    """REINFORCE with the batch's mean as baseline, by plain gradient descent."""
    model = Rows(table.rows, table.answers)
    rate = partial(sgd, learning_rate=table.rate * table.rows)
    begin = None if start is None else From(stage=start)
    frozen = {"reference": Frozen(begin, Uniform(table.rows, table.answers))} if beta else {}
    return Config(
        name=name,
        steps=table.steps if start is None else table.after,
        data={"prompts": partial(drawn, draw=questions, batch=table.rows, salt=int(bool(start)))},
        learners={"policy": Learner(model, reinforce, optimizer=rate, start=begin)},
        frozen=frozen,
        rollouts=Rollouts(
            partial(paid, chance=partial(by_half, answers=table.answers, strength=strength)),
            length=1,
            reference="reference" if beta else None,
            value=None,
            kl=KL(beta, adaptive=False),
            advantage=advantages.batch_mean,
            show=0,
        ),
        **options,
    )


def drift(trained: Trained, *, answers: int) -> dict[str, float]:
    """How far rows are from uniform, and how far to the side that was paid, logits."""
    logits = np.asarray(trained.weights["policy"]["head"]["kernel"], np.float64)
    side = logits[:, answers // 2 :].mean() - logits[:, : answers // 2].mean()
    kl = measure.row_kl(np.zeros_like(logits), logits).mean()
    return {"kl": float(kl), "side": float(side)}
