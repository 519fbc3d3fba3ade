"""A Llama in a GGUF file (llama.cpp) as a directory of Hugging Face, after which all else is alike.

Float, Q4_1, Q8_0 and what else the `gguf` package dequantises. Weights are then floats: quantised
ones cannot be trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as library

from rlhf_jax.models.exporting import write_shards
from rlhf_jax.models.families import FamilyError, read
from rlhf_jax.models.pretrained import PretrainedError

LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3  # token_type of special tokens


def convert(file: str | Path, out: str | Path, *, dtype: str = "float32") -> Path:
    """Write config.json, safetensors, tokenizer.json and the chat template of a GGUF file.

    Raises:
        PretrainedError: if the file is no GGUF, no Llama with a byte-level BPE, or holds tensors
            that are not known; or if the gguf package is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise PretrainedError("reading GGUF needs a package: pip install gguf") from error
    file, out = Path(file).expanduser(), Path(out).expanduser()
    if not file.is_file():
        raise PretrainedError(f"there is no file {file}")
    try:
        reader = GGUFReader(str(file))
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{file} is not a GGUF file that can be read: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise PretrainedError(
            f"{file} holds a {fields.get('general.architecture')!r}; only llama is supported"
        )
    made = _config(fields, {tensor.name for tensor in reader.tensors}, dtype)
    try:
        read(made)
    except FamilyError as error:
        raise PretrainedError(f"{file}: {error}") from error
    tokenizer = _tokenizer(fields, file)
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, _tensors(reader, made, np.dtype(dtype)), 2**31)
    tokens = fields["tokenizer.ggml.tokens"]
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]]
        for role, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{long}_token_id" in fields
    }
    template = fields.get("tokenizer.chat_template")
    _write(out / "config.json", made)
    _write(out / "tokenizer_config.json", {**named, "chat_template": template})
    tokenizer.save(str(out / "tokenizer.json"))
    return out


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(fields: dict[str, Any], tensors: set[str], dtype: str) -> dict[str, Any]:
    def of(name, *default):
        return fields.get(f"llama.{name}", *default)

    heads, width = of("attention.head_count"), of("embedding_length")
    if any(name.startswith("llama.rope.scaling") for name in fields):
        raise PretrainedError("GGUF files with rope scaling are not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": of("vocab_size", len(fields["tokenizer.ggml.tokens"])),
        "hidden_size": width,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "intermediate_size": of("feed_forward_length"),
        "head_dim": of("rope.dimension_count", width // heads),
        "max_position_embeddings": of("context_length"),
        # Stored as float32: 1e-5 comes as 9.99999974e-06.
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{of('rope.freq_base', 10_000.0):.6g}"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "dtype": dtype,
    }


def _tensors(reader, made: dict[str, Any], dtype) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    heads = {"attn_q": made["num_attention_heads"], "attn_k": made["num_key_value_heads"]}
    for tensor in reader.tensors:
        stem, kind = tensor.name.rsplit(".", 1)
        parts = stem.split(".")
        if parts[0] == "blk" and len(parts) == 3 and parts[2] in LAYER and kind == "weight":
            name = f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
        elif stem in WHOLE and kind == "weight":
            name = f"{WHOLE[stem]}.weight"
        else:
            raise PretrainedError(f"GGUF tensor {tensor.name!r} is not one of a Llama known here")
        x = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if parts[-1] in heads:
            x = unpermuted(x, heads[parts[-1]])
        yield name, np.ascontiguousarray(x.astype(dtype))


def unpermuted(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in the order of halves, as Hugging Face rotates them.

    llama.cpp rotates neighbours: its converter puts row i of a head's first half beside row i of
    its second.
    """
    return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _tokenizer(fields: dict[str, Any], file: Path) -> library.Tokenizer:
    """The byte-level BPE of a file, split as its `pre` says."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    splits = {"smollm": True, "gpt-2": False}  # whether each digit stands alone
    if kind != "gpt2" or pre not in splits:
        raise PretrainedError(
            f"{file}: a tokenizer {kind!r}, {pre!r} is not supported; valid: byte-level BPE "
            f"(gpt2) split as {' or '.join(splits)}. Put the model's tokenizer.json beside its "
            "weights in Hugging Face's format instead"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        found = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise PretrainedError(f"{file}: its tokenizer cannot be built: {error}") from error
    levels = [library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if splits[pre]:
        levels.insert(0, library.pre_tokenizers.Digits(individual_digits=True))
    found.pre_tokenizer = library.pre_tokenizers.Sequence(levels)
    found.decoder = library.decoders.ByteLevel()
    control = [
        library.AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL
    ]
    found.add_special_tokens(control)
    return found
