"""How the next token is drawn: temperature, top-k, top-p, and the draw itself. Pure, no loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


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
