"""An environment of which every token is known, and prompts that are names only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.environment import Environment
from rlhf_jax.types import Prompts


def names_of(rows=16, samples=2, first=0):
    """Prompts of one token that no environment reads."""
    prompt_id, sample_id = np.divmod(first * samples + np.arange(rows, dtype=np.int32), samples)
    return Prompts(np.zeros((rows, 1), np.int32), np.ones(rows, np.int32), prompt_id, sample_id)


def jump_reset(key, context):
    """1, 3, or 5 with a 0 before it."""
    start = 1 + 2 * jax.random.randint(key, (), 0, 3)
    return {}, jnp.where(start == 5, jnp.array([0, 5]), jnp.stack([start, -1]))


def jump_step(state, token, context):
    """After a multiple of 3 two tokens, after the next number one, then none; done from 12 on."""
    count = jnp.array([2, 1, 0])[token % 3]
    forced = jnp.where(count == 2, jnp.stack([token + 2, token + 4]), token + 1)
    return state, forced, count, token / 10, token >= 12


JUMPS = Environment(jump_reset, jump_step, forced=2, prompt=2)
