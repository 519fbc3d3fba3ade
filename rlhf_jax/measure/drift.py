"""What training moves that nobody asked for: drift, its laws, and where the gradient goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import log_softmax

from rlhf_jax.measure.probing import unstacked
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.sharding import path_name
from rlhf_jax.types import Params

REST = "rest"  # the group of parameters that no pattern names


# --- what has moved


def row_kl(
    before: Float[np.ndarray, "n v"], after: Float[np.ndarray, "n v"]
) -> Float[np.ndarray, "n"]:
    """KL(before‖after) of each row's next token, nats, from logits or log-probabilities."""
    p, q = (log_softmax(np.asarray(x, np.float64), axis=-1) for x in (before, after))
    if p.shape != q.shape:
        raise ValueError(f"before {list(p.shape)} and after {list(q.shape)} are of the same rows")
    possible = p > -np.inf
    gap = np.where(possible, p, 0.0) - np.where(possible, q, 0.0)
    # p log(p/q) − p + q, which sums to the same: no term is negative, small KL keep their digits.
    return np.where(possible, np.exp(p) * (gap + np.expm1(-gap)), np.exp(q)).sum(axis=-1)


def drift_by_label(
    before: Float[np.ndarray, "n v"], after: Float[np.ndarray, "n v"], label: np.ndarray
) -> dict[Hashable, float]:
    """Mean KL(before‖after) over the rows of each label, nats, on prompts that nothing trained."""
    found, label = row_kl(before, after), _labels(label, len(before))
    return {value: float(found[label == value].mean()) for value in np.unique(label).tolist()}


def signed_shift(
    before: Float[np.ndarray, "n v"],
    after: Float[np.ndarray, "n v"],
    label: np.ndarray,
    *,
    own: int | np.ndarray,
) -> float:
    """Δp(own | label 1) − Δp(own | label 0), Δp = p after − p before: which side the drift takes.

    `label` has two values, of which the greater is 1; `own` is a token, or one for each row.
    """
    label = _labels(label, len(before))
    values = np.unique(label)
    if len(values) != 2:
        raise ValueError(f"a shift is between two labels; there are {values.tolist()}")
    p, q = (np.exp(log_softmax(np.asarray(x, np.float64), axis=-1)) for x in (before, after))
    change = (q - p)[np.arange(len(p)), np.broadcast_to(own, len(p))]
    return float(change[label == values[1]].mean() - change[label == values[0]].mean())


# --- how it grows


def growth_exponent(
    steps: Float[np.ndarray, "m"], found: Float[np.ndarray, "*seeds m"]
) -> Float[np.ndarray, "*seeds"]:
    """Slope of log drift against log steps: 1 where gradients are noise, 2 where they agree."""
    steps, found = _curve(steps, found)
    if not (found > 0).all():
        raise ValueError("drift of 0 or less has no logarithm: leave out steps before the first")
    x = np.log(steps) - np.log(steps).mean()
    return (np.log(found) @ x / (x @ x))[()]


def measured_crossover(
    steps: Float[np.ndarray, "m"], found: Float[np.ndarray, "*seeds m"]
) -> Float[np.ndarray, "*seeds"]:
    """Steps N at which b N² has grown to a N in the fit drift = a N + b N²; inf without any b.

    Least squares of drift/N, whose noise does not grow with N where drift is noise. Of single seeds
    b is hard to tell from 0: give the mean over seeds. Times rows a step, compare `crossover`.
    """
    steps, found = _curve(steps, found)
    ratio = (found / steps).reshape(-1, len(steps))
    slope, level = np.polyfit(steps, ratio.T, 1)
    with np.errstate(divide="ignore"):
        at = np.where(slope > 0, np.maximum(level, 0) / np.where(slope > 0, slope, 1.0), np.inf)
    return at.reshape(found.shape[:-1])[()]


def null_drift(
    steps: float, *, rate: float, rows: int, outcomes: int, second_moment: float
) -> float:
    """E[KL] = N ½η² E[A²] (K − 1)/(B K²): SGD on noise moves a uniform softmax token by itself.

    K outcomes, N steps of B rows at the learning rate η, a policy gradient whose advantage has the
    second moment E[A²] and says nothing of the token. To second order in what has moved:
    ½ tr(F · E[δδᵀ]), where the gradient's covariance is E[A²] F/B with F = I/K − 11ᵀ/K².
    """
    return steps * rate**2 / 2 * second_moment * (outcomes - 1) / (_at_least(rows, 1) * outcomes**2)


def correlated_drift(steps: float, *, rate: float, outcomes: int, correlation: float) -> float:
    """½(ηNρ/2K)²: what it adds that P(R = 1|token) is (1 + ρ)/2 for half of K and (1 − ρ)/2 else.

    The first-order drift of each logit is ±ηNρ/2K, and KL half its variance.
    """
    return (rate * steps * correlation / (2 * _at_least(outcomes, 2))) ** 2 / 2


def crossover(*, outcomes: int, correlation: float) -> float:
    """Episodes N·B = (K − 1)/ρ² after which correlation has moved a policy as much as noise has.

    Rewards 0 or 1, as often, less their mean: E[A²] = ¼.
    """
    return (_at_least(outcomes, 2) - 1) / correlation**2 if correlation else math.inf


