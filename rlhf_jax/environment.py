"""Turns that the policy does not take: an environment, compiled into the rollout.

After each token that the policy chooses, the environment may put tokens of its own behind it: a
tool's answer, a die, an opponent's move. They stand in the text, outside the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Prompts

OF_ENVIRONMENT = 2**32 - 1  # the sample_id, one that no sample has, whose key an environment gets


@dataclass(frozen=True)
class Environment:
    """Two pure functions of one row, which the rollout maps over its rows.

    `reset(key, context) -> state, prompt` begins an episode; `prompt` is int32 `[prompt]`, at least
    one token, and −1 behind the last. All samples of one prompt get the same key, so they meet the
    same problem; randomness later on is carried in `state`, a pytree whose shapes never change.

    `step(state, token, context) -> state, forced, count, reward, done` follows each token of the
    policy: the first `count` tokens of `forced`, int32 `[forced]`, are written behind it, `reward`
    is what it earned, and after `done` the row has ended. A row that has ended is stepped on while
    others last, and what comes of that is dropped.

    `context` holds the weights of the models named here, by name, so a model that answers may
    learn in the same run and never makes the rollout compile again.
    """

    reset: Callable
    step: Callable
    forced: int  # most tokens that may follow one of the policy's
    prompt: int  # longest prompt, in tokens
    context: tuple[str, ...] = ()

    def __post_init__(self):
        for name, least in (("forced", 0), ("prompt", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")

    def capacity(self, length: int) -> int:
        """Tokens of the longest row in which the policy speaks `length` times."""
        return self.prompt + length * (1 + self.forced)


class World(NamedTuple):
    """What an environment carries through the rollout, all rows of it."""

    state: Any
    earned: Float[Array, "b t"]
    valid: Bool[Array, "b"]  # prompts, counts and forced tokens were possible ones so far


class Answer(NamedTuple):
    """What follows one token of the policy."""

    state: Any
    forced: Int[Array, "b k"]
    count: Int[Array, "b"]
    reward: Float[Array, "b"]
    done: Bool[Array, "b"]
    valid: Bool[Array, "b"]


def begin(
    environment: Environment,
    context: Any,
    prompts: Prompts,
    key: Array,
    *,
    length: int,
    pad: int,
    vocab: int | None,
) -> tuple[World, Prompts]:
    """A world for every row, and the environment's prompts in place of the given ones.

    Raises:
        ValueError: if `reset` does not return what it should.
    """

    def one(prompt_id):
        # A key that no sample has: reset may split it, or fold numbers into it.
        own = jax.random.fold_in(jax.random.fold_in(key, prompt_id), OF_ENVIRONMENT)
        return _reset(environment, context, own)

    state, tokens = _over_rows(one, prompts.prompt_id)
    used = jnp.cumprod(tokens >= 0, axis=1, dtype=jnp.int32) > 0
    size = used.sum(1, dtype=jnp.int32)
    # A hole, an empty prompt or an id beyond the vocabulary: the row goes on and is reported.
    valid = (size > 0) & (used | (tokens < 0)).all(1) & _known(tokens, vocab).all(1)
    rows = size.shape[0]
    world = World(state, jnp.zeros((rows, environment.capacity(length)), jnp.float32), valid)
    return world, prompts.replace(
        tokens=jnp.where(used, tokens, pad).astype(jnp.int32), length=jnp.maximum(size, 1)
    )


def answer(
    environment: Environment, context: Any, state: Any, token: Int[Array, "b"], *, vocab: int | None
) -> Answer:
    """One step of every row.

    Raises:
        ValueError: if `step` does not return what it should.
    """
    k = environment.forced
    state, forced, count, reward, done = _over_rows(
        lambda state, token: _step(environment, context, state, token), state, token
    )
    meant = jnp.arange(k)[None] < count[:, None]
    valid = (count >= 0) & (count <= k)
    valid &= (~meant | ((forced >= 0) & _known(forced, vocab))).all(1)
    return Answer(state, forced, jnp.clip(count, 0, k), reward, done, valid)


def check(environment: Environment, context: Any) -> None:
    """Trace both functions once, on the shapes of a context, without computing anything.

    Raises:
        ValueError: if one of them does not return what it should.
    """

    def both(key, context):
        state, _ = _reset(environment, context, key)
        return _step(environment, context, state, jnp.int32(0))

    jax.eval_shape(both, jax.random.key(0), context)


def _reset(environment, context, key):
    """One row's state and prompt."""
    found = environment.reset(key, context)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError("an environment's reset must return a tuple: state, prompt")
    state, prompt = found
    _check_shape("reset", "prompt", prompt, (environment.prompt,))
    return jax.tree.map(jnp.asarray, state), jnp.asarray(prompt, jnp.int32)


def _step(environment, context, state, token):
    """One row's state, forced tokens, count, reward and done."""
    found = environment.step(state, token, context)
    if not isinstance(found, tuple) or len(found) != 5:
        raise ValueError(
            "an environment's step must return a tuple: state, forced, count, reward, done"
        )
    new, forced, count, reward, done = found
    _check_shape("step", "forced", forced, (environment.forced,))
    for name, x in (("count", count), ("reward", reward), ("done", done)):
        _check_shape("step", name, x, ())
    return (
        _same_kind(state, new),
        jnp.asarray(forced, jnp.int32),
        jnp.asarray(count, jnp.int32),
        jnp.asarray(reward, jnp.float32),
        jnp.asarray(done, bool),
    )


def _over_rows(fn, *rows):
    """`vmap` in which a model that answers does not ask for its one row to be split over a mesh."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.vmap(fn)(*rows)


def _known(tokens, vocab):
    return tokens < vocab if vocab is not None else jnp.ones_like(tokens, bool)


def _check_shape(function, name, x, shape):
    if jnp.shape(x) != shape:
        raise ValueError(
            f"an environment's {function} must return {name} of shape {list(shape)}, not "
            f"{list(jnp.shape(x))}"
        )


def _same_kind(old, new):
    """The new state, if it has the structure, shapes and types of the old one."""
    new = jax.tree.map(jnp.asarray, new)
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "an environment's step must return a state of the structure that it was given: "
            f"{jax.tree.structure(old)}, not {jax.tree.structure(new)}"
        )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
    ):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"an environment's state{jax.tree_util.keystr(path)} was {a.dtype}"
                f"{list(a.shape)} and became {b.dtype}{list(b.shape)}: it may not change"
            )
    return new
