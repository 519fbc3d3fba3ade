"""The attractor test: after a few tokens of another world, how soon is a text back in the first?

    prompts = inject(key, worlds, 512, attractor=3, other=0, length=4)
    rollout = generate(params, prompts, key, model=model, length=32, ...)
    found = attraction(rollout.tokens[:, prompts.tokens.shape[1] :], worlds, attractor=3)
    base = predicted_attraction(prompts.tokens, worlds, attractor=3)

A lag counts the tokens after the injection from 0: lag k is `continuations[:, k]`. A text has
returned at the first lag at which at least 3 of the last 4 tokens, of the continuation alone, are
tokens of the attractor's block: lag 2 at the earliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.measure import estimate
from rlhf_jax.measure.estimate import Estimate
from rlhf_jax.measure.world_filter import answers_due, beliefs
from rlhf_jax.measure.worlds import Worlds
from rlhf_jax.types import Prompts

NEEDED, OF = 3, 4  # tokens of the attractor among the last ones
BITS = OF - 1  # tokens before the newest that a return depends on
OTHERS = ("segment", "context", "digit")  # what may come next besides a word, a surface token


@dataclass(frozen=True)
class Attraction:
    """How n texts go on after an injection; of `t` lags. Exact predictions have errors of 0."""

    share: Estimate  # [t], of tokens of the attractor's block at each lag
    hazard: Estimate  # [t], P(return at this lag | not before); `n` texts were at risk
    early: Estimate  # returns/texts at risk over the early lags: mean hazard, per token
    survival: Float[np.ndarray, "t"]  # not returned up to and including the lag (Kaplan-Meier)
    median: float  # first lag with survival ≤ ½; inf: more than half are still away
    segment: Estimate  # P(SEG among the first tokens)


def inject(
    key: Array,
    worlds: Worlds,
    rows: int,
    *,
    attractor: int,
    other: int | None,
    length: int,
    lead: int = 8,
    noisy: bool = False,
    before: Sequence[int] = (),
) -> Prompts:
    """BOS, `before`, `lead` tokens of the attractor's world, `length` tokens of another one.

    `other=None` injects uniform surface tokens. The tokens are uniform over a world's block, or
    with `noisy` drawn from its emission. `before` holds control tokens, one of them naming a world
    perhaps. The rows are `1 + len(before) + lead + length` long.

    Raises:
        ValueError: for worlds that do not exist, or lengths below 0.
    """
    known = range(len(worlds.prior))
    if attractor not in known or (other is not None and other not in known):
        raise ValueError(
            f"attractor={attractor}, other={other}: worlds are 0 … {len(known) - 1}, and other may "
            "be None for uniform tokens"
        )
    if lead < 0 or length < 0 or rows < 1:
        raise ValueError(
            f"rows={rows} must be 1 or more, lead={lead} and length={length} 0 or more"
        )
    table = worlds.emission if noisy else worlds.own
    uniform = np.full(worlds.surface, 1 / worlds.surface)
    kinds = np.stack([table[attractor], uniform if other is None else table[other]])
    logits = np.where(kinds > 0, np.log(np.where(kinds > 0, kinds, 1.0)), -np.inf)
    logits = jnp.asarray(np.repeat(logits, [lead, length], axis=0), jnp.float32)
    words = jax.random.categorical(key, logits, shape=(rows, lead + length))
    first = jnp.tile(jnp.asarray([[worlds.bos, *before]], jnp.int32), (rows, 1))
    tokens = jnp.concatenate([first, words.astype(jnp.int32)], axis=1)
    row = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(tokens, jnp.full_like(row, tokens.shape[1]), row, jnp.zeros_like(row))


def attraction(
    continuations: Int[np.ndarray, "n t"],
    worlds: Worlds,
    *,
    attractor: int,
    mask: Bool[np.ndarray, "n t"] | None = None,
    early: tuple[int, int] = (1, 8),
    within: int = 4,
) -> Attraction:
    """Shares by lag, returns and use of SEG in texts that a model wrote after an injection.

    `mask` is True up to a text's end: what ends early is censored there, which presumes that ending
    says nothing of returning. `early` are the first and last lag that `Attraction.early` pools;
    `within` is how many tokens may hold the SEG. Errors are binomial, √(p(1 − p)/n).
    """
    tokens = np.asarray(continuations)
    there = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if tokens.ndim != 2 or there.shape != tokens.shape:
        raise ValueError(
            f"continuations and mask are both [n, t], not {tokens.shape}, {there.shape}"
        )
    if (there[:, 1:] & ~there[:, :-1]).any():
        raise ValueError("a continuation's mask is True up to its end, without holes")
    hit = worlds.says(tokens, attractor) & there
    lag, returned = return_lags(tokens, worlds, attractor=attractor, mask=there)
    lags = np.arange(tokens.shape[1])
    risk = (there & (lags <= lag[:, None])).sum(axis=0)
    events = (returned[:, None] & (lags == lag[:, None])).sum(axis=0)
    seg = ((tokens == worlds.segment_id) & there)[:, :within].any(axis=1)
    return _summary(
        share=_binomial(hit.sum(axis=0), there.sum(axis=0)),
        events=events,
        risk=risk,
        early=early,
        segment=estimate.mean(seg[there[:, 0]]),
    )


def return_lags(
    continuations: Int[np.ndarray, "n t"],
    worlds: Worlds,
    *,
    attractor: int,
    mask: Bool[np.ndarray, "n t"] | None = None,
) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Lag of the first return and whether there was one; else the first lag not seen (censored)."""
    tokens = np.asarray(continuations)
    there = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    total = np.cumsum(np.pad(worlds.says(tokens, attractor) & there, ((0, 0), (OF, 0))), axis=1)
    back = (total[:, OF:] - total[:, :-OF] >= NEEDED) & there
    returned = back.any(axis=1)
    return np.where(returned, back.argmax(axis=1), there.sum(axis=1)), returned