def contraction(*, rate: float, beta: float, outcomes: int) -> float:
    """1 − ηβ/K a step: what a KL penalty β, as a reward, leaves of a small drift of the logits."""
    return 1 - rate * beta / _at_least(outcomes, 2)


def half_life(*, rate: float, beta: float, outcomes: int) -> float:
    """Steps to half of it, log ½ / log(1 − ηβ/K); its KL, which is of second order, takes half."""
    left = contraction(rate=rate, beta=beta, outcomes=outcomes)
    if not 0 < left <= 1:
        raise ValueError(f"a step leaves {left} of the drift: lower the rate or beta")
    return math.log(0.5) / math.log(left) if left < 1 else math.inf


# --- where the gradient goes


class Projection(NamedTuple):
    """A gradient along one direction of the residual stream."""

    mean: float  # over rows, signed
    share: float  # of the squared norm; 1/d for a direction that means nothing


def projection(
    gradient: Float[np.ndarray, "*n d"], direction: Float[np.ndarray, "d"]
) -> Projection:
    """Gradients by the residual stream, along a unit vector such as a probe's `direction`."""
    gradient, unit = np.asarray(gradient, np.float64), np.asarray(direction, np.float64)
    if not abs(np.linalg.norm(unit) - 1) < 1e-4:
        raise ValueError(f"a direction has length 1; this one {np.linalg.norm(unit):.6f}")
    along, total = gradient @ unit, (gradient**2).sum()
    return Projection(float(along.mean()), float((along**2).sum() / total) if total else math.nan)


def residual_gradients(
    loss: Callable[[Transformer], Float[Array, ""]], *, model: Transformer, rows: int, tokens: int
) -> Float[Array, "layers rows tokens d"]:
    """∂ loss/∂ (what each block leaves in the residual stream); for use inside `jax.jit`.

    `loss(model)` runs a model given to it on `[rows, tokens]` tokens; that model is this one with
    zeros added to its stream. Index ℓ − 1 belongs to index ℓ of `activations`.
    """

    def shifted(delta):
        def tap(layer, hidden):
            hidden = hidden if model.tap is None else model.tap(layer, hidden)
            return hidden + delta[layer].astype(hidden.dtype)

        return loss(replace(model, tap=tap))

    return jax.grad(shifted)(jnp.zeros((model.layers, rows, tokens, model.width), jnp.float32))


def gradient_share(grads: Params, groups: Mapping[str, str | Sequence[str]]) -> dict[str, float]:
    """Share of the squared gradient norm by group of parameters; the shares sum to 1.

    A group is a pattern, or several, searched in paths such as `layers_0/side_up/kernel` (of
    scanned layers too); the first that matches wins, and `rest` is what none matches.
    """
    names = {name: [p] if isinstance(p, str) else list(p) for name, p in groups.items()}
    total, hit = dict.fromkeys([*names, REST], 0.0), set()
    for path, leaf in _leaves(grads):
        group = next((n for n, ps in names.items() if any(re.search(p, path) for p in ps)), REST)
        hit.add(group)
        total[group] += float((leaf**2).sum())
    if missed := [name for name in names if name not in hit]:
        paths = ", ".join(path for path, _ in _leaves(grads))
        raise ValueError(
            f"the patterns of {missed} match no parameter that is left; there are {paths}"
        )
    whole = sum(total.values())
    return {name: x / whole if whole else math.nan for name, x in total.items()}


def update_norms(before: Params, after: Params, *, relative: bool = False) -> dict[str, float]:
    """‖after − before‖ by layer: `embed`, `layers_0`, ..., `final_norm`, heads.

    `relative` divides by ‖before‖: layers of different size, and optimisers that scale, compare.
    """
    moved, size = {}, {}
    theirs = dict(_leaves(after))
    for path, leaf in _leaves(before):
        name = path.split("/")[0]
        moved[name] = moved.get(name, 0.0) + ((theirs[path] - leaf) ** 2).sum()
        size[name] = size.get(name, 0.0) + (leaf**2).sum()
    root = {name: math.sqrt(x) for name, x in moved.items()}
    if not relative:
        return root
    return {
        name: x / math.sqrt(size[name]) if size[name] else (math.inf if x else 0.0)
        for name, x in root.items()
    }


def _leaves(tree):
    """Path and float64 array of every leaf, scanned layers apart."""
    found = jax.tree_util.tree_leaves_with_path(unstacked(tree))
    return [(path_name(path), np.asarray(x, np.float64)) for path, x in found]


def _labels(label, n):
    label = np.asarray(label)
    if label.shape != (n,):
        raise ValueError(f"one label for each of {n} rows, not {list(label.shape)}")
    return label


def _curve(steps, found):
    steps, found = np.asarray(steps, np.float64), np.asarray(found, np.float64)
    if steps.ndim != 1 or len(np.unique(steps)) < 2 or found.shape[-1:] != steps.shape:
        raise ValueError(
            f"drift [..., m] after m different steps, at least 2: not {list(found.shape)} and "
            f"{steps.tolist()}"
        )
    if not (steps > 0).all():
        raise ValueError(f"steps {steps.tolist()}: leave out those before training, 0")
    return steps, found


def _at_least(x, least):
    if x < least:
        raise ValueError(f"{x}: at least {least}")
    return x
