"""Processes that do not come, die, or are asked to stop; and others that go on with their work."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_rows
from together import RLHF_JAX, ended, started, together

from rlhf_jax import witness
from rlhf_jax.arrivals import Arrivals
from rlhf_jax.checkpoint import Checkpoints, restore_params

HOSTS = ["a", "b", "c"]
FATAL = (
    "F1122 03:01:46 31095 client.h:80] Terminating process because the JAX distributed service "
    "detected fatal errors. This most likely indicates that another task died; absl::Status: "
)


@pytest.mark.parametrize(
    ("me", "said", "expected"),
    [
        (0, "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n2\n"
            "The tasks have crashed.", "gone: process 1 on b, process 2 on c (killed"),
        (1, "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 2 heartbeat "
            "timeout.", "gone: process 2 on c (killed"),
        (1, "UNAVAILABLE: Failed to send RPC to coordination service.", "gone: process 0 on a"),
        (0, "DEADLINE_EXCEEDED: Barrier timed out. The first task at the barrier: 2. Some timed out"
            " task names:\n0\n1\n", "ended before the others: process 2 on c"),
    ],
)  # fmt: skip
def test_the_last_words_of_jax_name_who_is_gone(me, said, expected):
    assert expected in witness.gone(f"...\n{FATAL}{said}", me, HOSTS)
    assert witness.gone(said, me, HOSTS) is None  # it did not end the process


def test_nobody_accuses_itself():
    own = "The first task at the barrier: 2. Some timed out task names:\n0\n1\n"
    assert witness.gone(FATAL + own, 2, HOSTS) is None


def test_only_who_gives_signs_of_life_is_there(tmp_path):
    for stale in (1, 2):
        Arrivals(tmp_path, process=stale, processes=3, seconds=9)._write(beats=7)
    alive, me = (Arrivals(tmp_path, process=i, processes=3, seconds=9) for i in (1, 0))
    me._read()
    assert "processes 1, 2 of 3 have not come within 9 s" in me.missing("within 9 s")
    alive._write(beats=1)
    me._read()
    host = socket.gethostname()
    assert me.missing("within 9 s") == (
        f"process 2 of 3 has not come within 9 s; there: process 0 on {host}, process 1 on {host}"
    )


def lines(out):
    path = out / "metrics.jsonl"
    found = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def until(children, reached, seconds=600):
    """Wait for something to be so, while all live."""
    for _ in range(4 * seconds):
        if reached():
            return
        if any(child.poll() is not None for child in children):
            break
        time.sleep(0.25)
    for child in children:
        child.kill()
    pytest.fail("\n----\n".join(ended(children)[1]))


def train(out, processes, *arguments):
    command = [*RLHF_JAX, "train", Path(__file__).parent / "toy_rows.py", "--out", out]
    return [[*command, "--set", f"mesh=({processes},1,1,1)", *arguments]] * processes


@pytest.mark.slow
def test_who_does_not_come_is_named_in_time_by_all_who_did(tmp_path):
    doctor = [*RLHF_JAX, "doctor", "--checkpoints", tmp_path]
    with started([doctor, doctor], processes=3, RLHF_JAX_WAIT=20) as children:
        began = time.monotonic()
        codes, said = ended(children, timeout=100)
    assert codes == [1, 1], said
    assert time.monotonic() - began < 60
    host = socket.gethostname()
    there = f"process 0 on {host}, process 1 on {host}"
    for one in said:
        assert f"error: process 2 of 3 has not come within 20 s; there: {there}" in one


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_is_named_in_time_by_all_who_are_left_and_no_save_is_lost(tmp_path, victim):
    """Every step is saved, so that the kill comes in the middle of a save."""
    options = {"RLHF_JAX_HEARTBEAT": 20, "JAX_COMPILATION_CACHE_DIR": tmp_path / "xla"}
    commands = train(tmp_path / "run", 2, "--set", "checkpoint.every=1")
    with started(commands, **options) as children:
        until(children, lambda: len(lines(tmp_path / "run")) > 12)
        children[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes, said = ended(children, timeout=100)
    took = time.monotonic() - began
    print(f"killed process {victim}; the other ended after {took:.1f} s:\n{said[1 - victim]}")
    assert codes[1 - victim] not in (0, -signal.SIGKILL), said
    assert took < 60
    last = said[1 - victim].strip().splitlines()[-2:]
    assert f"error: gone: process {victim} on {socket.gethostname()}" in last[0], said
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() >= len(lines(tmp_path / "run")) - 2  # one may be in flight
    assert restore_params(tmp_path / "run", "policy")  # bit for bit what was saved, or an error


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_ends_both_and_they_go_on_once_there_is_room(tmp_path):
    disk, xla = tmp_path / "disk", {"JAX_COMPILATION_CACHE_DIR": tmp_path / "xla"}
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        often = ("--set", "checkpoint.every=1", "--set", "checkpoint.keep=1000")
        with started(train(disk / "run", 2, *often), RLHF_JAX_HEARTBEAT=20, **xla) as children:
            codes, said = ended(children, timeout=150)
        assert all(code not in (0, -signal.SIGKILL) for code in codes), said
        assert any("was not written: the disk is full" in one for one in said), said
        with Checkpoints(disk / "run" / "checkpoints", read_only=True) as checkpoints:
            saved = checkpoints.steps()
        assert saved == list(range(1, len(saved) + 1))
        subprocess.run([*mount[:4], "remount,size=64m", *mount[5:]], check=True)
        more = ("--resume", "--set", f"steps={len(saved) + 5}")
        codes, said = together(train(disk / "run", 2, *more), **xla)
        assert codes == [0, 0], said
        assert [line["step"] for line in lines(disk / "run")] == list(range(len(saved) + 5))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_four_lose_one_two_go_on_and_stop_one_ends_it_and_no_row_is_skipped_or_read_twice(tmp_path):
    out, options = tmp_path / "run", {"JAX_COMPILATION_CACHE_DIR": tmp_path / "xla"}
    with started(train(out, 4), RLHF_JAX_HEARTBEAT=20, **options) as children:
        until(children, lambda: len(lines(out)) > 24)
        children[2].send_signal(signal.SIGKILL)
        codes, said = ended(children, timeout=100)
    assert all(codes), said
    assert all("gone: process 2 on" in one for i, one in enumerate(said) if i != 2), said
    killed = len(lines(out))

    with started(train(out, 2, "--resume"), **options) as children:
        until(children, lambda: len(lines(out)) > killed + 7)
        children[1].send_signal(signal.SIGTERM)
        codes, said = ended(children, timeout=100)
    assert codes == [0, 0], said
    stopped = {int(re.search(r"stopped as asked; step (\d+) is saved", one)[1]) for one in said}
    assert stopped == {len(lines(out))}, said

    steps = len(lines(out)) + 10
    with started(train(out, 1, "--resume", "--set", f"steps={steps}"), **options) as children:
        codes, said = ended(children)
    assert codes == [0], said
    found = lines(out)
    assert [line["step"] for line in found] == list(range(steps))
    rows = np.array([toy_rows.counts(line) for line in found])
    assert (rows.sum(1) == toy_rows.BATCH).all()
    for epoch in range(steps // 3):  # three batches are an epoch
        assert (rows[3 * epoch : 3 * epoch + 3].sum(0) == 1).all(), epoch
