"""Running an experiment on other machines: TPU VMs, GKE (JobSet or XPK), SLURM.

The scripts and the manifest lie in `tpu/`, whole and checked; this file puts values into them,
quoted, and calls gcloud, kubectl, xpk or sbatch with lists of arguments, never through a shell.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from rlhf_jax.check_launch import check_launch
from rlhf_jax.config import ConfigError
from rlhf_jax.scripts import TEMPLATES, filled, from_git, host
from rlhf_jax.topologies import Slice, topology


@dataclass(frozen=True)
class Step:
    """A program to run."""

    arguments: Sequence[str]
    text: str | None = None  # what it reads from its standard input
    when: Sequence[str] = ()  # a program that must print something for this one to be run


def launch(options: Namespace) -> int:
    """Render, and do or show what `--do` says; the status of the last program.

    Raises:
        ConfigError: for a mistake, before anything is run.
    """
    check_launch(options)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / options.name
        written, steps = _TARGETS[options.on](options, bundle)
        if options.dry_run:
            for path, text in written.items():
                print(f"# ---- {path}\n{text}")
            for step in steps:
                when = f"if {shlex.join(step.when)} prints something: " if step.when else ""
                print(f"# {when}$ {shlex.join(step.arguments)}\n{step.text or ''}", end="")
            return 0
        for step in steps:
            if shutil.which(step.arguments[0]) is None:
                raise ConfigError(
                    f"--on {options.on} needs {step.arguments[0]}, which is not on this machine's "
                    "PATH; --dry-run shows what would be run"
                )
        for path, text in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for step in steps:
            if step.when and not _said(step.when):
                continue
            status = subprocess.run(step.arguments, input=step.text, text=True).returncode
            if status != 0:
                return status
    return 0


def _said(arguments: Sequence[str]) -> str:
    return subprocess.run(arguments, stdout=subprocess.PIPE, text=True).stdout.strip()


def _tpu_vm(options: Namespace, bundle: Path) -> tuple[dict[Path, str], list[Step]]:
    if options.zone is None:
        raise ConfigError("--on tpu-vm needs --zone, where the machines are: --zone us-east5-a")
    written, steps = {}, [Step(["bash", str(bundle / "tpu-vm.sh"), options.do])]
    values = {"NAME": options.name, "ZONE": options.zone, "PROJECT": options.project or ""}
    if options.do == "up":
        kind = topology(options.topology)
        if kind.chip.runtime is None:
            raise ConfigError(f"--topology {options.topology}: is had by --on gke only")
        values |= {
            "TYPE": kind.type,
            "SLICES": str(options.slices),
            "RUNTIME": options.runtime or kind.chip.runtime,
            "SPOT": "spot" if options.spot else "",
            "UNTIL": options.until or "",
            "BUNDLE": str(bundle),
        }
        written[bundle / "host.sh"] = host(
            options,
            extra=_extra(options, "tpu"),
            experiment=_bundled(options, bundle),
            wheel=f"./{Path(options.install or '').name}",
        )
        _warn(options, kind)
        if not (options.install or options.before or options.runtime):
            print("# a new machine has no rlhf-jax: give --install, or have --before do it")
    return {bundle / "tpu-vm.sh": filled("tpu-vm.sh", values), **written}, steps


def _bundled(options: Namespace, bundle: Path) -> str:
    """Copy what the hosts need into the bundle; the experiment's path in there."""
    if from_git(options):
        return options.file
    folder = Path(options.files or Path(options.file).parent).resolve()
    file = Path(options.file).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--files {options.files}: is no folder")
    if not file.is_relative_to(folder):
        raise ConfigError(f"--files {options.files}: {options.file} is not in it")
    shutil.copytree(
        folder, bundle / "files", ignore=shutil.ignore_patterns(".*", "__pycache__", "runs")
    )
    if (options.install or "").endswith(".whl") and Path(options.install).is_file():
        shutil.copy(options.install, bundle)
    return str(file.relative_to(folder))


def _warn(options: Namespace, kind: Slice) -> None:
    print(
        f"# cost: {options.slices} × {kind.type} ({options.slices * kind.chips} chips"
        f"{', spot' if options.spot else ''}) are paid for until --do delete",
        flush=True,
    )


def _gke(options: Namespace, bundle: Path) -> tuple[dict[Path, str], list[Step]]:
    place = ["--namespace", options.namespace] if options.namespace else []
    label = f"jobset.sigs.k8s.io/jobset-name={options.name}"
    if options.do == "logs":
        first = f"{label},batch.kubernetes.io/job-completion-index=0"
        return {}, [Step(["kubectl", "logs", "--follow", "--prefix", "-l", first, *place])]
    if options.xpk:
        return {}, [_xpk(options)]
    name = ["jobset", options.name, *place]
    suspend = ["--type=merge", '--patch={"spec":{"suspend":true}}']
    steps = {
        "status": ["kubectl", "get", *name, "--output=yaml"],
        "stop": ["kubectl", "patch", *name, *suspend],
        "delete": ["kubectl", "delete", *name],
    }
    if options.do != "up":
        return {}, [Step(steps[options.do])]
    manifest = jobset(options)
    _warn(options, topology(options.topology))
    # One that has ended cannot be started again; one that runs is left alone by `apply`.
    ended = ["kubectl", "get", *name, "--ignore-not-found"]
    ended.append("--output=jsonpath={.status.terminalState}")
    apply = Step(["kubectl", "apply", *place, "--filename=-"], manifest)
    return {}, [Step(steps["delete"], when=ended), apply]


