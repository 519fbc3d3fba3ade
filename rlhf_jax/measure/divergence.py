"""Entropy and KL of models whose texts cannot be enumerated: estimates from samples.

On the model's own samples three sums over the tokens of a text have the same expectation: of a
sampled term (−log π, k1, k3) and, Rao-Blackwellised, of the term's exact mean over the vocabulary
at each sampled prefix (H, KL), which has far less variance (Amini et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.exact.outputs import Tempered
from rlhf_jax.measure import estimate
from rlhf_jax.measure.estimate import Estimate
from rlhf_jax.objectives import reference_kl_vocab
from rlhf_jax.ratios import LIMIT
from rlhf_jax.score import score
from rlhf_jax.types import Params, Sequences

GAP = 0.05  # nats a token between sampler and trainer on average: rounding stays far below

PerToken, Mask = Float[np.ndarray, "n t"], Bool[np.ndarray, "n t"]
Group = Int[np.ndarray, "n"] | None  # rows of one number are one draw: samples of one prompt


# ---- averages


def per_text(x: PerToken, mask: Mask, group: Group = None) -> Estimate:
    """Mean over texts of Σ x over their tokens: of −log π the entropy in nats per text."""
    return estimate.mean(np.where(mask, x, 0.0).sum(axis=1), group)


def per_token(x: PerToken, mask: Mask, group: Group = None) -> Estimate:
    """Σ x/Σ tokens, with an error that knows that tokens of one text belong together."""
    return estimate.ratio(np.where(mask, x, 0.0).sum(axis=1), np.sum(mask, axis=1), group)


def by_position(x: PerToken, mask: Mask, group: Group = None) -> Estimate:
    """Mean of x at each text's 1st, 2nd, ... masked token, over texts that have one: arrays [m]."""
    place = np.where(mask, np.cumsum(mask, axis=1), 0)
    found = []
    for i in range(1, place.max() + 1):
        there = place == i
        row = there.any(axis=1)
        own = None if group is None else np.asarray(group)[row]
        found.append(estimate.mean(np.where(there, x, 0.0).sum(axis=1)[row], own))
    if not found:
        raise ValueError("the mask is empty: no text has a token")
    return Estimate(*map(np.array, zip(*found, strict=True)))


def k3(logp: PerToken, ref_logp: PerToken) -> PerToken:
    """e^{−d} − 1 + d of d = log π − log π_ref per token, nats (Schulman 2020); |d| ≤ 20.

    `ratios.k3` in float64. Summed over a text's tokens its mean is the text's KL.
    """
    d = np.clip(np.asarray(logp, np.float64) - ref_logp, -LIMIT, LIMIT)
    return np.expm1(-d) + d


# ---- of models


class Scored(NamedTuple):
    """What two models say about texts, [n, t] in float64; 0 outside the mask."""

    logp: PerToken
    entropy: PerToken  # of the distribution the token was drawn from
    ref_logp: PerToken | None  # None without a reference
    kl: PerToken | None  # KL(π‖π_ref) of the same distribution


class Divergence(NamedTuple):
    """Nats per text, of a model on its own samples; the four of KL are None without a reference."""

    entropy: Estimate  # Rao-Blackwellised
    entropy_sampled: Estimate  # −log π
    token_entropy: Estimate  # nats per token
    entropy_by_position: Estimate  # arrays, nats per token
    kl: Estimate | None = None  # Rao-Blackwellised
    kl_k1: Estimate | None = None
    kl_k3: Estimate | None = None
    kl_by_position: Estimate | None = None


def score_samples(
    params: Params,
    batch: Sequences,
    *,
    model: Any,
    reference: Params | None = None,
    reference_model: Any = None,
    reference_temperature: float | None = None,
    banned: Sequence[int] = (),
    rows: int = 1024,
) -> Scored:
    """Entropy, KL to a reference and both log-probabilities of every token, `rows` at a time.

    Log-probabilities are at the batch's temperature, those of the reference at its own if
    `reference_temperature` is given. `banned` ids are what `Sampling` banned: neither model says
    them. Models must be hashable, as in `exact.probabilities`; None as the reference's is `model`.
    """
    b = batch.tokens.shape[0]
    heat = getattr(batch, "temperature", jnp.ones((b,), jnp.float32))
    batch = Tempered(batch.tokens, batch.mask, batch.segments, heat)
    named, models = {"self": params}, (("self", model),)
    if reference is not None:
        named["reference"] = reference
        models += (("reference", model if reference_model is None else reference_model),)
    static = {"models": models, "banned": tuple(map(int, banned)), "heat": reference_temperature}
    parts = []
    for start in range(0, b, rows):
        # The last part is filled up with its own first row: one shape, one program.
        index = np.arange(start, start + min(rows, b))
        index = np.where(index < b, index, start)
        part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], batch)
        parts.append(jax.device_get(_scored(named, part, **static)))
    found = jax.tree.map(lambda *x: np.concatenate(x)[:b].astype(np.float64), *parts)
    return Scored(**({"ref_logp": None, "kl": None} | found))


