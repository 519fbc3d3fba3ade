"""A batch some of its rows at a time, and each time no wider than these rows are long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhf_jax.sharding import row_groups, split_rows
from rlhf_jax.types import Sequences


class Lengths(NamedTuple):
    """What is known of a batch's lengths before it is seen; what lies beyond is not computed."""

    widths: Sequence[int] = ()  # of rows: each micro-batch takes the narrowest that holds it
    most: int | None = None  # tokens of a row that can be in the mask; None: all
    pieces: int | None = None  # in which they can stand; None: each alone


UNKNOWN = Lengths()


def parts(batch: Any, n: int, *, group: int = 1) -> Any:
    """Rows cut into n parts, in front; part i takes rows i, i + n, …: none leaves its device.

    So many rows as a `group` has stay together.
    """

    def split(x):
        found = jnp.moveaxis(x.reshape(-1, n, group, *x.shape[1:]), 1, 0)
        return found.reshape(n, -1, *x.shape[1:])

    return split_rows(jax.tree.map(split, batch), axis=1)


def whole(cut: Any, *, group: int = 1) -> Any:
    """What `parts` has cut, in the order of its rows."""

    def join(x):
        n, rows, *rest = x.shape
        return jnp.moveaxis(x.reshape(n, -1, group, *rest), 0, 1).reshape(n * rows, *rest)

    return split_rows(jax.tree.map(join, cut))


def sum_over(fn: Callable, cut: Any) -> Any:
    """Σ fn(part) of what `parts` made, one part in memory at a time."""
    first = jax.tree.map(lambda x: x[0], cut)
    if jax.tree.leaves(cut)[0].shape[0] == 1:
        return fn(first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, first))
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None), zero, cut
    )
    return total


def map_over(fn: Callable, batch: Sequences, n: int, widths: Sequence[int] = ()) -> Any:
    """fn(part, width=…) of n parts, put together again in the order of the batch's rows."""
    if n == 1:
        return at_width(fn, batch, widths)
    order = by_length(batch, n) if widths else None
    if order is not None:
        batch = jax.tree.map(lambda x: x[order], batch)
    found = whole(jax.lax.map(lambda part: at_width(fn, part, widths), parts(batch, n)))
    return found if order is None else jax.tree.map(lambda x: x[jnp.argsort(order)], found)


def by_length(batch: Sequences, n: int) -> Int[Array, "b"]:
    """An order of rows of which `parts` makes n of similar length; no row leaves its device."""
    rows, groups = batch.tokens.shape[0], row_groups()
    length = _lengths(batch).reshape(groups, -1)
    order = jnp.argsort(length, axis=1, stable=True).reshape(groups, n, -1)
    first = jnp.arange(groups)[:, None] * (rows // groups)
    return (jnp.swapaxes(order, 1, 2).reshape(groups, -1) + first).reshape(-1)


def at_width(fn: Callable, part: Sequences, widths: Sequence[int]) -> Any:
    """fn(part, width=…) with the narrowest of some widths behind which there is only padding.

    Every width is compiled; which one runs is decided when the lengths are known.
    """
    full = part.tokens.shape[-1]
    widths = sorted({width for width in widths if width < full})
    if not widths:
        return fn(part, width=full)
    needed = (_lengths(part).max() > jnp.asarray(widths)).sum()
    return jax.lax.switch(needed, [partial(fn, width=w) for w in (*widths, full)], part)


def _lengths(batch: Sequences) -> Int[Array, "b"]:
    """Where each row's last token ends; of a group's, the longest member's."""
    place = jnp.arange(1, batch.tokens.shape[-1] + 1)
    ends = jnp.where(batch.segments != 0, place, 0)
    return ends.reshape(ends.shape[0], -1).max(axis=1)
