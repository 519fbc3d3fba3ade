"""The optimiser as one function of numbers, so that an experiment can say and override it."""

from __future__ import annotations

import jax
import optax

from rlhf_jax.sharding import path_name


def adam(
    *,
    learning_rate: float,
    final: float = 1.0,
    steps: int | None = None,
    warmup: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_dtype: str | None = None,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, a schedule and a clipped global gradient norm.

    The rate rises linearly over `warmup` optimiser steps, then falls linearly to
    `final * learning_rate` at optimiser step `steps` (None: stays). Decay acts on matrices only.
    `momentum_dtype="bfloat16"` halves the first moment. The second stays float32: it changes by a
    thousandth a step, which bfloat16 rounds away.
    """
    rate = optax.constant_schedule(learning_rate)
    if steps is not None:
        rate = optax.linear_schedule(learning_rate, final * learning_rate, max(1, steps - warmup))
    if warmup:
        rise = optax.linear_schedule(learning_rate / warmup, learning_rate, max(1, warmup - 1))
        rate = optax.join_schedules([rise, rate], [warmup])
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon, mu_dtype=momentum_dtype))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=_matrices))
    parts.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*parts)


def _matrices(params):
    """Scanned layers carry a leading axis: there a scale has two, and is no matrix."""

    def one(path, x):
        return x.ndim - ("layers/" in path_name(path)) > 1

    return jax.tree_util.tree_map_with_path(one, params)


def sgd(*, learning_rate: float, clip: float | None = None) -> optax.GradientTransformation:
    """Plain gradient descent: no normalisation, so a zero gradient moves nothing."""
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
