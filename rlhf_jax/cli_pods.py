"""The commands for machines other than this one: doctor and launch."""

from __future__ import annotations

TARGETS = ("tpu-vm", "gke", "slurm")
ACTIONS = ("up", "status", "logs", "stop", "delete")


def add(command, settings) -> None:
    """Put both commands into the parser; `command` and `settings` are the helpers of cli.py."""
    doctor = command(
        "doctor", _doctor, "is this machine, or set of them, fit to train?", joins="checkpoints"
    )
    doctor.add_argument("file", nargs="?", metavar="FILE", help="an experiment that is to run here")
    doctor.add_argument("--checkpoints", metavar="DIR", help="where checkpoints are to be written")
    settings(doctor)

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

    tpu = launch.add_argument_group("tpu-vm and gke")
    tpu.add_argument("--topology", metavar="v5p:4x4x8", help="kind of chip, and their arrangement")
    tpu.add_argument("--slices", type=int, default=1, help="of that topology; default: 1")
    tpu.add_argument("--spot", action="store_true", help="cheaper, and taken back at any time")
    tpu.add_argument("--zone", help="of Google Cloud")
    tpu.add_argument("--project", help="of Google Cloud; default: gcloud's own")

    vm = launch.add_argument_group("tpu-vm")
    vm.add_argument("--files", metavar="DIR", help="copied to the hosts; default: FILE's folder")
    vm.add_argument("--runtime", metavar="IMAGE", help="of the machines; default: the chip's")
    vm.add_argument("--until", metavar="6h", help="how long to wait in the queue; default: forever")

    gke = launch.add_argument_group("gke")
    gke.add_argument("--image", help="with bash, and Python or rlhf-jax")
    gke.add_argument("--claim", metavar="NAME=PATH", help="a PersistentVolumeClaim, mounted there")
    gke.add_argument("--namespace", help="default: kubectl's own")
    gke.add_argument("--xpk", metavar="CLUSTER", help="by XPK on this cluster, not kubectl")

    slurm = launch.add_argument_group("slurm")
    slurm.add_argument("--nodes", type=int, default=1, help="default: 1")
    slurm.add_argument("--gpus", type=int, default=0, help="of each node; default: 0")
    slurm.add_argument("--time", metavar="LIMIT", help="as sbatch has it: 1-12:00:00")
    slurm.add_argument("--partition", help="default: the cluster's own")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="more for sbatch; repeat"
    )


def _doctor(options) -> int:
    from rlhf_jax import doctor
    from rlhf_jax.config import Config
    from rlhf_jax.experiment import load

    value = load(options.file, options.settings) if options.file is not None else {}
    stages = {value.name: value} if isinstance(value, Config) else getattr(value, "stages", {})
    configs = {name: stage for name, stage in stages.items() if isinstance(stage, Config)}
    return doctor.show(doctor.doctor(options.setup.source, configs, options.checkpoints))


def _launch(options) -> int:
    from rlhf_jax.launch import launch

    return launch(options)
