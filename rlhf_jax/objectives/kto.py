"""Kahneman–Tversky optimisation: a policy from texts that are good or bad, each by itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import comparisons, masked
from rlhf_jax.types import Judged, Labeled, Probed, Scores, Terms


def kto(
    scores: Scores,
    batch: Labeled,
    *,
    beta: float = 0.1,
    threshold: float = 0.0,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    reference: str = "reference",
) -> Terms:
    """λ σ(∓β (h − z₀)) per text, h = Σ log π/π_ref (Ethayarajh et al. 2024, eq. 8).

    − and λ = `desirable` where the text's score is above `threshold`; + and λ = `undesirable`
    elsewhere: λ minus the value that a loss-averse person sees. z₀ ≈ KL(π‖π_ref) comes from
    `prepare=kto_reference`, once per update, so that this is exact for one optimiser step. The
    paper advises λ_D n_D : λ_U n_U between 1 : 1 and 4 : 3 for n_D good texts and n_U bad ones.
    Needs `scores=("reference",)`; `chosen` and `rejected` are β h of the good and of the bad, 0 on
    the others.

    Args:
        beta: risk aversion; the paper's 0.1.
        threshold: texts whose score is above it are good.
        desirable: λ_D; the paper's 1.
        undesirable: λ_U; the paper's 1.
        reference: whose probability a text is held against.
    Use: texts that are good or bad each by itself: thumbs, without pairs.
    Memory: the reference's forward pass, one more pass of both for the reference point, and the
        same again with `transform=mismatched`.

    Example:
        Learner(
            model,
            partial(kto, beta=0.1),
            batch="text",
            scores=("reference",),
            transform=mismatched,
            prepare=kto_reference,
        )
    """
    if not isinstance(batch, Judged):
        raise ValueError("kto needs the reference point: give its learner prepare=kto_reference")
    present = batch.mask.any(axis=-1) & ~batch.probe
    point = masked.select(batch.reference_point, present)
    ratio = comparisons.log_ratio(scores, batch, reference=reference)
    good = masked.select(batch.score, present) > threshold
    gain = beta * (masked.select(ratio, present) - point)
    loss = jnp.where(good, desirable, undesirable) * jax.nn.sigmoid(jnp.where(good, -gain, gain))
    reward = beta * masked.select(ratio, present)
    metrics = {
        "chosen": jnp.where(good, reward, 0.0),
        "rejected": jnp.where(good, 0.0, reward),
        "good": good.astype(jnp.float32),
        "reference_point": point,
    }
    return Terms(loss, weight=present.astype(jnp.float32), metrics=metrics)


def kto_reference(scores: Scores, batch: Labeled, *, reference: str = "reference") -> Judged:
    """z₀ = max(0, mean over rows of Σ log π/π_ref), nats, on every row; a learner's `prepare`.

    The paper measures it on answers to other prompts, (x, y′): give the learner
    `transform=mismatched` for those rows. Without them the batch's own rows serve, which costs no
    further rows, and is the same where texts have no prompts; with prompts it overestimates a
    policy that has learned the good rows, and underestimates one that has unlearned the bad.

    Args:
        reference: as the objective's.
    """
    ratio = comparisons.log_ratio(scores, batch, reference=reference)
    present = batch.mask.any(axis=-1)
    probe = batch.probe if isinstance(batch, Probed) else jnp.zeros_like(present)
    used = present & jnp.where(probe.any(), probe, True)
    point = jnp.maximum(masked.mean(ratio, used), 0.0)
    point = jnp.broadcast_to(point, present.shape)
    return Judged(**_labeled(batch), probe=probe, reference_point=point)


def mismatched(batch: Labeled, key: Array) -> Probed:
    """The batch, and as many rows again in which every prompt has another row's response.

    A learner's `transform`. A prompt is what stands before the first masked token, a response what
    follows; whose, one draw from `key` decides: all rows move on by the same number of places. What
    is longer than the row is cut. The new rows are for `kto_reference` alone: they cost a forward
    and a backward pass, and have weight 0.
    """
    b, t = batch.tokens.shape
    moved = 1 + jax.random.randint(key, (), 0, max(b - 1, 1))
    whose = (jnp.arange(b) + moved) % b
    begin = jnp.where(batch.mask.any(axis=-1), jnp.argmax(batch.mask, axis=-1), t)
    column = jnp.broadcast_to(jnp.arange(t), (b, t))
    own = column < begin[:, None]
    source = column - begin[:, None] + begin[whose][:, None]
    inside = source < t
    source = jnp.clip(source, 0, t - 1)

    def splice(x):
        other = jnp.take_along_axis(x[whose], source, axis=1)
        return jnp.where(own, x, jnp.where(inside, other, jnp.zeros((), x.dtype)))

    tokens, mask, segments = splice(batch.tokens), splice(batch.mask), splice(batch.segments)
    probes = batch.replace(tokens=tokens, mask=mask, segments=segments)
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch, probes)
    return Probed(**_labeled(both), probe=jnp.arange(2 * b) >= b)


def _labeled(batch):
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(Labeled)}
