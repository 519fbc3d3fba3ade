"""Gemma 2 and the texts of Gemma 3."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.families.fields import (
    SAVED,
    Family,
    FamilyError,
    Fields,
    activation,
    rope,
    rope_out,
    scaling,
)
from rlhf_jax.models.families.llama import (
    decoder,
    decoder_out,
    layer_types,
    llama_names,
    local_layers,
)
from rlhf_jax.models.transformer import Transformer


def _gemma(fields: Fields, **more: Any) -> Transformer:
    bias = fields("attention_bias", False)
    fields.must("use_bidirectional_attention", False, False)
    fields("hidden_act", None)  # hidden_activation is the one that counts
    return decoder(
        fields,
        head_dim=fields("head_dim", 256),
        tied=fields("tie_word_embeddings", True),
        activation=activation(fields("hidden_activation", "gelu_pytorch_tanh")),
        query_scale=fields("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=fields("attn_logit_softcapping", None),
        logit_cap=fields("final_logit_softcapping", None),
        window=fields("sliding_window", 4096),
        norm_offset=1.0,
        post_norms=True,
        embed_scale=fields("hidden_size") ** 0.5,
        qkv_bias=bias,
        out_bias=bias,
        **more,
    )


def _gemma2(fields: Fields) -> Transformer:
    layers = fields("num_hidden_layers")
    for name, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if name not in fields.found:
            fields.found[name] = usual
    local = local_layers(fields, [i % 2 == 0 for i in range(layers)])
    return _gemma(fields, **rope(fields), local_layers=local)


def _gemma3(fields: Fields) -> Transformer:
    layers, every = fields("num_hidden_layers"), fields("sliding_window_pattern", 6)
    local = local_layers(fields, [bool((i + 1) % every) for i in range(layers)])
    fields("_sliding_window_pattern", None)  # the same, as newer files have it
    by_type = fields.found.get("rope_parameters") or {}
    if "full_attention" in by_type:
        near, far = by_type["sliding_attention"], by_type["full_attention"]
        if scaling(near) is not None:
            raise FamilyError("rope scaling of sliding layers is not supported")
        theta, local_theta = far.get("rope_theta", 1e6), near.get("rope_theta", 1e4)
        stretched = scaling(far)
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"):
            fields(name, None)
    else:
        found = rope(fields, 1e6)
        theta, stretched = found["rope_theta"], found["rope_scaling"]
        local_theta = fields("rope_local_base_freq", 1e4)
    return _gemma(
        fields,
        rope_theta=float(theta),
        rope_scaling=stretched,
        local_rope_theta=float(local_theta),
        local_layers=local,
        query_key_norm=True,
    )


def _gemma_out(model: Transformer) -> dict[str, Any]:
    return {
        **{k: v for k, v in decoder_out(model).items() if k != "hidden_act"},
        "hidden_activation": SAVED[model.activation],
        "query_pre_attn_scalar": round((model.query_scale or model.size_of_head**-0.5) ** -2),
        "attn_logit_softcapping": model.attention_cap,
        "final_logit_softcapping": model.logit_cap,
        "sliding_window": model.window,
        "layer_types": layer_types(model),
        "attention_bias": model.qkv_bias,
    }


def _gemma2_out(model: Transformer) -> dict[str, Any]:
    return _gemma_out(model) | rope_out(model)


def _gemma3_out(model: Transformer) -> dict[str, Any]:
    far = rope_out(model)["rope_parameters"]
    near = {"rope_type": "default", "rope_theta": model.local_rope_theta or model.rope_theta}
    return _gemma_out(model) | {
        "rope_parameters": {"full_attention": far, "sliding_attention": near}
    }


AROUND = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}

FAMILIES = {
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2ForSequenceClassification",
        _gemma2, _gemma2_out, llama_names(AROUND), "model.",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification",
        _gemma3, _gemma3_out, llama_names(AROUND), "model.",
    ),
}  # fmt: skip
