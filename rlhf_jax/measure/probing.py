"""What can be read from the residual stream, and how much of it the model's training put there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Params


class Readout(NamedTuple):
    """A linear probe: how well it does on rows it has not seen, and what it looks at."""

    accuracy: float  # over all rows, each held out once
    error: float  # its standard error, √(a (1 − a) / n)
    chance: float  # the share of the most frequent label
    samples: int
    classes: np.ndarray  # [k], ascending
    weights: Float[np.ndarray, "d k"]  # of the fit to all rows, by unit of x; one column for k = 2
    bias: Float[np.ndarray, "k"]


class Selectivity(NamedTuple):
    """Accuracies by layer (0: the embedding) and position, of a probe and of its two controls."""

    accuracy: Float[np.ndarray, "layers+1 p"]
    untrained: Float[np.ndarray, "layers+1 p"]  # the same probe on a network of random weights
    shuffled: Float[np.ndarray, "layers+1 p"]  # the same probe for labels that mean nothing
    samples: int

    @property
    def over_untrained(self) -> Float[np.ndarray, "layers+1 p"]:
        """What training added to what any network of this shape lets through."""
        return self.accuracy - self.untrained

    @property
    def over_shuffled(self) -> Float[np.ndarray, "layers+1 p"]:
        """Selectivity (Hewitt & Liang 2019, section 2): less what the probe can learn by heart."""
        return self.accuracy - self.shuffled


@partial(jax.jit, static_argnames="model")
def activations(
    params: Params,
    tokens: Int[Array, "n t"],
    *,
    model: Transformer,
    positions: int | Sequence[int] | Int[Array, "n p"] | None = None,
    segments: Int[Array, "n t"] | None = None,
) -> Float[Array, "layers+1 n *p d"]:
    """The residual stream: 0 is the embedding, ℓ what block ℓ leaves.

    `positions` is one place for all rows (from the end, if negative): `[layers+1, n, d]`; several,
    or several for each row `[n, p]`: `[layers+1, n, p, d]`; None: all t. After a tap of the model's
    own, and before its last norm. A position that does not exist is nan.
    """
    if not isinstance(model, Transformer):
        raise TypeError(
            f"the residual stream is read from a Transformer, not a {type(model).__name__}; "
            "of a model that wraps another, give that one"
        )
    segments = jnp.ones_like(tokens) if segments is None else segments
    embedded = params["embed"]["embedding"][tokens].astype(model.dtype)
    stream = [jnp.where((segments > 0)[:, :, None], embedded, 0)]

    def read(layer, hidden):
        stream.append(hidden if model.tap is None else model.tap(layer, hidden))
        return stream[-1]

    # Unrolled, and nothing computed twice: what a scan or a checkpoint sees cannot leave it.
    plain = replace(model, scan=False, remat="none")
    plain.apply(unstacked(params), tokens, segments=segments, tap=read)
    found = jnp.stack(stream)
    if positions is None:
        return found
    at = jnp.asarray(positions)
    one, length = at.ndim == 0, tokens.shape[1]
    if at.ndim < 2:
        at = jnp.broadcast_to(at.reshape(1, -1), (len(tokens), at.size))
    at = jnp.where(at < 0, at + length, at)
    at = jnp.where(at < 0, length, at)  # still before the first: beyond the last is nan
    found = jnp.take_along_axis(
        found, at[None, :, :, None], axis=2, mode="fill", fill_value=jnp.nan
    )
    return found[:, :, 0] if one else found


def unstacked(params: Params) -> Params:
    """The weights of a scanned model (or their gradients) with one entry a layer, `layers_0`..."""
    if "layers" not in params:
        return params
    stack = params["layers"]
    rest = {name: x for name, x in params.items() if name != "layers"}
    layers = range(len(jax.tree.leaves(stack)[0]))
    return rest | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stack) for i in layers}


def probe(
    x: Float[np.ndarray, "n d"],
    label: np.ndarray,
    *,
    penalty: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> Readout:
    """Logistic regression on standardised features: min Σ −log p(label|x) + penalty/2 ‖w‖².

    Alain & Bengio 2016; `penalty` is 1/C where that is the parameter, and the bias pays none. The
    accuracy is cross-validated, with mean and scale of the features from the rows of the fit.
    """
    x, label = np.asarray(x, np.float64), np.asarray(label)
    if x.ndim != 2 or label.shape != x.shape[:1]:
        raise ValueError(
            f"a probe reads x [n, d] and label [n], not {list(x.shape)} and {list(label.shape)}"
        )
    if not np.isfinite(x).all():
        raise ValueError("x is not finite everywhere: is a position outside the texts?")
    classes, target, count = np.unique(label, return_inverse=True, return_counts=True)
    if len(classes) < 2 or folds < 2 or count.min() < folds:
        raise ValueError(
            f"labels {dict(zip(classes.tolist(), count.tolist(), strict=True))} in {folds} folds: "
            "needs two labels or more, 2 folds or more, and of each label a row for every fold"
        )
    fold, right = _folds(target, folds, seed), np.zeros(len(x), bool)
    for i in range(folds):
        held = fold == i
        weights, bias = _fit(x[~held], target[~held], len(classes), penalty)
        right[held] = _logits(x[held], weights, bias).argmax(axis=1) == target[held]
    accuracy, (weights, bias) = right.mean(), _fit(x, target, len(classes), penalty)
    return Readout(
        accuracy=float(accuracy),
        error=float(np.sqrt(accuracy * (1 - accuracy) / len(x))),
        chance=float(count.max() / len(x)),
        samples=len(x),
        classes=classes,
        weights=weights,
        bias=bias,
    )


def direction(readout: Readout) -> Float[np.ndarray, "d"]:
    """The unit vector along which the log-odds of a probe's second label grow fastest."""
    if len(readout.classes) != 2:
        raise ValueError(
            f"the probe tells {len(readout.classes)} labels apart: a direction belongs to two; fit "
            "`probe(x, label == one_of_them)`"
        )
    size = np.linalg.norm(readout.weights)
    if size == 0:
        raise ValueError("the probe's weights are all 0: it found nothing, in no direction")
    return readout.weights[:, 0] / size


