"""Mistakes in the options of `rlhf-jax launch`, found before anything is written or called."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from rlhf_jax.check import check
from rlhf_jax.config import ConfigError, runs_of
from rlhf_jax.experiment import load
from rlhf_jax.scripts import from_git
from rlhf_jax.topologies import topology

LEAST = {"slices": 1, "nodes": 1, "gpus": 0, "restarts": 0}
FORMS = {
    "time": (r"(\d+-)?\d+(:\d+){0,2}|(?i:unlimited|infinite)", "minutes, 12:00:00 or 1-12:00:00"),
    "until": (r"(\d+[smhd])+", "6h, 90m, 1d12h"),
    "image": (r"[A-Za-z0-9][\w.:/@-]*", "HOST/NAME:TAG"),
    "zone": (r"[a-z0-9-]+", "us-east5-a"),
    "project": (r"[a-z0-9.:-]+", "my-project"),
    "namespace": (r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", "small letters, digits and -"),
    "xpk": (r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", "a cluster's name"),
    "partition": (r"[\w.,+-]+", "gpu, or some: a,b"),
}
BY_XPK = {
    "claim": "XPK mounts what `xpk storage attach` gave the cluster; or --out gs://BUCKET/RUN",
    "namespace": "XPK uses the default one; leave it out",
}
BY_KUBECTL = dict.fromkeys(
    ("zone", "project"), "kubectl has its cluster already; leave it out, or add --xpk CLUSTER"
)
OURS = {  # options of sbatch that launch writes
    "--nodes": "--nodes", "-N": "--nodes", "--job-name": "--name", "-J": "--name",
    "--time": "--time", "-t": "--time", "--partition": "--partition", "-p": "--partition",
    "--gpus-per-node": "--gpus", "--output": "--out", "-o": "--out",
}  # fmt: skip


def check_launch(options: Namespace) -> None:
    """Find mistakes, those of the experiment too if its file is here.

    Raises:
        ConfigError: saying what was wrong and what is valid.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise ConfigError(
            f"--name {options.name!r}: valid are up to 40 small letters, digits and -, a letter "
            "first and no - last"
        )
    given = [f"{k}={v}" for k, v in vars(options).items() if isinstance(v, str)]
    for text in [*given, *options.settings, *options.sbatch]:
        if not text.isprintable():
            raise ConfigError(f"{text!r}: holds characters that cannot be printed")
    _check_place(options)
    _check_values(options)
    if options.do == "up":
        _check_experiment(options)


def _check_place(options: Namespace) -> None:
    bucket = options.out.startswith("gs://")
    if "://" in options.out and not (bucket and options.on != "slurm"):
        raise ConfigError(
            f"--out {options.out}: valid are a folder that all hosts see (mount a bucket with "
            "--claim or --before), and with --on tpu-vm and gke gs://BUCKET/RUN"
        )
    there = r"gs://[^/]+/.+" if bucket else r"/.+" if options.on != "slurm" else r"(?!/$).+"
    if not re.fullmatch(there, options.out):
        raise ConfigError(
            f"--out {options.out!r}: valid are gs://BUCKET/RUN, a path from / on (not / itself) "
            "and, with --on slurm, one from here"
        )
    if options.on == "slurm":
        out = Path(options.out).absolute()
        first = next(path for path in (out, *out.parents) if path.exists())
        if not first.is_dir():
            raise ConfigError(f"--out {options.out}: {first} is a file; choose another folder")


def _check_values(options: Namespace) -> None:
    for name, (targets, default) in options.own.items():
        if options.on not in targets and getattr(options, name) != default:
            raise ConfigError(
                f"--{name} is for --on {' and '.join(targets)}, not {options.on}; leave it out"
            )
    if options.on == "gke":
        for name, why in (BY_XPK if options.xpk else BY_KUBECTL).items():
            if getattr(options, name):
                raise ConfigError(f"--{name}: {why}")
    for name, least in LEAST.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least {least}")
    for name, (form, valid) in FORMS.items():
        value = getattr(options, name)
        if value is not None and not re.fullmatch(form, value):
            raise ConfigError(f"--{name} {value!r}: valid is {valid}")
    for option in options.sbatch:
        if not option.startswith("-"):
            raise ConfigError(f"--sbatch {option!r}: valid is an option, --sbatch=--account=ME")
        name = option.split("=")[0] if option.startswith("--") else option[:2]
        if name in OURS:
            raise ConfigError(f"--sbatch={option}: say it by {OURS[name]}, which sets it already")


def _check_experiment(options: Namespace) -> None:
    devices, slices = _devices(options)
    if options.file is None:
        raise ConfigError("--do up needs an experiment: rlhf-jax launch FILE --on …")
    if from_git(options):
        _check_path_in_repository(options.file)
    if Path(options.file).is_file():
        runs = runs_of(load(options.file, options.settings))
        if devices is None:
            print("# without --gpus nobody here knows the devices: mesh and rows are not checked")
            return
        for name, config in runs.items():
            try:
                check(config, devices=devices, slices=slices)
            except ConfigError as error:
                raise ConfigError(f"{name} on {devices} devices: {error}") from error
    elif options.on != "gke" and not from_git(options):
        raise ConfigError(f"there is no experiment file {options.file}")
    else:
        where = "repository" if from_git(options) else "image"
        print(f"# {options.file} is not here: taken for a path in the {where}, and not checked")


def _check_path_in_repository(file: str) -> None:
    """The hosts look for it from the root of what they fetched."""
    path = Path(file).resolve()
    root = next((one for one in path.parents if (one / ".git").exists()), None)
    here = path.is_file() and root is not None
    if Path(file).is_absolute() or ".." in Path(file).parts or (here and path != root / file):
        hint = f"; here that is {path.relative_to(root)}" if here else ""
        raise ConfigError(
            f"{file}: with --install git+… hosts look for it from the repository's root{hint}"
        )


def _devices(options: Namespace) -> tuple[int | None, int]:
    """How many JAX will see, None if nothing says so, and in how many slices."""
    if options.on == "slurm":
        return options.nodes * options.gpus or None, 1  # NVLink may join nodes
    if options.topology is None:
        raise ConfigError(f"--on {options.on} needs --topology, such as v5e:4x4 or v5p:4x4x8")
    return topology(options.topology).devices * options.slices, options.slices
