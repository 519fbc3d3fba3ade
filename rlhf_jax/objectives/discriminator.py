"""A discriminator: is this text real, or did the policy write it?"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.aggregate import over_sequences
from rlhf_jax.types import Labeled, Scores, Terms


def discriminator(
    scores: Scores,
    batch: Labeled,
    *,
    smoothing: float = 0.0,
    aggregate: Callable = over_sequences,
) -> dict[str, Terms]:
    """−log D on real texts (score 1) − log(1 − D) on generated ones (score 0), in nats.

    D = σ(the model's score of the text up to and including the token): per prefix; with
    `aggregate=over_ends` per whole text (Goodfellow et al. 2014, eq. 1). Real and generated are
    two terms, each a mean over its texts, so that neither their numbers nor their lengths bias D:
    logit D ends at log p(prefix) − log q(prefix), the loss at 2 log 2 per prefix where p = q.
    `smoothing` ε makes the target of real texts 1 − ε (Salimans et al. 2016, §3.4): D (1 − ε).
    Such batches are made by `adversarial.real_and_generated`.

    Args:
        smoothing: ε, taken from the target of real texts; Salimans et al. have 0.1. 0: off.
        aggregate: `over_sequences`: every prefix; `over_ends`: whole texts.
    Use: an adversary whose `adversarial.from_discriminators` is the policy's reward.
    Memory: a model without lm_head computes no logits.

    Example:
        Learner(model, discriminator, batch="both")
    """
    if scores.reward is None:
        raise ValueError(
            "discriminator needs scores.reward: give this learner's model a value head"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing}: taken from the target 1, so 0 ≤ smoothing < 1")
    real = (batch.score > 0.5)[:, None]
    weight, count = aggregate(batch)
    terms = {}
    for name, kind, target in (("real", real, 1.0 - smoothing), ("generated", ~real, 0.0)):
        here = kind & (weight != 0)
        s = masked.select(scores.reward, here)
        right = s > 0 if name == "real" else s <= 0
        metrics = {"accuracy": right.astype(jnp.float32), "logit": s}
        loss = jax.nn.softplus(s) - target * s
        both = (jnp.where(kind, x, 0.0) for x in (weight, count))
        terms[name] = Terms(loss, *both, metrics=metrics)
    return terms
