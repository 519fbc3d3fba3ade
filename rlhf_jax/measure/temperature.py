"""What heat can restore: sweeps, the temperature of an entropy, and what it does not undo.

Texts may be enumerated (`p [n]`, as in `rlhf_jax.exact`) or sampled from a model. Heat is a
sampler's, token by token, or over whole texts: p^{1/T}/Z, which is not the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import brentq

from rlhf_jax import exact
from rlhf_jax.measure.divergence import Divergence, sampled_divergence
from rlhf_jax.measure.estimate import Estimate
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Params, Prompts, Rollout

TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0)


class Distortion(NamedTuple):
    """What is left of a shift when heat has restored the base's entropy."""

    temperature: float  # T*: H(π at T*) = H(base)
    kl: float | Estimate  # KL(π at T*‖base), nats per text; 0 if π is the base but sharper


# ---- any function of the temperature


def sweep(
    at: Callable[[float], Mapping[str, float | Estimate]],
    temperatures: Sequence[float] = TEMPERATURES,
) -> dict[str, Float[np.ndarray, "m"]]:
    """Curves over the temperature: `at(T)` at each of them, with it as `temperature`.

    An `Estimate` called x becomes the curves x and x_error.
    """
    temperatures = np.array(temperatures, np.float64)
    rows = [at(float(x)) for x in temperatures]
    curves = {"temperature": temperatures}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        curves[name] = np.array([float(x) for x in values])
        if isinstance(first, Estimate):
            curves[f"{name}_error"] = np.array([x.error for x in values])
    return curves


def matching_temperature(
    at: Callable[[float], float | Estimate],
    target: float,
    *,
    low: float = 0.05,
    high: float = 20.0,
    tolerance: float = 1e-6,
) -> float:
    """The temperature between `low` and `high` at which a monotone function has a value.

    By Brent's method in log T, to a relative `tolerance`. For an estimate use the same random key
    at every temperature, so that it is a function, and a tolerance like its error.

    Raises:
        ValueError: if the value is out of reach.
    """
    if not 0 < low < high:
        raise ValueError(f"low={low} and high={high} must be temperatures, 0 < low < high")

    ends = {float(np.log(x)): float(at(x)) - target for x in (low, high)}  # asked once

    def gap(log_t):
        return ends[log_t] if log_t in ends else float(at(float(np.exp(log_t)))) - target

    if not np.prod(np.sign(list(ends.values()))) <= 0:
        first, last = (target + x for x in ends.values())
        raise ValueError(
            f"{target:.6f} is out of reach: heat goes from {first:.6f} at T={low} to {last:.6f} at "
            f"T={high}; widen the range, or the value does not exist"
        )
    return float(np.exp(brentq(gap, *ends, xtol=tolerance)))


# ---- enumerated texts


def heated(
    p: Float[np.ndarray, "n"], temperature: float, *, outputs: exact.Outputs | None = None
) -> Float[np.ndarray, "n"]:
    """Heat of a sampler, token by token, with `outputs`; p^{1/T}/Z over whole texts without."""
    if outputs is None:
        return exact.sequence_temperature(p, temperature)
    return exact.token_temperature(p, outputs, temperature)


def sweep_outputs(
    p: Float[np.ndarray, "n"],
    base: Float[np.ndarray, "n"],
    statistics: Mapping[str, Float[np.ndarray, "n"]],
    *,
    outputs: exact.Outputs | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
) -> dict[str, Float[np.ndarray, "m"]]:
    """Exact curves of p at each temperature: `entropy`, `kl` to the base, means of statistics."""

    def at(temperature):
        hot = heated(p, temperature, outputs=outputs)
        known = {"entropy": exact.entropy(hot), "kl": exact.kl(hot, base)}
        return known | {name: hot @ x for name, x in statistics.items()}

    return sweep(at, temperatures)


def token_temperature_of_entropy(
    p: Float[np.ndarray, "n"], outputs: exact.Outputs, target: float
) -> float:
    """The temperature of a sampler at which p has an entropy of `target` nats per text.

    Over whole texts it is `exact.temperature_of_entropy`. A sampler's entropy rises with its heat
    in all but contrived cases; in those, one of the temperatures is found.
    """
    return matching_temperature(
        lambda t: exact.entropy(exact.token_temperature(p, outputs, t)),
        target,
        low=1e-3,
        high=1e6,
        tolerance=1e-12,
    )


