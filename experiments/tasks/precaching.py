"""A toy that shows who prepares: a count that can be taken early is needed only later.

Random bits, a delay, then how often a 1 stood behind a 1. At each bit it is easy to see whether it
and the one before are both 1, but nothing there is to be gained by it; at the end, where the count
is asked for, a sum over bits is all that one layer of attention finds. Gradient descent teaches
early positions what later ones need; myopic descent, whose keys and values later positions do not
teach, cannot (Wu, Morris & Levine 2024). The control is a Markov chain: no token needs more than
the one before, and nothing is to be prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.exact import Outputs, token_logp

TEXTS = 4096  # at most, that a loss is measured on
STATES = 4  # of the control's chain
CHAIN = np.cos(1.7 * np.arange(STATES)[:, None] + 0.9 * np.arange(STATES)[None])  # its logits


@dataclass(frozen=True)
class Precaching:
    """Sizes. Tokens are the bits, the pause, BOS, and the counts; of the chain its states."""

    bits: int = 8
    delay: int = 2
    markov: bool = False  # the control

    def __post_init__(self):
        if self.bits < 2 or self.delay < 0:
            raise ValueError(f"bits={self.bits}, delay={self.delay}: at least 2 bits, no delay < 0")

    @property
    def vocab(self) -> int:
        """Bits, pause, BOS, and one token for each count; the chain has enough of them."""
        return 4 + self.bits

    @property
    def length(self) -> int:
        """Tokens of a text behind BOS."""
        return self.bits + self.delay + 1


PAUSE, BOS, COUNTS = 2, 3, 4


def texts(bits, *, task: Precaching):
    """Rows of bits with their delay and count; numpy and JAX alike."""
    xp = jnp if isinstance(bits, jax.Array) else np
    count = (bits[:, 1:] * bits[:, :-1]).sum(axis=1, keepdims=True)
    start, pause = (xp.full((bits.shape[0], n), x) for n, x in ((1, BOS), (task.delay, PAUSE)))
    return xp.concatenate([start, bits, pause, COUNTS + count], axis=1)


def chain(key, rows, *, task: Precaching):
    """Texts of the control: a uniform first state, then the chain."""
    first = jax.random.randint(jax.random.fold_in(key, 0), (rows,), 0, STATES)

    def step(state, key):
        state = jax.random.categorical(key, jnp.asarray(CHAIN, jnp.float32)[state])
        return state, state

    keys = jax.random.split(jax.random.fold_in(key, 1), task.length - 1)
    _, later = jax.lax.scan(step, first, keys)
    # BOS is a number of its own, above the states.
    return jnp.column_stack([jnp.full_like(first, STATES), first, later.T])


def draw(key, rows, *, task: Precaching):
    """Texts of the toy, or of its control: a draw for `rlhf_jax.data.drawn`."""
    if task.markov:
        return whole_texts(chain(key, rows, task=task))
    return whole_texts(texts(jax.random.randint(key, (rows, task.bits), 0, 2), task=task))


def loss(params: Any, task: Precaching, *, model: Any) -> float:
    """−log p in nats: of the count, over all bits if they can be enumerated; of the chain's tokens.

    The texts are the same for all models, so that what differs between two is theirs alone.
    """
    if task.markov:
        tokens, given = np.asarray(chain(jax.random.key(0), TEXTS, task=task)), 2
    elif 2**task.bits <= TEXTS:
        bits = np.arange(2**task.bits)[:, None] >> np.arange(task.bits) & 1
        tokens, given = texts(bits, task=task), task.length
    else:
        bits = np.random.default_rng(0).integers(0, 2, (TEXTS, task.bits))
        tokens, given = texts(bits, task=task), task.length
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= given, tokens.shape)
    logp = token_logp(params, Outputs(tokens.astype(np.int32), mask), model=model)
    return float(-logp.sum() / mask.sum())
