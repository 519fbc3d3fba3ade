"""A decoder-only transformer; what tells Llama, Qwen, Gemma, GPT-2 and GPT-NeoX apart is a number.

The rest of the house sees a `Transformer`: numbers, and five pure functions over a bare nested dict
of parameters, made of the modules in `blocks.py`. Other models offer the same five; of `apply` they
may leave out `read` and the hooks. The defaults are Llama's: RMSNorm, rotary positions,
grouped-query attention, SwiGLU; `families` has the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import blocks, weights
from rlhf_jax.models import cache as caches
from rlhf_jax.models.blocks import ACTIVATIONS, REMAT, Decoder, taken
from rlhf_jax.models.cache import Cache
from rlhf_jax.types import Params

Tap = Callable[[Int[Array, ""], Float[Array, "b t d"]], Float[Array, "b t d"]]
Attention = Callable[..., Float[Array, "b t h k"]]


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


DTYPES = ("float64", "float32", "bfloat16", "float16")


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
    value_bias: bool = True  # of that head; reward models of Hugging Face have none
    scan: bool = False  # one compiled block for all layers: compiles faster, runs slower on CPU
    remat: str = "none"  # "full": recompute blocks in the backward pass; "dots": but for products
    dtype: str = "float32"
    param_dtype: str = "float32"  # of stored weights; those that are trained should be float32
    cache_dtype: str | None = None  # what decoding remembers in: "bfloat16", "int8"; None: `dtype`
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
                 "activation": tuple(ACTIVATIONS), "remat": tuple(REMAT),
                 "cache_dtype": (None, *DTYPES[1:], "int8"), "dtype": DTYPES,
                 "param_dtype": DTYPES}  # fmt: skip
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
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
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
        return Decoder(self).init(key, tokens, jnp.zeros_like(tokens), jnp.ones_like(tokens))[
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
        read: Int[Array, "b n"] | None = None,
    ) -> Output:
        """Hidden states after the last norm, of all tokens or of those at the indices `read`.

        Without a cache, a token attends to earlier tokens of its own segment (0 is padding;
        default: all one segment) and its position is the index within it. With a cache, tokens are
        written behind what it holds and attend to what is there at or before their own position;
        those at position −1 are padding.

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
        texts = tokens, positions, segments, cache, read
        hidden, cache = Decoder(own).apply({"params": params}, *texts)
        return Output(hidden, cache)

    def logits(self, params: Params, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """Float32 logits of the next token."""
        flat, panels = hidden.reshape(-1, self.width), params.get("head", {}).get("panels")
        if panels is not None and blocks.few(flat):
            flat = blocks.panel_product(flat, panels.astype(self.dtype), self.vocab)
        else:
            flat = flat @ self._head(params).astype(self.dtype)
        flat = flat.reshape(*hidden.shape[:-1], self.vocab).astype(jnp.float32)
        return flat if self.logit_cap is None else self.logit_cap * jnp.tanh(flat / self.logit_cap)

    def panels(self, params: Params) -> Params:
        """Copies of matrices, to be merged into the tree: a CPU decodes few rows faster with them.

        See `blocks.panels`; `weights.merged(params, panels)` says what `params` say.
        """
        kernels = {
            name.removesuffix("kernel") + "panels": blocks.panels(x)
            for name, x in weights.flat(params).items()
            if name.startswith("layers") and name.endswith("/kernel")
        }
        head = {"head/panels": blocks.panels(self._head(params))} if self.lm_head else {}
        return weights.nested(kernels | head)

    def _head(self, params: Params) -> Array:
        return params["embed"]["embedding"].T if self.tied else params["head"]["kernel"]

    def value(self, params: Params, hidden: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        """The scalar head, float32 throughout: exactly 0 before the first update."""
        head = params["value_head"]
        found = (hidden.astype(jnp.float32) @ head["kernel"])[..., 0]
        return found + head["bias"][0] if self.value_bias else found

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Room for `length` tokens a row, in the cache's dtype."""
        shape = {"layers": self.layers, "heads": self.kv_heads, "size": self.size_of_head}
        dtype = self.cache_dtype or self.dtype
        return caches.empty(rows, length, dtype=dtype, stacked=self.scan, **shape)


def apply_at(
    model: Any, params: Params, tokens: Array, read: Int[Array, "b n"] | None, **rest: Any
) -> Output:
    """`model.apply` at the indices `read` of each row (None: all).

    A model whose `apply` has no such argument computes all of them first.
    """
    if "read" in inspect.signature(model.apply).parameters:
        return model.apply(params, tokens, read=read, **rest)
    found = model.apply(params, tokens, **rest)
    return found._replace(hidden=taken(found.hidden, read))


def index_in_segment(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token within its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