def shape_distortion(
    p: Float[np.ndarray, "n"],
    base: Float[np.ndarray, "n"],
    *,
    outputs: exact.Outputs | None = None,
) -> Distortion:
    """T* that restores the base's entropy, and KL(p at T*‖base), nats: 0 for mere sharpening.

    `outputs` as in `heated`.
    """
    target = exact.entropy(base)
    if outputs is None:
        temperature = exact.temperature_of_entropy(p, target)
    else:
        temperature = token_temperature_of_entropy(p, outputs, target)
    return Distortion(temperature, exact.kl(heated(p, temperature, outputs=outputs), base))


# ---- models


def sampled_at(
    params: Params,
    prompts: Prompts,
    key: Array,
    temperature: float,
    *,
    model: Any,
    length: int,
    sampling: Sampling | None = None,
    reference: Params | None = None,
    reference_model: Any = None,
    pad: int = 0,
) -> tuple[Rollout, Divergence]:
    """Samples of a model at a temperature, their entropy, and KL to a reference at temperature 1.

    One compiled program for all temperatures. The key decides the random numbers, so that curves
    over the temperature are smooth. `sampling` gives stop and banned ids.
    """
    sampling = replace(Sampling() if sampling is None else sampling, temperature=temperature)
    rollout = _generate(params, prompts, key, sampling, model=model, length=length, pad=pad)
    found = sampled_divergence(
        params,
        rollout,
        model=model,
        reference=reference,
        reference_model=reference_model,
        reference_temperature=1.0,
        banned=[int(i) for i in sampling.banned],
    )
    return rollout, found


def sampled_distortion(
    params: Params,
    reference: Params,
    prompts: Prompts,
    key: Array,
    *,
    model: Any,
    length: int,
    sampling: Sampling | None = None,
    reference_model: Any = None,
    pad: int = 0,
    low: float = 0.3,
    high: float = 5.0,
    tolerance: float = 1e-3,
) -> Distortion:
    """`shape_distortion` of a model's samplers, by sampling: T* and KL(π at T*‖reference at 1).

    The entropies are Rao-Blackwellised, on the same prompts and random numbers. The error of the KL
    does not contain that of T*.
    """
    base = model if reference_model is None else reference_model
    asked = {"length": length, "sampling": sampling, "pad": pad}
    start = sampled_at(reference, prompts, key, 1.0, model=base, **asked)[1].entropy
    asked |= {"model": model, "reference": reference, "reference_model": reference_model}
    found = partial(sampled_at, params, prompts, key, **asked)
    temperature = matching_temperature(
        lambda t: found(t)[1].entropy, float(start), low=low, high=high, tolerance=tolerance
    )
    return Distortion(temperature, found(temperature)[1].kl)


@partial(jax.jit, static_argnames=("model", "length", "pad"))
def _generate(params, prompts, key, sampling, *, model, length, pad):
    return generate(params, prompts, key, model=model, length=length, sampling=sampling, pad=pad)


# ---- quality against diversity


def frontier(points: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "k 2"]:
    """The points that no other one beats in both coordinates, first coordinate ascending."""
    points = _points(points)
    order = np.lexsort((-points[:, 1], -points[:, 0]))  # best first coordinate first
    best = np.maximum.accumulate(points[order, 1])
    new = np.concatenate([[True], best[1:] > best[:-1]])
    return points[order[new]][::-1]


def hypervolume(points: Float[np.ndarray, "m 2"], origin: tuple[float, float]) -> float:
    """The area that points (quality, diversity) dominate above `origin`; more is better in both.

    One number for a curve over temperatures (Caccia et al. 2020 compare the curves). Points that
    are not above the origin in both add nothing; use one origin for all that is compared.
    """
    points = _points(points)
    points = points[(points > np.array(origin)).all(axis=1)]
    if not len(points):
        return 0.0
    points = frontier(points)
    width = np.diff(points[:, 0], prepend=origin[0])
    return float(width @ (points[:, 1] - origin[1]))


def _points(points):
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"needs finite points [m, 2], at least one; these are {points.shape}")
    return points
