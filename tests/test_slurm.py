"""A real SLURM on this machine: our job runs on two nodes, is preempted, requeued, and resumes.

As root, after `apt-get install --no-install-recommends slurmctld slurmd slurm-client munge`:
`python -m pytest -n 0 --slow tests/test_slurm.py`. Everything runs in the foreground on loopback,
in a folder of the test's own, and ends with it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.geteuid() != 0,
        reason="needs slurmctld, slurmd and munged, and to be root",
    ),
]
STEPS = 1000
CONF = """
ClusterName=trial
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""
EXPERIMENT = f"""
from functools import partial
import toy_sft
from rlhf_jax.optimizer import adam

def config():
    optimizer = partial(adam, learning_rate=1e-3)
    return toy_sft.config(steps={STEPS}, optimizer=optimizer)
"""


def free_ports(count):
    """Ports in a row, which nothing listens at."""
    for first in range(20000, 30000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return list(range(first, first + count))
        except OSError:
            continue
    raise OSError("no free ports")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """slurmctld and two slurmd; the environment of their clients; ended by their numbers."""
    ports = free_ports(4)
    (tmp_path / "state").mkdir()
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONF.format(folder=tmp_path, ports=ports))
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    munge = ["munged", "--foreground", "--force", f"--socket={tmp_path}/munge.sock"]
    munge += [f"--key-file={key}", f"--pid-file={tmp_path}/munge.pid", f"--log-file={tmp_path}/m"]
    munge += [f"--seed-file={tmp_path}/munge.seed"]
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{ports[3]}")  # no n0 in any DNS
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device in each process
    # Jobs find `rlhf-jax` and the package as this process does.
    root, tests = Path(__file__).parent.parent, Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{tests}")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "rlhf-jax"
    program.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m rlhf_jax "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    children = []

    def serve(*command):
        path = tmp_path / f"{len(children)}.log"
        with path.open("w") as log:
            children.append(subprocess.Popen(command, stdout=log, stderr=log))
        time.sleep(1.0)
        assert children[-1].poll() is None, path.read_text()

    try:
        serve(*munge)
        serve("slurmctld", "-D", "-i", "-f", str(conf))
        for node in ("n0", "n1"):
            serve("slurmd", "-D", "-N", node, "-f", str(conf))
        wait(lambda: "idle" in said("sinfo", "--noheader", "--partition=low", "--format=%T"), 60)
        yield tmp_path
    finally:
        subprocess.run(["scancel", "--user=root", "--full"], timeout=30)
        time.sleep(3.0)
        for child in reversed(children):
            child.terminate()
            child.wait(timeout=30)


def said(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def wait(ready, seconds):
    for _ in range(seconds * 4):
        if ready():
            return
        time.sleep(0.25)
    raise AssertionError("waited in vain")


def launch(folder, *more):
    """Submit by the command; the job's number."""
    (folder / "tiny.py").write_text(EXPERIMENT)
    command = ["rlhf-jax", "launch", str(folder / "tiny.py"), "--on", "slurm", "--name", "trial"]
    command += ["--nodes", "2", "--out", str(folder / "run"), "--set", "mesh=(2,1,1,1)", *more]
    command += ["--set", "checkpoint.every=500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def steps(folder):
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines]


def field(job, name):
    found = said("scontrol", "show", "job", job).split()
    return next((x.partition("=")[2] for x in found if x.startswith(f"{name}=")), None)


def finished(job, folder):
    wait(lambda: field(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED"), 400)
    log = (folder / "run" / "launch" / "slurm.log").read_text()
    assert field(job, "JobState") == "COMPLETED", log
    assert steps(folder) == list(range(STEPS)), log  # none is skipped, none is taken twice
    assert log.count("process 0 of 2, found by SLURM job") == 4  # doctor and train, twice
    return log


def test_a_preempted_job_goes_back_into_the_queue_and_on_where_it_was(cluster):
    job = launch(cluster, "--partition", "low", "--time", "30")
    try:
        wait(lambda: len(steps(cluster)) > 40, 200)
    except AssertionError:
        pytest.fail((cluster / "run" / "launch" / "slurm.log").read_text() + said("squeue"))
    before = steps(cluster)[-1]
    subprocess.run(
        ["sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5"],
        check=True,
    )
    wait(lambda: field(job, "Restarts") == "1", 100)
    assert before < steps(cluster)[-1] < STEPS - 1  # in the middle
    log = finished(job, cluster)
    assert "stopped as asked" in log
    assert field(job, "Restarts") == "1"


def test_a_job_whose_time_is_nearly_over_saves_and_goes_on_later(cluster):
    # SLURM may be a minute early: the signal comes 60 to 120 s after the start.
    job = launch(cluster, "--time", "3", "--sbatch=--signal=B:USR1@60", "--set", "steps=60000")
    wait(lambda: field(job, "Restarts") == "1", 300)
    log = (cluster / "run" / "launch" / "slurm.log").read_text()
    assert "stopped as asked" in log and "stopped: back into the queue" in log
    stopped = steps(cluster)
    assert stopped == list(range(len(stopped)))
    wait(lambda: len(steps(cluster)) > len(stopped) + 20, 200)
    assert steps(cluster)[: len(stopped)] == stopped
