"""From a directory of Hugging Face through a run and back to one, on a tiny model."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import host_scores
import jax
import numpy as np
import pytest
from hub_toys import CONFIGS
from numpy.testing import assert_array_equal
from test_chat import CHATML, SPECIALS, directory
from test_pretrained import lively

from rlhf_jax import cli, train
from rlhf_jax.check_models import check_directories
from rlhf_jax.checkpoint import restore_frozen, restore_params
from rlhf_jax.config import ConfigError
from rlhf_jax.data import snippets, streams, tokenizers, vader
from rlhf_jax.experiment import load
from rlhf_jax.models import families, pretrained, weights
from rlhf_jax.models.exporting import export

FOLDER = Path(__file__).parent.parent / "experiments" / "models"
PPO, GRPO, CHAIN = (FOLDER / f"{name}.py" for name in ("ppo", "grpo", "chain"))
pytestmark = pytest.mark.usefixtures("compiled_once")
TEXTS = [
    {"text": f"the {word} film is it {i}", "ratings": np.array([i % 4 - 2, i % 4]), "part": "movie"}
    for i, word in enumerate(("bad", "odd", "fine", "good") * 4)
]


def made(tmp_path, vocab=264):
    """A tiny Llama with a tokenizer of bytes."""
    sizes = {"vocab_size": vocab, "num_hidden_layers": 2, "max_position_embeddings": 320}
    config = {**CONFIGS["llama"], **sizes}
    origin = tmp_path / "origin"
    origin.mkdir()
    directory(origin)
    (origin / "config.json").write_text(json.dumps(config))
    model = families.read(config)[1]
    params = lively(model)
    for name in ("embed", "head"):
        for leaf in params[name]:
            params[name][leaf] *= 0.05
    return export(tmp_path / "whole", model, params, origin=origin)


@pytest.fixture
def hub(tmp_path):
    return made(tmp_path)


def trained(file, out, *settings):
    """Run an experiment; the metrics of its steps, of each stage that there is."""
    given = [part for setting in settings for part in ("--set", setting)]
    assert cli.main(["train", str(file), "--out", str(out), *given]) == 0
    found = {x.parent.name: x.read_text().splitlines() for x in out.rglob("metrics.jsonl")}
    return {name: [json.loads(line) for line in lines] for name, lines in found.items()}


def test_a_directory_is_trained_sampled_and_handed_back(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snippets, "rows", lambda **_: TEXTS)
    monkeypatch.setattr(vader, "vader_compound", host_scores.second_letter)
    out = tmp_path / "run"
    rows = trained(
        PPO, out, f"model.path={hub}", "model.rank=2", "steps=2", "rows=16", "rollouts.show=0",
        "rollouts.length=6", "mesh.0=2", "mesh.1=2", "mesh.2=2",
    )["run"]  # fmt: skip
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


def edit(hub, name="config.json", **changes):
    found = json.loads((hub / name).read_text())
    (hub / name).write_text(json.dumps({**found, **changes}))


def cut(hub):
    file = hub / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def nothing_is_compiled(monkeypatch):
    """Or even read: to build the programs, and to fill weights, are errors of another kind."""
    monkeypatch.setattr(train, "build", None)
    monkeypatch.setattr(weights, "fill", None)


SPOILED = {
    "no config": (lambda hub: (hub / "config.json").unlink(), "cannot read .*config.json"),
    "half a config": (
        lambda hub: (hub / "config.json").write_text("{"), "config.json is not valid.*again"
    ),
    "no weights": (
        lambda hub: (hub / "model.safetensors").unlink(), r"holds 0 \.safetensors files"
    ),
    "a truncated file": (cut, r"model\.safetensors is not a complete .*download it again"),
    "another's config": (
        lambda hub: edit(hub, hidden_size=64),
        r"not those of its config\.json:\n.*embedding is \(264, 32\); config.json says \(264, 64\)",
    ),
    "an unknown model": (
        lambda hub: edit(hub, model_type="mamba"),
        r"config\.json: model_type 'mamba' is not supported; valid: llama",
    ),
    "text for a number": (
        lambda hub: edit(hub, hidden_size="32"), "does a field hold text where a number is meant"
    ),
    "an end outside": (
        lambda hub: edit(hub, eos_token_id=[2, 264]),
        r"config\.json says eos_token_id=264, and tokens are 0 to 263; correct it",
    ),
    "no tokenizer": (lambda hub: (hub / "tokenizer.json").unlink(), "no tokenizer file"),
    "another end outside": (
        lambda hub: edit(hub, "generation_config.json", eos_token_id=[262, 300]),
        r"does not fit .* ids up to 300 \(which generation_config.json says ends texts\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil, says", SPOILED.values(), ids=SPOILED)
def test_a_directory_that_is_not_whole_is_refused_before_anything_is_compiled(
    hub, tmp_path, capsys, monkeypatch, spoil, says
):
    spoil(hub)
    nothing_is_compiled(monkeypatch)
    setting = ["--set", f"model.path={hub}", "--set", "rows=16"]
    commands = [["show", str(PPO), *setting], ["sample", str(hub), "--chat", "--prompt", "a"]]
    commands.append(["train", str(PPO), "--out", str(tmp_path / "run"), *setting])
    for command in commands[0 if (hub / "config.json").is_file() else 2 :]:
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error
        assert re.search(says, error, re.DOTALL), error


@pytest.mark.parametrize("vocab", [200, 263], ids=["for texts", "for an end"])
def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(
    tmp_path, capsys, monkeypatch, vocab
):
    path = made(tmp_path, vocab)
    nothing_is_compiled(monkeypatch)
    says = rf"tokenizer of {path} does not fit the model of .* ids up to 263 .*{vocab} rows"
    train = ["train", str(PPO), "--out", str(tmp_path / "run"), "--set", "rows=16"]
    for command in ([*train, "--set", f"model.path={path}"], ["sample", str(path)]):
        assert cli.main(command) == 2
        assert re.search(says, capsys.readouterr().err)


def test_the_special_tokens_of_a_streams_chats_are_looked_at_too(hub):
    base = tokenizers.byte_base()
    names = [*SPECIALS, "<tool>"]  # 264: nobody's row, as long as nobody writes it
    base.add_special_tokens([tokenizers.library.AddedToken(t, special=True) for t in names])
    base.save(str(hub / "tokenizer.json"))
    config = load(PPO, [f"model.path={hub}"])
    check_directories(config)
    talks = partial(streams.chat_prompts, tokenizer=hub, template=CHATML, batch=2, length=99)
    check_directories(replace(config, data={"prompts": talks}))
    talks = partial(talks, template=CHATML + "<tool>")
    with pytest.raises(ConfigError, match=r"data\.prompts\.tokenizer: .* ids up to 264"):
        check_directories(replace(config, data={"prompts": talks}))


@pytest.mark.parametrize("file", [PPO, GRPO, CHAIN], ids=lambda file: file.stem)
def test_without_a_directory_an_experiment_asks_for_one(file, capsys):
    assert cli.main(["show", str(file)]) == 2
    assert "name a directory of Hugging Face: --set model.path=DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, rank", [(GRPO, 2), (CHAIN, 2), (CHAIN, 0)], ids=lambda x: getattr(x, "stem", x)
)
def test_an_experiment_is_sound_with_adapters_and_with_all_weights(hub, file, rank, capsys):
    if file is GRPO:
        pytest.importorskip("reasoning_gym")
    given = ["--set", f"model.path={hub}", "--set", f"model.rank={rank}"]
    assert cli.main(["show", str(file), *given]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_a_chain_hands_its_weights_on_and_holds_still_what_it_compares_with(
    hub, tmp_path, monkeypatch, rank
):
    monkeypatch.setattr(snippets, "rows", lambda **_: TEXTS)
    out = tmp_path / "run"
    metrics = trained(
        CHAIN, out, f"model.path={hub}", f"model.rank={rank}", "model.learning_rate=0.01",
        "steps.sft=2", "steps.reward=2", "steps.ppo=2", "rows=16", "stages.ppo.rollouts.length=6",
        "stages.ppo.rollouts.show=0",
    )  # fmt: skip
    assert [len(metrics[name]) for name in ("sft", "reward", "ppo")] == [2, 2, 2]
    assert abs(metrics["ppo"][0]["rollout/kl"]) < 1e-4 < abs(metrics["ppo"][1]["rollout/kl"])
    sft, reward = (
        restore_params(out / stage, name) for stage, name in (("sft", "policy"), ("reward",) * 2)
    )
    for name, expected in (("reference", sft), ("reward", reward)):
        found = restore_params if rank else restore_frozen
        jax.tree.map(assert_array_equal, found(out / "ppo", name), expected)
    policy = weights.flat(restore_params(out / "ppo", "policy"))
    assert all((x != weights.flat(sft)[name]).any() for name, x in policy.items())
    for stage in ("sft", "ppo"):
        command = ["export", str(out), "--stage", stage, "--out", str(tmp_path / stage)]
        assert cli.main([*command, "--origin", str(hub)]) == 0
        assert pretrained.model(tmp_path / stage) == pretrained.model(hub)


@pytest.mark.slow
def test_answers_are_learned_from_by_groups(hub, tmp_path):
    pytest.importorskip("reasoning_gym")
    rows = trained(
        GRPO, tmp_path / "run", f"model.path={hub}", "model.rank=2", "steps=2", "rows=8",
        "samples=2", "rollouts.length=6", "rollouts.show=0",
    )["run"]  # fmt: skip
    assert len(rows) == 2 and all(0 <= row["rollout/reward"] <= 1 for row in rows)
    assert abs(rows[0]["rollout/kl"]) < 1e-4


def test_a_reward_model_does_not_write_texts(hub, tmp_path, capsys):
    model = replace(pretrained.model(hub), lm_head=False, value_head=True, value_bias=False)
    out = export(tmp_path / "scores", model, lively(model), origin=hub)
    assert cli.main(["sample", str(out), "--prompt", "a"]) == 2
    assert "is a reward model: it scores texts and writes none" in capsys.readouterr().err
