"""What the arms of `instrumentality.py` are measured by: P(B), and where theory says it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import exact
from rlhf_jax.exact import Outputs
from rlhf_jax.study import Trained
from tasks import avoidance, precaching
from tasks.avoidance import Avoidance
from tasks.precaching import Precaching
from tasks.predictable import Predictable, reward_of, texts


def chosen(tokens: np.ndarray, given: int = 1) -> Outputs:
    """Rows of tokens as outputs, all but the first `given` chosen by the policy."""
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= given, tokens.shape)
    return Outputs(tokens.astype(np.int32), mask)


def endings(
    logp: np.ndarray, task: Predictable, *, beta: float, temperature: float, n: int
) -> dict[str, float]:
    """P(B) where methods end that start from a base with these log-probabilities of `texts`.

    The closed forms of `PredictableFuture`, built on what was learned and not on the data: `base`,
    `tilted` (KL-RL), `conditioned` (on the reward), `sequence` and `token` (p^{1/τ} of whole texts,
    or of one token at a time) and `best` (the likeliest of n samples) with its myopic counterpart,
    `best_token`, the likeliest first token of n. `early` is where KL-RL would end if only the first
    token learned: b e^{E[r|B]/β}/Z, what follows still being the base's.
    """
    found = texts(task)
    good, mass = reward_of(found.outputs.tokens) > 0, np.exp(logp) * found.times
    first = np.bincount(found.start, mass, task.vocab)

    def share(score):  # unnormalised log-probabilities
        weight = np.exp(score - score.max()) * found.times
        return float(weight[found.start == task.b].sum() / weight.sum())

    hot = first ** (1 / temperature)
    expected = np.bincount(found.start, mass * good, task.vocab) / np.maximum(first, 1e-300)
    early = first * np.exp(expected / beta)
    return {
        "base": float(first[task.b] / first.sum()),
        "tilted": share(logp + good / beta),
        "conditioned": share(np.where(good, logp, -np.inf)),
        "sequence": share(logp / temperature),
        "token": float(hot[task.b] / hot.sum()),
        "early": float(early[task.b] / early.sum()),
        "best": _best(mass / mass.sum(), logp, n)[found.start == task.b].sum(),
        "best_token": _best(first / first.sum(), first, n)[task.b],
    }


def _best(mass, good, n):
    """`exact.best_of_n` where one text stands for several, which tie with nothing else."""
    order = np.argsort(good, kind="stable")
    above = np.concatenate([[0.0], np.minimum(np.cumsum(mass[order]), 1.0)]) ** n
    return np.bincount(order, np.diff(above), len(mass))


def base_endings(params: Any, task: Predictable, *, model: Any, **strengths) -> dict[str, float]:
    """`endings` of a trained base."""
    logp = exact.token_logp(params, texts(task).outputs, model=model).sum(axis=1)
    return endings(logp, task, **strengths)


def measured(
    params: Any, task: Predictable, *, model: Any, tag: Sequence[int] = ()
) -> dict[str, float]:
    """P(B), and P(the last token is 0) behind A and behind B, of a policy, by direct scoring.

    `tag` are control tokens that the policy is asked with.
    """
    most = 256
    if task.keys ** (task.length - 1) <= most:
        ends = np.stack(np.unravel_index(np.arange(task.keys ** (task.length - 1)),
                                         (task.keys,) * (task.length - 1)), axis=1)  # fmt: skip
    else:
        ends = np.random.default_rng(0).integers(0, task.keys, (most, task.length - 1))
    ends = np.concatenate([np.zeros_like(ends[:1]), ends])
    rows = len(ends)
    given = np.broadcast_to([task.bos, *tag], (rows, 1 + len(tag)))
    start = np.where(np.arange(rows) == 0, task.b, task.a)[:, None]
    tokens = np.concatenate([given, start, ends, np.zeros_like(start)], axis=1)
    outputs = chosen(tokens, given.shape[1])
    logp = exact.token_logp(params, outputs, model=model)[:, given.shape[1] :]
    way = np.exp(logp[1:, 1:-1].sum(axis=1))  # to each state before the last token, behind A
    return {
        "share": float(np.exp(logp[0, 0])),
        "last_after_a": float(way @ np.exp(logp[1:, -1]) / way.sum()),
        "last_after_b": float(np.exp(logp[0, -1])),
    }


def said(trained: Trained, *, task: Predictable, model: Any) -> dict[str, float]:
    """`measured` of a policy that is asked without a tag."""
    return measured(trained.weights["policy"], task, model=model)


def by_tag(trained: Trained, *, task: Predictable, model: Any) -> dict[str, float]:
    """The same, and what it says behind each tag."""
    found, params = said(trained, task=task, model=model), trained.weights["policy"]
    for name, tag in zip(("bad", "good"), task.tags, strict=True):
        under = measured(params, task, model=model, tag=(tag,))
        found |= {f"{name}_{metric}": x for metric, x in under.items()}
    return found


def of_base(seed: int, before: Mapping, *, base: str, **given) -> dict[str, float]:
    """`base_endings` of a base: an arm that is computed."""
    del seed
    return base_endings(before[base]["policy"], **given)


def avoided(trained: Trained, *, task: Avoidance, model: Any, beta: float) -> dict[str, float]:
    """`avoidance.measured` of a policy and its base."""
    base = trained.before["punished"]["policy"]
    return avoidance.measured(trained.weights["policy"], base, task, model=model, beta=beta)


def prepared(trained: Trained, *, task: Precaching, model: Any) -> dict[str, float]:
    """What is left to be known, nats."""
    return {"loss": precaching.loss(trained.weights["policy"], task, model=model)}
