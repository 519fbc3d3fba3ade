"""The key game: some questions that may cost something, and then the one answer that pays.

One of K keys opens the door. In each of n slots the policy names a key, and the environment says
HIT or MISS, or it passes. Then it commits to a key and earns 1 if it is the right one, less the
price of every question. What a player can earn is known exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.environment import Environment
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.score import score
from rlhf_jax.types import Sequences


def words(keys):
    """The tokens behind the keys 0 .. K − 1: PASS, HIT, MISS, BOS. The policy says the first."""
    return range(keys, keys + 4)


def _reset(key, context, *, keys):
    *_, bos = words(keys)
    right = jax.random.randint(key, (), 0, keys)
    return {"right": right, "slot": jnp.int32(0)}, jnp.full((1,), bos, jnp.int32)


def _step(state, token, context, *, keys, probes, price, answers):
    _, hit, miss, _ = words(keys)
    commits = state["slot"] == probes
    asks = ~commits & (token < keys)
    found = token == state["right"]
    reward = jnp.where(commits, found, jnp.where(asks, -price, 0.0))
    forced = jnp.where(found, hit, miss)[None]
    count = asks & answers
    return state | {"slot": state["slot"] + 1}, forced, count, reward, commits


def key_game(*, keys=4, probes, price, answers=True):
    """The environment; without `answers` a question is a pause. `price` may be traced."""
    rules = {"keys": keys, "probes": probes, "price": price, "answers": answers}
    return Environment(partial(_reset, keys=keys), partial(_step, **rules), forced=1, prompt=1)


@dataclass(frozen=True)
class Player(Transformer):
    """Reads all words, says a key or PASS; `passing` is the log-odds of PASS against one key."""

    vocab: int = 8
    width: int = 32
    layers: int = 1
    mlp: int = 64
    passing: float = 0.0

    def logits(self, params, hidden):
        keys = self.vocab - 4
        start = self.passing * (jnp.arange(keys + 1) == keys)
        said = super().logits(params, hidden)[..., : keys + 1]
        return said + start.reshape((1,) * (said.ndim - 1) + (-1,))


def optimum(*, keys, probes, price):
    """The most that can be earned, by dynamic programming over keys that are still possible."""
    if probes == 0:
        return 1 / keys
    passed = optimum(keys=keys, probes=probes - 1, price=price)
    missed = optimum(keys=keys - 1, probes=probes - 1, price=price) if keys > 1 else 0.0
    return max(passed, -price + 1 / keys + (keys - 1) / keys * missed)


def outcomes(model, params, *, probes, answers=True):
    """What a policy does, exactly: its success, and how many questions it asks, expected."""
    keys = model.vocab - 4
    passes, hit, miss, bos = words(keys)
    rows, masks, won, asked = [], [], [], []
    for right in range(keys):
        for actions in itertools.product(range(keys + 1), repeat=probes + 1):
            row, mask = [bos], [False]
            for action in actions[:-1]:
                row, mask = [*row, action], [*mask, True]
                if answers and action != passes:
                    row, mask = [*row, hit if action == right else miss], [*mask, False]
            rows.append([*row, actions[-1]])
            masks.append([*mask, True])
            won.append(actions[-1] == right)
            asked.append(sum(action != passes for action in actions[:-1]))
    length = 2 * probes + 2

    def padded(lists, dtype):
        return jnp.asarray([[*x, *[0] * (length - len(x))] for x in lists], dtype)

    batch = Sequences(
        padded(rows, jnp.int32), padded(masks, bool), padded([[1] * len(x) for x in rows], int)
    )
    logp = jax.jit(lambda p: score({"self": p}, batch, models={"self": model}).logp)(params)
    share = np.exp(np.asarray(logp, np.float64).sum(1)) / keys
    np.testing.assert_allclose(share.sum(), 1, atol=1e-4)
    return share @ np.array(won), share @ np.array(asked)