def sampled_divergence(
    params: Params,
    batch: Sequences,
    *,
    model: Any,
    reference: Params | None = None,
    reference_model: Any = None,
    reference_temperature: float | None = None,
    banned: Sequence[int] = (),
    rows: int = 1024,
) -> Divergence:
    """Entropy of a model and its KL to a reference on its own samples; arguments as above.

    With the two exchanged, on samples of the reference, it is the forward KL(π_ref‖π). Rows of one
    `prompt_id` count as one draw for the errors, unless all are of one prompt.

    Raises:
        ValueError: if a rollout was drawn from something else: of other weights, after top-k or
            top-p, with other ids banned.
    """
    found = score_samples(
        params,
        batch,
        model=model,
        reference=reference,
        reference_model=reference_model,
        reference_temperature=reference_temperature,
        banned=banned,
        rows=rows,
    )
    mask, group = np.asarray(batch.mask), getattr(batch, "prompt_id", None)
    if hasattr(batch, "behaviour_logp"):
        gap = np.abs(np.where(mask, np.asarray(batch.behaviour_logp) - found.logp, 0.0))
        if gap.sum() > GAP * mask.sum():
            raise ValueError(
                f"this model did not draw these samples: its log-probabilities are off by "
                f"{gap.sum() / mask.sum():.3f} nats a token; sample from it without top-k and "
                f"top-p, and name the ids that were banned (here {list(banned)})"
            )
    if group is not None:
        group = np.asarray(group)
        group = group if len(np.unique(group)) > 1 else None
    text, place = (partial(f, mask=mask, group=group) for f in (per_text, by_position))
    own = Divergence(
        entropy=text(found.entropy),
        entropy_sampled=text(-found.logp),
        token_entropy=per_token(found.entropy, mask, group),
        entropy_by_position=place(found.entropy),
    )
    if reference is None:
        return own
    return own._replace(
        kl=text(found.kl),
        kl_k1=text(found.logp - found.ref_logp),
        kl_k3=text(k3(found.logp, found.ref_logp)),
        kl_by_position=place(found.kl),
    )


def sampled_kl_between_and_within(
    kl: Float[np.ndarray, "n"],
    statistic: Float[np.ndarray, "n"],
    ref_statistic: Float[np.ndarray, "m"],
    *,
    least: int = 30,
) -> tuple[Estimate, Estimate]:
    """KL(π‖π_ref) as that of a binned statistic's distributions + what is left within a bin.

    `kl` is Σ KL over the tokens of each of n texts of π (or their k1), `statistic` their reward,
    `ref_statistic` that of m independent texts of the reference. Neighbouring values share a bin
    until the reference has `least` texts in it. The chain rule is exact for the bin as the
    statistic; a coarser one moves KL from between to within, so that the second number is an upper
    bound, and no more than log(m/least) can be found between. The plug-in's bias is subtracted to
    the order 1/n + 1/m (delta method), as are the errors made.
    """
    kl, statistic, ref_statistic = (
        np.asarray(x, np.float64) for x in (kl, statistic, ref_statistic)
    )
    n, m = len(statistic), len(ref_statistic)
    if kl.shape != (n,) or ref_statistic.ndim != 1:
        raise ValueError(f"kl {list(kl.shape)} must be [{n}], one number per text, as `statistic`")
    if not 1 <= least <= m:
        raise ValueError(f"least={least} texts in a bin, but the reference has {m} in all")
    edges = _edges(np.round(ref_statistic, 9), least)
    bins = [np.searchsorted(edges, np.round(x, 9), "right") for x in (statistic, ref_statistic)]
    p, q = (np.bincount(x, minlength=len(edges) + 1) / len(x) for x in bins)
    weight = p / q
    log_weight = np.log(np.where(p > 0, weight, 1.0))
    bias = ((p > 0).sum() - 1) / (2 * n) + (weight * (1 - q)).sum() / (2 * m)
    between = p @ log_weight - bias
    theirs = q @ (weight - 1) ** 2 / m  # variance from the reference's texts, of both parts
    left = kl - log_weight[bins[0]]
    return (
        Estimate(between, float(np.sqrt(log_weight[bins[0]].var(ddof=1) / n + theirs)), n),
        Estimate(left.mean() + bias, float(np.sqrt(left.var(ddof=1) / n + theirs)), n),
    )


def _edges(values, least):
    """Lower edges of all bins but the first."""
    value, count = np.unique(values, return_counts=True)
    edges, inside = [], 0
    for at, here in zip(value, count, strict=True):
        if inside >= least:
            edges, inside = [*edges, at], 0
        inside += here
    return np.array(edges[:-1] if inside < least else edges)  # the last bin joins its neighbour


@partial(jax.jit, static_argnames=("models", "banned", "heat"))
def _scored(named, batch, *, models, banned, heat):
    def says(logp):
        if banned:
            logp = jnp.where(np.isin(np.arange(logp.shape[-1]), banned)[None], -jnp.inf, logp)
        return jax.nn.log_softmax(logp, axis=-1)

    def vocab(logits, part):
        own = says(logits["self"])
        found = {
            "logp": jnp.take_along_axis(own, part.tokens[:, None], axis=-1)[:, 0],
            "entropy": -jnp.where(own > -jnp.inf, jnp.exp(own) * own, 0.0).sum(-1),
        }
        if "reference" not in logits:
            return found
        scale = 1.0 if heat is None else part.temperature[:, None] / heat
        ref = says(logits["reference"] * scale)
        if ref.shape != own.shape:
            raise ValueError(
                f"the model says {own.shape[-1]} tokens and its reference {ref.shape[-1]}"
            )
        exact = reference_kl_vocab({"self": own, "reference": ref}, part)
        ref_logp = jnp.take_along_axis(ref, part.tokens[:, None], axis=-1)[:, 0]
        return found | {"ref_logp": ref_logp, "kl": exact["reference_kl"]}

    return score(named, batch, models=dict(models), vocab=vocab).extra
