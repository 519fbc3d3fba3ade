"""What the command line answers: a user's mistake gets one message, not a traceback."""

import json
import sys
from pathlib import Path

import jax
import pytest

from rlhf_jax import cli
from rlhf_jax.config import Config, check
from rlhf_jax.experiment import load

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SMOKE = str(EXPERIMENTS / "smoke.py")


@pytest.fixture(autouse=True)
def keep_cache_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def experiment_files():
    return sorted(p for p in EXPERIMENTS.rglob("*.py") if "def config()" in p.read_text())


@pytest.mark.parametrize("file", experiment_files(), ids=lambda p: str(p.relative_to(EXPERIMENTS)))
def test_every_experiment_loads_and_its_batches_divide(file):
    value = load(file)
    runs = [value] if isinstance(value, Config) else value.stages.values()
    for one in runs:
        if isinstance(one, Config):
            check(one, devices=1)
            jax.eval_shape(
                lambda one=one: [x.model.init(jax.random.key(0)) for x in one.learners.values()]
            )


def test_show_prints_every_number_and_the_batch_plan(capsys):
    status, out, _ = run(capsys, "show", SMOKE, "--set", "learners.policy.objective.clip=0.3")
    shown = json.loads(out)
    assert status == 0
    assert shown["config"]["learners"]["policy"]["objective"]["clip"] == 0.3
    assert shown["batch plan"]["rollout"]["rows"] == 16
    assert shown["batch plan"]["policy"]["rows per minibatch"] == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nowhere.py"], "there is no experiment file nowhere.py"),
        (["show", SMOKE, "--set", "learners.policy.objective.clp=1"], "Did you mean 'clip'?"),
        (["show", SMOKE, "--set", "learner.policy=1"], "Valid: name, steps, learners"),
        (["show", SMOKE, "--set", "steps=many"], "valid is int"),
        (["show", SMOKE, "--set", "steps"], "write it as name.name=value"),
        (["show", SMOKE, "--set", "learners.policy.minibatches=3"], "do not divide into 3"),
        (["show", SMOKE, "--set", "rollouts.sampling.temperature=0.0"], "must be above 0"),
        (["show", SMOKE, "--set", "learners.policy.objective=grpo"], "this is code, not a number"),
        (["sample", "nowhere"], "holds no run"),
        (["eval", "nowhere"], "holds no run"),
        (["report", "nowhere"], "nowhere"),
        (["train", SMOKE, "--out", f"{SMOKE}/x"], "cannot write to"),
    ],
)
def test_a_mistake_gets_one_message_that_says_what_is_valid(arguments, says, capsys):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert says in err


def test_an_experiment_without_a_config_function_is_refused(tmp_path, capsys):
    file = tmp_path / "empty_experiment.py"
    file.write_text("x = 1\n")
    status, _, err = run(capsys, "show", file)
    assert (status, "defines no function config()" in err) == (2, True)


def test_a_directory_with_a_run_is_not_overwritten(tmp_path, capsys, monkeypatch):
    from rlhf_jax import runs

    monkeypatch.setattr(runs, "train", lambda *a, **k: None)
    out = tmp_path / "run"
    runs.start(SMOKE, [], out, resume=False)
    status, _, err = run(capsys, "train", SMOKE, "--out", out)
    assert status == 2
    assert f"rlhf-jax train {SMOKE} --out {out} --resume" in err
    status, _, err = run(capsys, "train", SMOKE, "--out", out, "--set", "seed=3")
    assert status == 2
    assert "seed: 0 -> 3" in err
    status, _, err = run(capsys, "train", SMOKE, "--out", out, "--set", "seed=3", "--resume")
    assert status == 2
    assert "cannot be resumed with another experiment" in err
    runs.start(SMOKE, ["steps=9"], out, resume=True)  # longer is allowed


def test_the_module_is_the_console_script():
    import rlhf_jax.__main__ as module

    assert module.main is cli.main
    assert sys.modules["rlhf_jax.cli"] is cli
