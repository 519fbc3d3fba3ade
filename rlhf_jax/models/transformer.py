"""A decoder-only transformer; what tells Llama, Qwen, Gemma, GPT-2 and GPT-NeoX apart is a number.

The rest of the house sees a `Transformer`: numbers, and five pure functions over a bare nested dict
of parameters. Flax stays inside this file. Other models offer the same five. The defaults are
Llama's: RMSNorm, rotary positions, grouped-query attention, SwiGLU; `families.py` has the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rlhf_jax.models.attention import capped_attention, dot_attention
from rlhf_jax.sharding import gather_columns, split_rows
from rlhf_jax.types import Params

Cache = Any  # keys and values [b, s, kv_heads, head_dim]: one pair a layer, or stacked when scanned
Tap = Callable[[Int[Array, ""], Float[Array, "b t d"]], Float[Array, "b t d"]]
Attention = Callable[..., Float[Array, "b t h k"]]


ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}
REMAT = {  # what the backward pass finds of a block's activations
    "none": None,  # all of them
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of products with weights
}


class Output(NamedTuple):
    """What `apply` returns: normalised hidden states, and the cache with this call's tokens."""

    hidden: Float[Array, "b t d"]
    cache: Cache | None


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for texts longer than those of pretraining.

    "linear": all ÷ factor. "llama3": those with a wavelength above original / low ÷ factor, those
    below original / high as they are, a blend between (Llama 3.1's).
    """

    kind: str = "linear"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192  # context of pretraining, in tokens

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f'rope scaling of kind {self.kind!r}; valid: "linear", "llama3"')


@dataclass(frozen=True)
class Lora:
    """Terms of low rank beside some matrices: x W + alpha / rank · (x A) B (Hu et al. 2021, eq. 3).

    A starts random and B at 0, so that a fresh adapter changes nothing.
    """

    rank: int = 8
    alpha: float = 16.0
    on: str = "query|key|value|out|gate|up|down"  # regular expression of the matrices' names

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora rank {self.rank}: at least 1")


@dataclass(frozen=True)
class Transformer:
    """Shape and precision of a model; `dtype` is what it computes in."""

    vocab: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 352
    head_dim: int | None = None  # None: width // heads
    context: int = 1024  # longest text, in tokens
    positions: str = "rotary"  # or "learned": a table of `context` rows
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_part: float = 1.0  # of each head's width that is rotated
    norm: str = "rms"  # or "layer": less the mean, with a bias
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # added to the stored scale (Gemma: 1)
    post_norms: bool = False  # what attention and MLP write is normalised, too
    parallel: bool = False  # attention and MLP read the same hidden states (GPT-NeoX)
    query_key_norm: bool = False  # RMSNorm of each head's queries and keys
    query_scale: float | None = None  # of attention's logits; None: head_dim ** -0.5
    attention_cap: float | None = None  # logits become cap · tanh(logit / cap)
    logit_cap: float | None = None  # the same for the next token's
    window: int = 0  # tokens that a local layer sees, its own included; 0: all
    local_layers: tuple[bool, ...] = ()  # which layers have the window; (): all
    local_rope_theta: float | None = None  # of those layers, unscaled; None: as the others
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True  # MLP: activation(gate) · up; False: activation(up)
    activation: str = "silu"  # or "gelu", "gelu_tanh"
    embed_scale: float = 1.0
    lm_head: bool = True
    tied: bool = True  # the head is the transposed embedding
    value_head: bool = False  # one number a position; starts at zero
    scan: bool = False  # one compiled block for all layers: compiles faster, runs slower on CPU
    remat: str = "none"  # "full": recompute blocks in the backward pass; "dots": but for products
    dtype: str = "float32"
    param_dtype: str = "float32"  # of stored weights; those that are trained should be float32
    lora: Lora | None = None
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
        known = {"positions": ("rotary", "learned"), "norm": ("rms", "layer"),
                 "activation": tuple(ACTIVATIONS), "remat": tuple(REMAT)}  # fmt: skip
        for name, valid in known.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; valid: {', '.join(map(repr, valid))}"
                )
        if self.local_layers and len(self.local_layers) != self.layers:
            raise ValueError(
                f"local_layers has {len(self.local_layers)} entries for {self.layers} layers"
            )
        if self.attention_cap is not None and self.attention is not None:
            raise ValueError("attention_cap needs the own kernel: leave attention at None")
        if self.side_mlp < 0:
            raise ValueError(f"side_mlp is {self.side_mlp}: a width, or 0 for none")
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "mlp", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        if self.rotated % 2:
            raise ValueError(
                f"{self.rotated} of head_dim {self.size_of_head} are rotated: must be even, since "
                "rotations act on pairs"
            )

    @property
    def size_of_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    @property
    def rotated(self) -> int:
        """Leading numbers of a head that are rotated."""
        return int(self.size_of_head * self.rotary_part) if self.positions == "rotary" else 0

    def init(self, key: Array) -> Params:
        """Fresh parameters in `param_dtype`; the value head is zero, and float32."""
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
        flat = flat.reshape(*hidden.shape[:-1], self.vocab).astype(jnp.float32)
        return flat if self.logit_cap is None else self.logit_cap * jnp.tanh(flat / self.logit_cap)

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


def frequencies(model: Transformer, *, local: bool = False) -> Float[Array, "half"]:
    """Radians per token of the pairs that are rotated, in a layer with or without the window."""
    half, theta = model.rotated // 2, model.rope_theta
    if local and model.local_rope_theta is not None:
        theta = model.local_rope_theta
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = model.rope_scaling
    if scaling is None or (local and model.local_rope_theta is not None):
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.original * plain / (2 * math.pi)  # within the context of pretraining
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotate(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], frequency: Float[Array, "half"]
) -> Array:
    """Rotary positions (Su et al. 2021, eq. 34), halves paired as in Llama, angles in float32.

    Only the first 2 · half numbers of a head turn; the others stay.
    """
    half = frequency.shape[0]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    rest = x[..., 2 * half :]
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


class _Linear(nn.Module):
    """`x @ kernel`, a bias, a term of low rank; on two-dimensional operands.

    A three-dimensional product makes XLA:CPU transpose whole activations in the backward pass.
    """

    features: int
    model: Transformer
    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        dtype, stored = self.model.dtype, jnp.dtype(self.model.param_dtype)
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), stored)
        flat = x.reshape(-1, x.shape[-1])
        found = flat @ kernel.astype(dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), stored)
            found = found + bias.astype(dtype)[None]
        lora = self.model.lora
        if lora is not None and re.fullmatch(lora.on, self.name):
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as PEFT
            down = self.param("lora_a", init, (x.shape[-1], lora.rank), jnp.float32)
            up = self.param("lora_b", nn.initializers.zeros, (lora.rank, self.features))
            low = (flat @ down.astype(dtype)) @ up.astype(dtype)
            found = found + jnp.asarray(lora.alpha / lora.rank, dtype) * low
        return found.reshape(*x.shape[:-1], self.features)


class _Norm(nn.Module):
    model: Transformer
    kind: str | None = None  # None: the model's

    @nn.compact
    def __call__(self, x):
        c, shape = self.model, (1,) * (x.ndim - 1) + (-1,)
        stored = jnp.dtype(c.param_dtype)
        fresh = nn.initializers.constant(1 - c.norm_offset)
        scale = self.param("scale", fresh, (x.shape[-1],), stored)
        scale = scale.astype(jnp.float32) + c.norm_offset if c.norm_offset else scale
        wide = x.astype(jnp.float32)
        layer = (self.kind or c.norm) == "layer"
        if layer:
            wide = wide - wide.mean(axis=-1, keepdims=True)
        root = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + c.norm_epsilon)
        wide = wide * root * scale.reshape(shape)
        if layer:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), stored)
            wide = wide + bias.reshape(shape)
        return wide.astype(x.dtype)


class _Embed(nn.Module):
    rows: int
    model: Transformer

    @nn.compact
    def __call__(self, index):
        init, stored = nn.initializers.normal(0.02), jnp.dtype(self.model.param_dtype)
        table = self.param("embedding", init, (self.rows, self.model.width), stored)
        return gather_columns(table)[index]


class _Block(nn.Module):
    """`(hidden, cache), (layer, local) -> (hidden, cache), None`: the shape `nn.scan` wants."""

    config: Transformer

    @nn.compact
    def __call__(self, carry, which, positions, mask, near):
        c = self.config
        (hidden, cache), (layer, local) = carry, which
        linear = partial(_Linear, model=c)
        narrow = 1 / (2 * c.layers)  # residual writes: the stream's variance stays that of depth 1
        after = partial(_Norm, c) if c.post_norms else lambda name: lambda x: x

        def attention(x):
            b, t, _ = x.shape
            query = linear(c.heads * c.size_of_head, bias=c.qkv_bias, name="query")(x)
            key = linear(c.kv_heads * c.size_of_head, bias=c.qkv_bias, name="key")(x)
            value = linear(c.kv_heads * c.size_of_head, bias=c.qkv_bias, name="value")(x)
            query = query.reshape(b, t, c.heads, -1)
            key, value = (x.reshape(b, t, c.kv_heads, -1) for x in (key, value))
            if c.query_key_norm:
                query = _Norm(c, "rms", name="query_norm")(query)
                key = _Norm(c, "rms", name="key_norm")(key)
            if c.positions == "rotary":
                turn = frequencies(c)
                if c.local_rope_theta is not None:
                    turn = jnp.where(local, frequencies(c, local=True), turn)
                query, key = rotate(query, positions, turn), rotate(key, positions, turn)
            if c.query_scale is not None:  # the kernels multiply by head_dim ** -0.5
                query = query * jnp.asarray(c.query_scale * c.size_of_head**0.5, query.dtype)
            kept = cache
            if cache is not None:
                kept, key, value = _write(cache, layer, positions, key, value, stacked=c.scan)
            seen = mask if near is None else jnp.where(local, near, mask)
            attend = c.attention if c.attention is not None else dot_attention
            if c.attention_cap is not None:
                attend = partial(capped_attention, cap=c.attention_cap)
            x = attend(query, key, value, seen).reshape(b, t, -1)
            return linear(c.width, scale=narrow, bias=c.out_bias, name="out")(x), kept

        def mlp(x):
            act = ACTIVATIONS[c.activation]
            if c.gated:
                gate = linear(c.mlp, bias=c.mlp_bias, name="gate")(x)
                inner = act(gate) * linear(c.mlp, bias=c.mlp_bias, name="up")(x)
            else:
                inner = act(linear(c.mlp, bias=c.mlp_bias, name="up")(x))
            return linear(c.width, scale=narrow, bias=c.mlp_bias, name="down")(inner)

        read = hidden
        found, cache = attention(_Norm(c, name="attention_norm")(read))
        hidden = hidden + after(name="attention_post_norm")(found)
        x = _Norm(c, name="mlp_norm")(read if c.parallel else hidden)
        hidden = hidden + after(name="mlp_post_norm")(mlp(x))
        if c.side_mlp:
            side = nn.silu(linear(c.side_mlp, name="side_up")(x))
            side = linear(c.width, scale=narrow, name="side_down")(side)
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
        hidden = _Embed(c.vocab, c, name="embed")(tokens).astype(c.dtype)
        if c.embed_scale != 1.0:
            hidden = hidden * jnp.asarray(c.embed_scale, c.dtype)
        if c.positions == "learned":
            hidden = hidden + _Embed(c.context, c, name="position")(positions).astype(c.dtype)
        # A weight of 0 does not hide a nan: padding enters as zeros, whatever its row holds.
        hidden = split_rows(jnp.where((segments > 0)[:, :, None], hidden, 0))
        if cache is None:
            index = jnp.arange(tokens.shape[1])
            causal = index[:, None] >= index[None, :]
            same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
            mask, keys = same & causal[None], positions
        else:
            length = jax.tree.leaves(cache)[0].shape[-3]
            keys = jnp.arange(length)[None]
            mask = keys[:, None, :] <= positions[:, :, None]
        near = None
        if c.window:
            near = mask & (positions[:, :, None] - keys[:, None, :] < c.window)
        local = c.local_layers or (True,) * c.layers

        block, policy = _Block, REMAT[c.remat]
        if policy is not None:
            block = nn.remat(_Block, prevent_cse=not c.scan, policy=policy)
        if c.scan:
            # The cache rides in the carry: as scanned input and output it would exist twice.
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.layers,
            )(c, name="layers")
            which = jnp.arange(c.layers), jnp.array(local)
            (hidden, cache), _ = layers((hidden, cache), which, positions, mask, near)
        else:
            new = []
            for i in range(c.layers):
                layer = block(c, name=f"layers_{i}")
                own = None if cache is None else cache[i]
                which = jnp.int32(i), jnp.array(local[i])
                (hidden, own), _ = layer((hidden, own), which, positions, mask, near)
                new.append(own)
            cache = None if cache is None else tuple(new)

        hidden = _Norm(c, name="final_norm")(hidden)
        if self.is_initializing():
            if c.lm_head and not c.tied:
                _Linear(c.vocab, c, name="head")(hidden)
            if c.value_head:
                nn.Dense(1, kernel_init=nn.initializers.zeros, name="value_head")(hidden)
        return hidden, cache
