"""Check an objective of your own: `check_objective(my_objective)` runs every law on it.

The trainer may cut a minibatch into parts, pad it, shuffle it, spread it over a mesh, compile it
and map it over seeds, and none of that may change a result: that is so if the laws hold.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import masked
from rlhf_jax.laws import LAWS, BrokenLawError
from rlhf_jax.step import Misfit, terms_of
from rlhf_jax.types import Labeled, Pairs, Scores, Sequences, Terms

__all__ = ["LAWS", "BrokenLawError", "Case", "check_objective", "random_batch"]

ROWS, MEMBERS, TOKENS, VOCABULARY = 6, 2, 7, 5
SCORES = ("logp", "entropy", "value", "reward")


def check_objective(
    fn: Callable,
    *,
    batch: type[Sequences] | Sequences | None = None,
    vocab: Callable | None = None,
    others: Sequence[str] = ("reference",),
    laws: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Run the laws on `fn(scores, batch) -> Terms | dict[str, Terms]`, hyperparameters bound.

    Args:
        fn: the objective; a `functools.partial` if it has required hyperparameters.
        batch: the class of batch to draw at random (its masks have holes, one row is empty), or a
            batch to use; by default the class that `fn` annotates.
        vocab: the vocabulary function whose results `fn` reads in `scores.extra`.
        others: names of other models whose scores and logits `fn` or `vocab` reads.
        laws: names from `LAWS`; by default all.
        seed: of the random batch and scores.

    Raises:
        BrokenLawError: naming the law and what was expected.
    """
    wanted = list(LAWS) if laws is None else list(laws)
    unknown = [name for name in wanted if name not in LAWS]
    if unknown:
        raise ValueError(f"no law is named {unknown}; the laws are {list(LAWS)}")
    kind = batch if batch is not None else _annotated_batch(fn)
    case = Case(fn, kind, vocab, tuple(others), seed)
    for name in wanted:
        LAWS[name](case)


class Case:
    """An objective, one batch and random inputs for it, all in numpy; only `fn` runs in JAX.

    `inputs` is what is differentiated: {"scores": Scores, "logits": {name: [..., v]}}.
    """

    def __init__(self, fn, kind, vocab, others, seed):
        self.fn, self.kind, self.vocab, self.others, self.seed = fn, kind, vocab, others, seed
        drawn = isinstance(kind, type)
        self.batch = random_batch(kind, seed) if drawn else jax.tree.map(np.asarray, kind)
        self.inputs = self.random_inputs(seed + 1)

    def another(self) -> Case:
        """The same objective on other numbers."""
        return Case(self.fn, self.kind, self.vocab, self.others, self.seed + 100)

    def random_inputs(self, seed: int) -> dict[str, Any]:
        """Scores of the learner and of the others, and logits if there is a `vocab`."""
        shape, rng = self.batch.tokens.shape, np.random.default_rng(seed)

        def scores(**others):
            return Scores(**{name: _floats(name, rng, shape) for name in SCORES}, **others)

        logits = {}
        if self.vocab is not None:
            for name in ("self", *self.others):
                logits[name] = rng.normal(size=(*shape, VOCABULARY)).astype(np.float32)
        others = {name: scores() for name in self.others}
        return {"scores": scores(others=others), "logits": logits}

    def eager_terms(self, inputs, batch) -> dict[str, Terms]:
        """The objective's answer, always as a dict."""
        inputs, batch = jax.tree.map(jnp.asarray, (inputs, batch))
        scores = inputs["scores"]
        if self.vocab is not None:
            found = self.vocab(*_flat(inputs["logits"], batch))
            shaped = {name: x.reshape(batch.tokens.shape) for name, x in found.items()}
            scores = scores.replace(extra=shaped)
        try:
            return terms_of(self.fn(scores, batch), batch, self.fn)
        except Misfit as error:
            raise BrokenLawError(f"law 'shapes': {error}") from error

    def _everything(self, inputs, batch):
        def value(inputs):
            total, terms = jnp.float32(0.0), self.eager_terms(inputs, batch)
            for term in terms.values():
                count = jnp.sum(term.weight if term.count is None else term.count)
                sum_ = masked.sum(term.loss * term.weight, term.weight != 0)
                total += term.scale * sum_ / jnp.where(count == 0, 1.0, count)
            return total, terms

        (value, terms), grads = jax.value_and_grad(value, has_aux=True)(inputs)
        return terms, value, grads

    @cached_property
    def _compiled(self) -> Callable:
        # one program for all laws, since compiling is what takes the time
        return jax.jit(self._everything, compiler_options=_quick())

    def terms(self, inputs, batch) -> dict[str, Terms]:
        """`eager_terms`, compiled."""
        return self._compiled(inputs, batch)[0]

    def value_and_grad(self, inputs, batch) -> tuple[Any, Any]:
        """The trainer's value, and its gradient by the inputs; compiled."""
        return self._compiled(inputs, batch)[1:]

    def values_and_grads(self, inputs, batch) -> tuple[Any, Any]:
        """The same mapped over a leading axis of seeds."""
        mapped = jax.jit(jax.vmap(self._everything), compiler_options=_quick())
        return mapped(inputs, batch)[1:]

    def unseen(self) -> np.ndarray:
        """True at tokens that no term may look at: weight 0, or outside the mask."""
        mask = self.batch.mask
        hidden = np.ones(mask.shape, bool)
        for term in self.terms(self.inputs, self.batch).values():
            zero = np.asarray(term.weight) == 0
            if zero.shape != mask.shape:  # per sequence or per group
                zero = zero.reshape(zero.shape + (1,) * (mask.ndim - zero.ndim)) | ~mask
            hidden &= zero
        return hidden


