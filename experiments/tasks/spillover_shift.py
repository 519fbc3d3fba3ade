"""Expected updates, exact: with ten points more, and of rewards that look at the prompt alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import advantages
from tasks import spillover_measures
from tasks.spillover import Speaker, Spillover

BASELINES = {
    "none": advantages.reward_to_go,
    "batch_mean": advantages.batch_mean,
    "leave_one_out": advantages.leave_one_out,
}
MORE = 10.0  # points
STRENGTHS = (0.0, 0.1, 0.5, 1.0)  # ρ of rewards that look at the prompt alone
ROWS = 2  # of a batch: small enough to go through all of them


def update(
    advantage: Any, reward: np.ndarray, probability: np.ndarray, text: np.ndarray, texts: int
) -> np.ndarray:
    """Coefficients c [texts] of E[update] = Σ c ∇log p(text), over all batches of two outcomes.

    An outcome is a text and its reward, with a probability. The advantages are the trainer's own
    functions on each batch; the sums are taken in float64.
    """
    n = len(reward)
    first, second = (x.ravel() for x in np.indices((n, n)))
    pairs = np.stack([first, second], axis=1)
    paid = jnp.asarray(reward[pairs], jnp.float32)[..., None]
    found, _ = jax.vmap(
        lambda r: advantage(
            reward=r,
            value=jnp.zeros_like(r),
            mask=jnp.ones_like(r, bool),
            prompt_id=jnp.zeros(ROWS, jnp.int32),
        )
    )(paid)
    weight = (probability[pairs].prod(axis=1) / ROWS)[:, None] * np.asarray(found, np.float64)[
        ..., 0
    ]
    return np.bincount(text[pairs].ravel(), weights=weight.ravel(), minlength=texts)


def ten_more(seed: int, before: Any, *, model: Speaker, task: Spillover, chance: Any) -> dict:
    """For `chance`, by baseline: ‖E[update with R + 10] − E[update]‖ ÷ ‖E[update]‖, at the base.

    `noise`: E‖A ∇log p‖² of one sample with A = R + 10, to that with A = R − E[R]; `law`: what it
    must be if R says nothing of the text, E[(R + 10)²]/Var R. `null`: ‖E[update]‖ of a reward that
    is 1 with probability (1 + ρ)/2 whatever is said, ÷ that of `chance`; the largest over ρ and
    baselines. `kept`: how much of the update a mean with the own sample in it leaves.
    """
    del seed
    tokens = spillover_measures.task_texts(task)[: task.answers**2]  # one prompt
    grads, logp = jacobian(before["base"]["policy"], jnp.asarray(tokens), model=model)
    gram, p = grads @ grads.T, np.exp(logp) / np.exp(logp).sum()
    one = np.asarray(chance(jnp.asarray(tokens)), np.float64)
    text = np.tile(np.arange(len(p)), 2)
    probability = np.concatenate([p * (1 - one), p * one])
    reward = np.repeat([0.0, 1.0], len(p))
    found, null = {}, []
    for name, advantage in BASELINES.items():
        at, more = (
            update(advantage, r, probability, text, len(p)) for r in (reward, reward + MORE)
        )
        gap = more - at
        found[name] = float(np.sqrt(max(gap @ gram @ gap, 0.0) / (at @ gram @ at)))
        found[f"size_{name}"] = float(np.sqrt(at @ gram @ at))
        for rho in STRENGTHS:
            either = np.concatenate([p * (1 - rho), p * (1 + rho)]) / 2
            nowhere = update(advantage, reward, either, text, len(p))
            null.append(np.sqrt(max(nowhere @ gram @ nowhere, 0.0) / (at @ gram @ at)))
    plain, centred = reward + MORE, reward - probability @ reward
    noise, law = (
        (probability * size * plain**2).sum() / (probability * size * centred**2).sum()
        for size in (np.diag(gram)[text], np.ones(len(text)))
    )
    return found | {
        "worst": max(found[name] for name in BASELINES),
        "null": float(max(null)),
        "kept": found["size_batch_mean"] / found["size_none"],
        "noise": float(noise),
        "law": float(law),
    }


def jacobian(params: Any, tokens: Any, *, model: Speaker) -> tuple[np.ndarray, np.ndarray]:
    """∇log p of each text, [n, parameters], and log p, [n]; float64."""
    rows, logp = _jacobian(params, tokens, model=model)
    flat = [np.asarray(x, np.float64).reshape(len(tokens), -1) for x in jax.tree.leaves(rows)]
    return np.concatenate(flat, axis=1), np.asarray(logp, np.float64)


@partial(jax.jit, static_argnames="model")
def _jacobian(params, tokens, *, model):
    def logp(params, text):
        return spillover_measures.text_logp(params, text[None], model)[0]

    rows = jax.vmap(jax.grad(logp), in_axes=(None, 0))(params, tokens)
    return rows, jax.vmap(partial(logp, params))(tokens)
