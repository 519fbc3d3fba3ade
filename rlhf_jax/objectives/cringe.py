"""CRINGE: a bad token has to lose against what the policy would rather say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.types import Labeled, Scores, Terms


def cringe_vocab(
    logits: dict[str, Float[Array, "c v"]], batch: Labeled, *, top_k: int = 5
) -> dict[str, Float[Array, "c"]]:
    """Σ_a w_a · −log[e^{z_a} / (e^{z_a} + e^{z_token})] over the `top_k` best other tokens a.

    A learner's `vocab`; the result is scores.extra["cringe"], in nats, as if every token were bad.
    Departs from the paper, which draws one a from the softmax w over them: this is the expectation
    of its loss and, since no gradient flows through w, of its gradient; nothing is random.

    Args:
        top_k: how many other tokens a bad one is held against.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: a bad token needs at least 1 other to lose against")
    logp = jax.nn.log_softmax(masked.select(logits["self"], batch.mask[:, None]))
    size = logp.shape[-1]
    token = jnp.where(batch.mask, batch.tokens, 0)[:, None]
    bad = jnp.take_along_axis(logp, token, axis=-1)
    others = jnp.where(jnp.arange(size)[None] == token, -jnp.inf, logp)
    best, _ = jax.lax.top_k(others, min(top_k, size))
    possible = best > -jnp.inf  # fewer than top_k others may be: nobody loses against those
    best = jnp.where(possible, best, 0.0)
    weight = jnp.where(possible, jnp.exp(best - best.max(axis=-1, keepdims=True)), 0.0)
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-30)
    loss = jax.lax.stop_gradient(weight) * jax.nn.softplus(bad - best)
    return {"cringe": loss.sum(axis=-1)}


def cringe(scores: Scores, batch: Labeled, *, threshold: float, alpha: float = 1.0) -> Terms:
    """−log π on good tokens, α times the contrast of `cringe_vocab` on bad ones, in nats.

    Adolphs et al. 2023, §3. The learner needs `vocab=cringe_vocab`. What a bad token loses, the
    tokens that the policy likes best gain, in proportion to how it likes them.
    Departs from the paper: a token is bad if its own score is below `threshold`, not by its text.

    Args:
        threshold: a token whose own score is below it is bad.
        alpha: weight of the bad tokens.
    Use: marks on tokens, when what takes the place of a bad token should be what the policy likes.
    Memory: a top-k over each chunk of the vocabulary.

    Example:
        cringing = partial(cringe, threshold=0.0)
        Learner(model, cringing, batch="text", vocab=partial(cringe_vocab, top_k=5))
    """
    if "cringe" not in scores.extra:
        raise ValueError(
            "cringe needs vocab=cringe_vocab on its learner (or partial(cringe_vocab, top_k=...))"
        )
    good = masked.select(batch.token_score, batch.mask) >= threshold
    likelihood = -masked.select(scores.logp, batch.mask)
    contrast = masked.select(scores.extra["cringe"], batch.mask)
    loss = jnp.where(good, likelihood, alpha * contrast)
    metrics = {"good": good.astype(jnp.float32)}
    return Terms(loss, weight=batch.mask.astype(jnp.float32), metrics=metrics)
