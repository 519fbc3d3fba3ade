"""Directories of Hugging Face: read slice by slice onto a mesh, written back bit for bit."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hub_toys import CONFIGS
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.models import families, pretrained, weights
from rlhf_jax.models.exporting import export, export_adapter
from rlhf_jax.models.pretrained import PretrainedError
from rlhf_jax.models.transformer import Lora, Transformer

KINDS = pytest.mark.parametrize("name", CONFIGS, ids=lambda name: name.replace(" ", "-"))


def lively(model, seed=0):
    """Random weights, every leaf of them: no bias 0, no scale 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


def of(name, **changes):
    return replace(families.read(CONFIGS[name])[1], **changes)


def written(path, name, **options):
    """A directory of the family, and what is in it."""
    (path / "origin").mkdir()
    (path / "origin" / "config.json").write_text(json.dumps(CONFIGS[name]))
    model = of(name)
    params = lively(model)
    export(path / "made", model, params, origin=path / "origin", shard_bytes=20_000, **options)
    return model, params, path / "made"


@KINDS
def test_the_config_of_a_model_is_read_as_that_model(name):
    model = of(name)
    kind, again = families.read(families.write(model))
    assert families.says(families.write(model), model)
    assert again.layers == 3 and again.vocab == 96 and kind in families.FAMILIES


@KINDS
def test_what_is_written_in_shards_is_read_onto_eight_devices_bit_for_bit(name, tmp_path):
    model, params, path = written(tmp_path, name)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert pretrained.model(path) == model
    mesh = sharding.make_mesh((2, 2, 2, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.shardings(shapes, mesh),
    )
    found = weights.fill(target, pretrained.load(path, model), origin=str(path))
    jax.tree.map(assert_array_equal, found, params)
    split = [x for x in jax.tree.leaves(found) if not x.sharding.is_fully_replicated]
    assert len(split) > len(jax.tree.leaves(found)) / 3


@KINDS
def test_scanned_layers_are_the_same_weights(name, tmp_path):
    model, params, path = written(tmp_path, name)
    scanned = replace(model, scan=True)
    lazy = pretrained.load(path, scanned)
    fresh = jax.eval_shape(scanned.init, jax.random.key(0))
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    fresh = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one), fresh)
    found = weights.fill(fresh, lazy, origin="")
    jax.tree.map(assert_array_equal, found, toys.stacked(params, model.layers))
    export(tmp_path / "again", scanned, found, origin=tmp_path / "origin")
    one = load_file(tmp_path / "again" / "model.safetensors")
    for name, x in one.items():
        assert_array_equal(x, pretrained.Files(path).tensor(name)[:])


def test_half_precision_goes_through_float32_and_back_bit_for_bit(tmp_path):
    model, _, path = written(tmp_path, "qwen2", dtype="bfloat16")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    fresh = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    params = weights.fill(fresh, pretrained.load(path, model), origin="")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    export(tmp_path / "again", model, params, origin=path)  # its dtype, without being asked
    for name in pretrained.Files(path).where:
        one, other = (pretrained.Files(p).tensor(name) for p in (path, tmp_path / "again"))
        assert one.dtype == other.dtype == "BF16"
        assert_array_equal(one[:].view(np.uint16), other[:].view(np.uint16))


def test_a_device_reads_only_its_part(tmp_path):
    """Of a fused tensor, too: no more than the heads that it needs."""
    model, params, path = written(tmp_path, "neox")
    lazy = weights.flat(pretrained.load(path, model))["layers_1/value/kernel"]
    read = []

    class Spy:
        def __getitem__(self, index):
            read.append([i.stop - i.start for i in index])
            return lazy.tensor[index]

    part = replace(lazy, tensor=Spy())[3:7, 9:14]  # of the second head
    assert_array_equal(part, params["layers_1"]["value"]["kernel"][3:7, 9:14])
    assert read == [[3 * 8, 4]]


