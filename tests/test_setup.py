"""How a process finds the others, by what the environment says; joining them for real is slow."""

import time

import jax
import pytest

from rlhf_jax import arrivals, processes
from rlhf_jax.config import ConfigError
from rlhf_jax.processes import find

PLAIN = {
    "RLHF_JAX_COORDINATOR": "10.0.0.1:8476", "RLHF_JAX_PROCESSES": "4", "RLHF_JAX_PROCESS": "3",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n[0-1]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
GKE = {
    "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true",
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.1.1.1", "JOB_COMPLETION_INDEX": "0"}


def test_without_variables_a_process_is_alone():
    assert find({}).arguments is None
    assert find({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1"}).arguments is None
    assert find({"KUBERNETES_SERVICE_HOST": "10.1.1.1"}).arguments is None


def test_plain_variables_say_everything():
    found = find(PLAIN)
    assert found.expected == {"processes": 4, "process": 3}
    assert found.arguments == {
        "coordinator_address": "10.0.0.1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


def test_plain_variables_go_before_the_cluster_they_agree_with():
    assert find({**PLAIN, **GKE}, tpu=True).expected["processes"] == 4
    assert find({**SLURM, "SLURM_NTASKS": "4", **PLAIN}).expected["process"] == 3


def test_slurm_is_left_to_jax():
    found = find(SLURM)
    assert found.source == "SLURM job 12"
    assert found.arguments == {}
    assert found.expected == {"processes": 2, "process": 1}


def test_the_only_task_of_a_node_takes_all_its_gpus_and_one_of_several_takes_one():
    assert find({**SLURM, "SLURM_GPUS_ON_NODE": "4"}).arguments == {
        "local_device_ids": [0, 1, 2, 3]
    }
    several = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"}
    assert find(several).arguments == {}


def test_on_gke_hosts_are_counted_slice_by_slice():
    found = find(GKE, tpu=True)
    assert (found.arguments, found.expected) == ({}, {"processes": 4, "process": 3})
    assert find({"TPU_WORKER_HOSTNAMES": "localhost"}, tpu=True).arguments is None


def test_a_tpu_vm_is_left_to_jax():
    assert find({}, tpu=True).arguments == {}
    assert find({"JAX_PLATFORMS": "tpu,cpu"}, tpu=True).arguments == {}


def test_who_wants_the_cpu_gets_no_tpu():
    assert find({**GKE, "JAX_PLATFORMS": "cpu"}, tpu=True).arguments is None
    assert find({"JAX_PLATFORMS": "cpu"}, tpu=True).arguments is None


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RLHF_JAX_PROCESSES": "2"}, "not RLHF_JAX_COORDINATOR, RLHF_JAX_PROCESS"),
        ({**PLAIN, "RLHF_JAX_PROCESS": "4"}, "0 to one less"),
        ({**PLAIN, "RLHF_JAX_PROCESSES": "two"}, "RLHF_JAX_PROCESSES=two"),
        ({**PLAIN, "RLHF_JAX_COORDINATOR": "10.0.0.1"}, "valid is HOST:PORT"),
        ({**SLURM, **PLAIN}, "but SLURM runs SLURM_NTASKS=2 tasks"),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "start it with srun"),
        ({**GKE, "TPU_WORKER_ID": "2"}, "a number from 0 to 1"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is None"),
        ({**GKE, "MEGASCALE_SLICE_ID": "2"}, "none of MEGASCALE_NUM_SLICES=2"),
        (POD, "RLHF_JAX_COORDINATOR"),
    ],
)
def test_what_is_incomplete_or_contradicts_itself_is_refused(environment, says, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=says):
        find(environment, tpu=True) if "TPU_WORKER_HOSTNAMES" in environment else find(environment)


def test_who_waits_says_so_and_a_failure_to_join_is_an_error(monkeypatch, capfd):
    def initialize(**arguments):
        assert arguments["num_processes"] == 4
        time.sleep(0.5)
        raise RuntimeError("nobody there")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(arrivals, "HINT", 0.0)
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="could not join the other processes"):
        processes.start()
    said = capfd.readouterr().out
    assert "waiting up to 300 s: not all processes have come after 0 s; there: process 3 on" in said


def test_a_time_out_that_is_none_is_refused(monkeypatch):
    for name, value in {**PLAIN, "RLHF_JAX_WAIT": "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="RLHF_JAX_WAIT=soon: valid is a whole number"):
        processes.start()