def jobset(options: Namespace) -> str:
    """The manifest; every value is a JSON value, which is one of YAML too."""
    kind = topology(options.topology)
    if options.image is None:
        raise ConfigError("--on gke needs --image, a container with bash, and Python or rlhf-jax")
    mounts, volumes = [{"name": "shm", "mountPath": "/dev/shm"}], []
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    if options.claim:
        claim, _, path = options.claim.partition("=")
        if not re.fullmatch(r"[a-z0-9][-.a-z0-9]*=/[^/].*", options.claim):
            raise ConfigError(f"--claim {options.claim}: valid is NAME=/PATH, a folder below /")
        if "://" not in options.out and not Path(options.out).is_relative_to(path):
            raise ConfigError(
                f"--out {options.out} is not below {path}, where --claim is mounted: "
                f"a pod's own disk ends with the pod; --out {path.rstrip('/')}/{options.name}"
            )
        mounts.append({"name": "out", "mountPath": path})
        volumes.append({"name": "out", "persistentVolumeClaim": {"claimName": claim}})
    elif "://" not in options.out:
        raise ConfigError(
            "--on gke needs --claim NAME=/PATH or --out gs://BUCKET/RUN: a pod's own disk ends "
            "with the pod"
        )
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kind.chip.label,
        "cloud.google.com/gke-tpu-topology": kind.shape,
    }
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    values = {
        "name": options.name,
        "restarts": options.restarts,
        "slices": options.slices,
        "hosts": kind.hosts,
        "selector": selector,
        "image": options.image,
        "chips": min(kind.chips, 4),
        "mounts": mounts,
        "volumes": volumes,
    }
    script = _pod(options).replace("$", "$$")  # Kubernetes expands $(NAME) and reads $$ as $
    return Template((TEMPLATES / "jobset.yaml").read_text()).substitute(
        {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()},
        script=textwrap.indent(script, " " * 16).rstrip(),
    )


def _pod(options: Namespace) -> str:
    work = f"/tmp/rlhf-jax/{options.name}"
    return host(options, extra=_extra(options, "tpu"), experiment=options.file, work=work)


def _extra(options: Namespace, kind: str) -> str:
    """What of rlhf-jax the hosts install besides."""
    return f"{kind},gcs" if "://" in options.out else kind


def _xpk(options: Namespace) -> Step:
    named = ["--workload", options.name, "--cluster", options.xpk]
    named += ["--zone", options.zone] if options.zone else []
    named += ["--project", options.project] if options.project else []
    if options.do == "status":
        named = ["--filter-by-job", *named[1:]]
        return Step(["xpk", "workload", "list", *named])
    if options.do in ("stop", "delete"):
        return Step(["xpk", "workload", "delete", *named])
    kind = topology(options.topology)
    if options.image is None:
        raise ConfigError("--xpk needs --image, a container with bash, and Python or rlhf-jax")
    # XPK puts the command into its manifest as it is, so it must be one line of plain characters.
    script = base64.b64encode(_pod(options).encode()).decode()
    run = f"echo {script} | base64 -d >/tmp/host.sh; exec bash /tmp/host.sh install run"
    _warn(options, kind)
    create = ["xpk", "workload", "create", *named, f"--tpu-type={kind.chip.type}-{kind.shape}"]
    create += [f"--num-slices={options.slices}", f"--docker-image={options.image}"]
    create += [f"--max-restarts={options.restarts}", "--restart-on-exit-codes=75"]
    create += ["--termination-grace-period-seconds=300", *(["--spot"] if options.spot else [])]
    return Step([*create, f"--command={run}"])


def _slurm(options: Namespace, bundle: Path) -> tuple[dict[Path, str], list[Step]]:
    options = Namespace(**vars(options) | {"out": str(Path(options.out).absolute())})
    folder = Path(options.out) / "launch"
    steps = {
        "status": ["squeue", "--me", f"--name={options.name}"],
        "logs": ["tail", "-n", "50", "-F", str(folder / "slurm.log")],
        "stop": ["scancel", "--batch", "--signal=USR2", "--me", f"--name={options.name}"],
        "delete": ["scancel", "--me", f"--name={options.name}"],
    }
    if options.do != "up":
        return {}, [Step(steps[options.do])]
    install = options.install or ""
    wheel = str(Path(install).absolute()) if Path(install).is_file() else ""
    experiment = options.file if from_git(options) else str(Path(options.file).absolute())
    script = host(options, extra="gpu" if options.gpus else "", experiment=experiment, wheel=wheel)
    values = {"LAUNCH": str(folder), "RESTARTS": str(options.restarts)}
    submit = ["sbatch", f"--job-name={options.name}", f"--nodes={options.nodes}"]
    # % begins a placeholder in this one path.
    submit.append(f"--output={str(folder / 'slurm.log').replace('%', '%%')}")
    submit += [f"--gpus-per-node={options.gpus}"] if options.gpus else []
    submit += [f"--time={options.time}"] if options.time else []
    submit += [f"--partition={options.partition}"] if options.partition else []
    submit += [*options.sbatch, str(folder / "slurm.sh")]
    written = {folder / "host.sh": script, folder / "slurm.sh": filled("slurm.sh", values)}
    return written, [Step(submit)]


_TARGETS = {"tpu-vm": _tpu_vm, "gke": _gke, "slurm": _slurm}