def test_a_model_of_our_own_is_a_llama(tmp_path):
    model = Transformer(vocab=96, width=32, layers=2, heads=4, kv_heads=2, mlp=48, context=64)
    export(tmp_path, model, lively(model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert pretrained.model(tmp_path, head_dim=None) == model


SCALAR = {"lm_head": False, "value_head": True, "value_bias": False}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_reward_model_is_one_of_transformers_and_back_bit_for_bit(tmp_path, name):
    model = of(name, **SCALAR)
    params = lively(model)
    export(tmp_path, model, params)
    made = json.loads((tmp_path / "config.json").read_text())
    assert made["architectures"][0].endswith("ForSequenceClassification")
    assert len(made["id2label"]) == 1
    assert "score.weight" in pretrained.Files(tmp_path).where
    again = pretrained.model(tmp_path)
    assert replace(again, head_dim=None) == replace(model, head_dim=None)
    lazy = pretrained.load(tmp_path, again)
    jax.tree.map(lambda leaf, x: assert_array_equal(leaf[:], x), lazy, params)
    export(tmp_path / "again", of(name), lively(of(name)), origin=tmp_path)  # a policy of it
    made = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "id2label" not in made and "Sequence" not in made["architectures"][0]
    assert pretrained.model(tmp_path / "again").lm_head


def test_a_reward_model_with_a_bias_is_not_written(tmp_path):
    model = of("llama", **{**SCALAR, "value_bias": True})
    params = lively(model)
    params["value_head"]["bias"][:] = 0.25
    with pytest.raises(PretrainedError, match=r"bias 0\.25.*replace\(model, value_bias=False\)"):
        export(tmp_path / "out", model, params)
    params["value_head"]["bias"][:] = 0
    assert (export(tmp_path / "out", model, params) / "model.safetensors").is_file()


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; valid: llama, mistral"),
        ({"hidden_act": "relu6"}, "activation 'relu6' is not known"),
        ({"router_jitter": 0.1}, r"may change the numbers: router_jitter=0\.1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2; only 1 is supported"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_key_value_heads": 3}, "must be a multiple of kv_heads"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            r"LlamaForSequenceClassification with 2 labels .*: a reward model has one",
        ),
    ],
)
def test_a_config_that_is_not_computed_exactly_is_refused_by_name(tmp_path, changes, says):
    given = {**CONFIGS["llama"], **changes}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(PretrainedError, match=says):
        pretrained.model(tmp_path)


def spoil(path, change):
    """One shard of a directory, changed."""
    file = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, str(file))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}),
            r"final_norm.* \(5,\)",
        ),
        (lambda t: t.update({"model.layers.0.odd": np.zeros(1, np.float32)}), None),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, says):
    model, _, path = written(tmp_path, "llama")
    spoil(path, change)
    index = path / pretrained.INDEX
    found = json.loads(index.read_text())
    first = sorted(path.glob("*.safetensors"))[0].name
    found["weight_map"] |= dict.fromkeys(load_file(path / first), first)
    index.write_text(json.dumps(found))
    with pytest.raises(PretrainedError, match=says or "odd is a tensor that this family does not"):
        pretrained.load(path, model)


def test_a_missing_tensor_is_named(tmp_path):
    model, _, path = written(tmp_path, "llama")
    index = path / pretrained.INDEX
    found = json.loads(index.read_text())
    del found["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(found))
    with pytest.raises(PretrainedError, match=r"missing: layers_1/up/kernel \(32, 48\)"):
        pretrained.load(path, model)


def test_files_that_are_cut_short_or_not_there_are_named(tmp_path):
    model, _, path = written(tmp_path, "llama")
    first, second, *_ = sorted(path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(PretrainedError, match=f"{first.name} is not a complete"):
        pretrained.load(path, model)
    second.unlink()
    with pytest.raises(PretrainedError, match=f"not there: {second.name}"):
        pretrained.load(path, model)
    (path / pretrained.INDEX).unlink()
    with pytest.raises(PretrainedError, match=r"and no model.safetensors.index.json"):
        pretrained.load(path, model)


def test_weights_of_another_model_are_not_written(tmp_path):
    model = of("llama")
    wide = lively(of("llama", mlp=64))
    with pytest.raises(PretrainedError, match=r"wants layers_0/gate/kernel \(32, 48\); was the"):
        export(tmp_path, model, wide)
    with pytest.raises(PretrainedError, match=r"wants layers_2/.*; was the experiment changed"):
        export(tmp_path, model, lively(of("llama", layers=2)))


def test_a_model_that_no_family_computes_is_not_written(tmp_path):
    model = of("gpt2", query_key_norm=True)
    with pytest.raises(PretrainedError, match="no family of Hugging Face computes this model"):
        export(tmp_path, model, lively(model))


def test_an_adapter_of_a_fused_matrix_or_of_a_reward_model_is_not_written(tmp_path):
    model = of("neox", lora=Lora(rank=2))
    with pytest.raises(PretrainedError, match="query, key and value in one matrix"):
        export_adapter(tmp_path, model, lively(model))
    model = of("llama", lora=Lora(rank=2), **SCALAR)
    with pytest.raises(PretrainedError, match="head of a reward model is no adapter"):
        export_adapter(tmp_path, model, lively(model))
