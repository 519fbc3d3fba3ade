"""Two processes load and write one model, and neither has more of it than its part."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_toys import CONFIGS
from jax.flatten_util import ravel_pytree
from test_chat import directory
from together import RLHF_JAX, together
from two_processes import drawn

from rlhf_jax.checkpoint import restore_params
from rlhf_jax.models import exporting, families, pretrained, weights

CHILD = Path(__file__).parent / "two_processes.py"
SMOKE = Path(__file__).parent.parent / "experiments" / "smoke.py"
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
    codes, said = together([[sys.executable, CHILD, task, path]] * 2)
    assert codes == [0, 0], said
    return [json.loads(re.findall(r"^{.*}$", one, re.M)[-1]) for one in said]


def trained(experiment, out, *arguments):
    """Exit states and what was said by two processes that run one experiment."""
    return together([[*RLHF_JAX, "train", experiment, "--out", out, *arguments]] * 2)


PLAIN = """
from dataclasses import replace
from functools import partial
from rlhf_jax import experiment
from rlhf_jax.optimizer import sgd
from rlhf_jax.rewards import KL

def config():
    smoke = experiment.load({smoke!r})
    step = partial(sgd, learning_rate=0.01)
    learners = {{name: replace(one, optimizer=step) for name, one in smoke.learners.items()}}
    rollouts = replace(smoke.rollouts, kl=KL(initial=0.0, adaptive=False))
    return replace(smoke, learners=learners, rollouts=rollouts)
"""


def run(experiment, out, mesh, steps):
    """One that goes on to a step, by as many processes as the mesh has devices."""
    every = ("checkpoint.every=1", "checkpoint.keep=3", f"mesh={mesh}".replace(" ", ""))
    command = [*RLHF_JAX, "train", experiment, "--out", out, "--resume"]
    settings = [f"--set={x}" for x in (*every, f"steps={steps}")]
    codes, said = together([[*command, *settings]] * math.prod(mesh))
    assert not any(codes), said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three steps in one process: of smoke, and of it with plain gradients as its updates."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "plain.py").write_text(PLAIN.format(smoke=str(SMOKE)))
    found = {"smoke": SMOKE, "plain": folder / "plain.py"}
    for name, experiment in found.items():
        run(experiment, folder / name, (1, 1, 1, 1), 3)
    return {name: (experiment, folder / name) for name, experiment in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "plain"])
@pytest.mark.parametrize("mesh", [(2, 1, 1, 1), (1, 2, 2, 1)], ids=["two", "four"])
def test_several_processes_take_the_same_three_steps_as_one(tmp_path, alone, mesh, name):
    """From the same bits, so that rounding does not add up over steps: weights to 1e-5.

    The first step begins with weights that each makes of the seed, and the policy hardly moves. Of
    the others updates are compared, too: of plain gradients to 1e-5; with Adam, which divides by
    the root of their square, they differ by 5e-5.
    """
    experiment, one_run = alone[name]
    for step in (0, 1, 2):
        out = tmp_path / f"{step}"
        if step > 0:
            shutil.copytree(one_run, out)
            for later in range(step + 1, 4):
                shutil.rmtree(out / "checkpoints" / f"{later}")
        run(experiment, out, mesh, step + 1)
        for learner in ("policy", "critic", "reward"):
            one, other = (
                ravel_pytree(restore_params(found, learner, step=step + 1))[0]
                for found in (one_run, out)
            )
            size, differ = map(np.linalg.norm, (one, other - one))
            print(f"{mesh} {name} {learner} {step}: {size=:.3g}, {differ=:.2g}")
            assert differ <= 1e-5 * size
            if step > 0:
                old = ravel_pytree(restore_params(one_run, learner, step=step))[0]
                moved = np.linalg.norm(one - old)
                assert differ <= (1e-5 if name == "plain" else 1e-4) * moved


HOST = """
from dataclasses import replace
from functools import partial
import host_scores
from rlhf_jax import experiment
from rlhf_jax.rewards import from_text

def config():
    smoke = experiment.load({smoke!r})
    reward = from_text(host_scores.{score}, tokenizer="bytes", workers=1)
    return replace(smoke, rollouts=replace(smoke.rollouts, reward=reward, normalise=32))
"""


@pytest.mark.slow
def test_two_processes_sample_pay_for_their_own_rows_and_go_on_from_a_checkpoint(
    tmp_path, monkeypatch
):
    """A reward on the host: each process is asked for its half, and both learn from the whole."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    file = tmp_path / "host.py"
    file.write_text(HOST.format(smoke=str(SMOKE), score="length"))
    out = tmp_path / "run"
    codes, said = trained(file, out, "--set", "steps=2")
    assert codes == [0, 0], said
    codes, said = trained(file, out, "--set", "steps=3", "--resume")
    assert codes == [0, 0], said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["rollout/mismatch"] < 1e-4 for line in lines)
    assert len({line["rollout/reward"] for line in lines}) == 3


@pytest.mark.slow
def test_a_wrong_reward_in_one_process_stops_both(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    file = tmp_path / "host.py"
    file.write_text(HOST.format(smoke=str(SMOKE), score="odd_one_out"))
    codes, said = trained(file, tmp_path / "run", "--set", "steps=2")
    assert all(codes), said
    assert sum("its own message says how" in one for one in said) == 1, said
    assert sum("nobody likes process" in one for one in said) == 1, said


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
