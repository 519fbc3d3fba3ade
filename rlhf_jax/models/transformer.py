"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The rest of the house sees a `Transformer`: numbers, and five pure functions over a bare nested dict
of parameters. Flax stays inside this file. Other models offer the same five.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rlhf_jax.models.attention import dot_attention as dot_attention
from rlhf_jax.sharding import gather_columns, split_rows
from rlhf_jax.types import Params

Cache = Any  # keys and values [b, s, kv_heads, head_dim]: one pair a layer, or stacked when scanned
Tap = Callable[[Int[Array, ""], Float[Array, "b t d"]], Float[Array, "b t d"]]
Attention = Callable[..., Float[Array, "b t h k"]]


class Output(NamedTuple):
    """What `apply` returns: normalised hidden states, and the cache with this call's tokens."""

    hidden: Float[Array, "b t d"]
    cache: Cache | None


@dataclass(frozen=True)
class Transformer:
    """Shape and precision of a model; parameters are float32, `dtype` is what it computes in."""

    vocab: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 352
    head_dim: int | None = None  # None: width // heads
    context: int = 1024  # longest text, in tokens
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    lm_head: bool = True
    tied: bool = True  # the head is the transposed embedding
    value_head: bool = False  # one number a position; starts at zero
    scan: bool = False  # one compiled block for all layers: compiles faster, runs slower on CPU
    remat: bool = False  # recompute a block's activations in the backward pass
    dtype: str = "float32"
    side_mlp: int = 0  # width of a second MLP beside each block's own; 0: none
    side_gate: float = 1.0  # what it writes is multiplied by this, and so is what teaches it
    tap: Tap | None = None  # layer, hidden -> hidden: reads or replaces the residual stream
    attention: Attention | None = None  # the kernel, such as `attention.myopic`; None: softmax

    def __post_init__(self):
        for name in ("tap", "attention"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: a function or None; an experiment's file "
                    f"says replace(model, {name}=...)"
                )
        if self.side_mlp < 0:
            raise ValueError(f"side_mlp is {self.side_mlp}: a width, or 0 for none")
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "mlp", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        if self.size_of_head % 2:
            raise ValueError(f"head_dim {self.size_of_head} must be even: rotations act on pairs")

    @property
    def size_of_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters; the value head is zero."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return _Decoder(self).init(key, tokens, jnp.zeros_like(tokens), jnp.ones_like(tokens))[
            "params"
        ]

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        tap: Tap | None = None,
        attention: Attention | None = None,
    ) -> Output:
        """Hidden states after the last norm.

        Without a cache, a token attends to earlier tokens of its own segment (0 is padding;
        default: all one segment) and its position is the index within it. With a cache, tokens are
        written at `positions` and attend to everything at or before their own.

        `tap(layer, hidden) -> hidden` reads or replaces the residual stream after each block;
        `attention(query, key, value, mask) -> [b, t, heads, head_dim]` swaps the kernel. None
        leaves the model's own, whose value stands in the fields of those names.
        """
        given = {"tap": tap, "attention": attention}
        own = replace(self, **{name: hook for name, hook in given.items() if hook is not None})
        if positions is None and segments is None:  # known without a scan, which XLA would fold
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        if positions is None:
            positions = index_in_segment(segments)
        hidden, cache = _Decoder(own).apply({"params": params}, tokens, positions, segments, cache)
        return Output(hidden, cache)

    def logits(self, params: Params, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """Float32 logits of the next token."""
        kernel = params["embed"]["embedding"].T if self.tied else params["head"]["kernel"]
        flat = hidden.reshape(-1, self.width) @ kernel.astype(self.dtype)
        return flat.reshape(*hidden.shape[:-1], self.vocab).astype(jnp.float32)

    def value(self, params: Params, hidden: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        """The scalar head, float32 throughout: exactly 0 before the first update."""
        head = params["value_head"]
        return (hidden.astype(jnp.float32) @ head["kernel"])[..., 0] + head["bias"][0]

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Room for `length` tokens a row, in the compute dtype."""
        shape = (rows, length, self.kv_heads, self.size_of_head)
        if self.scan:
            shape = (self.layers, *shape)
            return split_rows((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)), axis=1)
        return split_rows(
            tuple(
                (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
                for _ in range(self.layers)
            )
        )


def index_in_segment(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token within its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def rotate(x: Float[Array, "b t h k"], positions: Int[Array, "b t"], theta: float) -> Array:
    """Rotary positions (Su et al. 2021, eq. 34), halves paired as in Llama, angles in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class _Linear(nn.Module):
    """`x @ kernel` on two-dimensional operands.

    A three-dimensional product makes XLA:CPU transpose whole activations in the backward pass.
    """

    features: int
    dtype: str
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        flat = x.reshape(-1, x.shape[-1]) @ kernel.astype(self.dtype)
        return flat.reshape(*x.shape[:-1], self.features)


class _Norm(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * root * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class _Embed(nn.Module):
    vocab: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (self.vocab, self.width), jnp.float32)
        return gather_columns(table)[tokens]


class _Block(nn.Module):
    """`(hidden, cache), layer -> (hidden, cache), None`: the shape `nn.scan` wants."""

    config: Transformer

    @nn.compact
    def __call__(self, carry, layer, positions, mask):
        c = self.config
        hidden, cache = carry
        b, t, _ = hidden.shape
        narrow = 1 / (2 * c.layers)  # residual writes: the stream's variance stays that of depth 1

        x = _Norm(c.norm_epsilon, name="attention_norm")(hidden)
        query = _Linear(c.heads * c.size_of_head, c.dtype, name="query")(x)
        key = _Linear(c.kv_heads * c.size_of_head, c.dtype, name="key")(x)
        value = _Linear(c.kv_heads * c.size_of_head, c.dtype, name="value")(x)
        query = rotate(query.reshape(b, t, c.heads, -1), positions, c.rope_theta)
        key = rotate(key.reshape(b, t, c.kv_heads, -1), positions, c.rope_theta)
        value = value.reshape(b, t, c.kv_heads, -1)
        if cache is not None:
            cache, key, value = _write(cache, layer, positions, key, value, stacked=c.scan)
        attend = c.attention if c.attention is not None else dot_attention
        x = attend(query, key, value, mask).reshape(b, t, -1)
        hidden = hidden + _Linear(c.width, c.dtype, narrow, name="out")(x)

        x = _Norm(c.norm_epsilon, name="mlp_norm")(hidden)
        gate = _Linear(c.mlp, c.dtype, name="gate")(x)
        up = _Linear(c.mlp, c.dtype, name="up")(x)
        hidden = hidden + _Linear(c.width, c.dtype, narrow, name="down")(nn.silu(gate) * up)
        if c.side_mlp:
            side = nn.silu(_Linear(c.side_mlp, c.dtype, name="side_up")(x))
            side = _Linear(c.width, c.dtype, narrow, name="side_down")(side)
            hidden = hidden + jnp.asarray(c.side_gate, side.dtype) * side
        if c.tap is not None:
            hidden = c.tap(layer, hidden)
        return (split_rows(hidden), cache), None


def _write(cache, layer, positions, key, value, *, stacked):
    """Put this call's keys and values at their positions; return what the layer attends to."""
    row = jnp.arange(positions.shape[0])[:, None]
    keys, values = cache
    at = (layer, row, positions) if stacked else (row, positions)
    keys = keys.at[at].set(key, mode="drop")
    values = values.at[at].set(value, mode="drop")
    if not stacked:
        return (keys, values), keys, values
    read = jax.lax.dynamic_index_in_dim
    return (keys, values), read(keys, layer, keepdims=False), read(values, layer, keepdims=False)


class _Decoder(nn.Module):
    config: Transformer

    @nn.compact
    def __call__(self, tokens, positions, segments, cache=None):
        c = self.config
        hidden = _Embed(c.vocab, c.width, name="embed")(tokens).astype(c.dtype)
        # A weight of 0 does not hide a nan: padding enters as zeros, whatever its row holds.
        hidden = split_rows(jnp.where((segments > 0)[:, :, None], hidden, 0))
        if cache is None:
            index = jnp.arange(tokens.shape[1])
            causal = index[:, None] >= index[None, :]
            same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
            mask = same & causal[None]
        else:
            length = jax.tree.leaves(cache)[0].shape[-3]
            mask = jnp.arange(length)[None, None, :] <= positions[:, :, None]

        block = nn.remat(_Block, prevent_cse=not c.scan) if c.remat else _Block
        if c.scan:
            # The cache rides in the carry: as scanned input and output it would exist twice.
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.layers,
            )(c, name="layers")
            (hidden, cache), _ = layers((hidden, cache), jnp.arange(c.layers), positions, mask)
        else:
            new = []
            for i in range(c.layers):
                layer = block(c, name=f"layers_{i}")
                own = None if cache is None else cache[i]
                (hidden, own), _ = layer((hidden, own), jnp.int32(i), positions, mask)
                new.append(own)
            cache = None if cache is None else tuple(new)

        hidden = _Norm(c.norm_epsilon, name="final_norm")(hidden)
        if self.is_initializing():
            if c.lm_head and not c.tied:
                _Linear(c.vocab, c.dtype, name="head")(hidden)
            if c.value_head:
                nn.Dense(1, kernel_init=nn.initializers.zeros, name="value_head")(hidden)
        return hidden, cache
