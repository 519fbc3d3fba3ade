"""The exact observer of hidden worlds: what a text tells of the world it comes from.

The forward algorithm of a hidden Markov model (Rabiner 1989): the posterior over worlds after each
token, the next token's distribution, the log-likelihood. A perfect language model of the texts
predicts what this filter predicts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.measure.worlds import Worlds


class Beliefs(NamedTuple):
    """What the observer knows at each token; index t speaks of `tokens[:, t]`."""

    before: Float[np.ndarray, "n t w"]  # P(world of token t | tokens before t)
    after: Float[np.ndarray, "n t w"]  # P(world of token t | tokens up to t)
    logp: Float[np.ndarray, "n t"]  # log P(token t | tokens before t), nats; 0 at BOS


def beliefs(tokens: Int[np.ndarray, "n t"], worlds: Worlds) -> Beliefs:
    """The exact filter, in float64: before′ = (1 − s)·after + s·π, after ∝ before · P(token | w).

    A row starts in the prior, and does so again after BOS and SEG. Signs and digits say nothing of
    the world, nor do ids outside the vocabulary (control tokens), nor what the process cannot say:
    there the posterior stays and logp is −inf. Padding on the right changes nothing before it.
    """
    tokens, prior = np.asarray(tokens), np.asarray(worlds.prior)
    seen = likelihood(tokens, worlds.emission)
    before, after, core = forward(seen, fresh(tokens, worlds), prior, worlds.switch)
    due = answers_due(tokens, worlds)
    p = np.where(tokens < worlds.surface, core, 1.0) * _structure(tokens, due, worlds)
    with np.errstate(divide="ignore"):
        logp = np.log(p)
    return Beliefs(before, after, np.where(tokens == worlds.bos, 0.0, logp))


def beliefs_in_jax(
    tokens: Int[Array, "n t"], worlds: Worlds
) -> tuple[Float[Array, "n t w"], Float[Array, "n t w"]]:
    """`before` and `after` of `beliefs` in float32, for compiled programs."""
    emission = jnp.asarray(worlds.emission, jnp.float32)
    words = (tokens >= 0) & (tokens < worlds.surface)
    seen = jnp.where(words[..., None], emission.T[jnp.where(words, tokens, 0)], 1.0)
    prior = jnp.asarray(worlds.prior, jnp.float32)

    def step(after, now):
        fresh, seen = now
        stay = (1 - worlds.switch) * after + worlds.switch * prior[None]
        before = jnp.where(fresh[:, None], prior[None], stay)
        joint = before * seen
        total = joint.sum(axis=1, keepdims=True)
        after = jnp.where(total > 0, joint / jnp.where(total > 0, total, 1.0), before)
        return after, (before, after)

    first = jnp.broadcast_to(prior, (tokens.shape[0], len(worlds.prior)))
    renewed = jnp.moveaxis(fresh(tokens, worlds, jnp), 1, 0)
    _, found = jax.lax.scan(step, first, (renewed, jnp.moveaxis(seen, 1, 0)))
    return tuple(jnp.moveaxis(x, 0, 1) for x in found)


def filter_predictions(
    tokens: Int[np.ndarray, "n t"], worlds: Worlds
) -> Float[np.ndarray, "n t v"]:
    """P(token t = · | tokens before t): what a perfect language model of the worlds predicts."""
    tokens = np.asarray(tokens)
    due = answers_due(tokens, worlds)[..., None]
    found = np.zeros((*tokens.shape, worlds.vocab))
    signs = [worlds.segment_id, worlds.chat_id, worlds.code_id]
    words = 1 - sum(worlds.signs)
    found[..., : worlds.surface] = (
        (1 - due) * words * (beliefs(tokens, worlds).before @ worlds.emission)
    )
    found[..., signs] = (1 - due) * np.asarray(worlds.signs)
    found[..., worlds.surface : worlds.chat_id] = due / max(worlds.digits, 1)
    return found


def forward(
    seen: Float[np.ndarray, "n t w"],
    fresh: Bool[np.ndarray, "n t"],
    prior: Float[np.ndarray, "w"],
    switch: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The forward recursion: before, after `[n, t, w]` and P(token | before) `[n, t]`.

    `seen` is P(token t | world); `fresh` where the world is drawn anew for certain. It is analytic
    in the numbers it is given: complex ones pass through, and carry derivatives.
    """
    seen, fresh = np.ascontiguousarray(seen.swapaxes(0, 1)), fresh.T[..., None]
    before = np.zeros(seen.shape, np.result_type(seen, prior, switch))
    after, total = np.zeros_like(before), np.zeros_like(before[..., :1])
    posterior = np.broadcast_to(prior, before.shape[1:])
    for t, now in enumerate(seen):
        before[t] = np.where(fresh[t], prior, (1 - switch) * posterior + switch * prior)
        joint = before[t] * now
        total[t] = joint.sum(axis=1, keepdims=True)
        possible = total[t].real > 0
        posterior = np.where(possible, joint / np.where(possible, total[t], 1.0), before[t])
        after[t] = posterior
    return before.swapaxes(0, 1), after.swapaxes(0, 1), total[..., 0].T


def likelihood(tokens: np.ndarray, emission: np.ndarray) -> Float[np.ndarray, "n t w"]:
    """P(token | world) of surface tokens, from a table `[w, s]`; 1 for all others."""
    words = (tokens >= 0) & (tokens < emission.shape[1])
    return np.where(words[..., None], emission.T[np.where(words, tokens, 0)], 1.0)


def fresh(tokens, worlds: Worlds, xp=np) -> Bool[Array, "n t"]:
    """Where the world is drawn anew for certain: first in a row, after BOS and after SEG."""
    last = xp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=worlds.bos)
    return (last == worlds.bos) | (last == worlds.segment_id)


def answers_due(tokens: np.ndarray, worlds: Worlds) -> Float[np.ndarray, "n t"]:
    """P(token t is a digit | the one before it): `answered` after CHAT and CODE, else 0."""
    last = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=worlds.bos)
    return worlds.answered * ((last == worlds.chat_id) | (last == worlds.code_id))


def _structure(tokens, due, worlds):
    """P(what kind of token comes, and which sign or digit); of surface tokens only the kind."""
    digit = (tokens >= worlds.surface) & (tokens < worlds.chat_id)
    found = due * digit / max(worlds.digits, 1)
    found += (1 - due) * (1 - sum(worlds.signs)) * ((tokens >= 0) & (tokens < worlds.surface))
    names = (worlds.segment_id, worlds.chat_id, worlds.code_id)
    for name, p in zip(names, worlds.signs, strict=True):
        found += (1 - due) * p * (tokens == name)
    return found
