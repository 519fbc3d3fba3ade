"""Odds ratio preference optimisation: likelihood and preference in one stage, no reference."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import comparisons, masked
from rlhf_jax.objectives.unlikelihood import log_of_the_rest
from rlhf_jax.types import Pairs, Scores, Terms


def orpo(scores: Scores, batch: Pairs, *, coefficient: float = 0.1) -> dict[str, Terms]:
    """−log π on the chosen text, λ times −log σ(log odds₀ − log odds₁) (Hong et al. 2024, eq. 6).

    odds = P/(1 − P) of P = exp(mean over tokens of log π), likelihood averaged by length (eq. 4 and
    7). The likelihood is a mean over the tokens of all chosen texts, the odds ratio one over pairs.
    Departs: log P is held at −1e-6 and below, where the gradient ends; with more than two members,
    the first choice among all odds. λ is `coefficient`; the metrics are of log odds. A group with
    an empty member has weight 0 in the odds ratio.

    Args:
        coefficient: λ; the paper's 0.1, and up to 0.25.
    Use: comparisons, with fine-tuning on the chosen texts in the same stage and no reference model.
    Memory: nothing beyond the log-probabilities of both texts.

    Example:
        Learner(model, partial(orpo, coefficient=0.1), batch="pairs")
    """
    counted = comparisons.whole(batch)
    mask = batch.mask & counted[:, None, None]
    log_p = jnp.minimum(masked.mean(scores.logp, mask, axis=-1), -1e-6)
    log_odds = log_p - log_of_the_rest(log_p)
    odds = Terms(
        comparisons.first_is_best(log_odds),
        weight=counted.astype(jnp.float32),
        scale=coefficient,
        metrics=comparisons.metrics(log_odds),
    )
    chosen = batch.mask & (jnp.arange(batch.tokens.shape[1]) == 0)[None, :, None]
    likelihood = Terms(-masked.select(scores.logp, chosen), weight=chosen.astype(jnp.float32))
    return {"likelihood": likelihood, "odds": odds}
