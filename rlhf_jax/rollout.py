"""Sampling from a policy: prefill and decode in one compiled program, no text, no host.

A sample depends on the weights, its prompt, the phase key and `(prompt_id, sample_id)` alone: the
random number of token `i` comes from `fold_in(fold_in(fold_in(key, prompt_id), sample_id), i)`, so
neither the batch it is in, nor its place there, nor the mesh changes it. `i` counts the tokens that
the policy chose: what an environment writes between them moves no random number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import environment as environments
from rlhf_jax.environment import Environment, World
from rlhf_jax.types import Params, Prompts, Rollout


@struct.dataclass
class Sampling:
    """How tokens are drawn. Values are arrays: changing one never recompiles."""

    temperature: float | Float[Array, ""] = 1.0  # above 0; for greedy decoding use top_k=1
    top_k: int | Int[Array, ""] = 0  # 0: all
    top_p: float | Float[Array, ""] = 1.0  # 1: all
    stop: tuple[int | Int[Array, ""], ...] = ()  # ids that end a row (only their number is static)
    banned: tuple[int | Int[Array, ""], ...] = ()  # ids never drawn: padding, BOS, control tokens


def log_probabilities(
    logits: Float[Array, "b v"], temperature: Float[Array, "b"]
) -> Float[Array, "b v"]:
    """Log-softmax at a temperature, in nats: the one function of sampler and trainer."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature[:, None], axis=-1)


def filtered(logp: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """Log-probabilities of what is drawn from: banned ids, then top-k, then top-p, renormalised.

    Top-p keeps the most likely tokens until their sum reaches p, the one that crosses included
    (Holtzman et al. 2020, eq. 2). Tokens that tie with the last one kept are kept.
    """
    vocab = logp.shape[-1]
    if sampling.banned:
        ids = jnp.stack([jnp.asarray(i, jnp.int32) for i in sampling.banned])
        logp = jnp.where((jnp.arange(vocab)[:, None] == ids[None]).any(1)[None], -jnp.inf, logp)
        logp = jax.nn.log_softmax(logp, axis=-1)

    def cut(logp):
        ordered = jnp.sort(logp, axis=-1, descending=True)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
        place = jnp.arange(vocab)[None]
        ordered = jnp.where(place < k, ordered, -jnp.inf)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        # A float32 sum of probabilities reaches 1 long before its last term: 1 means all by itself.
        kept = (before < sampling.top_p) | (sampling.top_p >= 1.0) | (place == 0)
        kept &= ordered > -jnp.inf
        least = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        return jax.nn.log_softmax(jnp.where(logp >= least, logp, -jnp.inf), axis=-1)

    # The sort over the vocabulary is paid for only when it does something.
    wanted = (jnp.asarray(sampling.top_k) > 0) | (jnp.asarray(sampling.top_p) < 1.0)
    return jax.lax.cond(wanted, cut, lambda x: x, logp)


def draw(logp: Float[Array, "b v"], uniform: Float[Array, "b"]) -> Int[Array, "b"]:
    """Inverse-CDF sampling with one uniform number a row; a token of probability 0 is never drawn.

    Two levels, blocks and then inside one: faster than one long cumulative sum, far faster than
    Gumbel noise for every token, and rounding stays that of √v terms.
    """
    rows, vocab = logp.shape
    width = max(1, int(vocab**0.5))
    blocks = -(-vocab // width)
    p = jnp.pad(jnp.exp(logp), ((0, 0), (0, blocks * width - vocab))).reshape(rows, blocks, width)

    def pick(mass, target):  # mass [b, n], target [b] -> index, mass before it
        # A parallel sum may rise, by rounding, where the mass is 0: look at what has mass only.
        total, possible = jnp.cumsum(mass, axis=-1), mass > 0
        beyond = possible & (total > target[:, None])
        last = mass.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
        index = jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
        return index, jnp.take_along_axis(total - mass, index[:, None], axis=-1)[:, 0]

    mass = p.sum(-1)
    target = uniform * mass.sum(-1)
    block, before = pick(mass, target)
    inside = jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0]
    index, _ = pick(inside, jnp.maximum(target - before, 0.0))
    return (block * width + index).astype(jnp.int32)


class _Row(NamedTuple):
    """What the decoding loop carries."""

    index: Int[Array, ""]
    turn: Int[Array, "b 1+k"]  # the token chosen last, and what the environment wrote behind it
    count: Int[Array, "b"]  # how many it wrote
    end: Int[Array, "b"]  # tokens in the text
    done: Bool[Array, "b"]
    tokens: Int[Array, "b t"]
    mask: Bool[Array, "b t"]
    logp: Float[Array, "b t"]
    behaviour_logp: Float[Array, "b t"]
    world: World | None  # None: no environment


def _start(prompts: Prompts, world: World | None, capacity: int, pad: int) -> _Row:
    """Rows before the first response token."""
    b, p = prompts.tokens.shape
    prompt = jnp.arange(capacity)[None, :] < prompts.length[:, None]
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, capacity - p)), constant_values=pad)
    zeros = jnp.zeros((b, capacity), jnp.float32)
    return _Row(
        index=jnp.int32(0),
        turn=jnp.zeros((b, 1), jnp.int32),
        count=jnp.zeros((b,), jnp.int32),
        end=prompts.length.astype(jnp.int32),
        done=jnp.zeros((b,), bool),
        tokens=jnp.where(prompt, padded, pad).astype(jnp.int32),
        mask=jnp.zeros((b, capacity), bool),
        logp=zeros,
        behaviour_logp=zeros,
        world=world,
    )


