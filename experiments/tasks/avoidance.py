"""A toy that shows who sees a punishment coming: two starts, and an end that is punished or not.

After the start C the text ends in a punished token nine times of ten, after D once. Who learns from
all that follows stops saying C; who learns from the next token only goes on saying it, and turns
away abruptly at the last moment, where that is dear.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import exact as laboratory
from rlhf_jax import masked
from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.exact import Outputs, enumerate_outputs
from rlhf_jax.measure import PunishedFuture, abruptness

C, D, PUNISHED, FINE, BOS = range(5)
VOCAB, LENGTH = 5, 2


@dataclass(frozen=True)
class Avoidance:
    """How likely the starts and ends are, and what the punished one earns."""

    start: float = 0.5  # P(C)
    after_c: float = 0.9  # P(punished | C)
    after_d: float = 0.1
    reward: float = -1.0

    def __post_init__(self):
        self.future  # noqa: B018  (it refuses impossible numbers)

    @property
    def future(self) -> PunishedFuture:
        """The closed forms, built on the data."""
        return PunishedFuture(self.start, self.after_c, self.after_d, self.reward)


@lru_cache
def outputs() -> Outputs:
    """All 25 texts of two tokens."""
    return enumerate_outputs(prompt=[BOS], vocab=VOCAB, length=LENGTH)


def exact(task: Avoidance) -> np.ndarray:
    """The data's probability of each of `outputs`."""
    start, end = outputs().tokens[:, 1:].T
    punished = np.where(start == C, task.after_c, task.after_d)
    p = np.select([end == PUNISHED, end == FINE], [punished, 1 - punished], 0.0)
    return p * np.select([start == C, start == D], [task.start, 1 - task.start], 0.0)


def draw(key, rows, *, task: Avoidance):
    """Texts: a draw for `rlhf_jax.data.drawn`."""
    start, end = jax.random.uniform(key, (2, rows))
    c = start < task.start
    punished = end < jnp.where(c, task.after_c, task.after_d)
    words = (jnp.full(rows, BOS), jnp.where(c, C, D), jnp.where(punished, PUNISHED, FINE))
    return whole_texts(jnp.stack(words, axis=1))


def at_the_end(rollout, params, *, task: Avoidance):
    """What a text earns, on its last token."""
    del params
    punished = rollout.tokens[:, -1] == PUNISHED
    return masked.at_last(jnp.where(punished, task.reward, 0.0), rollout.mask)


def shares(p: np.ndarray) -> dict[str, float]:
    """P(C), P(punished | C) and P(punished) under probabilities of `outputs`."""
    start, end = outputs().tokens[:, 1:].T
    c, punished = p[start == C].sum(), end == PUNISHED
    after_c = p[(start == C) & punished].sum() / c
    return {"share": float(c), "after_c": float(after_c), "punished": float(p[punished].sum())}


def measured(
    params: Any, base: Any, task: Avoidance, *, model: Any, beta: float
) -> dict[str, float]:
    """`shares` of a policy, of its base, and where two horizons lead from there; KL by token, nats.

    The names begin with `base_`, `full_` (KL-RL to the end) and `myopic_` (one token).
    """
    found = outputs()
    p, start = (laboratory.probabilities(x, found, model=model) for x in (params, base))
    reward = np.where(found.tokens[:, -1] == PUNISHED, task.reward, 0.0)
    myopic = laboratory.horizon_optimum(start, reward, found, beta=beta, horizon=1)
    laws = {"base_": start, "full_": laboratory.tilted(start, reward, beta=beta), "myopic_": myopic}
    first, last = laboratory.kl_by_position(p, start, found)[1:]
    return {
        **shares(p),
        **{prefix + name: x for prefix, law in laws.items() for name, x in shares(law).items()},
        "kl_first": float(first),
        "kl_last": float(last),
        "abruptness": abruptness(max(first, 0.0), max(last, 0.0)),
    }
