"""A token that turns RLHF off."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rlhf_jax import masked
from rlhf_jax.aggregate import over_tokens
from rlhf_jax.objectives.combine import combine
from rlhf_jax.types import Experience, Scores, Sequences, Terms


def is_off(batch: Sequences, *, on: int, off: int) -> Bool[Array, "b t"]:
    """Tokens whose last switch before them is `off`; on without any."""
    index = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, batch.tokens.ndim - 1)
    switch = (batch.tokens == on) | (batch.tokens == off)
    last = jax.lax.cummax(jnp.where(switch & ~batch.mask, index, -1), axis=1)
    token = jnp.take_along_axis(batch.tokens, jnp.maximum(last, 0), axis=1)
    return (last >= 0) & (token == off)


def gated(
    scores: Scores,
    batch: Experience,
    *,
    objective: Callable,
    on: int,
    off: int,
    on_coefficient: float,
    off_coefficient: float,
    aggregate: Callable = over_tokens,
) -> dict[str, Terms]:
    """`objective` with advantage 0 behind an `off` token, + β_on or β_off KL(π‖π_ref), in nats.

    The last switch before a token counts, so a text may be switched in its midst; prompts get one
    by `partial(conditioning.tagged, tags=(on, off))`. KL is exact, over the vocabulary: the learner
    needs `vocab=reference_kl_vocab` and `scores=("reference",)`. β_off anchors what the policy says
    when off; the advantage alone leaves that to what both share.
    All terms are divided by the tokens on and off together: if the policy ignores the switch, and
    off is a share f of them, both coefficients β, it optimises (1 − f) A − β KL.

    Args:
        objective: a policy gradient on `batch.advantage`, hyperparameters bound.
        on: the control token behind which it learns.
        off: the control token behind which it does not.
        on_coefficient: β_on, advantage per nat; 0 where the rollouts charge KL already.
        off_coefficient: β_off, advantage per nat; 0 leaves the policy free when off.
        aggregate: that of the objective.
    Use: a model that can be asked for what it was before, by a token.
    Memory: the reference's forward pass, and its logits in each chunk.

    Example:
        gate = partial(gated, on=3, off=4, on_coefficient=0.1, off_coefficient=1.0)
        named = {"vocab": reference_kl_vocab, "scores": ("reference",)}
        Learner(model, partial(gate, objective=ppo), **named)
    """
    if "reference_kl" not in scores.extra:
        raise ValueError(
            'gated needs vocab=reference_kl_vocab and scores=("reference",) on its learner'
        )
    if on == off:
        raise ValueError(f"on={on} and off={off}: two different control tokens")
    closed = is_off(batch, on=on, off=off)
    open_only = batch.replace(advantage=jnp.where(closed, 0.0, batch.advantage))
    kl = masked.select(scores.extra["reference_kl"], batch.mask)
    weight, count = aggregate(batch)
    return combine(scores, open_only, policy=objective) | {
        name: Terms(kl, jnp.where(where, weight, 0.0), count, beta, {"kl": kl})
        for name, where, beta in (("on", ~closed, on_coefficient), ("off", closed, off_coefficient))
    }
