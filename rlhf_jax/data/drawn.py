"""A stream whose batches a pure function makes: a toy, a simulator."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.endless import Shard, own_rows
from rlhf_jax.types import Labeled, Prompts, Sequences


def drawn(
    *,
    seed: int,
    shard: Shard,
    batch: int,
    draw: Callable[[jax.Array, int], Sequences | Prompts],
    salt: int = 0,
) -> grain.IterDataset:
    """Batches of `draw(key, rows)`, a function in JAX; batch s is the same on every mesh.

    `salt` keeps apart two streams of one run that draw with the same function. A study whose seeds
    train in one program calls `draw` inside it, with the same keys.
    """
    mine = own_rows(shard, batch)
    source = grain.MapDataset.source(_Drawn(jax.jit(partial(draw, rows=batch)), seed, salt, mine))
    return source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def drawn_key(seed: int | jax.Array, place: int | jax.Array, salt: int = 0) -> jax.Array:
    """The key of batch `place` of a drawn stream."""
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"drawn") & 0x7FFFFFFF)
    return jax.random.fold_in(jax.random.fold_in(root, salt), place)


def one_prompt(key: jax.Array, rows: int, *, tokens: tuple[int, ...]) -> Prompts:
    """A draw for `drawn`: the same tokens in every row, each row a prompt of its own."""
    del key
    row = jnp.arange(rows, dtype=jnp.int32)
    start = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (rows, len(tokens)))
    return Prompts(start, jnp.full_like(row, len(tokens)), row, jnp.zeros_like(row))


def whole_texts(
    tokens: Int[jax.Array, "b t"], score: Float[jax.Array, "b"] | None = None, *, given: int = 1
) -> Labeled:
    """Texts without padding as a batch; the first `given` tokens are outside the mask."""
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= given, tokens.shape)
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    score = zeros[:, 0] if score is None else jnp.asarray(score, jnp.float32)
    return Labeled(tokens, mask, jnp.ones_like(tokens), score, zeros)


class _Drawn:
    """This process's rows of every batch."""

    def __init__(self, draw, seed: int, salt: int, mine: np.ndarray):
        self.draw, self.seed, self.salt, self.mine = draw, seed, salt, mine

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, at: int):
        batch = self.draw(drawn_key(self.seed, int(at), self.salt))
        return jax.tree.map(lambda x: np.asarray(x)[self.mine], batch)

    def __repr__(self) -> str:
        return f"batches drawn with seed {self.seed}"
