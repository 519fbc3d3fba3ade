"""The key game: some questions that may cost something, and then the one answer that pays.

One of K keys opens the door. In each of n slots the policy probes a key, and the environment says
HIT or MISS, or it passes, and hears NOTHING. Then it commits to a key and earns 1 if it is the
right one, less the price of every question. What players of all kinds earn is known exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.environment import Environment
from rlhf_jax.models.transformer import Output, Transformer
from rlhf_jax.score import score
from rlhf_jax.types import Sequences


@dataclass(frozen=True)
class Words:
    """Tokens: PROBE 0 .. K − 1, PASS, COMMIT 0 .. K − 1, and what only the environment says."""

    keys: int

    @property
    def passes(self):
        return self.keys

    @property
    def said(self):
        """How many words the policy has."""
        return 2 * self.keys + 1

    @property
    def heard(self):
        """HIT, MISS, NOTHING, BOS."""
        return range(self.said, self.said + 4)


def _reset(key, context, *, keys):
    *_, bos = Words(keys).heard
    right = jax.random.randint(key, (), 0, keys)
    return {"right": right, "slot": jnp.int32(0)}, jnp.full((1,), bos, jnp.int32)


def _step(state, token, context, *, keys, probes, price, answers):
    hit, miss, nothing, _ = Words(keys).heard
    commits = state["slot"] == probes
    asks = ~commits & (token < keys)
    right = token - jnp.where(commits, keys + 1, 0) == state["right"]
    reward = jnp.where(commits, jnp.where(right, 1.0, 0.0), jnp.where(asks, -price, 0.0))
    forced = jnp.where(asks, jnp.where(right, hit, miss), nothing)[None]
    return state | {"slot": state["slot"] + 1}, forced, ~commits & answers, reward, commits


def key_game(*, keys=4, probes, price, answers=True):
    """The environment; without `answers` the n slots are pauses: nobody says anything."""
    rules = {"keys": keys, "probes": probes, "price": price, "answers": answers}
    return Environment(partial(_reset, keys=keys), partial(_step, **rules), forced=1, prompt=1)


@dataclass(frozen=True)
class Player(Transformer):
    """Says what the rules allow: in a slot it probes or passes, then it commits.

    It starts with all that is allowed equally likely, but for PASS, whose log-odds against one
    probe are `passing` more. Nothing moves the probes' logits but what is learned from probes.
    """

    vocab: int = 13
    width: int = 32
    layers: int = 1
    mlp: int = 64
    tied: bool = False
    probes: int = 2
    answers: bool = True
    passing: float = 0.0

    @property
    def keys(self):
        return (self.vocab - 5) // 2

    def init(self, key):
        made = super().init(key)
        return made | {"head": jax.tree.map(jnp.zeros_like, made["head"])}

    def apply(self, params, tokens, *, positions=None, **rest):
        """Hidden states, and behind them whether it is time to commit."""
        hidden, cache = super().apply(params, tokens, positions=positions, **rest)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        commits = positions >= self.probes * (2 if self.answers else 1)
        flag = commits[..., None].astype(hidden.dtype)
        return Output(jnp.concatenate([hidden, flag], axis=-1), cache)

    def logits(self, params, hidden):
        words = Words(self.keys)
        every = super().logits(params, hidden[..., :-1])[..., : words.said]
        word = jnp.arange(words.said).reshape((1,) * (hidden.ndim - 1) + (-1,))
        every += jnp.where(word == words.passes, self.passing, 0.0)
        return jnp.where((word > words.passes) == (hidden[..., -1:] > 0), every, -1e9)

    def value(self, params, hidden):
        return super().value(params, hidden[..., :-1])


def optimum(*, keys, probes, price):
    """The most that can be earned, by dynamic programming over keys that are still possible."""
    if probes == 0:
        return 1 / keys
    passed = optimum(keys=keys, probes=probes - 1, price=price)
    missed = optimum(keys=keys - 1, probes=probes - 1, price=price) if keys > 1 else 0.0
    return max(passed, -price + 1 / keys + (keys - 1) / keys * missed)


def blind(*, keys, probes, passing=0.0):
    """The most often that anyone opens the door whose questions are drawn evenly and never learn.

    Each is a PASS with probability `passing`, and else any of the keys.
    """
    won = 0.0
    for asked in itertools.product(range(keys + 1), repeat=probes):  # PASS: the last
        share = np.prod([passing if x == keys else (1 - passing) / keys for x in asked])
        tried = len({*asked} - {keys})
        won += share * (min(tried + 1, keys) / keys)
    return won


def outcomes(model, params):
    """What a policy does, exactly: how often it succeeds, and how many questions it asks."""
    keys, probes = model.keys, model.probes
    words = Words(keys)
    hit, miss, nothing, bos = words.heard
    slots = itertools.product(range(keys + 1), repeat=probes)
    rows, won, asked = [], [], []
    for probed, commit, right in itertools.product(slots, range(keys), range(keys)):
        row = [bos]
        for action in probed:
            heard = nothing if action == words.passes else hit if action == right else miss
            row += [action, heard] if model.answers else [action]
        rows.append([*row, keys + 1 + commit])
        won.append(commit == right)
        asked.append(sum(action != words.passes for action in probed))
    tokens = jnp.asarray(rows, jnp.int32)
    batch = Sequences(tokens, tokens < words.said, jnp.ones_like(tokens))
    logp = jax.jit(lambda p: score({"self": p}, batch, models={"self": model}).logp)(params)
    share = np.exp(np.asarray(logp, np.float64).sum(1)) / keys
    np.testing.assert_allclose(share.sum(), 1, atol=1e-4)
    return share @ np.array(won), share @ np.array(asked)
