"""Run directories: what may be started where, stages one after another, and finding them again.

OUT/run.json            the experiment's file, settings, description, versions
OUT/metrics.jsonl …     what the run wrote; for a pipeline all of this is in OUT/<stage>/
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax import probes
from rlhf_jax.bucket import place, write
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError, Pipeline, runs_of
from rlhf_jax.experience import agree
from rlhf_jax.experiment import describe, difference, load
from rlhf_jax.train import train

# What may change between a run and its continuation: how long, where and how it is cut up.
FREE = (
    "steps", "mesh", "checkpoint", "evaluation", "max_skipped", "show",
    "microbatches", "chunk", "chunks", "slots", "windows", "widths",
)  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """A run or pipeline found in a directory."""

    value: Config | Pipeline
    directory: Path


def start(file: str, settings: Sequence[str], out: str | Path, *, resume: bool) -> Path:
    """Load an experiment and run it in `out`; returns the directory.

    Raises:
        ConfigError: if the experiment is wrong or another process has another one, or the
            directory holds a run that this would harm.
    """
    value = load(file, settings)
    for run in runs_of(value).values():
        check(run, devices=jax.device_count())  # before the directory is claimed
    out = place(out)
    out = out.resolve() if isinstance(out, Path) else out
    described = describe(value)
    facts = {"host": socket.gethostname(), "experiment": described | {"--resume": resume}}
    if said := apart(probes.gathered(facts)):
        raise ConfigError(f"{said}\nStart every process with the same command and the same files")
    record = {
        "file": str(Path(file).resolve()),
        "settings": list(settings),
        "config": described,
        "versions": versions(),
        "command": sys.argv,
    }
    error = None
    if jax.process_index() == 0:  # the others would find what it has just written
        try:
            _claim(out, record, resume=resume, file=file)
        except ConfigError as found:
            error = found
    agree(error, "it cannot use --out")
    if isinstance(value, Config):
        train(value, out, resume=resume)
    else:
        run_stages(value, out)
    return out


def apart(facts: Sequence[Mapping[str, Any]]) -> str | None:
    """Which process has another experiment than the first, and where; `facts` of all of them."""
    first, *others = facts
    for i, one in enumerate(others, 1):
        if lines := difference(first["experiment"], one["experiment"]):
            shown = "\n  ".join(_short(lines))
            return (
                f"process {i} on {one['host']} was started with another experiment than process 0 "
                f"on {first['host']} (there -> here):\n  {shown}"
            )
    return None


def _claim(out: Path, record: dict[str, Any], *, resume: bool, file: str) -> None:
    """Make the directory this run's own, or refuse."""
    path = out / "run.json"
    settings = "".join(f" --set {s}" for s in record["settings"])
    if path.is_file():
        old = json.loads(path.read_text())
        lines = difference(old["config"], record["config"])
        fixed = [line for line in lines if not set(line.split(":")[0].split(".")) & set(FREE)]
        shown = "\n  ".join(_short(fixed or lines))
        if not resume and fixed:
            raise ConfigError(
                f"{out} holds another run; choose another --out. It differs in (there -> here):\n"
                f"  {shown}"
            )
        if not resume:
            but = f", but for (there -> here)\n  {shown}\n" if lines else "; "
            raise ConfigError(
                f"{out} already holds this run{but}continue it with\n"
                f"  rlhf-jax train {file} --out {out}{settings} --resume\n"
                "or choose another --out"
            )
        if fixed:
            raise ConfigError(
                f"{out} cannot be resumed with another experiment (there -> here):\n  {shown}\n"
                f"Only {', '.join(FREE)} may change; choose another --out for the rest"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(record, indent=1))
    except Exception as error:  # file systems of clouds raise what they like
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write to {out}: {reason}; choose another --out") from error


def _short(lines: list[str]) -> list[str]:
    cut = [line if len(line) <= 120 else line[:117] + "..." for line in lines[:12]]
    return cut + ([f"(and {len(lines) - 12} more)"] if len(lines) > 12 else [])


def run_stages(pipeline: Pipeline, out: Path) -> None:
    """Every stage that is not finished, in order; an interrupted one goes on where it was saved."""
    directories: dict[str, Path] = {}
    for number, (name, stage) in enumerate(pipeline.stages.items(), 1):
        directory = out / name
        done = directory / "done"
        heading = f"[{number}/{len(pipeline.stages)}] {name}"
        if multihost_utils.broadcast_one_to_all(np.bool_(done.is_file())):
            print(f"{heading}: already finished", flush=True)
        else:
            print(heading, flush=True)
            directory.mkdir(parents=True, exist_ok=True)
            if isinstance(stage, Config):
                again = (directory / "checkpoints").is_dir()
                train(stage, directory, resume=again, stages=directories, stage=name)
            else:
                stage(out)
            done.write_text("")
        directories[name] = directory


def versions() -> dict[str, str]:
    """What a result depends on beside the experiment."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        found[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    found["devices"] = f"{jax.device_count()} × {device.device_kind} ({device.platform})"
    return found


def find(directory: str | Path, *, file: str | None = None) -> Recorded:
    """The experiment that a directory was made by, with its settings.

    Raises:
        ConfigError: if there is none, its file is gone, or the file says something else by now.
    """
    directory = place(directory)
    path = directory / "run.json"
    if not directory.is_dir():
        raise ConfigError(f"there is no directory {directory}; give the --out of a train command")
    if not path.is_file():
        raise ConfigError(f"{directory} holds no run (there is no run.json); give a train --out")
    record = json.loads(path.read_text())
    source = file if file is not None else record["file"]
    if not Path(source).is_file():
        raise ConfigError(f"the experiment file {source} is gone; name it with --file")
    value = load(source, record["settings"])
    lines = difference(record["config"], describe(value))
    if lines:
        shown = "\n  ".join(_short(lines))
        print(f"note: {source} has changed since this run (then -> now):\n  {shown}", flush=True)
    return Recorded(value, directory)


def stage_of(found: Recorded, stage: str | None) -> tuple[Config, Path]:
    """One stage's config and directory; the last run of a pipeline if none is named."""
    if isinstance(found.value, Config):
        if stage is not None:
            raise ConfigError(f"{found.directory} is a single run; leave --stage out")
        return found.value, found.directory
    runs = runs_of(found.value)
    name = stage if stage is not None else list(runs)[-1]
    if name not in runs:
        raise ConfigError(f"there is no stage {name!r}; valid: {', '.join(runs)}")
    return runs[name], found.directory / name