def random_batch(kind: type[Sequences], seed: int = 0) -> Sequences:
    """A small batch of a class, in numpy, its fields drawn by their annotations.

    Rows are padded and their masks have holes; one row, or one member of a group, has none at all.
    """
    rng = np.random.default_rng(seed)
    shape = (ROWS, MEMBERS, TOKENS) if issubclass(kind, Pairs) else (ROWS, TOKENS)
    index = np.broadcast_to(np.arange(TOKENS), shape)
    inside = index < rng.integers(3, TOKENS + 1, (*shape[:-1], 1))
    mask = inside & (index > 0) & ((rng.uniform(size=shape) < 0.7) | (index == 1))
    mask[(1, 0) if issubclass(kind, Pairs) else (1,)] = False
    fields = {"mask": mask, "segments": inside.astype(np.int32)}
    for name in (field.name for field in dataclasses.fields(kind)):
        if name in fields:
            continue
        dtype, dims = _annotation(kind, name)
        wide = dims.split()[-1] == "v"
        size = shape if "t" in dims.split() else shape[: len(dims.split())]
        size = (*size, VOCABULARY) if wide else size
        if dtype == "Bool":
            fields[name] = rng.uniform(size=size) < 0.5
        elif dtype == "Int":
            fields[name] = rng.integers(0, VOCABULARY, size, np.int32)
        else:
            fields[name] = _floats(name, rng, size)
    return kind(**fields)


@cache
def _quick() -> dict[str, Any]:
    """Compiler options that trade speed of the program for speed of compiling (9 times on CPU)."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except (RuntimeError, ValueError):  # another XLA, which knows them no longer
        return {}
    return options


def _floats(name, rng, shape):
    """Log-probabilities lie near one common draw, so that ratios are near 1; others are normal."""
    if name == "temperature":
        return np.ones(shape, np.float32)
    x = rng.normal(size=shape)
    if name.endswith("logp"):
        common = np.random.default_rng(0).uniform(-2.0, 0.0, shape)
        x = np.minimum(common + 0.3 * x, -1e-3)
    return x.astype(np.float32)


def _annotation(kind, name):
    """A field's ("Float", "b t")."""
    for owner in kind.__mro__:
        hint = inspect.get_annotations(owner).get(name)
        if hasattr(hint, "dim_str"):
            return hint.dtype.__name__, hint.dim_str
        found = re.search(r"(Float|Int|Bool)\[[\w.]*Array, [\"']([^\"']+)[\"']\]", str(hint))
        if found:
            return found.groups()
    raise ValueError(
        f'{kind.__name__}.{name} has no annotation like Float[Array, "b t"] to draw it by; pass '
        "check_objective(batch=...) a batch instead of its class"
    )


def _annotated_batch(fn):
    inner = fn
    while isinstance(inner, partial):
        inner = inner.func
    try:
        kind = typing.get_type_hints(inspect.unwrap(inner)).get("batch")
    except (NameError, TypeError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Sequences)):
        raise ValueError(
            "the objective does not annotate `batch` with a class of rlhf_jax.types; pass "
            "check_objective(batch=Labeled), or another class, or a batch"
        )
    return Labeled if kind is Sequences else kind


def _flat(logits, batch):
    """Logits [c, v] and the batch's arrays [c]: what `vocab` sees of c tokens."""
    shape = batch.tokens.shape

    def one(x):
        wider = x.shape[len(shape) :]
        x = x.reshape(x.shape + (1,) * (len(shape) - x.ndim))
        return jnp.broadcast_to(x, shape + wider).reshape(-1, *wider)

    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in logits.items()}
    return flat, jax.tree.map(one, batch)