def selectivity(
    params: Params,
    tokens: Int[Array, "n t"],
    label: np.ndarray,
    *,
    model: Transformer,
    positions: int | Sequence[int] | Int[Array, "n p"],
    segments: Int[Array, "n t"] | None = None,
    groups: np.ndarray | None = None,
    penalty: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> Selectivity:
    """A probe for `label` in every layer at every position, and the same with nothing to find.

    Controls: weights fresh from `model.init`; labels shuffled among rows or, with `groups` `[n]`
    (rows that are alike, such as those of one prompt), among groups: the control task of Hewitt &
    Liang 2019, which a probe with room to learn groups by heart solves as well.
    """
    label = np.asarray(label)
    places = np.atleast_1d(np.asarray(positions))
    shuffled = _shuffle(label, groups, np.random.default_rng(seed))
    untrained = _fresh(jax.random.key(seed), model=model)
    read = partial(activations, tokens=tokens, model=model, positions=places, segments=segments)
    trained, fresh = (np.asarray(read(p), np.float64) for p in (params, untrained))

    def accuracies(stream, label):
        fit = partial(probe, label=label, penalty=penalty, folds=folds, seed=seed)
        return np.array([[fit(x[:, p]).accuracy for p in range(x.shape[1])] for x in stream])

    return Selectivity(
        accuracies(trained, label),
        accuracies(fresh, label),
        accuracies(trained, shuffled),
        len(label),
    )


_fresh = jax.jit(lambda key, *, model: model.init(key), static_argnames="model")


def _shuffle(label, groups, rng):
    """Labels in random order, of rows or of groups."""
    if groups is None:
        return rng.permutation(label)
    _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    if not (label[first][group] == label).all():
        raise ValueError("rows of one group have different labels: groups are rows that are alike")
    return rng.permutation(label[first])[group]


def _folds(target, folds, seed):
    """Which fold each row is held out in: of each class as many in all, up to one."""
    order = np.random.default_rng(seed).permutation(len(target))
    order = order[np.argsort(target[order], kind="stable")]
    fold = np.empty(len(target), int)
    fold[order] = np.arange(len(target)) % folds
    return fold


def _fit(x, target, classes, penalty):
    """Weights [d, columns] and bias by unit of x; of two classes the first has logit 0."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # A feature that is the same in all rows, up to float32's rounding, tells nothing.
    flat = scale <= 1e-6 * np.hypot(mean, scale)
    scale = np.where(flat, np.inf, scale)
    z = (x - mean) / scale
    columns = 1 if classes == 2 else classes
    hot = np.eye(classes)[target][:, classes - columns :]

    def slope(error, w):
        down = np.vstack([z.T @ error + penalty * w[:-1], error.sum(axis=0)])
        return down.ravel() / len(z)

    def objective(flat_weights):
        w = flat_weights.reshape(-1, columns)
        logits = _logits(z, w[:-1], w[-1])
        log_total, p = _softmax(logits)
        nll = log_total.sum() - logits[np.arange(len(z)), target].sum()
        error = p[:, classes - columns :] - hot
        value = nll + penalty / 2 * (w[:-1] ** 2).sum()
        return value / len(z), slope(error, w)

    def curvature(flat_weights, flat_step):  # Hessian · step
        w, step = flat_weights.reshape(-1, columns), flat_step.reshape(-1, columns)
        _, p = _softmax(_logits(z, w[:-1], w[-1]))
        move = _logits(z, step[:-1], step[-1])
        move = p * (move - (p * move).sum(axis=1, keepdims=True))
        return slope(move[:, classes - columns :], step)

    start = np.zeros((x.shape[1] + 1) * columns)
    # Newton's method with conjugate gradients: neither a Hessian nor a line search.
    found = minimize(
        objective,
        start,
        jac=True,
        hessp=curvature,
        method="trust-ncg",
        options={"gtol": 1e-7, "maxiter": 1000},
    )
    w = found.x.reshape(-1, columns)
    weights = w[:-1] / scale[:, None]
    return weights, w[-1] - mean @ weights


def _logits(x, weights, bias):
    logits = x @ weights + bias
    return np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits


def _softmax(logits):  # scipy's takes longer than the matrix products here
    top = logits.max(axis=1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(axis=1, keepdims=True)
    return np.log(total) + top, p / total
