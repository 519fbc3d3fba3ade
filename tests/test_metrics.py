"""What a run writes: one line a step, valid JSON, nothing twice after a resume, one step late."""

import json
import math
import time

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhf_jax import metrics
from rlhf_jax.metrics import Meter, keep_lines_before


def meter(out, start=0, total=4):
    return Meter(out, name="ppo", start=start, total=total)


def rows(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(directory):
    """(tag, step, value) of every scalar in the TensorBoard files."""
    found = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += 16 + length
    return found


def test_every_step_is_one_line_and_one_event(tmp_path):
    with meter(tmp_path) as m:
        for step in range(4):
            m.write(step, {"rollout/reward": jnp.float32(step / 2), "policy/loss": 1.5})
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    assert all(type(row["step"]) is int for row in found)
    assert [row["rollout/reward"] for row in found] == [0.0, 0.5, 1.0, 1.5]
    assert all(abs(row["wall"] - time.time()) < 60 for row in found)
    assert ("rollout/reward", 3, 1.5) in events(tmp_path / "tensorboard")


def test_metrics_are_written_one_step_late_so_that_no_step_waits(tmp_path):
    with meter(tmp_path) as m:
        m.write(0, {"x": jnp.float32(1)})
        assert rows(tmp_path / "metrics.jsonl") == []
        m.write(1, {"x": jnp.float32(2)})
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0]
        m.flush()
        m.flush()
        assert [row["x"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with meter(tmp_path) as m:
        m.write(0, {"a": jnp.nan, "b": -math.inf, "c": jnp.float32(jnp.inf), "d": 0.0})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, 0.0)


def test_a_metric_that_is_not_one_number_is_named(tmp_path):
    m = meter(tmp_path)
    m.write(0, {"policy/ratio": jnp.ones((2,))})
    with pytest.raises(ValueError, match=r"'policy/ratio' has shape \(2,\)"), m:
        pass


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    with meter(tmp_path) as m:
        m.samples(0, [{"prompt": "a", "response": "b", "reward": 1.0}])
        for step in range(4):
            m.write(step, {"x": 1.0})
            m.samples(step + 1, [{"prompt": "a", "response": "b", "reward": 2.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "x"')  # killed in the middle of a line
    with meter(tmp_path, start=2) as m:  # a checkpoint after two steps: 0 and 1
        m.write(2, {"x": 2.0})
        m.samples(3, [{"prompt": "a", "response": "c", "reward": 3.0}])
    assert [(r["step"], r["x"]) for r in rows(tmp_path / "metrics.jsonl")] == [
        (0, 1.0),
        (1, 1.0),
        (2, 2.0),
    ]
    assert [r["step"] for r in rows(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
    with meter(tmp_path) as m:  # killed before its first checkpoint: everything again
        m.samples(0, [{"prompt": "a", "response": "d", "reward": 0.0}])
    assert rows(tmp_path / "metrics.jsonl") == []
    assert [r["response"] for r in rows(tmp_path / "samples.jsonl")] == ["d"]


def test_dropping_lines_leaves_the_old_file_if_it_is_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    monkeypatch.setattr(metrics.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        keep_lines_before(path, 1)
    assert len(path.read_text().splitlines()) == 2


def test_phases_are_seconds_and_tokens_per_second(tmp_path):
    with meter(tmp_path) as m:
        with m.phase("rollout") as count:
            time.sleep(0.05)
            count(100)
        for _ in range(2):
            with m.phase("update/policy", tokens=30):
                time.sleep(0.02)
        with m.phase("reward"):
            pass
        m.write(0, {})
        m.write(1, {})  # nothing was timed in this step
    first, second = rows(tmp_path / "metrics.jsonl")
    assert 0.05 <= first["time/rollout"] < 2
    assert first["speed/rollout"] == pytest.approx(100 / first["time/rollout"])
    assert first["time/update/policy"] >= 0.04
    assert first["speed/update/policy"] == pytest.approx(60 / first["time/update/policy"])
    assert "speed/reward" not in first
    assert "time/reward" in first
    assert not any(name.startswith("time/") for name in second)


@pytest.mark.parametrize(("seconds", "count"), [(1e9, 2), (-1.0, 50)])
def test_without_a_terminal_there_is_a_line_now_and_then(
    tmp_path, capsys, monkeypatch, seconds, count
):
    monkeypatch.setattr(metrics, "LINE_SECONDS", seconds)
    with meter(tmp_path, total=50) as m:
        for step in range(50):
            with m.phase("rollout", tokens=10):
                pass
            m.write(step, {"rollout/reward": 0.25, "rollout/kl": 3.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count + 1  # the first says that it compiles
    assert lines[1].startswith("ppo 1/50  reward +0.250  KL 3.00  tok/s: rollout ")
    assert lines[-1].startswith("ppo 50/50")
    assert lines[-1].endswith("0 s left")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with meter(tmp_path) as m:
        m.write(0, {"x": 1.0})
        m.samples(0, [{"prompt": "", "response": "", "reward": 0.0}])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_its_own_but_never_hides_the_first(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    full = pytest.raises(OSError, match=r"cannot write .*metrics.jsonl.*free some space")
    with full, meter(tmp_path) as one:
        one.write(0, {"loss": 1.0})
    with pytest.raises(KeyError, match="first"), meter(tmp_path) as one:
        one.write(0, {"loss": 1.0})
        raise KeyError("first")
