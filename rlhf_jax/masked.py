"""Sums and means under a mask: select first, then sum, because 0 · nan is nan.

Everything comes back in float32 (or wider) and is exactly 0 outside the mask, in value and in
gradient. A statistic over nothing is 0.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Axis = int | tuple[int, ...] | None


def select(x: Shaped[Array, "..."] | None, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """`x` in float32 where `mask`, 0 elsewhere; what `x` holds elsewhere, nan included, is lost."""
    if x is None:
        raise ValueError(
            "scores that no model gave: logp and entropy need lm_head=True, value and reward need "
            "value_head=True in the model of the learner, and in those that it scores"
        )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(mask, x, 0.0)


def sum(
    x: Shaped[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None
) -> Float[Array, "..."]:
    """Σ x over the mask."""
    return jnp.sum(select(x, mask), axis)


def mean(
    x: Shaped[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None
) -> Float[Array, "..."]:
    """Σ x / Σ 1 over the mask."""
    return sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis), 1)


def var(
    x: Shaped[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None
) -> Float[Array, "..."]:
    """Σ (x − mean)² / Σ 1 over the mask (biased)."""
    centre = mean(x, mask, axis)
    if axis is not None:
        centre = jnp.expand_dims(centre, axis)
    return mean((select(x, mask) - centre) ** 2, mask, axis)


def whiten(
    x: Shaped[Array, "..."], mask: Bool[Array, "..."], *, shift_mean: bool = True
) -> Float[Array, "..."]:
    """(x − mean) / √(var + 1e-8) over the mask, with the biased variance.

    With `shift_mean=False` the mean is added back, so that only the spread changes.
    """
    centre = mean(x, mask)
    white = (select(x, mask) - centre) * jax.lax.rsqrt(var(x, mask) + 1e-8)
    return jnp.where(mask, white if shift_mean else white + centre, 0.0)


def last_index(mask: Bool[Array, "*n t"]) -> Int[Array, "*n"]:
    """Index of each row's last masked token; 0, which is never masked, for a row without one."""
    return jnp.max(jnp.where(mask, _index(mask), 0), axis=-1)


def is_last(mask: Bool[Array, "*n t"]) -> Bool[Array, "*n t"]:
    """True at each row's last masked token and nowhere else."""
    return mask & (_index(mask) == last_index(mask)[..., None])


def is_first(mask: Bool[Array, "*n t"], count: int) -> Bool[Array, "*n t"]:
    """True at each row's first `count` masked tokens and nowhere else."""
    if count < 0:
        raise ValueError(f"the first {count} tokens: at least 0")
    return mask & (jnp.cumsum(mask, axis=-1) <= count)


def last(
    x: Shaped[Array, "*n t"], mask: Bool[Array, "*n t"], axis: Literal[-1] = -1
) -> Float[Array, "*n"]:
    """`x` at each row's last masked token; 0 for a row without one. (`axis`, as `sum` has it.)"""
    return sum(x, is_last(mask), axis)


def at_last(score: Shaped[Array, "*n"], mask: Bool[Array, "*n t"]) -> Float[Array, "*n t"]:
    """`score` on each row's last masked token, 0 elsewhere: where a sequence reward lands."""
    return select(jnp.broadcast_to(score[..., None], mask.shape), is_last(mask))


def _index(mask: Bool[Array, "*n t"]) -> Int[Array, "*n t"]:
    return jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
