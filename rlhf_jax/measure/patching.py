"""Where in the network does a token act? One run's residual stream, pasted into another's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.measure.probing import activations
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Params

ROUNDING = 1e-12  # nats: the KL of distributions that differ by float32's rounding stays below

Positions = Sequence[int] | Bool[np.ndarray, "b t"] | None


class Restored(NamedTuple):
    """How much of the way to the source's predictions pasting goes, layer by layer."""

    fraction: Float[np.ndarray, "layers"]  # 1 − residual/gap; nan where the gap is rounding
    residual: Float[np.ndarray, "layers"]  # KL(patched‖source), nats a position
    gap: float  # KL(unpatched‖source), nats a position
    layers: np.ndarray  # 0: the embedding; ℓ: what block ℓ leaves


@partial(jax.jit, static_argnames="model")
def next_logp(
    params: Params,
    tokens: Int[Array, "b t"],
    *,
    model: Any,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t v"]:
    """What follows each token: index t speaks of the token after `tokens[:, t]`. Nats, float32."""
    return _speak(params, tokens, model, segments)


def patched(
    params: Params,
    tokens: Int[Array, "b t"],
    source: Int[Array, "b t"],
    *,
    model: Transformer,
    layers: Sequence[int] | None,
    positions: Positions = None,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t v"]:
    """The run on `tokens` with the run on `source` pasted in: log p of what follows each token.

    Activation patching (Meng et al. 2022, section 2; Wang et al. 2022, whose source is another
    prompt). In `layers` (0: the embedding, ℓ: what block ℓ leaves; None: all) the residual stream
    at `positions` (places of all rows, or [b, t] True; None: all) is that of the source. Where it
    is pasted is an argument of the compiled program: another layer compiles nothing.
    """
    paste = _paste(model, np.shape(tokens), layers, positions)
    return _patched(params, tokens, source, paste, model=model, segments=segments)


def restored(
    params: Params,
    tokens: Int[Array, "b t"],
    source: Int[Array, "b t"],
    *,
    model: Transformer,
    positions: Positions = None,
    where: Bool[np.ndarray, "b t"] | None = None,
    layers: Sequence[int] | None = None,
    segments: Int[Array, "b t"] | None = None,
) -> Restored:
    """Share of KL that each layer alone restores: 1 − KL(patched‖source) / KL(unpatched‖source).

    KL is averaged over `where` [b, t], the tokens whose successor is predicted; None: all after the
    last of `positions`, or all if those are. Pasting the embedding at the only place where two
    texts differ makes them one, and so does any layer at all places: 1. From there on the share
    falls with the layer by which later tokens have read what they need at that place.
    """
    shape = np.shape(tokens)
    chosen = np.arange(model.layers + 1) if layers is None else np.asarray(layers)
    pastes = [_paste(model, shape, [layer], positions) for layer in chosen.tolist()]
    if where is None:
        place = pastes[0].any(axis=0)  # [b, t]
        later = np.flip(np.cumsum(np.flip(place, 1), axis=1), 1) == 0
        where = np.ones(shape, bool) if place.all() else later
    where = np.broadcast_to(np.asarray(where, bool), shape)
    if segments is not None:
        where = where & (np.asarray(segments) > 0)
    if not where.any():
        raise ValueError(
            f"no token of {list(shape)} to compare predictions at: they are compared after the "
            "last of `positions`; give longer texts, or say `where`"
        )
    pastes = np.stack([np.zeros_like(pastes[0]), *pastes])
    found = _divergences(params, tokens, source, pastes, where, model=model, segments=segments)
    gap, *residual = np.asarray(found, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(gap > ROUNDING, 1 - np.array(residual) / gap, np.nan)
    return Restored(fraction, np.array(residual), float(gap), chosen)


def _run(params, tokens, source, stream, paste, model, segments):
    """One run with the stream pasted where `paste` [layers+1, b, t]."""

    def tap(layer, hidden):
        hidden = hidden if model.tap is None else model.tap(layer, hidden)
        return jnp.where(paste[layer + 1][:, :, None], stream[layer + 1], hidden)

    # The embedding of a token is pasted by pasting the token.
    tokens = jnp.where(paste[0], source, tokens)
    return _speak(params, tokens, model, segments, tap=tap)


def _speak(params, tokens, model, segments, **hooks):
    """[b, t, v], of what follows."""
    hidden = model.apply(params, tokens, segments=segments, **hooks).hidden
    return jax.nn.log_softmax(model.logits(params, hidden), axis=-1)


@partial(jax.jit, static_argnames="model")
def _patched(params, tokens, source, paste, *, model, segments):
    stream = activations(params, source, model=model, segments=segments)
    return _run(params, tokens, source, stream, paste, model, segments)


@partial(jax.jit, static_argnames="model")
def _divergences(params, tokens, source, pastes, where, *, model, segments):
    """Mean KL(patched‖source) of every paste [s, layers+1, b, t], one after another."""
    stream = activations(params, source, model=model, segments=segments)
    target = next_logp(params, source, model=model, segments=segments)

    def one(paste):
        logp = _run(params, tokens, source, stream, paste, model, segments)
        # p log(p/q) − p + q, which sums to the same: no term is negative, small KL keep digits.
        gap = logp - target
        terms = jnp.where(logp > -jnp.inf, jnp.exp(logp) * (gap + jnp.expm1(-gap)), jnp.exp(target))
        return jnp.where(where, terms.sum(-1), 0.0).sum() / where.sum()

    return jax.lax.map(one, pastes)


def _paste(model, shape, layers, positions):
    """[layers+1, b, t], True where the other run is pasted."""
    depth = model.layers + 1
    rows = np.zeros(depth, bool)
    layers = range(depth) if layers is None else layers
    if wrong := [i for i in layers if not 0 <= i < depth]:
        raise ValueError(f"layers {wrong}: the model has 0 (the embedding) to {model.layers}")
    rows[list(layers)] = True
    places = np.zeros(shape, bool)
    if positions is None:
        places[:] = True
    elif np.asarray(positions).dtype == bool:
        places[:] = np.asarray(positions)
    else:
        t = shape[1]
        if wrong := [i for i in positions if not -t <= i < t]:
            raise ValueError(f"positions {wrong}: the texts have {t} tokens, 0 to {t - 1}")
        places[:, list(positions)] = True
    return rows[:, None, None] & places[None]
