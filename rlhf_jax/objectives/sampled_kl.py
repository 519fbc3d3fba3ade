"""KL to the reference, estimated on the tokens that were drawn."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_jax import masked
from rlhf_jax.aggregate import over_tokens
from rlhf_jax.ratios import k2
from rlhf_jax.types import Experience, Scores, Terms


def sampled_kl(
    scores: Scores,
    batch: Experience,
    *,
    estimator: Callable = k2,
    coefficient: float = 1.0,
    aggregate: Callable = over_tokens,
) -> Terms:
    """β k(log π, log π_ref) per token, nats: k1, k2, k3 of `ratios` (Schulman 2020) as a loss.

    As a loss they are not what they estimate: on samples of π the expected gradient of k1 is 0, of
    k2 it is ∇KL(π‖π_ref), of k3 (GRPO: Shao et al. 2024, eq. 4) ∇KL(π_ref‖π). The penalty stays
    with its own token; `rewards.minus_kl` charges earlier tokens as well. Exact: `reference_kl`.
    π_ref is `Rollouts.reference`; without one it is the policy before the update, and so no anchor.

    Args:
        estimator: k1, k2 or k3; GRPO has k3.
        coefficient: β, loss per nat; GRPO's 0.04. With `whitened` advantages in units of their
            deviation, not of the reward.
        aggregate: that of the policy's term: for `reinforce`, `aggregate.over_sequences`.
    Use: beside a policy gradient, when the KL shall be a loss and not a part of the reward.
    Memory: nothing beyond the log-probabilities; the reference's were stored by the rollout.

    Example:
        kl = partial(sampled_kl, estimator=k3, coefficient=0.04)
        Learner(model, partial(combine, policy=ppo, kl=kl))
    """
    logp, ref_logp = masked.select(scores.logp, batch.mask), batch.ref_logp
    kl = masked.select(estimator(logp, masked.select(ref_logp, batch.mask)), batch.mask)
    weight, count = aggregate(batch)
    return Terms(kl, weight, count, scale=coefficient, metrics={"kl": kl})
