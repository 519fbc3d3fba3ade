"""Quantized reward conditioning: likelihood under a tag that says how good the text is."""

from __future__ import annotations

from functools import partial

from jaxtyping import Array, Float

from rlhf_jax.objectives.combine import combine
from rlhf_jax.objectives.distill import distill, distill_vocab
from rlhf_jax.objectives.mle import mle
from rlhf_jax.types import Scores, Sequences, Terms


def quark_vocab(
    logits: dict[str, Float[Array, "c v"]], batch: Sequences, *, reference: str = "reference"
) -> dict[str, Float[Array, "c"]]:
    """KL(π_ref‖π) = Σ_v π_ref (log π_ref − log π) of each state, in nats: `distill_vocab`, beta 0.

    Args:
        reference: its name in the learner's `scores`.
    """
    return distill_vocab(logits, batch, beta=0.0, teacher=reference)


def quark(scores: Scores, batch: Sequences, *, coefficient: float = 0.05) -> dict[str, Terms]:
    """−log π(token | tag) + β KL(π_ref‖π), in nats per token (Lu et al. 2022, eq. 2).

    The tag comes from the transform: `conditioning.condition`, with a control token per quantile of
    the score; samples are drawn under the best one. The KL is forward, its gradient π − π_ref, over
    the whole vocabulary. Models are scored on the batch's own tokens, the tag among them: give the
    reference `models.untagged.Untagged`, which skips it, as the paper does. A reference that reads
    a tag which it never learned says something else than before, and the KL pulls towards that.
    The paper's pool of all samples, quantised anew each time, is `Derived(pool=…)`.

    Args:
        coefficient: β, nats per nat; 0.05 in the authors' code.
    Use: fresh samples in the loop, tagged by how good they are; for given texts and two tags it is
        conditional training with an anchor, and with a coefficient of 0 `mle` does the same.
    Memory: the reference's forward pass, and its logits in each chunk.

    Example:
        tags = (3, 4, 5, 6)  # from worst to best, of four parts
        tag = partial(condition, tags=tags, edges=(0.5, 1.5, 2.5))
        fresh = partial(chained, transforms=(partial(untagged, tags=tags), tag))
        named = {"vocab": quark_vocab, "scores": ("reference",)}
        Learner(model, quark, batch="pool", transform=fresh, **named)
        # with Rollouts(transform=partial(tagged, tags=(6,))), and as the derived batch "pool":
        Derived(with_score, pool=Pool(rows=256, draw=partial(by_quantile, parts=4)))
    """
    if "divergence" not in scores.extra:
        raise ValueError('quark needs vocab=quark_vocab and scores=("reference",) on its learner')
    return combine(scores, batch, likelihood=mle, kl=partial(distill, coefficient=coefficient))
