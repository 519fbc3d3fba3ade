"""A study carried out: bases from the cache, arms one after another, each measured and kept.

OUT/study.json            settings, versions, git revision, seconds by arm
OUT/arms/<arm>/           arm.json, results.jsonl, curves*.npz, seed<k>/: weights or a whole run
OUT/results.jsonl         one line per arm × seed × step × metric, of all arms
OUT/index.html            the page, with figure.png beside it

Bases live in the cache, by a hash of all that decides their weights; see `digest`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.check import check
from rlhf_jax.config import ConfigError
from rlhf_jax.experiment import difference
from rlhf_jax.study.design import Study
from rlhf_jax.study.progress import Progress
from rlhf_jax.study.results import Results
from rlhf_jax.study.together import obstacles
from rlhf_jax.study.work import Work, write_json


def conduct(
    study: Study,
    out: Path,
    *,
    record: dict[str, Any],
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Results:
    """Train and measure what is not there yet; write and return the results of all asked for.

    An arm that is finished in `out` is not trained again, so that an interrupted study goes on
    with the arm it was at; `record` gains the seconds of each.

    Raises:
        ConfigError: before anything is trained, for arms that cannot be, or an `out` that holds
            another study.
    """
    chosen = _chosen(study, arms)
    seeds = tuple(range(study.seeds)) if seeds is None else tuple(seeds)
    _check(study, chosen)
    work = Work(study, out, seeds)
    _claim(out, record)
    bases, arms_needed = _needed(study, chosen)
    left = [name for name in bases if work.missing(name)]
    left += [name for name in arms_needed if work.missing(name)]
    configs = study.configs
    with Progress(
        study.name,
        {n: len(work.missing(n)) * configs[n].steps if n in configs else 0 for n in left},
    ) as work.progress:
        for name in left:
            work.do(name)
    rows = [row for name in chosen for row in work.rows(name)]
    results = Results(rows)
    results.write(out / "results.jsonl")
    record["seconds"] = {name: work.seconds(name) for name in (*bases, *arms_needed)}
    write_json(out / "study.json", record)
    return results


def _chosen(study: Study, arms: Sequence[str] | None) -> list[str]:
    if arms is None:
        return list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        raise ConfigError(
            f"study {study.name!r} has no arm {', '.join(unknown)}; valid: {', '.join(study.arms)}"
        )
    return [name for name in study.arms if name in arms]


def _needed(study: Study, chosen: Sequence[str]) -> tuple[list[str], list[str]]:
    """Bases and arms to be trained for the chosen ones, each before what starts from it."""
    work, wanted = Work(study, Path(), ()), list(chosen)
    for name in wanted:
        wanted += [stage for stage in work.stages(name) if stage not in wanted]
    bases = [name for name in study.bases if name in wanted]
    return bases, [name for name in study.arms if name in wanted]


def _check(study: Study, chosen: Sequence[str]) -> None:
    """Everything that can be wrong, before anything is trained."""
    work, known = Work(study, Path(), ()), set()
    for name in (*study.bases, *study.arms):
        for stage in work.stages(name):
            if stage not in known:
                raise ConfigError(
                    f"{name!r} of study {study.name!r} starts from {stage!r}, which is no base or "
                    f"earlier arm; valid: {', '.join(sorted(known)) or 'none'}"
                )
        known.add(name)
    bases, arms = _needed(study, chosen)
    for name in (*bases, *arms):
        run = study.configs.get(name)
        if run is None:
            continue
        try:
            if study.together:
                check(replace(run, mesh=(1, 1, 1, 1)), devices=1)
                if wrong := obstacles(run):
                    raise ConfigError(
                        f"it cannot train all seeds in one program: {'; '.join(wrong)}; set "
                        "together=false to train them one after another"
                    )
            else:
                check(run, devices=jax.device_count())
        except ConfigError as error:
            raise ConfigError(f"{name!r} of study {study.name!r}: {error}") from error


def _claim(out: Path, record: Mapping[str, Any]) -> None:
    """Make the directory this study's own, or refuse."""
    path = out / "study.json"
    if path.is_file():
        old = json.loads(path.read_text())
        lines = difference(
            {"study": old["study"], "settings": old["settings"]},
            {"study": record["study"], "settings": record["settings"]},
        )
        if lines:
            shown = "\n  ".join(line[:120] for line in lines[:8])
            raise ConfigError(
                f"{out} holds another study, or other settings of this one (there -> here):\n"
                f"  {shown}\nChoose another --out"
            )
    elif (out / "run.json").is_file():
        raise ConfigError(f"{out} holds a run; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "seconds": {}})
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}; choose another --out"
        ) from error
