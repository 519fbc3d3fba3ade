"""The worlds a model believes in: the observer whose predictions are closest to the model's own.

If fine-tuning only moved the prior over worlds, the filter with another prior, another switch rate
and another noise explains the model; what it cannot explain is the residual.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float, Int

from rlhf_jax.measure import estimate
from rlhf_jax.measure.estimate import Estimate
from rlhf_jax.measure.patching import next_logp
from rlhf_jax.measure.world_filter import (
    answers_due,
    filter_predictions,
    forward,
    fresh,
    likelihood,
)
from rlhf_jax.measure.worlds import Worlds
from rlhf_jax.types import Params

SMALL = 1e-6  # least prior, switch and noise that a fit starts from
STEP = 1e-30  # of complex-step derivatives, which subtract nothing: any tiny number does
BOUND = 30.0  # of logits


class Residual(NamedTuple):
    """How far a model is from the filter of some worlds."""

    kl: Estimate  # KL(model‖filter), nats per masked token; error over texts
    by_position: Float[np.ndarray, "t"]  # the same at each position; nan where nothing is masked
    outside: float  # the model's share of what the process never says there; left out of the KL


class Refit(NamedTuple):
    """The fitted worlds, how far the model is from them, and how far from where the fit began."""

    worlds: Worlds
    residual: Residual
    start: Residual


def model_predictions(
    params: Params,
    tokens: Int[np.ndarray, "n t"],
    *,
    model: Any,
    temperature: float = 1.0,
    rows: int = 512,
) -> Float[np.ndarray, "n t v"]:
    """P_model(token t = · | tokens before t), float64; 0 at t = 0, which nothing predicts.

    `rows` texts at a time. Index t speaks of `tokens[:, t]`, as in `filter_predictions`.
    """
    tokens, found = np.asarray(tokens), np.zeros((*np.shape(tokens), model.vocab))
    for at in range(0, len(tokens), rows):
        logp = next_logp(params, jnp.asarray(tokens[at : at + rows]), model=model)
        logp = np.asarray(logp, np.float64)[:, :-1] / temperature
        found[at : at + rows, 1:] = scipy.special.softmax(logp, axis=-1)
    return found


def refit(
    next_token_distributions: Float[np.ndarray, "n t v"],
    tokens: Int[np.ndarray, "n t"],
    mask: Bool[np.ndarray, "n t"],
    worlds: Worlds,
) -> Refit:
    """Prior, switch, noise (and rates of signs) with the least Σ_masked CE(model, filter).

    Maximum likelihood on expected tokens: −Σ q log f with q = P_model(token t = · | tokens before
    t) and f the filter's prediction. Signs and answers do not depend on the world, so that their
    best rates are averages of q; the rest is found by L-BFGS-B on log π, logit s, logit ε, with
    complex-step derivatives (Squire & Trapp 1998), exact to rounding. Blocks are those of `worlds`,
    and the fit starts at its numbers. A rate that only unmasked tokens could tell stays as it was.

    Raises:
        ValueError: if shapes do not fit, or no masked token could be one of the worlds' own.
    """
    q, tokens = np.asarray(next_token_distributions, np.float64), np.asarray(tokens)
    mask = np.asarray(mask, bool)
    if q.shape[:2] != tokens.shape or mask.shape != tokens.shape or q.shape[2] < worlds.vocab:
        raise ValueError(
            "next_token_distributions [n, t, v], tokens [n, t], mask [n, t] with v ≥ "
            f"{worlds.vocab}, not {q.shape}, {tokens.shape}, {mask.shape}"
        )
    if not (q[mask] >= 0).all() or not np.allclose(q[mask].sum(axis=-1), 1, atol=1e-3):
        raise ValueError("next_token_distributions must sum to 1 over the last axis where masked")
    q = np.where(mask[..., None], q, 0.0)
    if not q[..., : worlds.surface].sum() > 0:
        raise ValueError(f"no masked token could be one of 0 … {worlds.surface - 1}")
    fitted = _core(q[..., : worlds.surface], tokens, _signs(q, tokens, worlds))
    return Refit(fitted, *(filter_residual(q, tokens, mask, x) for x in (fitted, worlds)))


def filter_residual(
    next_token_distributions: Float[np.ndarray, "n t v"],
    tokens: Int[np.ndarray, "n t"],
    mask: Bool[np.ndarray, "n t"],
    worlds: Worlds,
) -> Residual:
    """KL(P_model(·|before)‖P_filter(·|before)) averaged over masked tokens, nats per token.

    What the process never says after a text is left out of the model's distribution, which is
    divided by the rest.
    """
    q, tokens = np.asarray(next_token_distributions, np.float64), np.asarray(tokens)
    mask, f = np.asarray(mask, bool), filter_predictions(tokens, worlds)
    kept = np.where((f > 0) & mask[..., None], q[..., : worlds.vocab], 0.0)
    mass = kept.sum(axis=-1)
    kept /= np.where(mass > 0, mass, 1.0)[..., None]
    both = kept > 0
    gap = np.log(np.where(both, kept, 1.0)) - np.log(np.where(both, f, 1.0))
    kl, count = (kept * gap).sum(axis=-1), mask.sum(axis=0)
    by_position = np.where(count > 0, kl.sum(axis=0) / np.maximum(count, 1), np.nan)
    total = estimate.ratio(kl.sum(axis=1), mask.sum(axis=1))
    return Residual(total, by_position, float(1 - mass[mask].mean()))


def _signs(q, tokens, worlds):
    """Rates of SEG, CHAT, CODE and of answers, by averages."""
    context = answers_due(tokens, replace(worlds, answered=1.0, digits=max(worlds.digits, 1))) > 0
    digits = q[..., worlds.surface : worlds.chat_id].sum(axis=-1)
    words = q[..., : worlds.surface].sum(axis=-1)
    signs = q[..., worlds.chat_id : worlds.bos]  # CHAT, CODE, SEG
    going_on = (words + signs.sum(axis=-1)).sum()
    chat, code, segment = (signs.sum(axis=(0, 1)) / going_on).tolist()
    possible = (digits + words + signs.sum(axis=-1))[context].sum()
    answered = digits[context].sum() / possible if possible > 0 else worlds.answered
    return replace(worlds, chat=chat, code=code, segment=segment, answered=float(answered))


def _core(q, tokens, worlds):
    """Prior, switch and noise from what the model expects of surface tokens, q [n, t, s]."""
    # Tokens that the same blocks contain are alike: the filter sees classes of them.
    kinds, kind = np.unique(worlds.own, axis=1, return_inverse=True)
    expected = q @ np.eye(kinds.shape[1])[kind.reshape(-1)]  # [n, t, c]
    own, renewed = likelihood(tokens, worlds.own), fresh(tokens, worlds)
    words = ((tokens >= 0) & (tokens < worlds.surface))[..., None]
    share, count = 1 / worlds.surface, len(worlds.prior)

    def loss(x):
        weight = np.exp(x[:count] - x[:count].real.max())
        prior = weight / weight.sum()
        switch, noise = 1 / (1 + np.exp(-x[count:]))
        seen = np.where(words, (1 - noise) * own + noise * share, 1.0)
        before, _, _ = forward(seen, renewed, prior, switch)
        p = before @ ((1 - noise) * kinds + noise * share)
        return -(expected * np.log(np.where(expected > 0, p, 1.0))).sum() / expected.sum()

    def with_gradient(x):
        found = [loss(x + 1j * STEP * row) for row in np.eye(len(x))]
        return found[0].real, np.asarray([one.imag for one in found]) / STEP

    start = np.concatenate(
        [
            np.log(np.maximum(worlds.prior, SMALL)),
            scipy.special.logit(np.clip([worlds.switch, worlds.noise], SMALL, 1 - SMALL)),
        ]
    )
    found = scipy.optimize.minimize(
        with_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-BOUND, BOUND)] * len(start),
        options={"ftol": 1e-14, "gtol": 1e-8, "maxiter": 500, "maxfun": 2000},
    ).x
    prior = tuple(scipy.special.softmax(found[:count]).tolist())
    switch, noise = scipy.special.expit(found[count:]).tolist()
    return replace(worlds, prior=prior, switch=switch, noise=noise)
