"""The commands for machines other than this one: doctor, plan and launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

TARGETS = ("tpu-vm", "gke", "slurm")
PLANS = "RLHF_JAX_PLANS"  # in the process that compiles: "many" programs at a time, or "one"
ACTIONS = ("up", "status", "logs", "stop", "delete")


def add(command, settings) -> None:
    """Put these commands into the parser; `command` and `settings` are the helpers of cli.py."""
    doctor = command(
        "doctor", _doctor, "is this machine, or set of them, fit to train?", joins="checkpoints"
    )
    doctor.add_argument("file", nargs="?", metavar="FILE", help="an experiment that is to run here")
    doctor.add_argument("--checkpoints", metavar="DIR", help="where checkpoints are to be written")
    settings(doctor)

    plan = command("plan", _plan, "does a run fit on a topology that is not there, and how fast?")
    plan.add_argument("file", metavar="FILE", help="an experiment: a .py file with config()")
    settings(plan)
    plan.add_argument("--stage", help="a stage of a pipeline; default: the last run")
    plan.add_argument(
        "--topology",
        required=True,
        metavar="v5p:4x4x8",
        help="or h200:1x8x8, slices × hosts × GPUs; cpu:8, this machine",
    )
    plan.add_argument("--mesh", metavar="fsdp=32,tensor=4", help="default: the experiment's")
    plan.add_argument("--search", action="store_true", help="try all meshes, and plan the best")
    plan.add_argument("--best", type=int, default=2, help="how many of them; default: 2")
    plan.add_argument("--json", action="store_true", help="print everything, as JSON")

    launch = command("launch", _launch, "run an experiment on TPU VMs, GKE or SLURM; again: resume")
    launch.add_argument("file", nargs="?", metavar="FILE", help="the experiment, if --do is up")
    settings(launch)
    launch.add_argument("--on", required=True, choices=TARGETS, help="the kind of machines")
    launch.add_argument("--name", required=True, help="of the job: letters, digits and -")
    launch.add_argument(
        "--out", required=True, metavar="DIR", help="seen by all hosts, and lasting"
    )
    launch.add_argument("--do", default="up", choices=ACTIONS, help="default: up, start or resume")
    launch.add_argument("--dry-run", action="store_true", help="print all that would be run")
    launch.add_argument(
        "--install",
        metavar="WHAT",
        help="git+https://…@REVISION, a wheel, or rlhf-jax==…; default: the hosts have it",
    )
    launch.add_argument("--before", metavar="COMMAND", help="run by every host first: mount …")
    launch.add_argument("--restarts", type=int, default=20, help="at most; default: 20")

    own = {}  # option -> the targets it is for, and its default

    def group(*targets):
        options = launch.add_argument_group(" and ".join(targets))

        def option(name, **more):
            made = options.add_argument(name, **more)
            own[made.dest] = targets, made.default

        return option

    tpu = group("tpu-vm", "gke")
    tpu("--topology", metavar="v5p:4x4x8", help="kind of chip, and their arrangement")
    tpu("--slices", type=int, default=1, help="of that topology; default: 1")
    tpu("--spot", action="store_true", help="cheaper, and taken back at any time")
    tpu("--zone", help="of Google Cloud; with --on gke for --xpk")
    tpu("--project", help="of Google Cloud; default: gcloud's own")

    vm = group("tpu-vm")
    vm("--files", metavar="DIR", help="copied to the hosts; default: FILE's folder")
    vm("--runtime", metavar="IMAGE", help="of the machines; default: the chip's")
    vm("--until", metavar="6h", help="how long to wait in the queue; default: forever")

    gke = group("gke")
    gke("--image", help="with bash, and Python or rlhf-jax")
    gke("--claim", metavar="NAME=PATH", help="a PersistentVolumeClaim, mounted there")
    gke("--namespace", help="default: kubectl's own")
    gke("--xpk", metavar="CLUSTER", help="by XPK on this cluster, not kubectl")

    slurm = group("slurm")
    slurm("--nodes", type=int, default=1, help="default: 1")
    slurm("--gpus", type=int, default=0, help="of each node; default: 0")
    slurm("--time", metavar="LIMIT", help="as sbatch has it: 1-12:00:00")
    slurm("--partition", help="default: the cluster's own")
    slurm("--sbatch", action="append", default=[], metavar="OPTION", help="more for sbatch; repeat")
    launch.set_defaults(own=own)


def _doctor(options) -> int:
    from rlhf_jax import doctor
    from rlhf_jax.config import runs_of
    from rlhf_jax.experiment import load

    given = options.file is not None
    configs = runs_of(load(options.file, options.settings)) if given else {}
    return doctor.show(doctor.doctor(options.setup.source, configs, options.checkpoints))


def _plan(options) -> int:
    """In a process of its own where libtpu compiles, for it can crash.

    On programs far too large always, and now and then when it compiles several side by side.
    """
    if options.topology.startswith("cpu:") or os.environ.get(PLANS):
        return _planned(options)
    command = [sys.executable, "-m", "rlhf_jax", *options.arguments]
    for compilers in ("many", "one"):
        done = _run(command, os.environ | {PLANS: compilers})
        if done >= 0:
            return done
        crash = f"the compiler for {options.topology} crashed ({signal.Signals(-done).name})"
        if compilers == "many":
            print(f"{crash}; once more, one program at a time", file=sys.stderr, flush=True)
    print(
        f"error: {crash} in the phase that follows those reported above. It does so on programs "
        "far too large for the devices: plan for more, or for fewer rows at a time (microbatches, "
        "rollouts.chunks). SIGKILL: this machine's memory was too small",
        file=sys.stderr,
    )
    return 1


def _run(command, environment) -> int:
    """The status of a process that ends with this one: a signal's default would leave it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return subprocess.run(command, env=environment).returncode
    finally:
        signal.signal(signal.SIGTERM, before)


def _planned(options) -> int:
    import jax

    # Devices are described, not there; and what is compiled for them is not read from a cache.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    from rlhf_jax.config import ConfigError
    from rlhf_jax.experiment import load
    from rlhf_jax.plan import chips, meshes, page, whole
    from rlhf_jax.runs import Recorded, stage_of

    if options.search and options.mesh is not None:
        raise ConfigError("--search tries all meshes; leave --mesh out, or --search")
    if options.best < 1:
        raise ConfigError(f"--best {options.best}: must be at least 1")
    value = load(options.file, options.settings)
    config, _ = stage_of(Recorded(value, Path(options.file)), options.stage)
    shape = whole.mesh_argument(options.mesh)
    target = chips.target(options.topology)
    how = {"say": lambda line: print(line, file=sys.stderr, flush=True)}
    if os.environ.get(PLANS) == "one":
        how["compilers"] = 1
    if options.search:
        found = meshes.search(config, target, best=options.best, **how)
        shown, show = found["plans"], meshes.show
    else:
        found = whole.plan(config, target, mesh=shape, **how)
        shown, show = [found], page.show
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if any(one["fits"] for one in shown) else 1


def _launch(options) -> int:
    from rlhf_jax.launch import launch

    return launch(options)
