"""Model families of Hugging Face: config.json ↔ `Transformer`, tensor names ↔ parameter paths.

A family is a `Family`: two functions of numbers and a table of names. What a config.json says
beyond that is refused by name, unless it is known to change no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_jax.models.transformer import RopeScaling, Transformer


class FamilyError(ValueError):
    """A config.json that no family here computes exactly; the message names what is unknown."""


@dataclass(frozen=True)
class Names:
    """Tensors of a file and the leaves they hold; `{i}` is the layer.

    `layout`: "same", "transposed" (a file's matrices are [out, in], ours [in, out]), "columns"
    (GPT-2: query, key and value side by side), "interleaved" (GPT-NeoX: head by head, [out, in]).
    """

    tensor: str
    leaves: tuple[str, ...]
    layout: str = "same"


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    architecture: str
    read: Callable[[_Fields], Transformer]
    write: Callable[[Transformer], dict[str, Any]]
    names: tuple[Names, ...]  # of all that the family may have; a model has some of them
    prefix: str  # that tensors may lack: files of the bare model


# Fields of a config.json that say how a model was made, saved or served.
HARMLESS = frozenset(
    """
    _name_or_path architectures attention_dropout attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout cls_token_id decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty
    max_length mlp_dropout min_length model_type no_repeat_ngram_size n_ctx num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty
    reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate rope_interleaved
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_version unsloth_fixed
    use_bfloat16 use_cache vocab_size
    """.split()  # noqa: SIM905
)
OFF = (None, False, 0, "", [], {})  # of an unknown field: what it describes is not there


class _Fields:
    """A config.json, which remembers what was read of it."""

    def __init__(self, found: Mapping[str, Any]):
        self.found, self.seen = dict(found), set(HARMLESS)

    def __call__(self, name: str, *default: Any) -> Any:
        """A field, or its default; None counts as absent where there is a default."""
        self.seen.add(name)
        value = self.found.get(name)
        if value is not None:
            return value
        if default:
            return default[0]
        raise FamilyError(f"config.json has no {name!r}, which this family needs")

    def must(self, name: str, value: Any, default: Any) -> None:
        """Only one value of this field is computed here."""
        if (given := self(name, default)) != value:
            raise FamilyError(
                f"config.json says {name}={given!r}; only {value!r} is supported, and another value"
                " would change the numbers"
            )

    def unread(self) -> dict[str, Any]:
        """What is left that may change the numbers."""
        return {k: v for k, v in self.found.items() if k not in self.seen and v not in OFF}


ACTIVATIONS = {  # of a config.json
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SAVED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise FamilyError(f"activation {name!r} is not known; valid: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(fields: _Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """Rotary base and scaling, where older and newer files have them."""
    given = fields("rope_parameters", None) or fields("rope_scaling", None) or {}
    fields("rope_scaling", None)
    base = fields("rope_theta", given.get("rope_theta", theta))
    return {"rope_theta": float(base), "rope_scaling": _scaling(given)}


def _scaling(given: Mapping[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "default":
        found = None
    elif kind == "linear":
        known, found = known | {"factor"}, RopeScaling("linear", float(given["factor"]))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        original = given["original_max_position_embeddings"]
        found = RopeScaling("llama3", *(float(given[name]) for name in names), int(original))
        known |= {*names, "original_max_position_embeddings"}
    else:
        raise FamilyError(f'rope scaling {kind!r} is not supported; valid: "linear", "llama3"')
    if extra := {k: v for k, v in given.items() if k not in known and v not in OFF}:
        raise FamilyError(f"rope scaling has fields that are not known here: {extra}")
    return found


def _rope_out(model: Transformer) -> dict[str, Any]:
    scaling, found = model.rope_scaling, {"rope_theta": model.rope_theta}
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", **found}}
    found |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    return {"rope_parameters": found}


# ------------------------------------------------------------- Llama, and what is close to it


def _decoder(fields: _Fields, **more: Any) -> Transformer:
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
        given["activation"] = _activation(fields("hidden_act", "silu"))
    return Transformer(**{**given, **more})


def _decoder_out(model: Transformer) -> dict[str, Any]:
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


def _llama(fields: _Fields) -> Transformer:
    bias = fields("attention_bias", False)
    return _decoder(
        fields, **_rope(fields), qkv_bias=bias, out_bias=bias, mlp_bias=fields("mlp_bias", False)
    )


def _llama_out(model: Transformer) -> dict[str, Any]:
    biases = {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}
    return _decoder_out(model) | _rope_out(model) | biases


def _mistral(fields: _Fields) -> Transformer:
    # Files of before the field was written mean the class's default; a null means none.
    absent = "sliding_window" not in fields.found
    return _decoder(fields, **_rope(fields), window=fields("sliding_window", 4096 if absent else 0))


def _mistral_out(model: Transformer) -> dict[str, Any]:
    return _decoder_out(model) | _rope_out(model) | {"sliding_window": model.window or None}


def _qwen(fields: _Fields, **more: Any) -> Transformer:
    window = fields("sliding_window", 4096)
    used, first = fields("use_sliding_window", False), fields("max_window_layers", 28)
    layers = fields("num_hidden_layers")
    local = _local(fields, [used and i >= first for i in range(layers)])
    near = {"window": window, "local_layers": local} if used and any(local) else {}
    return _decoder(fields, **_rope(fields), **near, **more)


def _local(fields: _Fields, default: list[bool]) -> tuple[bool, ...]:
    types = fields("layer_types", None)
    if types is None:
        return tuple(default)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise FamilyError(f"layer_types {sorted(unknown)} are not supported")
    return tuple(kind == "sliding_attention" for kind in types)


def _types_out(model: Transformer) -> list[str]:
    local = model.local_layers or (bool(model.window),) * model.layers
    return ["sliding_attention" if here else "full_attention" for here in local]


def _qwen_out(model: Transformer) -> dict[str, Any]:
    return _decoder_out(model) | _rope_out(model) | {
        "use_sliding_window": bool(model.window),
        "sliding_window": model.window or None,
        "max_window_layers": model.layers,
        "layer_types": _types_out(model),
    }  # fmt: skip


def _qwen2(fields: _Fields) -> Transformer:
    return _qwen(fields, qkv_bias=True)


def _qwen3(fields: _Fields) -> Transformer:
    bias = fields("attention_bias", False)
    return _qwen(
        fields, query_key_norm=True, qkv_bias=bias, out_bias=bias,
        head_dim=fields("head_dim", 128),
    )  # fmt: skip


def _qwen3_out(model: Transformer) -> dict[str, Any]:
    return _qwen_out(model) | {"attention_bias": model.qkv_bias}


def _gemma(fields: _Fields, **more: Any) -> Transformer:
    bias = fields("attention_bias", False)
    fields.must("use_bidirectional_attention", False, False)
    fields("hidden_act", None)  # hidden_activation is the one that counts
    return _decoder(
        fields,
        head_dim=fields("head_dim", 256),
        tied=fields("tie_word_embeddings", True),
        activation=_activation(fields("hidden_activation", "gelu_pytorch_tanh")),
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


def _gemma2(fields: _Fields) -> Transformer:
    layers = fields("num_hidden_layers")
    for name, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if name not in fields.found:
            fields.found[name] = usual
    local = _local(fields, [i % 2 == 0 for i in range(layers)])
    return _gemma(fields, **_rope(fields), local_layers=local)


def _gemma3(fields: _Fields) -> Transformer:
    layers, every = fields("num_hidden_layers"), fields("sliding_window_pattern", 6)
    local = _local(fields, [bool((i + 1) % every) for i in range(layers)])
    fields("_sliding_window_pattern", None)  # the same, as newer files have it
    by_type = fields.found.get("rope_parameters") or {}
    if "full_attention" in by_type:
        near, far = by_type["sliding_attention"], by_type["full_attention"]
        if _scaling(near) is not None:
            raise FamilyError("rope scaling of sliding layers is not supported")
        theta, local_theta = far.get("rope_theta", 1e6), near.get("rope_theta", 1e4)
        scaling = _scaling(far)
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"):
            fields(name, None)
    else:
        found = _rope(fields, 1e6)
        theta, scaling = found["rope_theta"], found["rope_scaling"]
        local_theta = fields("rope_local_base_freq", 1e4)
    return _gemma(
        fields,
        rope_theta=float(theta),
        rope_scaling=scaling,
        local_rope_theta=float(local_theta),
        local_layers=local,
        query_key_norm=True,
    )


def _gemma_out(model: Transformer) -> dict[str, Any]:
    return {
        **{k: v for k, v in _decoder_out(model).items() if k != "hidden_act"},
        "hidden_activation": SAVED[model.activation],
        "query_pre_attn_scalar": round((model.query_scale or model.size_of_head**-0.5) ** -2),
        "attn_logit_softcapping": model.attention_cap,
        "final_logit_softcapping": model.logit_cap,
        "sliding_window": model.window,
        "layer_types": _types_out(model),
        "attention_bias": model.qkv_bias,
    }


def _gemma2_out(model: Transformer) -> dict[str, Any]:
    return _gemma_out(model) | _rope_out(model)


def _gemma3_out(model: Transformer) -> dict[str, Any]:
    far = _rope_out(model)["rope_parameters"]
    near = {"rope_type": "default", "rope_theta": model.local_rope_theta}
    return _gemma_out(model) | {
        "rope_parameters": {"full_attention": far, "sliding_attention": near}
    }


# ------------------------------------------------------------------------- GPT-2 and GPT-NeoX


def _gpt2(fields: _Fields) -> Transformer:
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
        activation=_activation(fields("activation_function", "gelu_new")),
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


def _gpt_neox(fields: _Fields) -> Transformer:
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
        activation=_activation(fields("hidden_act", "gelu")),
        parallel=fields("use_parallel_residual", True),
        rotary_part=float(part),
        rope_theta=float(theta),
        rope_scaling=_scaling(rope),
        **{**PLAIN, "qkv_bias": bias, "out_bias": bias},
    )


def _gpt_neox_out(model: Transformer) -> dict[str, Any]:
    rope = _rope_out(model)["rope_parameters"] | {"partial_rotary_factor": model.rotary_part}
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


# -------------------------------------------------------------------------------------- names


def _both(tensor: str, leaf: str, layout: str = "transposed") -> tuple[Names, ...]:
    """A matrix and its bias."""
    kernel = Names(f"{tensor}.weight", (f"{leaf}/kernel",), layout)
    return kernel, Names(f"{tensor}.bias", (f"{leaf}/bias",))


def _norm(tensor: str, leaf: str) -> tuple[Names, ...]:
    return Names(f"{tensor}.weight", (f"{leaf}/scale",)), Names(f"{tensor}.bias", (f"{leaf}/bias",))


def _llama_names(norms: Mapping[str, str]) -> tuple[Names, ...]:
    layer, own = "model.layers.{i}.", "layers_{i}/"
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    mlp = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    found = [
        Names("model.embed_tokens.weight", ("embed/embedding",)),
        Names("model.norm.weight", ("final_norm/scale",)),
        Names("lm_head.weight", ("head/kernel",), "transposed"),
    ]
    for name, leaf in attention.items():
        found += _both(f"{layer}self_attn.{name}", own + leaf)
    for name, leaf in mlp.items():
        found += _both(f"{layer}mlp.{name}", own + leaf)
    for name, leaf in {"q_norm": "query_norm", "k_norm": "key_norm"}.items():
        found.append(Names(f"{layer}self_attn.{name}.weight", (f"{own}{leaf}/scale",)))
    for name, leaf in norms.items():
        found.append(Names(f"{layer}{name}.weight", (f"{own}{leaf}/scale",)))
    return tuple(found)


def _fused(tensor: str, layout: str) -> tuple[Names, ...]:
    three = tuple(f"layers_{{i}}/{x}" for x in ("query", "key", "value"))
    return tuple(
        Names(f"{tensor}.{end}", tuple(f"{leaf}/{kind}" for leaf in three), layout)
        for end, kind in (("weight", "kernel"), ("bias", "bias"))
    )


PRE = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
AROUND = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
GPT2 = (
    Names("transformer.wte.weight", ("embed/embedding",)),
    Names("transformer.wpe.weight", ("position/embedding",)),
    *_norm("transformer.h.{i}.ln_1", "layers_{i}/attention_norm"),
    *_fused("transformer.h.{i}.attn.c_attn", "columns"),
    *_both("transformer.h.{i}.attn.c_proj", "layers_{i}/out", "same"),
    *_norm("transformer.h.{i}.ln_2", "layers_{i}/mlp_norm"),
    *_both("transformer.h.{i}.mlp.c_fc", "layers_{i}/up", "same"),
    *_both("transformer.h.{i}.mlp.c_proj", "layers_{i}/down", "same"),
    *_norm("transformer.ln_f", "final_norm"),
    Names("lm_head.weight", ("head/kernel",), "transposed"),
)
GPT_NEOX = (
    Names("gpt_neox.embed_in.weight", ("embed/embedding",)),
    *_norm("gpt_neox.layers.{i}.input_layernorm", "layers_{i}/attention_norm"),
    *_norm("gpt_neox.layers.{i}.post_attention_layernorm", "layers_{i}/mlp_norm"),
    *_fused("gpt_neox.layers.{i}.attention.query_key_value", "interleaved"),
    *_both("gpt_neox.layers.{i}.attention.dense", "layers_{i}/out"),
    *_both("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "layers_{i}/up"),
    *_both("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "layers_{i}/down"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    Names("embed_out.weight", ("head/kernel",), "transposed"),
)

# A model that several can say exactly is saved as the first.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, _llama_out, _llama_names(PRE), "model."),
    "mistral": Family("MistralForCausalLM", _mistral, _mistral_out, _llama_names(PRE), "model."),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _qwen_out, _llama_names(PRE), "model."),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _qwen3_out, _llama_names(PRE), "model."),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _gemma2_out, _llama_names(AROUND), "model."),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _gemma3, _gemma3_out, _llama_names(AROUND), "model."
    ),
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _gpt2_out, GPT2, "transformer."),
    "gpt_neox": Family("GPTNeoXForCausalLM", _gpt_neox, _gpt_neox_out, GPT_NEOX, "gpt_neox."),
}
BUFFERS = r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$"  # of old files: no weights


def read(config: Mapping[str, Any]) -> tuple[str, Transformer]:
    """The family and the model of a config.json.

    Raises:
        FamilyError: for a model type, a field or a value that is not computed exactly here.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise FamilyError(f"model_type {kind!r} is not supported; valid: {', '.join(FAMILIES)}")
    fields = _Fields(config)
    try:
        model = FAMILIES[kind].read(fields)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, FamilyError):
            raise FamilyError(f"{kind}: {error}") from error
        raise FamilyError(f"{kind}: config.json cannot be read: {error!r}") from error
    if left := fields.unread():
        shown = ", ".join(f"{name}={value!r}" for name, value in left.items())
        raise FamilyError(
            f"{kind}: config.json has fields that are not known here and may change the numbers: "
            f"{shown}; if they change none, take them out of the file"
        )
    return kind, model


