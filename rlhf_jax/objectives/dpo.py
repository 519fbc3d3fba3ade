"""Direct preference optimisation: a policy from comparisons, without a reward model."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax import comparisons, masked
from rlhf_jax.types import Pairs, Scores, Terms


def dpo(
    scores: Scores,
    batch: Pairs,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
    reduce: Callable = masked.sum,
    reference: str = "reference",
) -> Terms:
    """−log σ(β (h₀ − h₁)), h = Σ log π/π_ref of a text, in nats (Rafailov et al. 2023, eq. 7).

    Per pair; member 0 is preferred. On Bradley–Terry labels of a reward r the optimum is
    π_ref exp(r/β)/Z. `smoothing` ε: 1 − ε of that and ε of it with the labels swapped (conservative
    DPO: Mitchell 2023), for labels of which a share ε is wrong. More than two members:
    −log softmax(β h)₀, the first choice of Plackett–Luce, and ε spread over the others.
    `reduce=masked.mean` averages over tokens, so that long texts do not weigh more. Needs
    `scores=("reference",)`; the metrics are of β h, the implicit reward. A group with an empty
    member has weight 0.

    Args:
        beta: the paper's 0.1, and 0.5 for summaries: the KL price of the optimum it aims at.
        smoothing: ε, the share of wrong labels; the paper has none.
        reduce: `masked.sum`, the paper's, or `masked.mean`.
        reference: whose probability a text is held against.
    Use: comparisons from fixed data, without a reward model and without sampling.
    Memory: the reference's forward pass, on both texts of a pair.

    Example:
        Learner(model, partial(dpo, beta=0.1), batch="pairs", scores=("reference",))
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing}: a share of wrong labels, from 0 to below 1")
    weight = comparisons.whole(batch).astype(jnp.float32)
    reward = beta * comparisons.log_ratio(scores, batch, reference=reference, reduce=reduce)
    loss = comparisons.first_is_best(reward)
    if smoothing:  # −log p_j = −log p_0 + (reward_0 − reward_j)
        loss = loss + smoothing * (reward[:, :1] - reward[:, 1:]).mean(axis=-1)
    return Terms(loss, weight, metrics=comparisons.metrics(reward))
