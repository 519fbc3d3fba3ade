"""Several processes: what the environment says of them, and joining them into one JAX.

Found in this order: plain variables (`RLHF_JAX_*`), SLURM, GKE, a TPU VM, another Kubernetes job;
else the process is alone. JAX's own detection does the work wherever it knows the system.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import multihost_utils

from rlhf_jax import probes, witness
from rlhf_jax.arrivals import Arrivals
from rlhf_jax.config import ConfigError

PLAIN = ("RLHF_JAX_COORDINATOR", "RLHF_JAX_PROCESSES", "RLHF_JAX_PROCESS")
SLURM = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # of an srun
WAIT = 300  # seconds for all processes to arrive; RLHF_JAX_WAIT
HEARTBEAT = 100  # seconds of silence until a process counts as dead; RLHF_JAX_HEARTBEAT
GRACE = 10  # seconds for the others to come to the same error


@dataclass(frozen=True)
class Setup:
    """How this process finds the others."""

    source: str  # in words
    arguments: Mapping[str, Any] | None = None  # of `jax.distributed.initialize`; None: it is alone
    expected: Mapping[str, int] = field(default_factory=dict)  # "processes", "process", where known


def find(environment: Mapping[str, str], *, tpu: bool = False) -> Setup:
    """What the environment variables say; `tpu`: is there a TPU in this machine?

    Raises:
        ConfigError: if they are incomplete or contradict each other.
    """
    plain = {name: environment[name] for name in PLAIN if environment.get(name)}
    in_slurm = "SLURM_JOB_ID" in environment and int(environment.get("SLURM_NTASKS") or 1) > 1
    if plain:
        setup = _plain(plain)
        count = setup.expected["processes"]
        if in_slurm and int(environment["SLURM_NTASKS"]) != count:
            raise ConfigError(
                f"RLHF_JAX_PROCESSES={count}, but SLURM runs SLURM_NTASKS="
                f"{environment['SLURM_NTASKS']} tasks; unset RLHF_JAX_* to follow SLURM"
            )
        return setup
    if in_slurm:
        return _slurm(environment)
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu") or not tpu:
        return _kubernetes(environment)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts is None:  # JAX asks the machine's metadata server
        return Setup("TPU VM", {})
    return _gke(environment, hosts.split(","))


def _plain(given: Mapping[str, str]) -> Setup:
    """Three variables, all of them or none."""
    missing = [name for name in PLAIN if name not in given]
    if missing:
        raise ConfigError(
            f"{', '.join(given)} is set but not {', '.join(missing)}; set all of them (HOST:PORT "
            "of process 0, how many processes, which one this is), or none"
        )
    coordinator, count, index = (given[name] for name in PLAIN)
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise ConfigError(f"RLHF_JAX_COORDINATOR={coordinator}: valid is HOST:PORT, 10.0.0.1:8476")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            f"RLHF_JAX_PROCESSES={count}, RLHF_JAX_PROCESS={index}: valid are a count from 1, and "
            "a number from 0 to one less than it"
        )
    arguments = {
        "coordinator_address": coordinator,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }
    return Setup(f"RLHF_JAX_* ({coordinator})", arguments, _expected(count, index))


def _slurm(environment: Mapping[str, str]) -> Setup:
    job, tasks = environment["SLURM_JOB_ID"], environment["SLURM_NTASKS"]
    if any(name not in environment for name in SLURM):
        raise ConfigError(
            f"SLURM job {job} has {tasks} tasks, but this process is none of them; start it with "
            "srun, or set RLHF_JAX_COORDINATOR, _PROCESSES=1 and _PROCESS=0 to run it alone"
        )
    arguments: dict[str, Any] = {}
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if re.fullmatch(r"1(\(x\d+\))?", per_node) and gpus.isdecimal():
        # JAX gives each task one GPU; the only task of a node takes all of them.
        arguments["local_device_ids"] = list(range(int(gpus)))
    return Setup(f"SLURM job {job}", arguments, _expected(tasks, environment["SLURM_PROCID"]))


def _gke(environment: Mapping[str, str], hosts: list[str]) -> Setup:
    slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
    slice_id = environment.get("MEGASCALE_SLICE_ID") or "0"
    worker = environment.get("TPU_WORKER_ID", "0" if len(hosts) == 1 else None)
    if worker is None or not (worker.isdecimal() and int(worker) < len(hosts)):
        raise ConfigError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts, but TPU_WORKER_ID is {worker}; GKE "
            f"sets it to a number from 0 to {len(hosts) - 1} when a pod asks for google.com/tpu"
        )
    if not (slices.isdecimal() and slice_id.isdecimal() and int(slice_id) < int(slices)):
        raise ConfigError(f"MEGASCALE_SLICE_ID={slice_id} is none of MEGASCALE_NUM_SLICES={slices}")
    count, index = int(slices) * len(hosts), int(slice_id) * len(hosts) + int(worker)
    if count == 1:
        return Setup("GKE, one host")
    return Setup(f"GKE, {slices} slices of {len(hosts)} hosts", {}, _expected(count, index))


def _kubernetes(environment: Mapping[str, str]) -> Setup:
    """A job without TPU: JAX asks the cluster, if the package for that is there."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return Setup("no variable of a cluster")
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "this is a pod of an indexed Kubernetes job; set RLHF_JAX_COORDINATOR, _PROCESSES and "
            "_PROCESS in its manifest (docs/pods.md), or install `kubernetes` for JAX to ask"
        )
    return Setup("Kubernetes job", {})


