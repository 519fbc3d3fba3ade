"""Launching: what is rendered, what is called, and that no value of a user's becomes code."""

import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from jobset_schema import schemas
from recorder import calls, install

from rlhf_jax import cli, scripts
from rlhf_jax.config import ConfigError
from rlhf_jax.topologies import topology

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "experiments" / "smoke.py")
WIDE = "tests/wide/experiment.py"  # from the root of the repository
HOSTILE = "a'b\"; touch ${CANARY} `touch $CANARY` $(touch $CANARY) \\ #"
GKE = ["--on", "gke", "--topology", "v5p:4x4x8", "--image", "img:1", "--claim", "runs=/runs"]
VM = ["--on", "tpu-vm", "--topology", "v5p:4x4x8", "--zone", "us-east5-a"]


@pytest.fixture(autouse=True)
def from_the_root_with_another_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.chdir(ROOT)


def launch(capfd, *arguments, name="run-1", out="/runs/x", file=WIDE):
    place = ["--name", name, "--out", str(out)]
    status = cli.main(["launch", file, *place, *map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def manifest(capfd, *arguments, **named):
    status, out, err = launch(capfd, *GKE, "--dry-run", *arguments, **named)
    assert status == 0, err
    return yaml.safe_load(out)


def pod(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_shellcheck_finds_nothing_in_the_scripts():
    checker = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or "shellcheck"
    found = sorted(str(path) for path in (ROOT / "tpu").glob("*.sh"))
    assert len(found) == 3
    done = subprocess.run([checker, *found], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_package_holds_what_lies_in_tpu():
    assert {path.name for path in scripts.TEMPLATES.iterdir()} == {
        path.name for path in (ROOT / "tpu").iterdir()
    }


@pytest.mark.parametrize("which", schemas())
def test_a_jobset_is_what_kubernetes_takes(capfd, which):
    for more in ((), ("--spot", "--slices", 4), ("--install", "rlhf-jax==0.1.0")):
        found = manifest(capfd, *more)
        jsonschema.validate(found, schemas()[which])
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 1
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(found, schemas()[which])


def test_a_bucket_needs_no_claim_but_the_package_that_reads_it(capfd):
    """A claim may still be there, for something else."""
    without = [*GKE[:-2], "--dry-run", "--install", "rlhf-jax==0.1.0"]
    status, out, err = launch(capfd, *without, out="gs://bucket/run")
    assert status == 0, err
    found = pod(yaml.safe_load(out))
    assert [volume["name"] for volume in found["volumes"]] == ["shm"]
    script = found["containers"][0]["command"][2]
    assert "INSTALL='rlhf-jax[tpu,gcs]==0.1.0'" in script and "OUT=gs://bucket/run" in script


def test_a_jobset_has_a_pod_per_host_and_a_job_per_slice(capfd):
    found = manifest(capfd, "--slices", 2, "--spot")
    jobs = found["spec"]["replicatedJobs"][0]
    assert jobs["replicas"] == 2
    assert jobs["template"]["spec"]["parallelism"] == 32  # 128 chips, four at each host
    assert pod(found)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod(found)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    claim = {"name": "out", "persistentVolumeClaim": {"claimName": "runs"}}
    assert claim in pod(found)["volumes"]


def test_a_host_runs_what_comes_before_and_stops_if_it_fails(capfd, tmp_path):
    found = manifest(capfd, "--before", "git mount a && exit 3", "--install", "rlhf-jax")
    script = pod(found)["containers"][0]["command"][2].replace("$$", "$")
    script = script.replace("WORK=/tmp/rlhf-jax/run-1", f"WORK={tmp_path}/work")
    path = install(tmp_path / "bin", {"git": "", "uv": ""})
    env = {"PATH": path, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script, "host", "install"], env=env, timeout=60)
    assert done.returncode == 3
    assert calls(tmp_path / "bin") == [["git", "mount", "a"]]


def host_calls(tmp_path, command, **environment):
    """What a host's script calls, and whether something of a value was run."""
    path = install(tmp_path / "bin", dict.fromkeys(["rlhf-jax", "uv", "git", "python3"], ""))
    canary = tmp_path / "canary"
    env = {"PATH": path, "HOME": str(tmp_path), "CANARY": str(canary), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not canary.exists()
    return calls(tmp_path / "bin")


def test_a_pod_looks_around_then_trains_and_every_value_arrives_as_it_was(capfd, tmp_path):
    name = ["--set", f"name={HOSTILE}", "--set", "steps=3"]
    found = manifest(capfd, *name, out=f"/runs/{HOSTILE}", file="e x.py")
    container = pod(found)["containers"][0]
    # Kubernetes reads $$ as $, and nothing else in there is an expansion of its own.
    command = [text.replace("$$", "$") for text in container["command"]]
    assert "$(" not in container["command"][2].replace("$$", "")
    made = host_calls(tmp_path, command)
    settings = [f"--set=name={HOSTILE}", "--set=steps=3"]
    out, again = f"/runs/{HOSTILE}", ["--resume", "--stopped-status", "75"]
    assert made == [
        ["rlhf-jax", "doctor", "e x.py", *settings, "--checkpoints", out],
        ["rlhf-jax", "train", "e x.py", "--out", out, *settings, *again],
    ]


def test_a_host_that_the_doctor_refuses_does_not_train(capfd, tmp_path):
    script = pod(manifest(capfd))["containers"][0]["command"][2].replace("$$", "$")
    path = install(tmp_path / "bin", {"rlhf-jax": "exit 1"})
    env = {"PATH": path, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script, "host", "run"], env=env, timeout=60)
    assert done.returncode == 1
    assert [call[1] for call in calls(tmp_path / "bin")] == ["doctor"]


@pytest.mark.parametrize(
    ("what", "installed"),
    [
        ("git+https://host.example/r.git@v1.2", "./source[tpu]"),
        ("rlhf-jax==0.1.0", "rlhf-jax[tpu]==0.1.0"),
        ("rlhf-jax[tpu,reasoning]", "rlhf-jax[tpu,reasoning]"),
        ("https://host.example/r-1-py3-none-any.whl", "https://host.example/r-1-py3-none-any.whl[tpu]"),
    ],
)  # fmt: skip
def test_a_host_installs_what_it_is_told(capfd, tmp_path, what, installed):
    found = manifest(capfd, "--install", what)
    command = [text.replace("$$", "$") for text in pod(found)["containers"][0]["command"]]
    command[2] = command[2].replace("WORK=/tmp/rlhf-jax/run-1", f"WORK={tmp_path}/work")
    made = host_calls(tmp_path, [*command[:4], "install"])
    python = ["--reinstall-package", "rlhf-jax", "--python", "venv/bin/python"]
    assert made[-1] == ["uv", "pip", "install", "--quiet", *python, installed]
    if what.startswith("git"):
        clone = ["git", "clone", "--quiet", "--", "https://host.example/r.git", "source"]
        assert made[0] == clone
        assert ["git", "-C", "source", "checkout", "--quiet", "--detach", "v1.2"] in made


QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
ZONE = "--zone=us-east5-a"


def gcloud(tmp_path, monkeypatch, *states):
    rest = tmp_path / "states"  # one line for each time that it is asked
    rest.write_text("".join(f"{state}\n" for state in states))
    answer = (
        "[[ $* == *--format=value* ]] || exit 0\n"
        f"head -n 1 {rest}; [[ $(wc -l <{rest}) == 1 ]] || sed -i 1d {rest}"
    )
    monkeypatch.setenv("PATH", install(tmp_path / "bin", {"gcloud": answer}))
    monkeypatch.setenv("POLL", "0")


def verbs(tmp_path):
    return [(call[4], call[5]) for call in calls(tmp_path / "bin") if "--format" not in call[6]]


def test_tpu_vms_are_asked_for_then_filled_then_started(capfd, tmp_path, monkeypatch):
    gcloud(tmp_path, monkeypatch, "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    more = ["--project", "p", "--spot", "--until", "6h"]
    status, out, err = launch(capfd, *VM, *more)
    assert status == 0, err
    assert "1 × v5p-256 (128 chips, spot) are paid for until --do delete" in out
    place = [ZONE, "--project=p"]
    every = ["--node=all", "--worker=all"]
    host = "--command=bash rlhf-jax/run-1/host.sh "
    made = calls(tmp_path / "bin")
    bundle = made[6][8]
    assert Path(bundle).name == "run-1"
    asked = [*QUEUED, "describe", "run-1", "--format=value(state.state)", *place]
    machine = ["--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--node-id=run-1"]
    assert made == [
        asked,
        [*QUEUED, "create", "run-1", *machine, "--spot", "--valid-until-duration=6h", *place],
        asked,
        asked,
        asked,
        [*QUEUED, "ssh", "run-1", *every, "--command=mkdir -p rlhf-jax", *place],
        [*QUEUED, "scp", "--recurse", *every, bundle, "run-1:rlhf-jax/", *place],
        [*QUEUED, "ssh", "run-1", *every, f"{host}install", *place],
        [*QUEUED, "ssh", "run-1", *every, f"{host}start", *place],
        [*QUEUED, "ssh", "run-1", "--node=0", "--worker=0", f"{host}log", *place],
    ]  # fmt: skip


def test_what_runs_is_not_asked_for_again(capfd, tmp_path, monkeypatch):
    gcloud(tmp_path, monkeypatch, "ACTIVE")
    assert launch(capfd, *VM)[0] == 0
    assert [verb for verb, _ in verbs(tmp_path)] == ["ssh", "scp", "ssh", "ssh", "ssh"]


def test_what_was_taken_back_is_asked_for_anew(capfd, tmp_path, monkeypatch):
    gcloud(tmp_path, monkeypatch, "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
    assert launch(capfd, *VM)[0] == 0
    assert [verb for verb, _ in verbs(tmp_path)][:3] == ["delete", "create", "ssh"]


def test_a_request_that_failed_ends_the_launch(capfd, tmp_path, monkeypatch):
    gcloud(tmp_path, monkeypatch, "FAILED")
    status, _, err = launch(capfd, *VM)
    assert status == 1 and "the request failed" in err


def test_several_slices_are_one_request(capfd, tmp_path, monkeypatch):
    gcloud(tmp_path, monkeypatch, "", "ACTIVE")
    assert launch(capfd, *VM, "--slices", 2)[0] == 0
    create = next(call for call in calls(tmp_path / "bin") if "create" in call)
    assert create[8:10] == ["--node-count=2", "--node-prefix=run-1"]


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("status", ["describe", "run-1", ZONE]),
        ("logs", ["ssh", "run-1", "--node=0", "--worker=0",
                  "--command=bash rlhf-jax/run-1/host.sh log", ZONE]),
        ("stop", ["ssh", "run-1", "--node=all", "--worker=all",
                  "--command=bash rlhf-jax/run-1/host.sh stop", ZONE]),
        ("delete", ["delete", "run-1", "--force", "--quiet", ZONE]),
    ],
)  # fmt: skip
def test_tpu_vms_afterwards(capfd, tmp_path, monkeypatch, action, call):
    gcloud(tmp_path, monkeypatch, "ACTIVE")
    assert launch(capfd, *VM, "--do", action)[0] == 0
    assert calls(tmp_path / "bin") == [[*QUEUED, *call]]


def test_a_started_host_trains_detached_once_and_stops_when_asked(capfd, tmp_path):
    script = pod(manifest(capfd))["containers"][0]["command"][2].replace("$$", "$")
    (tmp_path / "host.sh").write_text(script.replace("WORK=/tmp/rlhf-jax/run-1", "WORK=''"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "rlhf-jax"
    program.write_text('#!/usr/bin/env bash\necho "$1"\n[[ $1 == doctor ]] || exec sleep 100\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}

    def host(action):
        done = subprocess.run(
            ["bash", tmp_path / "host.sh", action], env=env, capture_output=True, timeout=30
        )
        assert done.returncode == 0
        return done.stdout.decode()

    assert host("start") == ""
    pid = int((tmp_path / "pid").read_text())
    try:
        for _ in range(100):
            if (tmp_path / "log").read_text().split() == ["doctor", "train"]:
                break
            time.sleep(0.1)
        assert host("start") == "run-1 is running already\n"
        assert os.getsid(pid) == pid  # the connection's end does not reach it
        host("stop")
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
                return
            time.sleep(0.1)
        pytest.fail("it goes on")
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def slurm_script(capfd, tmp_path, monkeypatch, *more):
    monkeypatch.setenv("PATH", install(tmp_path / "bin", {"sbatch": ""}))
    out = tmp_path / "out %j"
    assert launch(capfd, "--on", "slurm", "--nodes", 2, *more, out=out)[0] == 0
    return out


def test_slurm_gets_one_job_with_its_options(capfd, tmp_path, monkeypatch):
    more = ["--gpus", 8, "--time", "4:00:00", "--partition", "big", "--sbatch=--account=x; y"]
    out = slurm_script(capfd, tmp_path, monkeypatch, *more)
    log = str(out / "launch" / "slurm.log").replace("%", "%%")
    given = ["--gpus-per-node=8", "--time=4:00:00", "--partition=big", "--account=x; y"]
    script = str(out / "launch" / "slurm.sh")
    assert calls(tmp_path / "bin") == [
        ["sbatch", "--job-name=run-1", "--nodes=2", f"--output={log}", *given, script]
    ]
    text = (out / "launch" / "slurm.sh").read_text()
    assert "#SBATCH --requeue\n" in text and "#SBATCH --signal=B:USR1@120\n" in text
    assert text.index("#SBATCH --signal") < text.index("\nset -uo")  # sbatch stops reading there


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (75, 0, True), (75, 20, False), (143, 0, True), (1, 0, False)],
)
def test_a_slurm_job_that_was_stopped_goes_back_into_the_queue(
    capfd, tmp_path, monkeypatch, status, restarts, again
):
    out = slurm_script(capfd, tmp_path, monkeypatch)
    path = install(tmp_path / "nodes", {"srun": f"exit {status}", "scontrol": "exit 1"})
    env = {"PATH": path, "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", out / "launch" / "slurm.sh"], env=env, timeout=60)
    assert done.returncode == status
    made = calls(tmp_path / "nodes")
    host = str(out / "launch" / "host.sh")
    assert made[0] == ["srun", "--kill-on-bad-exit=1", "bash", host, "run"]
    assert made[1:] == ([["scontrol", "requeue", "7"]] if again else [])


@pytest.mark.parametrize(("sent", "again"), [("SIGUSR1", True), ("SIGUSR2", False)])
def test_a_slurm_job_saves_when_it_is_signalled(capfd, tmp_path, monkeypatch, sent, again):
    out = slurm_script(capfd, tmp_path, monkeypatch)
    step = tmp_path / "step"
    wait = f'echo "$$" >{step}\ntrap "exit 75" TERM\nwhile :; do sleep 0.05; done'
    kill = f'kill -TERM "$(cat {step})"'
    programs = {"srun": wait, "scancel": kill, "scontrol": "exit 1"}
    path = install(tmp_path / "nodes", programs)
    env = {"PATH": path, "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", out / "launch" / "slurm.sh"], env=env) as job:
        for _ in range(200):
            if step.exists():
                break
            time.sleep(0.05)
        time.sleep(0.2)
        job.send_signal(getattr(signal, sent))
        assert job.wait(timeout=30) == 75
    requeued = [["scontrol", "requeue", "7"]] if again else []
    assert calls(tmp_path / "nodes")[1:] == [["scancel", "--signal=TERM", "7"], *requeued]


def test_kubectl_replaces_a_jobset_that_has_ended_and_no_other(capfd, tmp_path, monkeypatch):
    ended = ["kubectl", "get", "jobset", "run-1", "--ignore-not-found"]
    ended.append("--output=jsonpath={.status.terminalState}")
    for said, more in (("Failed", [["kubectl", "delete", "jobset", "run-1"]]), ("", [])):
        folder = tmp_path / f"bin{said}"
        answer = f"[[ $1 != get ]] || echo '{said}'"
        monkeypatch.setenv("PATH", install(folder, {"kubectl": answer}))
        assert launch(capfd, *GKE)[0] == 0
        assert calls(folder) == [ended, *more, ["kubectl", "apply", "--filename=-"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--on", "gke", "--topology", "v5p:4x4x9"], "valid shapes of v5p are 2x2x1"),
        (["--on", "gke", "--topology", "v9:2x2"], "one of v4, v5e, v5p, v6e, tpu7x"),
        (["--on", "gke", "--topology", "v5e:4x4"], "needs --image"),
        (["--on", "gke", "--topology", "v5e:4x4", "--image", "i"], "needs --claim"),
        ([*GKE, "--claim", "runs"], "valid is NAME=/PATH"),
        (["--on", "tpu-vm", "--topology", "v5e:4x4"], "needs --zone"),
        ([*VM, "--topology", "tpu7x:4x4x4"], "is had by --on gke only"),
        ([*VM, "--install", "git+https://u:secret@host/r@v1"], "a password has no place here"),
        ([*VM, "--install", "git+https://host/r"], "@REVISION"),
        ([*VM, "--install", "none.whl"], "there is no such file"),
        ([*VM, "--install", "x; y"], "valid is git+…, a wheel or rlhf-jax==VERSION"),
        ([*VM, "--set", "learner.policy=1"], "Valid: name, steps, learners"),
        ([*VM, "--set", "steps=1\ntouch x"], "cannot be printed"),
        ([*VM, "--out", "s3://bucket/x"], "mount a bucket"),
        (["--on", "slurm", "--out", "gs://bucket/x"], "mount a bucket"),
        ([*VM, "--files", "/usr"], "is not in it"),
        (["--on", "slurm", "--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--on", "slurm", "--restarts", "-5"], "--restarts -5: must be at least 0"),
        (["--on", "slurm", "--gpus", "-1"], "--gpus -1: must be at least 0"),
        (["--on", "slurm", "--time", "soon"], "valid is minutes, 12:00:00 or 1-12:00:00"),
        (["--on", "slurm", "--sbatch", "account=ME"], "valid is an option, --sbatch=--account"),
        (["--on", "slurm", "--sbatch=--nodes=5"], "say it by --nodes, which sets it already"),
        (["--on", "slurm", "--sbatch=-N5"], "say it by --nodes, which sets it already"),
        (["--on", "slurm", "--partition", "gpu --wrap=x"], "valid is gpu, or some: a,b"),
        ([*VM, "--zone", "us; rm"], "--zone 'us; rm': valid is us-east5-a"),
        ([*VM, "--project", "$(id)"], "valid is my-project"),
        ([*GKE, "--namespace", "Bad NS"], "valid is small letters, digits and -"),
        ([*VM, "--install", "foo"], "valid is git+…, a wheel or rlhf-jax==VERSION"),
        (["--on", "slurm", "--image", "i"], "--image is for --on gke, not slurm; leave it out"),
        (["--on", "slurm", "--topology", "v5e:4x4"], "is for --on tpu-vm and gke, not slurm"),
        (["--on", "slurm", "--gpus", "3"], "smoke on 3 devices: "),
        (["--on", "slurm", "--out", SMOKE + "/x"], f"{SMOKE} is a file"),
        ([*VM, "--until", "tomorrow"], "--until 'tomorrow': valid is 6h, 90m, 1d12h"),
        ([*VM, "--nodes", "2"], "--nodes is for --on slurm, not tpu-vm"),
        ([*VM, "--files", SMOKE], "is no folder"),
        (["--on", "tpu-vm", "--zone", "z"], "--on tpu-vm needs --topology, such as v5e:4x4"),
        ([*VM, "--set", "mesh=(-1,1,3,1)"], "smoke on 128 devices: mesh (-1, 1, 3, 1)"),
        ([*VM, "--slices", "2", "--set", "mesh=(1,1,256,1)"], "over 2 slices (or hosts) of 128"),
        ([*GKE, "--image", "I; rm"], "--image 'I; rm': valid is HOST/NAME:TAG"),
        ([*GKE, "--zone", "z"], "--zone: kubectl has its cluster already"),
        ([*GKE, "--xpk", "c"], "--claim: XPK mounts what `xpk storage attach`"),
        (["--on", "slurm"], "needs sbatch"),
        (VM, "--dry-run shows what would be run"),
        ([*GKE, "--out", "/runs/x"], "needs kubectl"),
        ([*GKE, "--out", "/other/x"], "--out /runs/run-1"),
        ([*GKE, "--claim", "runs=/"], "valid is NAME=/PATH, a folder below /"),
        ([*GKE, "--out", "runs/x"], "a path from / on"),
        ([*VM, "--out", "gs://bucket"], "gs://BUCKET/RUN"),
        (["--on", "slurm", "--out", "/"], "not / itself"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_run(capfd, tmp_path, monkeypatch, arguments, says):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    status, _, err = launch(capfd, *arguments, out=tmp_path / "out")
    assert (status, err.startswith("error: ")) == (2, True), err
    assert says in err
    assert not (tmp_path / "out").exists()


def test_what_nobody_here_can_check_is_said(capfd):
    _, out, _ = launch(capfd, *GKE, "--dry-run", file="e.py")
    assert out.startswith("# e.py is not here: taken for a path in the image, and not checked\n")
    _, out, _ = launch(capfd, "--on", "slurm", "--dry-run")
    assert "# without --gpus nobody here knows the devices" in out
    assert "nobody" not in launch(capfd, "--on", "slurm", "--gpus", 8, "--dry-run")[1]
    git = ["--install", "git+https://host/r@v1", "--dry-run"]
    _, out, _ = launch(capfd, *VM, *git, file="e.py")
    assert "taken for a path in the repository" in out and "a new machine" not in out
    assert "a new machine has no rlhf-jax" in launch(capfd, *VM, "--dry-run")[1]
    assert "not here" not in launch(capfd, *GKE, "--dry-run")[1]


def test_a_path_in_a_repository_is_one_from_its_root(capfd, monkeypatch):
    git = [*VM, "--install", "git+https://me:token@host/r@v1", "--dry-run"]
    status, _, err = launch(capfd, *git)
    assert status == 2 and "token" not in err and "a password has no place here" in err
    git[git.index("--install") + 1] = "git+https://host/r@v1"
    status, out, err = launch(capfd, *git)
    assert status == 0 and f"EXPERIMENT={WIDE}" in out, err
    status, _, err = launch(capfd, *git, file=str(ROOT / WIDE))
    assert status == 2 and f"here that is {WIDE}" in err
    monkeypatch.chdir(ROOT / "tests")
    status, _, err = launch(capfd, *git, file="wide/experiment.py")
    assert status == 2 and f"here that is {WIDE}" in err
    assert launch(capfd, *git, file="../elsewhere.py")[0] == 2


@pytest.mark.parametrize("name", ["x; touch y", "$(id)", "-x", "x-", "X", "", "a" * 41, "a/b"])
def test_a_name_that_could_be_anything_but_a_name_is_refused(capfd, name):
    status, _, err = launch(capfd, *GKE, "--dry-run", f"--name={name}")
    assert status == 2 and "valid are up to 40 small letters" in err


def test_a_topology_has_chips_hosts_and_the_names_that_google_gives_it():
    found = topology("v5p:4x4x8")
    assert (found.chips, found.hosts, found.type) == (128, 32, "v5p-256")
    found = topology("v5e:16x16")
    assert (found.chips, found.hosts, found.type) == (256, 64, "v5litepod-256")
    assert topology("v6e:1x1").hosts == 1
    assert (topology("tpu7x:2x2x1").chips, topology("tpu7x:2x2x1").devices) == (4, 8)
    with pytest.raises(ConfigError, match="valid shapes"):
        topology("v5p:0x4x4")


@pytest.mark.parametrize(
    ("google", "says"),
    [
        ("v5p-256", "name of 128 chips; here their shape is needed, v5p:4x4x8$"),
        ("v5litepod-16", "v5e:4x4$"),
        ("v5p-1024", "v5p:4x4x32 or v5p:4x8x16 or v5p:8x8x8$"),
        ("v4-24", "and no shape has so many"),
        ("v5e-16", "valid is CHIP:SHAPE"),
    ],
)
def test_google_clouds_name_of_a_slice_is_translated(google, says):
    with pytest.raises(ConfigError, match=says):
        topology(google)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("XPK"), reason="XPK: the path of xpk 1.16")
def test_xpk_takes_our_workload_and_runs_our_script(capfd, tmp_path):
    status, out, err = launch(
        capfd, *GKE[:-2], "--xpk", "c", "--slices", 2, "--dry-run", out=HOSTILE
    )
    assert status == 0, err
    command = shlex.split(out.splitlines()[-1].removeprefix("# $ "))
    more = ["--dry-run", "--skip-validation", "--no-dependency-auto-download"]
    more += ["--project=p", "--zone=us-east5-a", "--project-number=1"]
    more.append(f"--output-manifest-file={tmp_path}/m.yaml")
    done = subprocess.run(
        [os.environ["XPK"], *command[1:], *more],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = yaml.safe_load((tmp_path / "m.yaml").read_text())
    jobs, ours = theirs["spec"]["replicatedJobs"][0], manifest(capfd, "--slices", 2)
    assert jobs["replicas"] == 2 and jobs["template"]["spec"]["parallelism"] == 32
    assert pod(theirs)["nodeSelector"] == pod(ours)["nodeSelector"]
    line = next(
        x for x in pod(theirs)["containers"][0]["command"][2].splitlines() if "host.sh" in x
    )
    line = line.strip().removesuffix("& PID=$!;").replace("/tmp/host.sh", f"{tmp_path}/host.sh")
    assert host_calls(tmp_path, ["bash", "-c", line])[0][-1] == HOSTILE
