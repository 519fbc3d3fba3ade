"""Two processes load and write one model, and neither has more of it than its part."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hub_toys import CONFIGS
from test_chat import directory
from two_processes import drawn

from rlhf_jax.models import exporting, families, pretrained, weights

CHILD = Path(__file__).parent / "two_processes.py"
SIZE = {
    "vocab_size": 16384, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
}  # fmt: skip
WIDE = {
    "llama": {"model_type": "llama", **SIZE, "intermediate_size": 5504},
    "neox": {"model_type": "gpt_neox", **SIZE, "intermediate_size": 8192},  # fused, interleaved
}


def written(path, config):
    """A directory of random weights in several shards, made kind by kind."""
    (path / "origin").mkdir()
    directory(path / "origin")
    (path / "origin" / "config.json").write_text(json.dumps(config))
    model = families.read(config)[1]
    shapes = weights.flat(jax.eval_shape(model.init, jax.random.key(0)))

    def read(names):
        return {name: drawn(name, shapes[name].shape) for name in names if name in shapes}

    size = sum(x.size * 4 for x in shapes.values())
    limit = max(size // 5, 40_000)
    exporting.export(path / "model", model, read, origin=path / "origin", shard_bytes=limit)
    return size / 2**30


def both(task, path):
    """What two processes say at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device each
    command = [sys.executable, str(CHILD), task, str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen([*command, str(rank), str(path)], env=plain, **pipes) for rank in range(2)
    ]
    try:
        said = [child.communicate(timeout=400) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], said
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_each_of_two_processes_holds_half_of_a_gigabyte(tmp_path, name):
    size = written(tmp_path, WIDE[name])
    assert size > 1 and len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    for found in both("load", tmp_path):
        print(found)
        assert found["arrays"] < 0.501 * size
        assert found["peak"] < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_two_processes_write_what_they_read(tmp_path, name):
    size = written(tmp_path, CONFIGS[name])
    for found in both("export", tmp_path):
        assert found["arrays"] < 0.6 * size  # norms and biases are everywhere
    one, other = (pretrained.Files(tmp_path / path) for path in ("model", "out0"))
    assert set(one.where) == set(other.where)
    for tensor in one.where:
        assert one.tensor(tensor)[:].tobytes() == other.tensor(tensor)[:].tobytes(), tensor
    assert (tmp_path / "out0" / "tokenizer.json").is_file()
    assert pretrained.model(tmp_path / "out0") == pretrained.model(tmp_path / "model")
    assert not (tmp_path / "out1").exists()  # only the first writes