def _expected(count: int | str, index: int | str) -> dict[str, int]:
    return {"processes": int(count), "process": int(index)}


def start(directory: str | os.PathLike | None = None) -> Setup:
    """Join the other processes, if there are any, and say so; before any other use of JAX.

    If they do not come, the process ends and says who is missing; `directory` is where they can
    read each other's files. From then on a process that dies ends them all, and they say which.

    Raises:
        ConfigError: if the environment is wrong.
    """
    # JAX sets the variable where it finds no TPU on this machine's bus.
    chips = "TPU_SKIP_MDS_QUERY" not in os.environ or "TPU_WORKER_HOSTNAMES" in os.environ
    setup = find(os.environ, tpu=chips and importlib.util.find_spec("libtpu") is not None)
    if setup.arguments is None or jax.distributed.is_initialized():
        return setup
    wait = _seconds("RLHF_JAX_WAIT", WAIT)
    heartbeat = _seconds("RLHF_JAX_HEARTBEAT", HEARTBEAT)
    expected = setup.expected or {"processes": None, "process": None}
    try:
        with Arrivals(directory, **expected, seconds=wait):
            jax.distributed.initialize(
                **setup.arguments,
                initialization_timeout=wait + 60,  # it would end the process without a name
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=heartbeat + 30,  # who is dead is known by then
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"could not join the other processes ({setup.source}): {str(error)[:400]}"
        ) from error
    found = {"processes": jax.process_count(), "process": jax.process_index()}
    if setup.expected and found != dict(setup.expected):
        raise ConfigError(f"{setup.source} says {dict(setup.expected)}, but JAX found {found}")
    if found["processes"] > 1:
        witness.accompany(found["process"], probes.gathered(socket.gethostname()))
    print(
        f"process {found['process']} of {found['processes']}, found by {setup.source}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        flush=True,
    )
    return setup


def _seconds(name: str, default: int) -> int:
    given = os.environ.get(name) or str(default)
    if not (given.isdecimal() and int(given) > 0):
        raise ConfigError(f"{name}={given}: valid is a whole number of seconds from 1")
    return int(given)


def broken_link(error: BaseException | None) -> bool:
    """Is it, or what caused it, that another process does not answer any more?"""
    while error is not None:
        if re.search("Gloo|NCCL", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def finish() -> None:
    """Wait for the others to be done: JAX ends all when one goes first."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        multihost_utils.sync_global_devices("done")


def abandon(status: int) -> None:
    """Go with an error that the others need not have; they have a moment to come to it, too.

    Then this process ends alone, and JAX ends the others.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(GRACE)
        if together.is_alive():
            sys.stdout.flush()
            os._exit(status)
