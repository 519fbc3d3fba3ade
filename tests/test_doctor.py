"""What the doctor says of facts that are made up, of this process, and of two real ones."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from together import RLHF_JAX, together

from rlhf_jax import cli, doctor, probes

SMOKE = str(Path(__file__).parent.parent / "experiments" / "smoke.py")
GIB = 2**30
FACT = {
    "host": "a", "versions": {"jax": "0.11.2", "rlhf-jax": "0.1.0"}, "kinds": ["TPU v5p"],
    "platform": "tpu", "devices": 4, "free": 400 * GIB, "total": 440 * GIB, "limit": 95 * GIB,
    "used": 0,
}  # fmt: skip
STORED = {"host": "a", "write": 0.05, "read": 0.05, "same": True, "free": 500 * GIB}


def two(facts, **other):
    return [facts, {**facts, "host": "b", **other}]


def levels(judge):
    return {
        "ok": judge(two(FACT)).level,
        "versions": judge(two(FACT, versions={"jax": "0.10.2", "rlhf-jax": "0.1.0"})).level,
        "devices": judge(two(FACT, devices=3)).level,
        "kinds": judge(two(FACT, kinds=["TPU v4"])).level,
        "free": judge(two(FACT, free=20 * GIB)).level,
        "used": judge(two(FACT, used=60 * GIB)).level,
    }


def test_each_judge_sees_its_own_fault_and_no_other():
    good = dict.fromkeys(("ok", "versions", "devices", "kinds", "free", "used"), "ok")
    assert levels(doctor.versions) == {**good, "versions": "fail"}
    assert levels(doctor.devices) == {**good, "devices": "fail", "kinds": "fail"}
    assert levels(doctor.memory) == {**good, "free": "warn", "used": "warn"}


def test_the_host_that_differs_is_named():
    line = doctor.versions(two(FACT, versions={"jax": "0.10.2", "rlhf-jax": "0.1.0"}))
    assert "process 1 on b has jax 0.10.2" in line.said
    assert line.todo == "install the same versions on every host"


def test_processes_with_different_experiments_fail_with_the_first_difference():
    facts = [{**one, "experiment": {"ppo": {"steps": 8, "seed": 0}}} for one in two(FACT)]
    assert doctor.experiments(facts) == []
    facts[1]["experiment"] = {"ppo": {"steps": 9, "seed": 0}}
    (line,) = doctor.experiments(facts)
    assert line.level == "fail" and "process 1 on b" in line.said
    assert line.said.endswith("(there -> here):\n  ppo.steps: 8 -> 9")


def test_a_cpu_is_a_warning():
    cpu = {**FACT, "platform": "cpu", "kinds": ["cpu"], "limit": 0}
    assert doctor.devices([cpu]).level == "warn"


def test_the_quietest_round_gives_the_skew():
    assert doctor.clock([[10.0, 13.0], [20.0, 20.02], [30.0, 33.0]]).level == "ok"
    assert "process 1 is ahead" in doctor.clock([[10.0, 13.0]]).said
    assert doctor.clock([[10.0, 13.0]]).level == "warn"
    assert doctor.clock([[10.0, 100.0]]).level == "fail"


@pytest.mark.parametrize(
    ("other", "level", "says"),
    [
        ({}, "ok", "336 MB/s written"),
        ({"cannot write": "PermissionError: no"}, "fail", "process 1 on b cannot write"),
        ({"cannot see": "FileNotFoundError"}, "fail", "does not see what process 0 wrote"),
        ({"same": False}, "fail", "does not see what process 0 wrote"),
        ({"free": 2 * GIB}, "warn", "2 GiB free"),
        ({"write": 5.0}, "warn", "3 MB/s written"),
    ],
)
def test_a_directory_is_judged_by_its_worst_process(other, level, says):
    line = doctor.storage(two(STORED, **other), "/runs/x")
    assert (line.level, says in line.said) == (level, True), line


def test_a_sum_over_an_axis_is_measured_and_checked():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    speed, right = probes.all_reduce(mesh, "fsdp")
    assert right and speed > 0
    line = doctor.collective(mesh, "fsdp")
    assert line.level == "ok" and "fsdp (4 devices)" in line.said


def test_a_wrong_sum_is_a_failure(monkeypatch):
    monkeypatch.setattr(probes, "all_reduce", lambda mesh, axis: (1e12, False))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert doctor.collective(mesh, "data").level == "fail"


def test_one_process_ends_with_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "SIZE", 2**16)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    good = ["doctor", SMOKE, "--set", "mesh=(1,8,1,1)", "--checkpoints", str(tmp_path / "run")]
    assert cli.main(good) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ok +mesh +smoke: data 1 × fsdp 8 × tensor 1 × sequence 1$", out, re.M)
    assert re.search(r"^ok +collective .* over fsdp \(8 devices\)$", out, re.M)
    assert "checkpoints" in out and not list((tmp_path / "run").iterdir())
    assert cli.main(["doctor", SMOKE, "--set", "mesh=(3,1,1,1)"]) == 1
    out = capsys.readouterr().out
    assert "these are 3 of the 8 devices" in out and "→ change the experiment" in out
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--checkpoints", str(tmp_path / "file" / "run")]) == 1
    assert "cannot write to" in capsys.readouterr().out


def test_waiting_ends_with_a_message_and_a_status():
    code = "from rlhf_jax.probes import Patience; import time\nwith Patience(1): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "process 0 on" in done.stdout and "→ a host is down" in done.stdout


def doctors(*directories):
    """Statuses and outputs of processes that look at these directories."""
    return together([[*RLHF_JAX, "doctor", "--checkpoints", path] for path in directories])


@pytest.mark.slow
def test_two_processes_find_each_other_and_agree_on_a_shared_directory(tmp_path):
    statuses, (first, second) = doctors(tmp_path, tmp_path)
    assert statuses == [0, 0], (first, second)
    assert "process 1 of 2, found by RLHF_JAX_*" in second and "checkpoints" not in second
    speed = re.search(r"ok +collective +([\d.]+) GB/s .* over data \(2 devices\)", first)
    assert speed and np.isfinite(float(speed[1]))
    assert re.search(r"ok +clocks", first) and re.search(r"ok +checkpoints", first)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["doctor", "train"])
def test_two_processes_with_different_settings_stop_before_they_begin(tmp_path, command):
    given = [] if command == "doctor" else ["--out", tmp_path / "run"]
    settings = ("steps=8", "steps=9")
    statuses, said = together(
        [[*RLHF_JAX, command, SMOKE, *given, "--set", one] for one in settings]
    )
    assert statuses == ([1, 1] if command == "doctor" else [2, 2]), said
    assert "process 1 on" in said[0] and "steps: 8 -> 9" in said[0]
    assert "steps: 8 -> 9" in said[1] or command == "doctor"
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_two_processes_with_directories_of_their_own_both_fail(tmp_path):
    statuses, said = doctors(tmp_path / "a", tmp_path / "b")
    assert statuses == [1, 1], said
    assert "process 0 on" in said[0] and "does not see what process 1 wrote" in said[0]
