"""Which worlds a model's texts come from: the entropy of the world, and that of tokens within it.

H(Y) = I(Y; W) + H(Y|W). Fine-tuning may narrow the first part, the distribution over worlds, or the
second, what is said within one. Who generates the texts does not matter: the observer is the exact
filter of a `Worlds`, the generator's or one that was refitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.measure import estimate
from rlhf_jax.measure.estimate import Estimate
from rlhf_jax.measure.world_filter import beliefs
from rlhf_jax.measure.worlds import Worlds, entropies


@dataclass(frozen=True)
class Decomposition:
    """Entropies in nats per token, each over n texts; errors by leaving one text out (jackknife).

    `token_entropy` = `information` + `given_world` exactly. They speak of one token at a random
    place and the world it came from, without the text before it; `rate` and those below it know
    that text, and are None where the model's distributions were not given. Where all tokens of the
    blocks are alike `in_block` is at its maximum, and its error too large by a third.
    """

    share: Estimate  # [w], of each world: the posterior averaged over tokens
    world_entropy: Estimate  # H(W) of that average
    token_entropy: Estimate  # H(Y)
    information: Estimate  # I(Y; W)
    given_world: Estimate  # H(Y|W)
    in_block: Estimate  # H(Y | most likely world, Y in its block); log 4 for blocks of 4
    confidence: Estimate  # tokens until one world has a posterior of `level`
    rate: Estimate | None = None  # H(Y | text before): the cross-entropy of a perfect model
    text_information: Estimate | None = None  # rate − H(Y|W): of a text about its worlds, per token
    in_block_next: Estimate | None = None  # `in_block` of the next token, given the text before


def world_decomposition(
    tokens: Int[np.ndarray, "n t"],
    mask: Bool[np.ndarray, "n t"],
    worlds: Worlds,
    *,
    next_token: Float[np.ndarray, "n t v"] | None = None,
    level: float = 0.9,
) -> Decomposition:
    """Share of each world, H(W), H(Y) = I(Y; W) + H(Y|W), H(Y|W) in the block, confidence.

    The table P(w, y) is the mean over masked surface tokens of P(w | tokens up to y)·1[this is y]:
    unbiased for the observer's own worlds. With `next_token`, the model's distributions P(token t =
    · | tokens before t), it is the mean of P(w | before, y)·P(y | before) over all y instead
    (Rao-Blackwell). Signs, digits and ids outside the vocabulary have no world and do not count;
    all else before a masked token does, prompts included.
    Entropies of counted tokens are plug-in values, too low by about (kinds of tokens)/2n.

    Raises:
        ValueError: if no surface token is masked, or shapes do not fit.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    if tokens.shape != mask.shape or tokens.ndim != 2:
        raise ValueError(f"tokens and mask are both [n, t], not {tokens.shape} and {mask.shape}")
    counted = mask & (tokens >= 0) & (tokens < worlds.surface)
    if not counted.any():
        raise ValueError(f"no masked token is one of the worlds' own, 0 … {worlds.surface - 1}")
    found = beliefs(tokens, worlds)
    said = (tokens[..., None] == np.arange(worlds.surface)) & counted[..., None]  # [n, t, s]
    best = found.after.argmax(axis=2)
    within = np.stack(
        [(said & (best == w)[..., None]).sum(axis=1) for w in range(len(worlds.prior))], axis=1
    ) * (worlds.own > 0)
    waited, _ = tokens_to_confidence(found.after, mask, level=level)
    if next_token is None:
        table = np.einsum("ntw,nts->nws", found.after, said)
        extra = {}
    else:
        q = np.asarray(next_token, np.float64)
        if q.shape[:2] != tokens.shape or q.shape[2] < worlds.surface:
            raise ValueError(
                f"next_token is [n, t, v] with n, t = {tokens.shape} and v ≥ {worlds.surface}, "
                f"not {q.shape}"
            )
        table = _expected_table(q, found.before, mask, worlds)
        extra = _of_distributions(q, found.before, mask, table, worlds)
    return Decomposition(
        share=jackknife(table, lambda x: _normal(x).sum(axis=2)),
        world_entropy=jackknife(table, lambda x: entropies(_normal(x).sum(axis=2))),
        token_entropy=jackknife(table, lambda x: entropies(_normal(x).sum(axis=1))),
        information=jackknife(table, _information),
        given_world=jackknife(table, _given_row),
        in_block=jackknife(within, _given_row),
        confidence=estimate.mean(waited),
        **extra,
    )


