"""One small config.json per family and variant, as Hugging Face writes them."""

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GEMMA = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
NEOX = {name: x for name, x in SMALL.items() if name != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CONFIGS = {
    "llama": {"model_type": "llama", **SMALL},
    "llama 3, tied": {
        "model_type": "llama", **SMALL, "tie_word_embeddings": True, "rope_parameters": LLAMA3,
    },
    "llama with biases, linear rope": {
        "model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma3": {
        "model_type": "gemma3_text", **GEMMA, "rope_parameters": BY_LAYER,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2,
    },
    "neox": {"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.5},
    "neox, one after the other": {
        "model_type": "gpt_neox", **NEOX, "rotary_pct": 0.25, "use_parallel_residual": False,
    },
}  # fmt: skip
