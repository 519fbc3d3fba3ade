"""Distillation: a student's distribution over the vocabulary is brought to a teacher's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.aggregate import over_tokens
from rlhf_jax.types import Scores, Sequences, Terms

LEAST = -1e9  # stands for log 0, so that 0 · (−inf) never is nan


def distill_vocab(
    logits: dict[str, Float[Array, "c v"]],
    batch: Sequences,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher: str = "teacher",
) -> dict[str, Float[Array, "c"]]:
    """JSD_β(p‖q) = β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q, teacher p and student q, nats.

    Agarwal et al. 2024, eq. 1; ½ is the Jensen–Shannon divergence. β = 0 is KL(p‖q), forward (the
    soft targets of Hinton et al. 2015), and β = 1 is KL(q‖p), reverse: the limits of JSD_β/β and of
    JSD_β/(1 − β), so that the scale jumps there. Both distributions are taken at `temperature` on
    top of the batch's. A learner's `vocab`, beside `scores=("teacher",)`; the result is
    scores.extra["divergence"].

    Args:
        beta: of the Jensen–Shannon divergence: 0 forward KL, 1 reverse; the paper's 0.1, 0.5, 0.9.
        temperature: of both distributions; the paper's 1.
        teacher: its name among the learner's scores.
    """
    if teacher not in logits:
        raise ValueError(
            f'distill_vocab needs a model named "{teacher}" in the learner\'s scores; it has '
            f"{sorted(set(logits) - {'self'})}"
        )
    if not 0 <= beta <= 1 or not temperature > 0:
        raise ValueError(f"beta={beta}, temperature={temperature}: 0 ≤ beta ≤ 1, temperature > 0")
    p, q = (_log_softmax(logits[name], batch, temperature) for name in (teacher, "self"))
    if p.shape != q.shape:
        raise ValueError(
            f"teacher and student speak of {p.shape[-1]} and {q.shape[-1]} tokens; they need one "
            "vocabulary, or distil on the teacher's samples: mle on rollouts of the teacher"
        )
    if beta in (0, 1):
        return {"divergence": _kl(p, q) if beta == 0 else _kl(q, p)}
    middle = jnp.logaddexp(p + np.log(beta), q + np.log1p(-beta))
    return {"divergence": beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)}


def distill(
    scores: Scores,
    batch: Sequences,
    *,
    coefficient: float = 1.0,
    aggregate: Callable = over_tokens,
) -> Terms:
    """The divergence of `distill_vocab` from the teacher at each state of the texts, in nats.

    On the student's own rollouts, or a `selection.mixture` of them with data, it is GKD (Agarwal et
    al. 2024, algorithm 1): no gradient flows through the sampling. The learner needs
    `vocab=distill_vocab` and `scores=("teacher",)`. Beside a reward: `combine` (eq. 5 there).

    Args:
        coefficient: of this term, beside others.
        aggregate: `over_tokens`, … of `rlhf_jax.aggregate`.
    Use: a teacher's whole distribution: soft targets on data, GKD on the student's own rollouts.
    Memory: the teacher's forward pass, and its log-probabilities of a chunk over the vocabulary.

    Example:
        Learner(
            model,
            distill,
            batch="mixture",
            vocab=partial(distill_vocab, beta=0.5),
            scores=("teacher",),
        )
    """
    if "divergence" not in scores.extra:
        raise ValueError('distill needs vocab=distill_vocab and scores=("teacher",) on its learner')
    weight, count = aggregate(batch)
    loss = masked.select(scores.extra["divergence"], weight != 0)
    return Terms(loss, weight, count, scale=coefficient, metrics={"divergence": loss})


def _log_softmax(logits, batch, temperature):
    logits = masked.select(logits, batch.mask[:, None]) / temperature
    return jnp.maximum(jax.nn.log_softmax(logits), LEAST)


def _kl(p, q):
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
