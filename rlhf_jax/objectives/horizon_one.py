"""RL with a horizon of one token and a KL penalty, exact over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.objectives.reference_kl import reference_kl_vocab
from rlhf_jax.types import Labeled, Scores, Sequences, Terms

Logits = dict[str, Float[Array, "c v"]]


def marked_token(logits: Logits, batch: Labeled) -> Float[Array, "c v"]:
    """r(s, v) = the token's score where v is the token that stands in the text, 0 elsewhere."""
    vocabulary = jnp.arange(logits["self"].shape[-1], dtype=batch.tokens.dtype)
    mark = masked.select(batch.token_score, batch.mask)
    return jnp.where(vocabulary[None] == batch.tokens[:, None], mark[:, None], 0.0)


def from_head(
    logits: Logits, batch: Sequences, *, name: str = "token_reward"
) -> Float[Array, "c v"]:
    """r(s, v) = what the head of another model says, for a model in the learner's scores.

    It arrives as log-probabilities (at the batch's temperature), so each state's r is the head's
    less log Σ_v e^{r(s, v)}: a constant of the state, which changes neither gradient nor optimum.

    Args:
        name: of the model among the learner's scores.
    """
    if name not in logits:
        raise ValueError(
            f'from_head needs a model named "{name}" in the learner\'s scores; it has '
            f"{sorted(set(logits) - {'self'})}"
        )
    return masked.select(logits[name], batch.mask[:, None])


def horizon_one_vocab(
    logits: Logits, batch: Sequences, *, reward: Callable = marked_token
) -> dict[str, Float[Array, "c"]]:
    """Σ_v π r and KL(π‖π_ref) of each state; `logits["reference"]` must be scored.

    A learner's `vocab`, beside `scores=("reference",)`. `reward(logits, batch) -> [c, v]` is any
    r(s, v): the marks of the text by default, `from_head`, or a function of your own.

    Args:
        reward: r(s, v): `marked_token`, `from_head`, or your own `(logits, batch) -> [c, v]`.
    """
    here = batch.mask[:, None]
    p = jax.nn.softmax(masked.select(logits["self"], here))
    # select: a reward of −inf on a token that the policy cannot say costs nothing
    r = masked.select(reward(logits, batch), here & (p > 0))
    return reference_kl_vocab(logits, batch) | {"expected_reward": jnp.sum(p * r, axis=-1)}


def horizon_one(scores: Scores, batch: Sequences, *, kl_coefficient: float) -> Terms:
    """−Σ_v π(v|s) r(s, v) + β KL(π‖π_ref)(s), per state of the given texts, with exact gradient.

    In units of r, which the vocabulary function says. Each state is a bandit: nothing is credited
    to earlier tokens, and its optimum is softmax(log π_ref + r/β) (the tilt of Korbak et al. 2022,
    for one token). The learner needs `vocab=horizon_one_vocab` and `scores=("reference",)`.
    On states that the policy itself reaches, `reinforce` with discount 0 and KL in the reward has
    this gradient in expectation, from one sampled token instead of the whole vocabulary.

    Args:
        kl_coefficient: β, reward per nat: how much a mark may move a token, exp(r/β).
    Use: marks on tokens, or a learned reward of tokens, with a known optimum for every state.
    Memory: the reference's forward pass, and its log-probabilities of a chunk over the vocabulary;
        with `from_head` those of the reward model as well.

    Example:
        Learner(
            model,
            partial(horizon_one, kl_coefficient=0.5),
            batch="text",
            vocab=horizon_one_vocab,
            scores=("reference",),
        )
    """
    names = ("expected_reward", "reference_kl")
    missing = [name for name in names if name not in scores.extra]
    if missing:
        raise ValueError(
            'horizon_one needs vocab=horizon_one_vocab and scores=("reference",) on its learner; '
            f"scores.extra lacks {missing}"
        )
    earned, kl = (masked.select(scores.extra[name], batch.mask) for name in names)
    loss = kl_coefficient * kl - earned
    metrics = {"expected_reward": earned, "kl": kl}
    return Terms(loss, weight=batch.mask.astype(jnp.float32), metrics=metrics)