def forecast(
    prompts: Int[np.ndarray, "n t"], worlds: Worlds, *, lags: int = 32
) -> Float[np.ndarray, "n k w"]:
    """P(world of the token at lag k | prompt) for k = 0 … lags, by the exact filter.

    With a = the filter's posterior after the prompt and without signs it is π + (1 − s)^{k+1}
    (a − π): the world may change before the first token, too. The token at lag k is of a world's
    block with probability (1 − noise)·P + noise·(block/surface).
    """
    mass = _start(prompts, worlds)[..., None]
    found = []
    for _ in range(lags + 1):
        found.append(mass.sum(axis=(2, 3)))
        mass = sum(_emit(mass, worlds, kind) for kind in ("word", *OTHERS))
    return np.stack(found, axis=1)


def predicted_attraction(
    prompts: Int[np.ndarray, "n t"],
    worlds: Worlds,
    *,
    attractor: int,
    lags: int = 32,
    early: tuple[int, int] = (1, 8),
    within: int = 4,
) -> Attraction:
    """What a perfect model of `worlds` does after these prompts, without sampling.

    Exact: the world, whether a digit is due, the last 3 tokens and whether the text has returned
    form a Markov chain, run from the filter's posterior of each prompt. Mean over prompts.
    """
    start, n = _start(prompts, worlds), len(prompts)
    mass = np.zeros((*start.shape, 2 << BITS))
    mass[..., 0] = start
    miss, hit = _window(False), _window(True)
    inside = worlds.emission[:, worlds.says(np.arange(worlds.surface), attractor)].sum(axis=1)
    share, gone = [], [0.0]
    for _ in range(lags):
        on = mass * inside[:, None, None]
        said = _emit(on, worlds, "word")
        share.append(said.sum() / n)
        rest = _emit(mass - on, worlds, "word") + sum(_emit(mass, worlds, x) for x in OTHERS)
        mass = said @ hit + rest @ miss
        gone.append(mass[..., 1 << BITS :].sum() / n)
    quiet = start[..., None]
    for _ in range(within):
        quiet = sum(_emit(quiet, worlds, kind) for kind in ("word", "context", "digit"))
    left = 1 - np.asarray(gone)
    return _summary(
        share=Estimate(np.asarray(share), np.zeros(lags), n),
        events=n * (left[:-1] - left[1:]),
        risk=n * left[:-1],
        early=early,
        segment=Estimate(max(0.0, float(1 - quiet.sum() / n)), 0.0, n),
        exact=True,
    )


def _start(prompts, worlds):
    """P(world of the next token, whether a digit is due), [n, w, 2]."""
    tokens = np.asarray(prompts)
    tokens = np.concatenate([tokens, np.full_like(tokens[:, :1], worlds.bos)], axis=1)
    world, due = beliefs(tokens, worlds).before[:, -1], answers_due(tokens, worlds)[:, -1, None]
    return np.stack([world * (1 - due), world * due], axis=-1)


def _emit(mass, worlds, kind):
    """Mass [n, w, due, ...] after a token of that kind; the world may change before the next."""
    prior = np.asarray(worlds.prior)[:, None]
    contexts = worlds.chat + worlds.code
    rate = {
        "word": 1 - worlds.segment - contexts,
        "segment": worlds.segment,
        "context": contexts,
        "digit": 1.0,
    }[kind]
    now = rate * mass[:, :, 1 if kind == "digit" else 0]
    switch = 1.0 if kind == "segment" else worlds.switch
    now = (1 - switch) * now + switch * prior * now.sum(axis=1, keepdims=True)
    due = worlds.answered if kind == "context" else 0.0
    return np.stack([(1 - due) * now, due * now], axis=2)


def _window(hit):
    """Transitions of (returned, the last 3 tokens as bits) when a token is of the block or not."""
    table = np.zeros((2 << BITS, 2 << BITS))
    for state in range(2 << BITS):
        last, returned = state % (1 << BITS), state >> BITS
        back = returned or (hit and last.bit_count() + 1 >= NEEDED)
        table[state, (back << BITS) + (2 * last + hit) % (1 << BITS)] = 1
    return table


def _summary(*, share, events, risk, early, segment, exact=False):
    """An Attraction from how many returned at each lag, of how many that could."""
    low, high = early
    if not 0 <= low <= high:
        raise ValueError(f"early={early} is the first and the last lag, from 0")
    hazard, window = _binomial(events, risk), slice(low, high + 1)
    pooled = _binomial(events[window].sum(), risk[window].sum())
    if exact:
        hazard, pooled = (x._replace(error=0 * x.error) for x in (hazard, pooled))
    survival = np.cumprod(1 - np.where(risk > 0, hazard.value, 0.0))
    left = survival <= 0.5 + 1e-12  # as many as half, but for rounding
    median = float(left.argmax()) if left.any() else float("inf")
    return Attraction(share, hazard, pooled, survival, median, segment)


def _binomial(count, n):
    """count/n with √(p(1 − p)/n); nan where there is nothing."""
    n = np.asarray(n)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.asarray(count / n)
        error = np.sqrt(np.maximum(p * (1 - p), 0.0) / n)
    return Estimate(p, error, n) if n.ndim else Estimate(float(p), float(error), n.item())
