"""The parts of a `Transformer` as Flax modules: embedding, blocks, norms, matrices, positions.

Flax stays inside this file.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rlhf_jax.models.attention import dot_attention, grouped_attention
from rlhf_jax.models.cache import attention as cached_attention
from rlhf_jax.models.cache import grown, placed, plain, written
from rlhf_jax.sharding import (
    ROWS,
    SHARE,
    WRITERS,
    data_groups,
    split,
    split_rows,
    split_tokens,
    token_groups,
)

if TYPE_CHECKING:
    from rlhf_jax.models.transformer import Transformer

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}
PANEL, FEW = 64, 64  # columns of a panel; rows that are multiplied by panels, at most
REMAT = {  # what the backward pass finds of a block's activations
    "none": None,  # all of them
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of products with weights
}


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


def turns(positions: Int[Array, "b t"], frequency: Float[Array, "half"]) -> tuple[Array, Array]:
    """Cosine and sine of each pair's angle, float32 [b, t, 1, half]."""
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return _kept(jnp.cos(angle)), _kept(jnp.sin(angle))


def _kept(x: Array) -> Array:
    """The same numbers, which XLA:CPU then keeps in memory.

    Left to itself it computes a cosine again for every head, in every layer, and twice in the
    derivative. It looks through its own barrier, but not through a product of matrices.
    """

    def times_one(x):
        return product(x, jnp.eye(x.shape[-1], dtype=x.dtype))

    return jax.lax.platform_dependent(x, cpu=times_one, default=lambda x: x)


def rotate(x: Float[Array, "b t h k"], turn: tuple[Array, Array]) -> Array:
    """Rotary positions (Su et al. 2021, eq. 34), halves paired as in Llama, in float32.

    Only the first 2 · half numbers of a head turn; the others stay.
    """
    cos, sin = turn
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    rest = x[..., 2 * half :]
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def product(x: Float[Array, "*n i"], kernel: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """`x @ kernel`, on two-dimensional operands where that moves nothing.

    A three-dimensional product makes XLA:CPU transpose whole activations in the backward pass. But
    where a mesh splits both rows and their tokens, the two axes cannot become one.
    """
    if token_groups() > 1:
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def panels(kernel: Float[Array, "*l i o"]) -> Float[Array, "*l n i w"]:
    """A matrix as panels of 64 columns, each in one place of memory; zeros behind the last column.

    One core of a CPU multiplies a few rows by them faster than by the matrix, whose rows lie far
    apart: a library makes panels for each product (Goto & van de Geijn 2008).
    """
    *ahead, inside, columns = kernel.shape
    kernel = jnp.pad(kernel, (*[(0, 0)] * (kernel.ndim - 1), (0, -columns % PANEL)))
    return jnp.swapaxes(kernel.reshape(*ahead, inside, -1, PANEL), -3, -2)


def panel_product(
    x: Float[Array, "*n i"], panels: Float[Array, "p i w"], columns: int
) -> Float[Array, "*n o"]:
    """`x @ kernel`, of which there are `panels` and so many columns."""
    rows = x.reshape(-1, x.shape[-1])
    rows = jnp.broadcast_to(rows, (len(panels), *rows.shape))  # or XLA makes a matrix of them again
    found = jnp.einsum("pri,piw->prw", rows, panels).transpose(1, 0, 2)
    return found.reshape(*x.shape[:-1], -1)[..., :columns]


def few(x: Float[Array, "*n i"]) -> bool:
    """So few rows that a product is faster by panels."""
    return math.prod(x.shape[:-1]) <= FEW


class _Linear(nn.Module):
    """`x @ kernel`, a bias, a term of low rank."""

    features: int
    model: Transformer
    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        dtype, stored = self.model.dtype, jnp.dtype(self.model.param_dtype)
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), stored)
        if few(x) and self.has_variable("params", "panels"):
            found = self.get_variable("params", "panels").astype(dtype)
            found = panel_product(x, found, self.features)
        else:
            found = product(x, kernel.astype(dtype))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), stored)
            found = found + bias.astype(dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        lora = self.model.lora
        if lora is not None and re.fullmatch(lora.on, self.name):
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as PEFT
            down = self.param("lora_a", init, (x.shape[-1], lora.rank), jnp.float32)
            up = self.param("lora_b", nn.initializers.zeros, (lora.rank, self.features))
            low = product(product(x, down.astype(dtype)), up.astype(dtype))
            found = found + jnp.asarray(lora.alpha / lora.rank, dtype) * low
        return found


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
        return lookup(table, index, self.model.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "v d"], index: Int[Array, "b t"], dtype: str) -> Array:
    """Rows of a table, in the dtype that is computed in: only so does a table leave its device.

    Its gradient is summed in the table's own dtype: a token may stand in many places.
    """
    if table.dtype != dtype:  # said, or it would be collected first and then made smaller
        table = split(table.astype(dtype), "tensor", SHARE)
    # A lookup in a table split both ways makes XLA rematerialise it in full.
    return split(table, "tensor", None)[index]


