"""Return conditioning: control tokens that say what is still to be earned from here on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import masked
from rlhf_jax.conditioning import Edges, bin_of, edges_of, inserted
from rlhf_jax.environment import Environment
from rlhf_jax.types import Labeled


def of_tokens(batch: Labeled) -> Float[Array, "b t"]:
    """What each token earned: its own score."""
    return masked.select(batch.token_score, batch.mask)


def at_the_end(batch: Labeled) -> Float[Array, "b t"]:
    """What each token earned, where only whole texts are scored: all of it on the last one."""
    return masked.at_last(batch.score, batch.mask)


def returns_to_go(
    batch: Labeled,
    key: jax.Array,
    *,
    edges: Edges,
    tags: Sequence[int],
    every: int | None = 1,
    drop: float = 0.0,
    reward: Callable = of_tokens,
) -> Labeled:
    """Before each masked token, tags[k] for its Σ_{t' ≥ t} r (decision transformer: Chen 2021, §3).

    k is the number of `edges` at or below that sum. `every=n` writes one before every n-th masked
    token, `every=None` before the first only. The mask covers the text alone. With probability
    `drop` a row gets none. Rows hold one text each; they grow by as many columns as could be used.
    Departs: the return is binned, and there are no states between actions.
    """
    tags = jnp.asarray(tags, batch.tokens.dtype)
    edges = edges_of(edges, batch, len(tags))
    if every is not None and every < 1:
        raise ValueError(f"every={every}: at least 1, or None for the first token only")
    width = batch.tokens.shape[1]
    period = width if every is None else every
    to_go = jnp.cumsum(reward(batch)[:, ::-1], axis=1)[:, ::-1]
    number = jnp.cumsum(batch.mask, axis=1) - batch.mask  # among the masked ones, from 0
    before = batch.mask & (number % period == 0)
    before &= ~jax.random.bernoulli(key, drop, before.shape[:1])[:, None]
    tag = tags[bin_of(to_go, edges)]
    # "Before token t" is "behind token t − 1"; a text's first token is never masked.
    tag, after = (jnp.roll(x, -1, axis=1) for x in (tag, before))
    return inserted(batch, tag, after, room=-(-(width - 1) // period))


def on_request(
    environment: Environment,
    *,
    request: float,
    edges: Sequence[float],
    tags: Sequence[int],
    every: int = 1,
) -> Environment:
    """The environment, with control tokens that ask the policy for a return of `request`.

    A tag stands at the end of the prompt and behind every n-th token that the policy chooses; it
    speaks of the request less what was earned so far (Chen et al. 2021, §3). For tags at the start
    only, and no environment, `conditioning.tagged` with `place=before_response` does it.
    """
    if len(edges) + 1 != len(tags):
        raise ValueError(f"{len(tags)} tags need {len(tags) - 1} edges, not {len(edges)}")
    if every < 1:
        raise ValueError(f"every={every}: at least 1")

    bound = {"environment": environment, "edges": tuple(edges), "tags": tuple(tags)}
    return Environment(
        partial(_reset, request=request, **bound),
        partial(_step, every=every, **bound),
        forced=environment.forced + 1,
        prompt=environment.prompt + 1,
        context=environment.context,
    )


def _reset(key, context, *, environment, request, edges, tags):
    state, prompt = environment.reset(key, context)
    left = jnp.float32(request)
    prompt = jnp.append(jnp.asarray(prompt, jnp.int32), -1)
    prompt = prompt.at[jnp.argmax(prompt < 0)].set(_tag_for(left, edges, tags))
    return (state, left, jnp.int32(0)), prompt


def _step(state, token, context, *, environment, every, edges, tags):
    inner, left, chosen = state
    inner, forced, count, reward, done = environment.step(inner, token, context)
    left, chosen = left - reward, chosen + 1
    ask = jnp.logical_not(done) & (chosen % every == 0)
    possible = (count >= 0) & (count <= environment.forced)
    forced = jnp.append(jnp.asarray(forced, jnp.int32), 0)
    forced = forced.at[count].set(_tag_for(left, edges, tags))
    # An impossible count stays one, for the rollout to report.
    return (inner, left, chosen), forced, jnp.where(possible, count + ask, -1), reward, done


def _tag_for(left, edges, tags):
    return jnp.array(tags, jnp.int32)[bin_of(left, jnp.array(edges, jnp.float32))]
