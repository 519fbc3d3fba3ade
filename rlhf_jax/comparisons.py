"""What the losses on comparisons share: which groups count, a policy as a reward, the metrics."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import masked
from rlhf_jax.types import Pairs, Scores, Sequences


def whole(batch: Sequences) -> Bool[Array, "n"]:
    """Groups of which every member has a masked token; another can decide nothing: weight 0.

    Raises:
        ValueError: if the batch is not one of groups.
    """
    if batch.tokens.ndim != 3:
        raise ValueError(
            f"needs comparisons [n, k, t], not {type(batch).__name__} of shape "
            f"{list(batch.tokens.shape)}: give the learner a stream of Pairs, or labelling.compare"
        )
    return batch.mask.any(axis=-1).all(axis=-1)


def log_ratio(
    scores: Scores,
    batch: Sequences,
    *,
    reference: str = "reference",
    reduce: Callable = masked.sum,
) -> Float[Array, "*n"]:
    """Σ log π/π_ref over a text's masked tokens, nats; `reduce=masked.mean` averages instead.

    β times it is the reward for which π is optimal, but for a constant of the prompt (Rafailov et
    al. 2023, eq. 5). In a group that is not `whole` it is 0, without gradient.

    Raises:
        ValueError: if the learner does not score the reference.
    """
    if reference not in scores.others:
        raise ValueError(
            f'this objective needs scores=("{reference}",) on its learner (a learner or a frozen '
            f"tree of that name); it scores {sorted(scores.others) or 'nobody'}"
        )
    mask = batch.mask
    if isinstance(batch, Pairs):
        mask = mask & whole(batch)[:, None, None]
    # Both in float32 before they are subtracted: close numbers in bfloat16 leave nothing.
    gap = masked.select(scores.logp, mask) - masked.select(scores[reference].logp, mask)
    return reduce(gap, mask, axis=-1)


def first_is_best(reward: Float[Array, "n k"]) -> Float[Array, "n"]:
    """−log softmax(reward)₀, nats: member 0 is preferred to the others (Bradley–Terry if k = 2)."""
    # softplus of differences, not logsumexp minus reward: exact for confident models too.
    return jax.nn.softplus(jax.nn.logsumexp(reward[:, 1:] - reward[:, :1], axis=-1))


def metrics(reward: Float[Array, "n k"]) -> dict[str, Float[Array, "n"]]:
    """`chosen`, `rejected` (the best of the others), their `margin`, `accuracy` (a tie is ½)."""
    chosen, rejected = reward[:, 0], reward[:, 1:].max(axis=-1)
    margin = chosen - rejected
    right = 0.5 * ((margin > 0).astype(jnp.float32) + (margin >= 0).astype(jnp.float32))
    return {"chosen": chosen, "rejected": rejected, "margin": margin, "accuracy": right}