def _lookup_forward(table, index, dtype):
    return lookup(table, index, dtype), (table, index)


def _lookup_backward(dtype, kept, grad):
    """Added up in each part of `data` first, where its parts of the table meet, then over them."""
    table, index = kept
    groups = math.gcd(data_groups(), index.shape[0])
    grad, index = (x.reshape(groups, -1, *x.shape[1:]) for x in (grad.astype(table.dtype), index))
    zeros = split(jnp.zeros((groups, *table.shape), table.dtype), "data", "tensor", None)
    found = jax.vmap(lambda zeros, index, grad: zeros.at[index].add(grad))(zeros, index, grad)
    return split(split(found, "data", "tensor", None), "data", "tensor", SHARE).sum(0), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def taken(x: Array, read: Int[Array, "b n"] | None) -> Array:
    """`[b, n, ...]`: what stands at these places of each row of `[b, t, ...]`; None: all."""
    if read is None:
        return x
    return jnp.take_along_axis(x, read.reshape(*read.shape, *(1,) * (x.ndim - 2)), axis=1)


class _Block(nn.Module):
    """`(hidden, cache), (layer, local) -> (hidden, cache), None`: the shape `nn.scan` wants.

    With `read` what is behind attention, where no token needs another, is done for these places.
    """

    config: Transformer

    @nn.compact
    def __call__(self, carry, which, turn, mask, near, used, read=None):
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
                far, close = turn
                own = jax.tree.map(partial(jnp.where, local), close, far) if close else far
                query, key = rotate(query, own), rotate(key, own)
            if c.query_scale is not None:  # the kernels multiply by head_dim ** -0.5
                query = query * jnp.asarray(c.query_scale * c.size_of_head**0.5, query.dtype)
            seen = mask if near is None else jnp.where(local, near, mask)
            attend, kept = c.attention if c.attention is not None else dot_attention, cache
            if c.attention_cap is not None:
                attend = partial(grouped_attention, cap=c.attention_cap)
            if cache is None:  # each part of the tokens reads the keys and values of all of them
                query, key, value = (
                    split(x, *ROWS, "sequence", "tensor") for x in (query, key, value)
                )
                key, value = (split(x, *ROWS, None, "tensor") for x in (key, value))
            else:
                kept, key, value = written(cache, used, key, value, layer if c.scan else None)
                if c.attention is None:
                    attend = partial(cached_attention, cap=c.attention_cap)
                else:  # a kernel of its own reads keys in the order of the text
                    key, value = plain(key, query.dtype), plain(value, query.dtype)
                    key, value = key.transpose(0, 3, 1, 2), value.transpose(0, 2, 1, 3)
            x = taken(attend(query, key, value, seen).reshape(b, t, -1), read)
            return linear(c.width, scale=narrow, bias=c.out_bias, name="out")(x), kept

        def mlp(x):
            act = ACTIVATIONS[c.activation]
            if c.gated:
                gate = linear(c.mlp, bias=c.mlp_bias, name="gate")(x)
                inner = act(gate) * linear(c.mlp, bias=c.mlp_bias, name="up")(x)
            else:
                inner = act(linear(c.mlp, bias=c.mlp_bias, name="up")(x))
            return linear(c.width, scale=narrow, bias=c.mlp_bias, name="down")(inner)

        found, cache = attention(_Norm(c, name="attention_norm")(hidden))
        before = taken(hidden, read)
        hidden = before + after(name="attention_post_norm")(found)
        x = _Norm(c, name="mlp_norm")(before if c.parallel else hidden)
        hidden = hidden + after(name="mlp_post_norm")(mlp(x))
        if c.side_mlp:
            side = nn.silu(linear(c.side_mlp, name="side_up")(x))
            side = linear(c.width, scale=narrow, name="side_down")(side)
            hidden = hidden + jnp.asarray(c.side_gate, side.dtype) * side
        if c.tap is not None:
            hidden = c.tap(layer, hidden)
        return (_placed(hidden, cache), cache), None


