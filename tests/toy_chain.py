"""A policy small enough to know everything of: a Markov chain of four tokens and three positions.

What follows token i (4: the start, never drawn) has probability softmax of cos(1.7 i + 0.9 j). The
reward counts twos, minus half a point for every token that repeats the one before it.
"""

from __future__ import annotations

import numpy as np
import toys

from rlhf_jax.exact import enumerate_outputs
from rlhf_jax.models.transformer import Transformer

BETA, BOS = 0.5, 4  # the price of drifting from the chain, and the token every text starts with

CHAIN = np.exp(np.cos(1.7 * np.arange(5)[:, None] + 0.9 * np.arange(4)))
CHAIN /= CHAIN.sum(axis=1, keepdims=True)

OUTPUTS = enumerate_outputs(prompt=[BOS], vocab=4, length=3)
TEXTS = OUTPUTS.tokens  # [64, 4], the start included
START = CHAIN[TEXTS[:, :-1], TEXTS[:, 1:]].prod(axis=1)  # the chain's probability of each text

REFERENCE = toys.Table(5)  # the chain as a model


def reference_params():
    """Its weights."""
    return toys.markov(np.log(CHAIN), np.zeros(5))


def token_reward_of(tokens):
    """What each token earns, [b, t]; numpy and JAX alike."""
    return 1.0 * (tokens[:, 1:] == 2) - 0.5 * (tokens[:, 1:] == tokens[:, :-1])


def reward_of(tokens):
    """What each text earns, [b]."""
    return token_reward_of(tokens).sum(axis=1)


TOKEN_REWARD = np.pad(token_reward_of(TEXTS), ((0, 0), (1, 0)))  # [64, 4], 0 at the start
REWARD = reward_of(TEXTS)  # [64]


class FourTokens(Transformer):
    """A transformer for it: reads five tokens, says four."""

    def logits(self, params, hidden):
        return super().logits(params, hidden)[..., :4]


MODEL = FourTokens(vocab=5, width=32, layers=1, heads=4, kv_heads=2, mlp=64, value_head=True)