def tokens_to_confidence(
    posterior: Float[np.ndarray, "n t w"], mask: Bool[np.ndarray, "n t"], *, level: float = 0.9
) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Masked tokens until some world's posterior is ≥ level, and whether that happened.

    Where it did not, the number is the text's length: censored (`kaplan_meier` takes both).
    """
    sure = mask & (posterior.max(axis=2) >= level)
    reached, place = sure.any(axis=1), sure.argmax(axis=1)
    count = np.cumsum(mask, axis=1)
    return np.where(reached, count[np.arange(len(count)), place], count[:, -1]), reached


def jackknife(
    sums: Float[np.ndarray, "n *k"], statistic: Callable[[np.ndarray], np.ndarray]
) -> Estimate:
    """A statistic of Σ over n draws, with √((n − 1)/n Σ (leaving one out − their mean)²) as error.

    `statistic` takes `[m, *k]`, m sums, and gives `[m]` or `[m, j]` (Efron & Stein 1981).
    """
    total, n = sums.sum(axis=0, keepdims=True), len(sums)
    value = statistic(total)[0]
    value = float(value) if np.ndim(value) == 0 else value
    if n == 1:
        return Estimate(value, np.full(np.shape(value), np.nan)[()], n)
    left = statistic(total - sums)
    error = np.sqrt((n - 1) / n * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
    return Estimate(value, float(error) if np.ndim(error) == 0 else error, n)


def _expected_table(q, before, mask, worlds):
    """Σ over masked tokens of P(w | before, y)·P(y | before), [n, w, s]."""
    table = np.zeros((len(q), len(worlds.prior), worlds.surface))
    for t in range(q.shape[1]):  # [n, w, s] at a time
        joint = before[:, t, :, None] * worlds.emission
        total = joint.sum(axis=1, keepdims=True)
        world = np.where(total > 0, joint / np.where(total > 0, total, 1), before[:, t, :, None])
        table += mask[:, t, None, None] * world * q[:, t, None, : worlds.surface]
    return table


def _of_distributions(q, before, mask, table, worlds):
    """What the model's distributions tell beyond the table."""
    words = q[..., : worlds.surface]
    mass = words.sum(axis=2)
    weight = np.where(mask, mass, 0.0)
    per_token = np.where(mask, mass * entropies(words / np.maximum(mass, 1e-300)[..., None]), 0.0)
    own = (worlds.own > 0)[before.argmax(axis=2)]  # [n, t, s], the block of the most likely world
    chosen = np.where(own, words, 0.0)
    inside = chosen.sum(axis=2)
    within = entropies(chosen / np.maximum(inside, 1e-300)[..., None])
    sums = np.concatenate(
        [table.reshape(len(q), -1), np.stack([per_token.sum(1), weight.sum(1)], axis=1)], axis=1
    )

    def of_text(x):
        return x[:, -2] / x[:, -1] - _given_row(x[:, :-2].reshape(-1, *table.shape[1:]))

    return {
        "rate": estimate.ratio(per_token.sum(axis=1), weight.sum(axis=1)),
        "text_information": jackknife(sums, of_text),
        "in_block_next": estimate.ratio(
            np.where(mask, inside * within, 0.0).sum(axis=1),
            np.where(mask, inside, 0.0).sum(axis=1),
        ),
    }


def _normal(table):
    return table / np.maximum(table.sum(axis=(1, 2), keepdims=True), 1e-300)


def _given_row(table):
    """H(column | row) of tables [m, rows, columns]."""
    p = _normal(table)
    return entropies(p.reshape(len(p), -1)) - entropies(p.sum(axis=2))


def _information(table):
    """I(row; column)."""
    return entropies(_normal(table).sum(axis=1)) - _given_row(table)
