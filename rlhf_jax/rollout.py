"""Sampling from a policy: prefill and decode in one compiled program, no text, no host.

A sample depends on the weights, its prompt, the phase key and `(prompt_id, sample_id)` alone: the
random number of token `i` comes from `fold_in(fold_in(fold_in(key, prompt_id), sample_id), i)`, so
neither the batch it is in, nor its place there, nor the mesh changes it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

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
    token: Int[Array, "b"]
    done: Bool[Array, "b"]
    tokens: Int[Array, "b t"]
    mask: Bool[Array, "b t"]
    logp: Float[Array, "b t"]
    behaviour_logp: Float[Array, "b t"]


def _start(prompts: Prompts, length: int, pad: int) -> tuple[_Row, Bool[Array, "b t"]]:
    """Rows before the first response token, and where their prompts are."""
    b, p = prompts.tokens.shape
    prompt = jnp.arange(p + length)[None, :] < prompts.length[:, None]
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, length)), constant_values=pad)
    zeros = jnp.zeros((b, p + length), jnp.float32)
    state = _Row(
        index=jnp.int32(0),
        token=jnp.zeros((b,), jnp.int32),
        done=jnp.zeros((b,), bool),
        tokens=jnp.where(prompt, padded, pad).astype(jnp.int32),
        mask=jnp.zeros((b, p + length), bool),
        logp=zeros,
        behaviour_logp=zeros,
    )
    return state, prompt


def generate(
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    model,
    length: int,
    sampling: Sampling,
    pad: int = 0,
) -> Rollout:
    """Up to `length` tokens after each prompt; rows end at a stop id, which they keep.

    The response follows its prompt without a gap, padding is on the right, and the loop ends when
    every row has. Result arrays are `[b, p + length]`.
    """
    b, p = prompts.tokens.shape
    row = jnp.arange(b)
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(
        prompts.prompt_id, prompts.sample_id
    )
    temperature = jnp.full((b,), sampling.temperature, jnp.float32)
    stop = [jnp.asarray(i, jnp.int32) for i in sampling.stop]

    def choose(state: _Row, hidden) -> _Row:
        """Draw the next token of every row that is not done, and write it behind the row."""
        logp = log_probabilities(model.logits(params, hidden), temperature)
        behaviour = filtered(logp, sampling)
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, state.index)))(keys)
        token = draw(behaviour, uniform)
        at = jnp.where(state.done, p + length, prompts.length + state.index)  # out of range: drop

        def put(array, value):
            return array.at[row, at].set(value, mode="drop")

        def of_token(x):
            return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]

        ended = jnp.zeros_like(state.done)
        for one in stop:
            ended |= token == one
        return _Row(
            index=state.index + 1,
            token=token,
            done=state.done | ended,
            tokens=put(state.tokens, token),
            mask=put(state.mask, True),
            logp=put(state.logp, of_token(logp)),
            behaviour_logp=put(state.behaviour_logp, of_token(behaviour)),
        )

    state, prompt = _start(prompts, length, pad)
    # Padding of a short prompt is written to the cache too, behind it: each such place is
    # overwritten by a response token before anything attends to it.
    positions = jnp.broadcast_to(jnp.arange(p), (b, p))
    cache = model.empty_cache(b, p + length)
    hidden, cache = model.apply(params, prompts.tokens, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]

    def more(carry):
        state, _ = carry
        return (state.index < length) & ~state.done.all()

    def decode(carry):
        state, cache = carry
        at = jnp.where(state.done, p + length, prompts.length + state.index - 1)
        hidden, cache = model.apply(
            params, state.token[:, None], positions=at[:, None], cache=cache
        )
        return choose(state, hidden[:, 0]), cache

    state, _ = jax.lax.while_loop(more, decode, (choose(state, last), cache))
    return Rollout(
        tokens=state.tokens,
        mask=state.mask,
        segments=(state.mask | prompt).astype(jnp.int32),
        logp=state.logp,
        behaviour_logp=state.behaviour_logp,
        temperature=temperature,
        ended=state.done,
        prompt_id=prompts.prompt_id,
        sample_id=prompts.sample_id,
    )
