"""A Markov chain of a few tokens and positions: a policy on it can be written down whole.

What follows token i (the first id that no text says: its start) has probability softmax of
cos(1.7 i + 0.9 j). The reward counts twos, minus half a point for every token that repeats the one
before it. With 4 tokens and 3 positions there are 64 texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import exact, masked
from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Labeled


def law(vocab: int) -> np.ndarray:
    """P(j | i), [vocab + 1, vocab]; the last row is that of the start."""
    found = np.exp(np.cos(1.7 * np.arange(vocab + 1)[:, None] + 0.9 * np.arange(vocab)))
    return found / found.sum(axis=1, keepdims=True)


def walk(key: jax.Array, rows: int, *, vocab: int, length: int) -> Labeled:
    """Texts of the chain behind their start token, for `drawn`: a base learns from them."""
    log_law = jnp.asarray(np.log(law(vocab)), jnp.float32)

    def follow(token, key):
        token = jax.random.categorical(key, log_law[token])
        return token, token

    start = jnp.full((rows,), vocab, jnp.int32)
    _, tokens = jax.lax.scan(follow, start, jax.random.split(key, length))
    return whole_texts(jnp.concatenate([start[:, None], tokens.T.astype(jnp.int32)], axis=1))


class Speaker(Transformer):
    """A transformer that reads `vocab` tokens and says all but the last, which starts a text."""

    def logits(self, params, hidden):
        """Float32 logits of what may be said."""
        return super().logits(params, hidden)[..., :-1]


@dataclass(frozen=True)
class Chain:
    """The task in a size, and all that is exact about it."""

    vocab: int = 4  # tokens a text is made of; the start is one more
    length: int = 3

    @property
    def start(self) -> int:
        """The token that every text starts with and that is never drawn."""
        return self.vocab

    @cached_property
    def outputs(self) -> exact.Outputs:
        """All texts; refused if there are more than can be held."""
        return exact.enumerate_outputs(prompt=[self.start], vocab=self.vocab, length=self.length)

    @cached_property
    def p(self) -> np.ndarray:
        """The chain's probability of each text, [n]."""
        tokens = self.outputs.tokens
        return law(self.vocab)[tokens[:, :-1], tokens[:, 1:]].prod(axis=1)

    def token_reward_of(self, tokens: Any) -> Any:
        """What each token behind the start earns, [b, t − 1]; numpy and JAX alike."""
        return 1.0 * (tokens[:, 1:] == 2) - 0.5 * (tokens[:, 1:] == tokens[:, :-1])

    def reward_of(self, tokens: Any) -> Any:
        """What each text earns, [b]."""
        return self.token_reward_of(tokens).sum(axis=1)

    @cached_property
    def token_reward(self) -> np.ndarray:
        """Of all texts by token, [n, t]; 0 at the start."""
        return np.pad(self.token_reward_of(self.outputs.tokens), ((0, 0), (1, 0)))

    @cached_property
    def reward(self) -> np.ndarray:
        """Of all texts, [n]."""
        return self.reward_of(self.outputs.tokens)

    def model(self, like: Transformer, **changes: Any) -> Speaker:
        """A model for it, of the shape of another: `like` decides all but the vocabulary."""
        return speaker(like, self.vocab, **changes)


def speaker(like: Transformer, vocab: int, **changes: Any) -> Speaker:
    """A Speaker of `vocab` tokens with the shape of another model."""
    fields = {name: getattr(like, name) for name in like.__dataclass_fields__}
    return Speaker(**{**fields, "vocab": vocab + 1, **changes})


def at_the_end(rollout, params, *, task: Any):
    """A reward for rollouts: the last token is paid what the whole text earns."""
    return masked.at_last(task.reward_of(rollout.tokens).astype(jnp.float32), rollout.mask)


def by_token(rollout, params, *, task: Any):
    """A reward for rollouts: every token is paid what it earns, when it is said."""
    paid = jnp.pad(task.token_reward_of(rollout.tokens).astype(jnp.float32), ((0, 0), (1, 0)))
    return masked.select(paid, rollout.mask)
