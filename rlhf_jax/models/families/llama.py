"""Llama, and what is close to it: Mistral, Qwen 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.families.fields import (
    SAVED,
    SCORE,
    Family,
    FamilyError,
    Fields,
    Names,
    activation,
    both,
    rope,
    rope_out,
)
from rlhf_jax.models.transformer import Transformer


def decoder(fields: Fields, **more: Any) -> Transformer:
    """What Llama, Mistral, Qwen and Gemma have in common."""
    heads = fields("num_attention_heads")
    fields.must("pretraining_tp", 1, 1)
    given = {
        "vocab": fields("vocab_size"),
        "width": fields("hidden_size"),
        "layers": fields("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields("num_key_value_heads", heads),
        "mlp": fields("intermediate_size"),
        "head_dim": fields("head_dim", None),
        "context": fields("max_position_embeddings", 2048),
        "norm_epsilon": fields("rms_norm_eps", 1e-6),
        "tied": fields("tie_word_embeddings", False),
    }
    if "activation" not in more:
        given["activation"] = activation(fields("hidden_act", "silu"))
    return Transformer(**{**given, **more})


def decoder_out(model: Transformer) -> dict[str, Any]:
    """The other way."""
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.mlp,
        "head_dim": model.size_of_head,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        "hidden_act": SAVED[model.activation],
    }


def local_layers(fields: Fields, default: list[bool]) -> tuple[bool, ...]:
    """Which layers have the window: what the file says, else `default`."""
    types = fields("layer_types", None)
    if types is None:
        return tuple(default)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise FamilyError(f"layer_types {sorted(unknown)} are not supported")
    return tuple(kind == "sliding_attention" for kind in types)


def layer_types(model: Transformer) -> list[str]:
    """Each layer's kind, as a config.json has it."""
    local = model.local_layers or (bool(model.window),) * model.layers
    return ["sliding_attention" if here else "full_attention" for here in local]


def _llama(fields: Fields) -> Transformer:
    bias = fields("attention_bias", False)
    return decoder(
        fields, **rope(fields), qkv_bias=bias, out_bias=bias, mlp_bias=fields("mlp_bias", False)
    )


def _llama_out(model: Transformer) -> dict[str, Any]:
    biases = {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}
    return decoder_out(model) | rope_out(model) | biases


def _mistral(fields: Fields) -> Transformer:
    # Files of before the field was written mean the class's default; a null means none.
    absent = "sliding_window" not in fields.found
    return decoder(fields, **rope(fields), window=fields("sliding_window", 4096 if absent else 0))


def _mistral_out(model: Transformer) -> dict[str, Any]:
    return decoder_out(model) | rope_out(model) | {"sliding_window": model.window or None}


def _qwen(fields: Fields, **more: Any) -> Transformer:
    window = fields("sliding_window", 4096)
    used, first = fields("use_sliding_window", False), fields("max_window_layers", 28)
    layers = fields("num_hidden_layers")
    local = local_layers(fields, [used and i >= first for i in range(layers)])
    near = {"window": window, "local_layers": local} if used and any(local) else {}
    return decoder(fields, **rope(fields), **near, **more)


def _qwen_out(model: Transformer) -> dict[str, Any]:
    return decoder_out(model) | rope_out(model) | {
        "use_sliding_window": bool(model.window),
        "sliding_window": model.window or None,
        "max_window_layers": model.layers,
        "layer_types": layer_types(model),
    }  # fmt: skip


def _qwen2(fields: Fields) -> Transformer:
    return _qwen(fields, qkv_bias=True)


def _qwen3(fields: Fields) -> Transformer:
    bias = fields("attention_bias", False)
    return _qwen(
        fields, query_key_norm=True, qkv_bias=bias, out_bias=bias,
        head_dim=fields("head_dim", 128),
    )  # fmt: skip


def _qwen3_out(model: Transformer) -> dict[str, Any]:
    return _qwen_out(model) | {"attention_bias": model.qkv_bias}


def llama_names(norms: Mapping[str, str]) -> tuple[Names, ...]:
    """All tensors; `norms` are those of a layer around attention and MLP."""
    layer, own = "model.layers.{i}.", "layers_{i}/"
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    mlp = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    found = [
        Names("model.embed_tokens.weight", ("embed/embedding",)),
        Names("model.norm.weight", ("final_norm/scale",)),
        Names("lm_head.weight", ("head/kernel",), "transposed"),
        SCORE,
    ]
    for name, leaf in attention.items():
        found += both(f"{layer}self_attn.{name}", own + leaf)
    for name, leaf in mlp.items():
        found += both(f"{layer}mlp.{name}", own + leaf)
    for name, leaf in {"q_norm": "query_norm", "k_norm": "key_norm"}.items():
        found.append(Names(f"{layer}self_attn.{name}.weight", (f"{own}{leaf}/scale",)))
    for name, leaf in norms.items():
        found.append(Names(f"{layer}{name}.weight", (f"{own}{leaf}/scale",)))
    return tuple(found)


PRE = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def _family(name: str, read, write) -> Family:
    names = llama_names(PRE)
    return Family(
        f"{name}ForCausalLM", f"{name}ForSequenceClassification", read, write, names, "model."
    )


FAMILIES = {
    "llama": _family("Llama", _llama, _llama_out),
    "mistral": _family("Mistral", _mistral, _mistral_out),
    "qwen2": _family("Qwen2", _qwen2, _qwen_out),
    "qwen3": _family("Qwen3", _qwen3, _qwen3_out),
}