# What a config.json does not say: how a model is computed, not what.
FREE = ("scan", "remat", "dtype", "param_dtype", "lora", "lm_head", "value_head")


def write(model: Transformer, kind: str | None = None) -> dict[str, Any]:
    """The config.json of a model, of the family `kind` or of the first that can say it exactly.

    Raises:
        FamilyError: if none can.
    """
    for name in [kind] if kind is not None else FAMILIES:
        family = FAMILIES[name]
        config = {"architectures": [family.architecture], "model_type": name, **family.write(model)}
        if says(config, model):
            return config
    raise FamilyError(
        f"no family of Hugging Face computes this model: {model}; known: {', '.join(FAMILIES)}"
    )


def says(config: Mapping[str, Any], model: Transformer) -> bool:
    """Whether a config.json is that of the model."""
    exact = replace(model, **{name: getattr(Transformer(vocab=1), name) for name in FREE})
    found = read(config)[1]
    return _same(*(replace(m, head_dim=m.size_of_head, lm_head=True) for m in (found, exact)))


def _same(one: Transformer, other: Transformer) -> bool:
    def canonical(model):
        local = model.local_layers or (True,) * model.layers
        none = not model.window or not any(local)
        scale = model.query_scale or model.size_of_head**-0.5
        return replace(
            model,
            window=0 if none else model.window,
            local_layers=() if none or all(local) else local,
            query_scale=round(scale, 9),
            rope_theta=model.rope_theta if model.positions == "rotary" else 0.0,
        )

    return canonical(one) == canonical(other)