def _chosen(state: _Row, token, logp, behaviour, stop) -> _Row:
    """Write a token of the policy behind every row that is not done."""
    row, capacity = jnp.arange(token.shape[0]), state.tokens.shape[1]
    at = jnp.where(state.done, capacity, state.end)  # out of range: drop

    def put(array, value):
        return array.at[row, at].set(value, mode="drop")

    def of_token(x):
        return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]

    ended = jnp.zeros_like(state.done)
    for one in stop:
        ended |= token == one
    return state._replace(
        index=state.index + 1,
        turn=token[:, None],
        end=jnp.where(state.done, state.end, state.end + 1),
        done=state.done | ended,
        tokens=put(state.tokens, token),
        mask=put(state.mask, True),
        logp=put(state.logp, of_token(logp)),
        behaviour_logp=put(state.behaviour_logp, of_token(behaviour)),
    )


def _answered(before: _Row, state: _Row, answer: environments.Answer) -> _Row:
    """Write what the environment says behind the token just chosen, if the row was not done."""
    (b, k), capacity = answer.forced.shape, state.tokens.shape[1]
    live, row, place = ~before.done, jnp.arange(b), jnp.arange(k)[None]
    written = (place < answer.count[:, None]) & live[:, None]
    at = jnp.where(written, state.end[:, None] + place, capacity)
    paid = jnp.where(live, before.end, capacity)
    world = World(
        state=answer.state,
        earned=state.world.earned.at[row, paid].set(answer.reward, mode="drop"),
        valid=state.world.valid & (answer.valid | ~live),
    )
    return state._replace(
        turn=jnp.concatenate([state.turn, answer.forced], axis=1),
        count=answer.count,
        end=jnp.where(live, state.end + answer.count, state.end),
        done=state.done | answer.done,
        tokens=state.tokens.at[row[:, None], at].set(answer.forced, mode="drop"),
        world=world,
    )


def generate(
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    model,
    length: int,
    sampling: Sampling,
    pad: int = 0,
    environment: Environment | None = None,
    context: Any = None,
) -> Rollout:
    """Up to `length` tokens after each prompt; rows end at a stop id, which they keep.

    The response follows its prompt without a gap, padding is on the right, and the loop ends when
    every row has. Result arrays are `[b, p + length]`.

    An `environment` makes the prompts, of which only the names are then used, writes up to k tokens
    behind each one chosen, pays for it, and may end the row; it is given `context`, any pytree.
    Result arrays are `[b, p + length (1 + k)]`. What breaks its contract earns nan.
    """
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(
        prompts.prompt_id, prompts.sample_id
    )
    world, k, vocab = None, 0, getattr(model, "vocab", None)
    if environment is not None:
        world, prompts = environments.begin(
            environment, context, prompts, key, length=length, pad=pad, vocab=vocab
        )
        k = environment.forced
    b, p = prompts.tokens.shape
    capacity = p + length * (1 + k)
    temperature = jnp.full((b,), sampling.temperature, jnp.float32)
    stop = [jnp.asarray(i, jnp.int32) for i in sampling.stop]

    def choose(before: _Row, hidden) -> _Row:
        """Draw the next token of every row that is not done; let the environment answer."""
        logp = log_probabilities(model.logits(params, hidden), temperature)
        behaviour = filtered(logp, sampling)
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, before.index)))(keys)
        token = draw(behaviour, uniform)
        state = _chosen(before, token, logp, behaviour, stop)
        if environment is None:
            return state
        said = environments.answer(environment, context, before.world.state, token, vocab=vocab)
        return _answered(before, state, said)

    place = jnp.arange(p)[None]
    positions = jnp.where(place < prompts.length[:, None], place, -1)
    cache = model.empty_cache(b, capacity)
    hidden, cache = model.apply(params, prompts.tokens, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]

    def more(carry):
        state, _ = carry
        return (state.index < length) & ~state.done.all()

    def decode(carry):
        state, cache = carry
        place = jnp.arange(1 + k)[None]
        at = (state.end - 1 - state.count)[:, None] + place
        at = jnp.where(state.done[:, None] | (place > state.count[:, None]), -1, at)
        hidden, cache = model.apply(params, state.turn, positions=at, cache=cache)
        newest = jnp.take_along_axis(hidden, state.count[:, None, None], axis=1)[:, 0]
        return choose(state, newest), cache

    state = choose(_start(prompts, world, capacity, pad), last)
    state, _ = jax.lax.while_loop(more, decode, (state, cache))
    earned = jnp.zeros(state.logp.shape, jnp.float32)
    if environment is not None:
        broken = state.mask & ~state.world.valid[:, None]
        earned = jnp.where(broken, jnp.nan, state.world.earned)
    return Rollout(
        tokens=state.tokens,
        mask=state.mask,
        segments=(jnp.arange(capacity)[None] < state.end[:, None]).astype(jnp.int32),
        logp=state.logp,
        behaviour_logp=state.behaviour_logp,
        temperature=temperature,
        ended=state.done,
        prompt_id=prompts.prompt_id,
        sample_id=prompts.sample_id,
        earned=earned,
        most=length,
    )
