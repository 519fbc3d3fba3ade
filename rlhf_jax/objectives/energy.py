"""Inverse reinforcement learning: the reward under which the data are the best energy model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Contrast, Scores, Terms, Weighed


def energy_weights(scores: Scores, batch: Contrast) -> Weighed:
    """Importance weights ∝ exp(r − log q) of the samples, and log Ẑ = log mean exp(r − log q).

    A learner's `prepare`: both are statistics of the whole batch.
    """
    reward, generated = _reward(scores, batch), _generated(batch)
    number = jnp.maximum(generated.sum(), 1).astype(jnp.float32)
    gap = jnp.where(generated, reward - batch.log_q, -jnp.inf)
    top = jnp.where(generated.any(), gap.max(), 0.0)
    raw = jnp.where(generated, jnp.exp(gap - top), 0.0)
    mean = jnp.where(generated.any(), raw.sum() / number, 1.0)
    log_z = jnp.broadcast_to(top + jnp.log(mean), reward.shape)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Contrast)}
    return Weighed(**fields, importance=raw / mean, log_z=log_z)


def energy(scores: Scores, batch: Contrast) -> dict[str, Terms]:
    """−E_data[r] + log Ẑ in nats per text: the likelihood of data under e^r/Z, up to its sign.

    r is the score after a text's last masked token; Ẑ is estimated with samples of the policy
    (Finn et al. 2016, §2.3.2), and its gradient Σ w ∇r takes the self-normalised weights of
    `energy_weights`, which the learner needs as `prepare`. Exact for one optimiser step: later
    ones still have the weights of the first. It ends at r = log p + constant. The policy learns
    beside it, with `rewards.max_entropy` at temperature 1, to draw from e^r/Z: then all weights
    are 1. Departs from the paper: the data are not among the importance samples.

    Use: the reward of data, as inverse reinforcement learning; the policy learns beside it.
    Memory: one more pass over the batch, for the importance weights.

    Example:
        Learner(model, energy, batch="both", prepare=energy_weights)
    """
    if scores.reward is None:
        raise ValueError("energy needs scores.reward: give this learner's model a value head")
    if not isinstance(batch, Weighed):
        raise ValueError("energy needs importance weights: give its learner prepare=energy_weights")
    reward, generated = _reward(scores, batch), _generated(batch)
    real = batch.mask.any(axis=1) & ~generated
    importance = masked.select(batch.importance, generated)
    # its value is log Ẑ, its gradient Σ w ∇r
    moved = masked.select(reward - jax.lax.stop_gradient(reward), generated)
    log_z = masked.select(batch.log_z, generated) + importance * moved
    return {
        "real": Terms(-reward, real.astype(jnp.float32), metrics={"reward": reward}),
        "generated": Terms(
            log_z,
            generated.astype(jnp.float32),
            metrics={"reward": reward, "squared_importance": importance**2},
        ),
    }


def _reward(scores, batch):
    return masked.last(scores.reward, batch.mask)


def _generated(batch):
    return batch.mask.any(axis=1) & (batch.score <= 0.5)
