"""A model as a random number generator: is what it says of k outcomes what it was told to say?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.special import chdtrc, rel_entr, xlogy

from rlhf_jax.sampling import log_probabilities
from rlhf_jax.types import Params, Prompts


class Calibration(NamedTuple):
    """How far probabilities of k outcomes are from a target: exact numbers, without an error."""

    kl: float  # KL(target‖p), nats, of p among the outcomes
    total_variation: float  # ½ Σ |p − target|, of the same
    top: float  # max p · k of the same: 1 if all are equally likely, k if one is always said
    invalid: float  # what is said beside the outcomes, 1 − Σ p


class GTest(NamedTuple):
    """A test of counts against a target."""

    statistic: float  # G
    p: float  # of a G as large under the target, by its limit χ²(k − 1)
    kl: float  # KL(shares‖target), nats, without the bias (k − 1)/2n of the plug-in G/2n
    n: int


def calibration(
    p: Float[np.ndarray, "k"], target: Float[np.ndarray, "k"] | None = None
) -> Calibration:
    """What a model makes of an instruction to draw from `target` (None: uniform over k outcomes).

    `p` are the probabilities of the outcomes alone, of the model's full distribution; what is
    missing to 1 is invalid, the other numbers are of p/Σ p. KL is from the target, inf where the
    model cannot say what it was told to.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not (p >= 0).all() or not 0 < p.sum() < 1 + 1e-5:
        raise ValueError(
            f"needs the probabilities of k outcomes, none below 0 and of a sum in (0, 1]; these "
            f"are {list(p.shape)} with sum {p.sum():.6f}"
        )
    target = _target(target, len(p))
    among = p / p.sum()
    return Calibration(
        kl=float(rel_entr(target, among).sum()),
        total_variation=float(np.abs(among - target).sum() / 2),
        top=float(among.max() * len(p)),
        invalid=float(max(0.0, 1 - p.sum())),
    )


def g_test(counts: Int[np.ndarray, "k"], target: Float[np.ndarray, "k"] | None = None) -> GTest:
    """G = 2 Σ o log(o/e) of counts o against e = n · target (None: uniform) (Woolf 1957).

    The p-value is the large-sample one: good if every expected count is about 5 or more. The KL is
    that of the shares from the target, the other direction than `calibration`'s; without its bias
    it is around 0, and as often below, under the target.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or (counts < 0).any() or (counts != np.round(counts)).any():
        raise ValueError("counts are whole numbers, one per outcome and none below 0")
    target, n, k = _target(target, len(counts)), counts.sum(), len(counts)
    if n < 1 or k < 2:
        raise ValueError(f"{n:.0f} draws of {k} outcomes: needs at least 1 draw and 2 outcomes")
    if not (target > 0).all():
        impossible = np.flatnonzero(target == 0).tolist()
        raise ValueError(
            f"outcomes {impossible} have target 0: they cannot be tested by G; leave them out and "
            "count what falls on them as invalid"
        )
    statistic = float(2 * (xlogy(counts, counts) - xlogy(counts, n * target)).sum())
    p = float(chdtrc(k - 1, statistic))
    return GTest(statistic, p, (statistic - (k - 1)) / (2 * n), int(n))


def next_token_probabilities(
    params: Params,
    prompts: Prompts,
    *,
    model: Any,
    outcomes: Sequence[int],
    temperature: float = 1.0,
) -> Float[np.ndarray, "b k"]:
    """P(outcome | prompt) of k token ids at the place behind each prompt: rows for `calibration`.

    `model` must be hashable, as in `exact.probabilities`.
    """
    outcomes = list(map(int, outcomes))
    if not outcomes or len(set(outcomes)) < len(outcomes):
        raise ValueError(f"outcomes {outcomes} must be different token ids, at least one")
    logp = np.asarray(_next_logp(params, prompts, temperature, model=model), np.float64)
    if not all(0 <= i < logp.shape[1] for i in outcomes):
        raise ValueError(f"outcomes {outcomes} must be ids below {logp.shape[1]}")
    return np.exp(logp[:, outcomes])


@partial(jax.jit, static_argnames=("model",))
def _next_logp(params, prompts, temperature, *, model):
    b, p = prompts.tokens.shape
    used = jnp.arange(p)[None] < prompts.length[:, None]
    hidden = model.apply(params, prompts.tokens, segments=used.astype(jnp.int32)).hidden
    last = hidden[jnp.arange(b), prompts.length - 1]
    return log_probabilities(model.logits(params, last), jnp.full((b,), temperature, jnp.float32))


def _target(target, k):
    target = np.full(k, 1 / k) if target is None else np.asarray(target, np.float64)
    if target.shape != (k,) or not (target >= 0).all() or not abs(target.sum() - 1) < 1e-6:
        raise ValueError(
            f"the target must be [{k}] probabilities that sum to 1; this one is "
            f"{list(target.shape)} with sum {target.sum():.6f}"
        )
    return target
