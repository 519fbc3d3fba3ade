"""Turns of libraries that are compared: order, ratios, and what ours answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"
STAND_IN = """
import sys
sys.path.append(sys.argv[1])
from protocol import Turns
turns = Turns(who=sys.argv[2])
while True:
    with open(sys.argv[3], "a") as file:
        file.write(sys.argv[2])
    print("a library's own words", {"not": "ours"})
    turns.ended("rollout")
    turns.done("update", tokens=7)
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    import compare

    return compare


def test_after_two_iterations_to_warm_up_workers_take_turns(compare, tmp_path):
    log = tmp_path / "log"
    make = [sys.executable, "-c", STAND_IN, str(PEERS)]
    commands = {name: [*make, name, str(log)] for name in "ab"}
    turns, ready = compare.run(commands, tmp_path, repeats=2)
    # With each answer goes the beginning of the next: only the last "go" is still to come.
    assert log.read_text().startswith("aabbabab")
    assert ready == {"a": {"who": "a"}, "b": {"who": "b"}}
    for one in (x for found in turns.values() for x in found):
        assert one["tokens"] == 7
        assert one["seconds"] == pytest.approx(one["rollout"] + one["update"], abs=1e-3)


def test_a_ratio_is_a_peers_time_over_ours_in_the_same_round(compare):
    def rounds(*seconds, **more):
        return [
            {"seconds": s, "rollout": s / 2, "tokens": 100, "cores": 2, "others": 0} | more
            for s in seconds
        ]

    turns = {
        "ours": rounds(1.0, 2.0, 4.0, score=1.0, update=1.0),
        "trl": rounds(3.0, 4.0, 20.0, score=2.0, update=1.0),
        "hf": rounds(1.0, 1.0, 1.0),
    }
    table = compare.compared(turns)
    assert table["trl"]["ratios"]["seconds"] == {"median": 3.0, "least": 2.0, "most": 5.0}
    assert table["trl"]["ratios"]["score"]["median"] == 2.0
    assert table["trl"]["times"]["seconds"] == {"median": 4.0, "least": 3.0, "most": 20.0}
    assert table["ours"]["speed"] == 100.0  # tokens a second of the rollout, not of the iteration
    assert "ratios" not in table["ours"]
    assert set(table["hf"]["ratios"]) == {"rollout"}  # its seconds are no iteration
    assert "3.00 (2.00–5.00)" in compare.show(table, rows=4)


def test_a_worker_that_dies_leaves_its_last_words(compare, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such weights')"]
    with pytest.raises(compare.WorkerError, match=r"(?s)trl ended with status 1.*no such weights"):
        compare.run({"trl": command}, tmp_path, repeats=1)


@pytest.mark.slow
def test_ours_answers_go_with_a_step_of_the_training_loop():
    small = ["rows=8", "prompt=4", "length=8", "minibatches=1"]
    small += [f"learners.{name}.model.layers=1" for name in ("policy", "critic")]
    command = [sys.executable, str(PEERS / "ours.py"), *(x for s in small for x in ("--set", s))]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    said = subprocess.run(
        command, input="go\ngo\n", capture_output=True, text=True, env=environment, timeout=600
    )
    assert said.returncode == 0, said.stderr
    lines = [json.loads(x) for x in said.stdout.splitlines() if x.startswith("{")]
    assert "jax" in lines[0]["ready"]["versions"]
    assert len(lines) == 3
    for one in lines[1:]:
        assert one["tokens"] == 64
        assert 0 < one["rollout"] + one["score"] + one["update"] <= one["seconds"]
