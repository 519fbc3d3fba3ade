"""Unlikelihood: push bad tokens down instead of good ones up."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def unlikelihood(
    scores: Scores, batch: Labeled, *, threshold: float | None, alpha: float = 1.0
) -> Terms:
    """−log p on good tokens, −α log(1 − p) on bad ones, in nats (Welleck et al. 2020, eq. 4).

    Departs from the paper: a token is bad if its own score is below `threshold`, not if it repeats
    an n-gram; and 1 − p is held at 1e-6 and above, where the gradient ends. `threshold=None` mixes
    the two by degree: a score of −x is bad to the share x, between 0 and 1 (Korbak et al. 2023).

    Args:
        threshold: a token whose own score is below it is bad; None: bad to the degree −score,
            within [0, 1].
        alpha: weight of the bad tokens; the paper's 1.
    Use: marks on tokens, some of them bad: the push on a bad token ends as it vanishes.
    Memory: nothing beyond the log-probabilities.

    Example:
        Learner(model, partial(unlikelihood, threshold=0.0), batch="text")
    """
    logp = masked.select(scores.logp, batch.mask)
    score = masked.select(batch.token_score, batch.mask)
    if threshold is None:
        good = 1.0 - jnp.clip(-score, 0.0, 1.0)
    else:
        good = (score >= threshold).astype(jnp.float32)
    likelihood = jnp.where(good > 0, -good * logp, 0.0)  # 0 · (−inf) is nan
    loss = likelihood - alpha * (1.0 - good) * log_of_the_rest(logp)
    metrics = {"good": good}
    return Terms(loss, weight=batch.mask.astype(jnp.float32), metrics=metrics)


def log_of_the_rest(logp):
    """log(1 − p) for log p, exact near 0 and far from it (Mächler 2012); p at most 1 − 1e-6."""
    x = jnp.minimum(logp, -1e-6)
    near = x > -0.6931
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