def _placed(hidden: Float[Array, "b t d"], cache: Any) -> Float[Array, "b t d"]:
    """Residual streams of whole texts are split by rows and tokens, those that decode by rows."""
    return split_tokens(hidden) if cache is None else split_rows(hidden, over=WRITERS)


class Decoder(nn.Module):
    """Embedding, blocks and the last norm; heads are only made here, `Transformer` applies them."""

    config: Transformer

    @nn.compact
    def __call__(self, tokens, positions, segments, cache=None, read=None):
        """Hidden states and the cache: see `Transformer.apply`."""
        c = self.config
        if cache is None:
            tokens, positions = split_tokens((tokens, positions))
        hidden = _Embed(c.vocab, c, name="embed")(tokens)
        if c.embed_scale != 1.0:
            hidden = hidden * jnp.asarray(c.embed_scale, c.dtype)
        if c.positions == "learned":
            hidden = hidden + _Embed(c.context, c, name="position")(positions)
        # A weight of 0 does not hide a nan: padding enters as zeros, whatever its row holds.
        hidden = _placed(jnp.where((segments > 0)[:, :, None], hidden, 0), cache)
        if cache is None:
            index = jnp.arange(tokens.shape[1])
            causal = index[:, None] >= index[None, :]
            same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
            mask, keys, used, pairs = split_tokens(same & causal[None]), positions, None, None
        else:
            cache = placed(cache, positions)
            keys, used, pairs = cache.places, cache.used, cache.layers
            mask = (keys >= 0)[:, None, :] & (keys[:, None, :] <= positions[:, :, None])
        near = None
        if c.window:
            near = mask & (positions[:, :, None] - keys[:, None, :] < c.window)
        local = c.local_layers or (True,) * c.layers
        turn = None
        if c.positions == "rotary":
            close = c.local_rope_theta is not None
            turn = (
                turns(positions, frequencies(c)),
                turns(positions, frequencies(c, local=True)) if close else None,
            )

        block, policy = _Block, REMAT[c.remat]
        if policy is not None:
            block = nn.remat(_Block, prevent_cse=not c.scan, policy=policy)
        # A hook reads every token, and layers that are scanned are equal.
        early = None if c.scan or c.tap is not None else read
        if c.scan:
            # The cache rides in the carry: as scanned input and output it would exist twice.
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, *[nn.broadcast] * 4),
                length=c.layers,
            )(c, name="layers")
            which = jnp.arange(c.layers), jnp.array(local)
            (hidden, pairs), _ = layers((hidden, pairs), which, turn, mask, near, used)
        else:
            new = []
            for i in range(c.layers):
                layer = block(c, name=f"layers_{i}")
                own = None if cache is None else pairs[i]
                which = jnp.int32(i), jnp.array(local[i])
                last = early if i == c.layers - 1 else None
                (hidden, own), _ = layer((hidden, own), which, turn, mask, near, used, last)
                new.append(own)
            pairs = tuple(new)
        if cache is not None:
            cache = grown(cache, tokens.shape[1], pairs)

        hidden = _Norm(c, name="final_norm")(taken(hidden, read if early is None else None))
        if self.is_initializing():
            if c.lm_head and not c.tied:
                _Linear(c.vocab, c, name="head")(hidden)
            if c.value_head:
                zero, bias = nn.initializers.zeros, c.value_bias
                nn.Dense(1, kernel_init=zero, use_bias=bias, name="value_head")(hidden)
        return hidden, cache
