"""GPT-2 and GPT-NeoX (Pythia)."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.families.fields import (
    SAVED,
    SCORE,
    Family,
    Fields,
    Names,
    activation,
    both,
    norm,
    rope_out,
    scaling,
)
from rlhf_jax.models.transformer import Transformer


def _gpt2(fields: Fields) -> Transformer:
    fields.must("scale_attn_weights", True, True)
    fields.must("scale_attn_by_inverse_layer_idx", False, False)
    fields.must("add_cross_attention", False, False)
    width, heads = fields("n_embd", 768), fields("n_head", 12)
    return Transformer(
        vocab=fields("vocab_size"),
        width=width,
        layers=fields("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        mlp=fields("n_inner", 4 * width),
        context=fields("n_positions", 1024),
        norm_epsilon=fields("layer_norm_epsilon", 1e-5),
        tied=fields("tie_word_embeddings", True),
        activation=activation(fields("activation_function", "gelu_new")),
        **PLAIN,
        positions="learned",
    )


PLAIN = {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated": False}


def _gpt2_out(model: Transformer) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.mlp,
        "n_positions": model.context,
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        "activation_function": SAVED[model.activation],
    }


def _gpt_neox(fields: Fields) -> Transformer:
    heads, bias = fields("num_attention_heads"), fields("attention_bias", True)
    rope = fields("rope_parameters", None) or fields("rope_scaling", None) or {}
    fields("rope_scaling", None)
    part = rope.get("partial_rotary_factor", fields("rotary_pct", 0.25))
    theta = rope.get("rope_theta", fields("rotary_emb_base", 10_000))
    fields("rope_theta", None)
    return Transformer(
        vocab=fields("vocab_size"),
        width=fields("hidden_size"),
        layers=fields("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        mlp=fields("intermediate_size"),
        context=fields("max_position_embeddings", 2048),
        norm_epsilon=fields("layer_norm_eps", 1e-5),
        tied=fields("tie_word_embeddings", False),
        activation=activation(fields("hidden_act", "gelu")),
        parallel=fields("use_parallel_residual", True),
        rotary_part=float(part),
        rope_theta=float(theta),
        rope_scaling=scaling(rope),
        **{**PLAIN, "qkv_bias": bias, "out_bias": bias},
    )


def _gpt_neox_out(model: Transformer) -> dict[str, Any]:
    rope = rope_out(model)["rope_parameters"] | {"partial_rotary_factor": model.rotary_part}
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp,
        "max_position_embeddings": model.context,
        "layer_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        "hidden_act": SAVED[model.activation],
        "use_parallel_residual": model.parallel,
        "attention_bias": model.qkv_bias,
        "rotary_pct": model.rotary_part,
        "rope_parameters": rope,
    }


def _fused(tensor: str, layout: str) -> tuple[Names, ...]:
    three = tuple(f"layers_{{i}}/{x}" for x in ("query", "key", "value"))
    return tuple(
        Names(f"{tensor}.{end}", tuple(f"{leaf}/{kind}" for leaf in three), layout)
        for end, kind in (("weight", "kernel"), ("bias", "bias"))
    )


GPT2 = (
    Names("transformer.wte.weight", ("embed/embedding",)),
    Names("transformer.wpe.weight", ("position/embedding",)),
    *norm("transformer.h.{i}.ln_1", "layers_{i}/attention_norm"),
    *_fused("transformer.h.{i}.attn.c_attn", "columns"),
    *both("transformer.h.{i}.attn.c_proj", "layers_{i}/out", "same"),
    *norm("transformer.h.{i}.ln_2", "layers_{i}/mlp_norm"),
    *both("transformer.h.{i}.mlp.c_fc", "layers_{i}/up", "same"),
    *both("transformer.h.{i}.mlp.c_proj", "layers_{i}/down", "same"),
    *norm("transformer.ln_f", "final_norm"),
    Names("lm_head.weight", ("head/kernel",), "transposed"),
    SCORE,
)
GPT_NEOX = (
    Names("gpt_neox.embed_in.weight", ("embed/embedding",)),
    *norm("gpt_neox.layers.{i}.input_layernorm", "layers_{i}/attention_norm"),
    *norm("gpt_neox.layers.{i}.post_attention_layernorm", "layers_{i}/mlp_norm"),
    *_fused("gpt_neox.layers.{i}.attention.query_key_value", "interleaved"),
    *both("gpt_neox.layers.{i}.attention.dense", "layers_{i}/out"),
    *both("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "layers_{i}/up"),
    *both("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "layers_{i}/down"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    Names("embed_out.weight", ("head/kernel",), "transposed"),
    SCORE,
)

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2ForSequenceClassification",
        _gpt2, _gpt2_out, GPT2, "transformer.",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification",
        _gpt_neox, _gpt_neox_out, GPT_NEOX, "gpt_neox.",
    ),
}  # fmt: skip
