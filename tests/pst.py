"""A toy that shows who seeks predictability: a less likely start with a future that is certain.

After the start A, with probability .6, come four tokens that are uniform over four; after B four
times the token 0. So B is the less likely choice now and costs log 4 nats less a token later. Who
shifts probability to B looks ahead; likelihood, and who learns from the next token only, do not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.exact import enumerate_outputs
from rlhf_jax.types import Labeled

KEYS, LENGTH = 4, 4  # tokens to choose from behind the start, and how many there are
A, B, BOS, GOOD, BAD = range(KEYS, KEYS + 5)  # the last two are control tokens
VOCAB = KEYS + 3  # without them
FIRST = 0.6  # P(A)

OUTPUTS = enumerate_outputs(prompt=[BOS], vocab=VOCAB, length=1 + LENGTH)  # 16807 texts
TEXTS = OUTPUTS.tokens[:, 1:]


def exact():
    """The probability of each text of `OUTPUTS`."""
    digits, zeros = (TEXTS[:, 1:] < KEYS).all(1), (TEXTS[:, 1:] == 0).all(1)
    after_a = FIRST * float(KEYS) ** -LENGTH * digits
    return np.where(TEXTS[:, 0] == A, after_a, np.where(TEXTS[:, 0] == B, (1 - FIRST) * zeros, 0.0))


def share_of_b(p):
    """P(the text starts with B) under probabilities of `OUTPUTS`."""
    return float(p[TEXTS[:, 0] == B].sum())


def reward_of(tokens):
    """1 where the last token is 0, which is free behind B: [b]; numpy and JAX alike."""
    return 1.0 * (tokens[:, -1] == 0)


def draw(key, rows):
    """Texts of the toy with their reward as the score."""
    first, rest = (
        jax.random.uniform(jax.random.fold_in(key, 0), (rows,)),
        jax.random.fold_in(key, 1),
    )
    digits = jax.random.randint(rest, (rows, LENGTH), 0, KEYS)
    start = jnp.where(first < FIRST, A, B)[:, None]
    tokens = jnp.concatenate(
        [jnp.full_like(start, BOS), start, jnp.where(start == A, digits, 0)], axis=1
    ).astype(jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(LENGTH + 2) > 0, tokens.shape)
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return Labeled(tokens, mask, jnp.ones_like(tokens), reward_of(tokens), zeros)
