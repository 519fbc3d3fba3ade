"""What `rlhf-jax study` and `rlhf-jax report` do with a study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.config import ConfigError
from rlhf_jax.experiment import describe, load_study
from rlhf_jax.runs import versions
from rlhf_jax.study import page, words
from rlhf_jax.study.conduct import conduct
from rlhf_jax.study.results import Results
from rlhf_jax.study.verdicts import judge


def run(
    file: str,
    settings: Sequence[str],
    out: str | Path,
    *,
    preset: str,
    arms: Sequence[str] | None = None,
    seeds: str | None = None,
) -> Path:
    """Carry out a study, or what is left of it; print its verdicts; returns the page's path.

    Raises:
        ConfigError: for a mistake in the file, the options or the directory.
    """
    study, chosen = load_study(file, preset, settings)
    out = Path(out).resolve()
    record = {
        "study": study.name,
        "file": str(Path(file).resolve()),
        "preset": preset,
        "overrides": list(settings),
        "settings": describe(chosen),
        "config": describe(study),
        "versions": versions(),
        "revision": _revision(Path(file).resolve().parent),
        "command": ["rlhf-jax", *sys.argv[1:]],
    }
    began = time.monotonic()
    arms = arms if arms is not None else chosen.arms or None
    results = conduct(study, out, record=record, arms=arms, seeds=_seeds(seeds, study.seeds))
    path = page.save(study, results, record, out)
    verdicts = judge(study.primaries, results, arms=study.arms)
    for v in verdicts:
        print(f"{v.claim.name:4s} {v.verdict:10s} {v.claim.says}\n     {words.estimate(v)}")
    print(f"{words.answer(verdicts)}\n{path}  ({time.monotonic() - began:.0f} s)", flush=True)
    if chosen.arms and preset == "cpu_ci":
        print("cpu_ci shows that it runs, with some of the arms; the answer is --preset cpu's")
    return path


def report(directory: Path, *, file: str | None = None) -> Path:
    """The page of a study that was run, written again from its results by its file of today."""
    record = json.loads((directory / "study.json").read_text())
    source = file if file is not None else record["file"]
    if not Path(source).is_file():
        raise ConfigError(f"the study's file {source} is gone; name it with --file")
    study, _ = load_study(source, record["preset"], record["overrides"])
    results = Results.read(directory / "results.jsonl")
    return page.save(study, results, record, directory)


def _seeds(given: str | None, count: int) -> list[int] | None:
    """`8`: the first eight; `0,3,5`: these."""
    if given is None:
        return None
    try:
        found = [int(part) for part in given.split(",") if part.strip()]
        found = list(range(found[0])) if "," not in given else sorted(set(found))
    except (ValueError, IndexError):
        found = []
    if not found or min(found) < 0:
        raise ConfigError(
            f"--seeds {given}: a number of seeds, such as {count}, or seeds, such as 0,3,5"
        )
    return found


def _revision(folder: Path) -> str | None:
    """The commit of the study's file, with + if the tree has changes; None outside of git."""
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None
