"""What the command line answers: a user's mistake gets one message, not a traceback."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rlhf_jax import cli
from rlhf_jax.check import check
from rlhf_jax.config import Config
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
            check(replace(one, mesh=(1, 1, 1, 1)), devices=1)
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
        (["show", "experiments/models/ppo.py", "--set", "modl.path=x"], "Did you mean 'model'?"),
        (["show", SMOKE, "--set", "learner.policy=1"], "Valid: name, steps, learners"),
        (["show", SMOKE, "--set", "steps=many"], "valid is int"),
        (["show", SMOKE, "--set", "steps"], "write it as name.name=value"),
        (["show", SMOKE, "--set", "learners.policy.minibatches=3"], "do not divide into 3"),
        (["show", SMOKE, "--set", "rollouts.sampling.temperature=0.0"], "must be above 0"),
        (["show", SMOKE, "--set", "learners.policy.objective=grpo"], "this is code, not a number"),
        (["show", SMOKE, "--set", "mesh=(2,2)"], "needs four positive sizes"),
        (
            ["show", SMOKE, "--set", "mesh=(3,1,1,1)"],
            "data 3, and these are 3 of the 8 devices; try (8, 1, 1, 1)",
        ),
        (["show", SMOKE, "--set", "rollouts.microbatches=0"], "must be at least 1"),
        (["show", SMOKE, "--set", "rollouts.length=60"], "exceed the model's context of 64"),
        (["show", SMOKE, "--set", "rollouts.sampling.top_p=2.0"], "needs 0 < top_p ≤ 1"),
        (["show", SMOKE, "--set", "frozen.reference.start.learner=foo"], "no learner 'foo'"),
        (["show", str(EXPERIMENTS / "README.md")], "is not a .py file"),
        (["sample", "nowhere"], "there is no directory"),
        (["sample", "nowhere", "--chat"], "rlhf-jax export makes one"),
        (["eval", "nowhere"], "there is no directory"),
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


def test_a_mistake_in_an_experiments_file_names_its_line(tmp_path, capsys):
    file = tmp_path / "broken_experiment.py"
    file.write_text("import nothing_of_this_name\n")
    assert "line 1: ModuleNotFoundError" in run(capsys, "show", file)[2]
    file.write_text("def config(:\n")
    assert "line 1: SyntaxError" in run(capsys, "show", file)[2]
    file.write_text(
        "from functools import partial\nimport smoke\nfrom dataclasses import replace\n"
        "from rlhf_jax.objectives import ppo\n"
        "def config():\n"
        "    base = smoke.config()\n"
        "    policy = replace(base.learners['policy'], objective=partial(ppo, klip=0.2))\n"
        "    return replace(base, learners={**base.learners, 'policy': policy})\n"
    )
    load(SMOKE)  # puts its folder where the file above finds it
    status, _, err = run(capsys, "show", file)
    assert status == 2
    assert "learners.policy.objective: ppo() got an unexpected keyword argument 'klip'" in err


def test_a_refused_experiment_does_not_claim_the_directory(tmp_path, capsys):
    out = tmp_path / "run"
    bad = ["--set", "learners.policy.minibatches=3"]
    assert run(capsys, "train", SMOKE, "--out", out, *bad)[0] == 2
    assert not out.exists()


def test_no_document_ships_a_placeholder():
    root = EXPERIMENTS.parent
    for path in [*root.glob("*.md"), *EXPERIMENTS.rglob("*.md"), *EXPERIMENTS.rglob("*.py")]:
        assert not re.search(r"\b[A-Z]+_(RESULT|TIME|NUMBERS|EXPECT|LOSS)\b", path.read_text()), (
            path
        )


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
    assert "seed: 0 -> 3" in err and "--resume" not in err
    status, _, err = run(capsys, "train", SMOKE, "--out", out, "--set", "steps=9")
    assert "steps: 8 -> 9" in err and f"--out {out} --set steps=9 --resume" in err
    status, _, err = run(capsys, "train", SMOKE, "--out", out, "--set", "seed=3", "--resume")
    assert status == 2
    assert "cannot be resumed with another experiment" in err
    runs.start(SMOKE, ["steps=9"], out, resume=True)  # longer is allowed
    runs.start(SMOKE, ["steps=9", "rollouts.chunks=2"], out, resume=True)  # and in other pieces


def test_a_launcher_can_tell_a_stopped_run_from_a_finished_one(tmp_path, capsys, monkeypatch):
    from rlhf_jax import runs
    from rlhf_jax.checkpoint import Stopped

    def stopped(*arguments, **named):
        raise Stopped("stopped as asked")

    monkeypatch.setattr(runs, "start", stopped)
    train = ["train", SMOKE, "--out", tmp_path]
    assert run(capsys, *train)[0] == 0
    assert run(capsys, *train, "--stopped-status", 75)[0] == 75


def test_the_module_is_the_console_script():
    import rlhf_jax.__main__ as module

    assert module.main is cli.main
    assert sys.modules["rlhf_jax.cli"] is cli
