"""From a directory of Hugging Face through a run and back to one, on a tiny model."""

import json
import re
from pathlib import Path

import host_scores
import numpy as np
import pytest
from hub_toys import CONFIGS
from numpy.testing import assert_array_equal
from test_chat import directory
from test_pretrained import lively

from rlhf_jax import cli
from rlhf_jax.data import snippets, vader
from rlhf_jax.models import families, pretrained
from rlhf_jax.models.exporting import export

PPO = Path(__file__).parent.parent / "experiments" / "models" / "ppo.py"
pytestmark = pytest.mark.usefixtures("compiled_once")
TEXTS = [{"text": f"the film is {word} and more"} for word in ("good", "bad", "fine", "odd")] * 4


@pytest.fixture
def hub(tmp_path):
    """A tiny Llama with a tokenizer of bytes."""
    config = {**CONFIGS["llama"], "vocab_size": 264, "num_hidden_layers": 2}
    made = tmp_path / "origin"
    made.mkdir()
    directory(made)
    (made / "config.json").write_text(json.dumps(config))
    model = families.read(config)[1]
    params = lively(model)
    for name in ("embed", "head"):
        for leaf in params[name]:
            params[name][leaf] *= 0.05
    export(tmp_path / "whole", model, params, origin=made)
    return tmp_path / "whole"


def test_a_directory_is_trained_sampled_and_handed_back(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snippets, "rows", lambda **_: TEXTS)
    monkeypatch.setattr(vader, "vader_compound", host_scores.second_letter)
    out = tmp_path / "run"
    settings = [f"model.path={hub}", "model.rank=2", "steps=2", "rows=16", "rollouts.show=0",
                "rollouts.length=6", "mesh.0=2", "mesh.1=2", "mesh.2=2"]  # fmt: skip
    given = [part for setting in settings for part in ("--set", setting)]
    assert cli.main(["train", str(PPO), "--out", str(out), *given]) == 0
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and abs(rows[0]["rollout/kl"]) < 1e-4
    assert cli.main(["sample", str(out), "--prompt", "the", "--count", "1", "--length", "4"]) == 0
    assert cli.main(["export", str(out), "--out", str(tmp_path / "back")]) == 0
    assert cli.main(["export", str(out), "--out", str(tmp_path / "low"), "--adapter"]) == 0
    assert (tmp_path / "low" / "adapter_config.json").is_file()
    back = tmp_path / "back"
    assert pretrained.model(back) == pretrained.model(hub)
    assert (back / "tokenizer.json").read_text() == (hub / "tokenizer.json").read_text()
    one, other = pretrained.Files(hub), pretrained.Files(back)
    assert set(one.where) == set(other.where)
    moved = {name for name in one.where if np.any(one.tensor(name)[:] != other.tensor(name)[:])}
    assert all("_proj" in name for name in moved) and len(moved) == 2 * 7
    assert_array_equal(one.tensor("model.norm.weight")[:], other.tensor("model.norm.weight")[:])
    capsys.readouterr()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda hub: (hub / "config.json").unlink(), "cannot read .*config.json"),
        (lambda hub: (hub / "model.safetensors").unlink(), r"holds 0 \.safetensors files"),
        (lambda hub: (hub / "tokenizer.json").unlink(), "no tokenizer file"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused_before_anything_is_compiled(
    hub, tmp_path, capsys, spoil, says
):
    spoil(hub)
    command = ["train", str(PPO), "--out", str(tmp_path / "run"), "--set", f"model.path={hub}"]
    assert cli.main(command) != 0
    error = capsys.readouterr().err
    assert "Traceback" not in error

    assert re.search(says, error)
