"""What every objective obeys: a law takes a `testing.Case` and raises BrokenLawError or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


class BrokenLawError(AssertionError):
    """An objective breaks a law; the message names it and says what was expected."""


def shapes(case) -> None:
    """One number per token, member or group; weight, count and metrics alike; float32, finite."""
    for name, term in case.eager_terms(case.inputs, case.batch).items():  # which looks at shapes
        metrics = {f"metric {key!r}": x for key, x in term.metrics.items()}
        for part, x in (_arrays(term) | metrics).items():
            what = f"{part} of term {name!r}" if name else part
            if x.dtype != jnp.float32:
                _fail("shapes", f"{what} is {x.dtype}; expected float32")
            if not np.isfinite(np.where(np.asarray(term.weight) != 0, x, 0.0)).all():
                _fail("shapes", f"{what} is not finite where weight is not 0")


def jit(case) -> None:
    """Compiled, the objective answers as it does step by step."""
    eager = case.eager_terms(case.inputs, case.batch)
    try:
        compiled = case.terms(case.inputs, case.batch)
    except jax.errors.JAXTypeError as error:
        _fail("jit", f"the objective cannot be compiled: {error}")
    _same("jit", "compiled", compiled, eager)


def weights(case) -> None:
    """Weight, count and scale depend on the batch alone, so Σ count is known beforehand."""
    first = case.terms(case.inputs, case.batch)
    other = case.terms(case.random_inputs(case.seed + 50), case.batch)
    for name, term in first.items():
        for part in ("weight", "count", "scale"):
            old, new = getattr(term, part), getattr(other[name], part)
            if old is not None and not np.array_equal(old, new):
                _fail("weights", f"{part} changed with the scores; expected: of the batch only")


def zero_gradient(case) -> None:
    """Nothing reaches a token of weight 0: its gradient is 0 exactly."""
    hidden = case.unseen()
    _, grads = case.value_and_grad(case.inputs, case.batch)
    for what, grad in _own(grads).items():
        leak = (np.asarray(grad) != 0).reshape(*hidden.shape, -1).any(-1) & hidden
        if leak.any():
            at = tuple(int(i) for i in np.argwhere(leak)[0])
            _fail("zero_gradient", f"the gradient by {what} is not 0 at {at}, where weight is 0")


def nan(case) -> None:
    """What stands at a token of weight 0 touches nothing, nan included (0 · nan is nan)."""
    hidden = case.unseen()
    rows = hidden.reshape(hidden.shape[0], -1).all(-1)

    def spoil(x):
        if not np.issubdtype(x.dtype, np.floating):
            return x
        where = hidden if x.shape[: hidden.ndim] == hidden.shape else rows
        return np.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), np.nan, x)

    expected = case.value_and_grad(case.inputs, case.batch)
    got = case.value_and_grad(*_map(spoil, (case.inputs, case.batch)))
    _same_value_and_grad("nan", "with nan where weight is 0 (select, then compute)", got, expected)


def padding(case) -> None:
    """More columns of padding change nothing, whatever stands in them."""
    shape = case.batch.tokens.shape
    rng = np.random.default_rng(case.seed)

    def pad(x):
        if x.shape[: len(shape)] != shape:
            return x
        new = np.zeros((*shape[:-1], 3, *x.shape[len(shape) :]), x.dtype)
        if np.issubdtype(x.dtype, np.floating):
            new += 30 * rng.normal(size=new.shape).astype(x.dtype)
        return np.concatenate([x, new], axis=len(shape) - 1)

    expected = case.value_and_grad(case.inputs, case.batch)
    value, grads = case.value_and_grad(*_map(pad, (case.inputs, case.batch)))
    cut = (slice(None),) * (len(shape) - 1) + (slice(shape[-1]),)
    grads = jax.tree.map(lambda x: np.asarray(x)[cut], grads)
    _same_value_and_grad("padding", "with 3 more columns of padding", (value, grads), expected)


def additivity(case) -> None:
    """Σ loss·weight and Σ count over parts of the rows add up to those over the whole."""
    whole = _sums(case, slice(None))
    rows = case.batch.tokens.shape[0]
    first, rest = _sums(case, slice(rows // 2)), _sums(case, slice(rows // 2, rows))
    for name, sums in whole.items():
        for what, total in sums.items():
            got = first[name][what] + rest[name][what]
            _same("additivity", f"{what} of parts of the rows, added (no mean inside),", got, total)


def permutation(case) -> None:
    """Rows in another order give the same terms in that order."""
    order = np.random.default_rng(case.seed).permutation(case.batch.tokens.shape[0])
    moved = case.terms(*_map(lambda x: x[order], (case.inputs, case.batch)))
    for name, term in case.terms(case.inputs, case.batch).items():
        for what, x in _arrays(term).items():
            got = _arrays(moved[name])[what]
            _same("permutation", f"{what} of rows in another order", got, np.asarray(x)[order])


def vmap(case) -> None:
    """Mapped over a leading axis of seeds, it gives what a loop over them gives."""
    seeds = [case, case.another()]
    stacked = jax.tree.map(lambda *x: np.stack(x), *[(s.inputs, s.batch) for s in seeds])
    mapped = case.values_and_grads(*stacked)
    for i, seed in enumerate(seeds):
        got = _map(lambda x, i=i: x[i], mapped)
        expected = case.value_and_grad(seed.inputs, seed.batch)
        _same_value_and_grad("vmap", f"of seed {i} under vmap", got, expected)


def extremes(case) -> None:
    """Loss and gradient are finite at log-probabilities of −1e4, −1e-8 and 0."""
    scores, logits = case.inputs["scores"], case.inputs["logits"]
    old = [f.name for f in dataclasses.fields(case.batch) if f.name.endswith("logp")]
    trials = {}
    for logp in (-1e4, -1e-8, 0.0):
        full = np.full(scores.logp.shape, logp, np.float32)
        others = {name: other.replace(logp=full) for name, other in scores.others.items()}
        trials[f"logp = {logp}"] = (scores.replace(logp=full), logits, case.batch)
        trials[f"others' logp = {logp}"] = (scores.replace(others=others), logits, case.batch)
        batch = case.batch.replace(**{name: full for name in old})
        trials[f"the batch's {', '.join(old)} = {logp}"] = (scores, logits, batch)
    if logits:
        sure, banned = {}, {}
        for i, (name, x) in enumerate(logits.items()):
            sure[name], banned[name] = np.zeros_like(x), x.copy()
            sure[name][..., i], banned[name][..., 0] = 1e4, -np.inf
        trials["logits of 1e4, on another token by each model"] = (scores, sure, case.batch)
        trials["a token that no model may say (logit -inf)"] = (scores, banned, case.batch)
    for what, (scores, logits, batch) in trials.items():
        value, grads = case.value_and_grad({"scores": scores, "logits": logits}, batch)
        finite = {"the loss": value, **{f"the gradient by {k}": x for k, x in _own(grads).items()}}
        for name, x in finite.items():
            if not np.isfinite(x).all():
                _fail("extremes", f"{name} is not finite at {what}; clamp before exp and log")


def bfloat16(case) -> None:
    """Scores in bfloat16 are accepted, and computed with in float32."""

    def to(dtype, tree):
        return _map(lambda x: x.astype(dtype) if x.dtype.kind not in "ib" else x, tree)

    half = to(jnp.bfloat16, (case.inputs, case.batch))
    full = to(np.float32, half)
    expected = case.terms(*full)
    for name, term in case.terms(*half).items():
        for what in ("loss", "weight"):
            if getattr(term, what).dtype != jnp.float32:
                _fail("bfloat16", f"{what} is {getattr(term, what).dtype}; expected float32")
        _same("bfloat16", "loss computed in float32", term.loss, expected[name].loss)


LAWS: dict[str, Callable] = {
    law.__name__: law
    for law in (
        shapes,
        jit,
        weights,
        zero_gradient,
        nan,
        padding,
        additivity,
        permutation,
        vmap,
        extremes,
        bfloat16,
    )
}


def _map(change, tree):
    return jax.tree.map(lambda x: change(np.asarray(x)), tree)


def _arrays(term):
    found = {"loss": term.loss, "weight": term.weight}
    return found if term.count is None else {**found, "count": term.count}


def _sums(case, rows):
    found = {}
    for name, term in case.terms(*_map(lambda x: x[rows], (case.inputs, case.batch))).items():
        loss, weight = np.asarray(term.loss), np.asarray(term.weight)
        count = weight if term.count is None else np.asarray(term.count)
        value = float(term.scale) * np.where(weight != 0, loss * weight, 0.0).sum()
        found[name] = {"Σ loss·weight": value, "Σ count": count.sum()}
    return found


def _own(grads):
    """The gradients that reach the learner: by its scores and by its logits."""
    scores = grads["scores"]
    found = {f"scores.{name}": getattr(scores, name) for name in ("logp", "entropy", "value")}
    found["scores.reward"] = scores.reward
    if "self" in grads["logits"]:
        found["logits['self']"] = grads["logits"]["self"]
    return found


def _same_value_and_grad(law, when, got, expected):
    _same(law, f"the value {when}", got[0], expected[0])
    for what, grad in _own(got[1]).items():
        _same(law, f"the gradient by {what} {when}", grad, _own(expected[1])[what])


def _same(law, what, got, expected):
    def one(path, got, expected):
        got, expected = np.asarray(got), np.asarray(expected)
        wrong = ~np.isclose(got, expected, rtol=1e-5, atol=1e-6)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            where = jax.tree_util.keystr(path) + (f" at {at}" if at else "")
            _fail(law, f"{what}: {where} is {got[at]}; expected {expected[at]}")

    jax.tree.map_with_path(one, got, expected)


def _fail(law, message):
    raise BrokenLawError(f"law {law!r}: {message}")
