"""A checkpoint is written as a directory of Hugging Face without being anywhere whole."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from hub_toys import CONFIGS
from numpy.testing import assert_array_equal
from test_chat import directory
from test_pretrained import lively

from rlhf_jax import inference, objectives, phases
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import Config, ConfigError, From, Frozen, Learner
from rlhf_jax.models import exporting, families, pretrained, weights
from rlhf_jax.models.transformer import Lora
from rlhf_jax.optimizer import sgd
from rlhf_jax.types import Control, TrainState


def saved(tmp_path, name, **changes):
    """A run with one learner, an adapter of a frozen base if it has terms of low rank."""
    origin = tmp_path / "origin"
    origin.mkdir()
    directory(origin)
    (origin / "config.json").write_text(json.dumps(CONFIGS[name]))
    plain = families.read(CONFIGS[name])[1]
    model = replace(plain, **changes)
    learner = Learner(
        model, objectives.mle, batch="text", optimizer=partial(sgd, learning_rate=1.0),
        base="base" if model.lora is not None else None,
    )  # fmt: skip
    params, frozen = lively(model), {}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        if learner.base is not None:
            kept = {n: x for n, x in weights.flat(params).items() if "lora_" not in n}
            checkpoints.save_frozen({"base": weights.nested(kept)})
            frozen = {"base": Frozen(From(path=str(origin)), replace(model, lora=None))}
        state = phases.learner_state(weights.trained(params, "lora_") if frozen else params,
                                     learner=learner)  # fmt: skip
        checkpoints.save(
            3, TrainState(np.int32(3), {"policy": state}, Control(*np.float32([0.1, 0.0, 1.0])))
        )
    config = Config("x", 1, {"policy": learner}, {"text": dict}, frozen=frozen)
    return config, params, partial(inference.export, config, tmp_path / "run", origin=origin)


def spied(monkeypatch):
    """Shapes of what devices hold, and all bytes, whenever a tensor is brought to the host."""
    seen, real = [], exporting._host
    others = {id(x): x for x in jax.live_arrays()}  # what other tests keep

    def host(x):
        there = [one for one in jax.live_arrays() if len(one.sharding.device_set) > 1]
        there = [one for one in there if id(one) not in others]
        parts = {shard.data.shape for one in there for shard in one.addressable_shards}
        seen.append((parts, sum(one.nbytes for one in there)))
        return real(x)

    monkeypatch.setattr(exporting, "_host", host)
    return seen


@pytest.mark.parametrize(
    "name, changes",
    [("gpt2", {}), ("neox", {"lora": Lora(rank=8), "scan": True})],
    ids=["one-by-one", "scanned-with-adapter"],
)
def test_no_device_holds_a_whole_matrix_and_one_device_writes_the_same_bytes(
    tmp_path, monkeypatch, name, changes
):
    _, params, export = saved(tmp_path, name, **changes)
    seen = spied(monkeypatch)
    eight = export(tmp_path / "eight")
    shapes = {x.shape for x in jax.tree.leaves(params)}
    whole = {shape for shape in shapes | {shape[1:] for shape in shapes} if len(shape) > 1}
    assert (96, 32) in whole and not [parts & whole for parts, _ in seen if parts & whole]
    assert max(size for _, size in seen) < sum(x.nbytes for x in jax.tree.leaves(params)) / 2
    one = export(tmp_path / "one", devices=jax.devices()[:1])
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (one / file).read_bytes() == (eight / file).read_bytes()
    exporting.export(
        tmp_path / "whole", replace(families.read(CONFIGS[name])[1], **changes), params,
        origin=tmp_path / "origin",
    )  # fmt: skip
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (one / "model.safetensors").read_bytes() == whole


def test_what_is_written_and_read_again_is_what_was_trained_bit_for_bit(tmp_path):
    config, params, export = saved(tmp_path, "llama", scan=True)
    out = export(tmp_path / "out")
    model = config.learners["policy"].model
    assert pretrained.model(out, scan=True) == model
    shapes = inference.here(jax.eval_shape(model.init, jax.random.key(0)))
    found = weights.fill(shapes, pretrained.load(out, model), origin=str(out))
    jax.tree.map(assert_array_equal, found, params)
    with pytest.raises(ConfigError, match="no learner 'critic'; valid: policy"):
        export(tmp_path / "other", learner="critic")
