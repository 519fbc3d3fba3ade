"""One part of a study, a base or an arm: where it lies, what it starts from, and how it is done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import Config, ConfigError
from rlhf_jax.data import cache_directory
from rlhf_jax.experiment import describe, difference
from rlhf_jax.models import weights
from rlhf_jax.study.design import Arm, Study, Trained
from rlhf_jax.study.digest import digest
from rlhf_jax.study.results import Results, Row
from rlhf_jax.study.together import Together
from rlhf_jax.train import prepared, train
from rlhf_jax.types import Params

SECONDS = 3.0  # that one call of a program shall take: how often progress is shown


@dataclass
class Work:
    """Where everything of one study lies, and how a part of it is done."""

    study: Study
    out: Path
    seeds: tuple[int, ...]
    progress: Any = None
    _digests: dict[str, str] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """Of a base or an arm."""
        if name in self.study.arms:
            return self.out / "arms" / name
        return cache_directory() / "bases" / f"{name}-{self.digest(name)}"

    def digest(self, name: str) -> str:
        """Of what decides the weights of a base or an arm."""
        if name not in self._digests:
            stages = {stage: self.digest(stage) for stage in sorted(self.stages(name))}
            run = self.study.bases.get(name) or self.study.arms[name].run
            self._digests[name] = digest(run, stages, together=self.study.together)
        return self._digests[name]

    def stages(self, name: str) -> list[str]:
        """Bases and arms that one starts from or reads."""
        arm = self.study.arms.get(name)
        run = self.study.bases[name] if arm is None else arm.run
        return list(dict.fromkeys([*starts(run), *(() if arm is None else arm.needs)]))

    def missing(self, name: str) -> tuple[int, ...]:
        """Seeds that are not finished.

        Raises:
            ConfigError: if seeds are finished of another arm of this name.
        """
        path = self.folder(name) / "arm.json"
        done = json.loads(path.read_text()) if path.is_file() else {"seeds": []}
        if done["seeds"] and name in self.study.arms:
            lines = difference(done["config"], describe(self.study.arms[name]))
            lines += difference(done["starts from"], self._starts(name))
            if lines:
                shown = "\n  ".join(line[:120] for line in lines[:8])
                raise ConfigError(
                    f"{path.parent} holds results of another arm {name!r} (there -> here):\n"
                    f"  {shown}\nChoose another --out, or delete that folder"
                )
        return tuple(seed for seed in self.seeds if seed not in done["seeds"])

    def _starts(self, name):
        return {s: self.digest(s) for s in self.stages(name) if s in self.study.bases}

    def rows(self, name: str) -> list[Row]:
        """An arm's results, of the seeds asked for."""
        found = Results.read(self.folder(name) / "results.jsonl").rows
        return [row for row in found if row.seed in self.seeds]

    def seconds(self, name: str) -> float:
        """What an arm or a base took when it was trained."""
        return json.loads((self.folder(name) / "arm.json").read_text())["seconds"]

    def do(self, name: str) -> None:
        """Train and measure the missing seeds of a base or an arm."""
        folder, seeds, began = self.folder(name), self.missing(name), time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        arm = self.study.arms.get(name) or Arm(self.study.bases[name], "base", measure=_nothing)
        with self.progress.part(name):
            if not isinstance(arm.run, Config):
                rows = self._computed(name, arm, seeds)
            elif self.study.together:
                rows = self._together(name, arm, seeds, folder)
            else:
                rows = self._one_by_one(name, arm, seeds, folder)
        path = folder / "arm.json"
        old = json.loads(path.read_text()) if path.is_file() else {"seeds": [], "seconds": 0.0}
        if name in self.study.arms:
            before = Results.read(folder / "results.jsonl").rows if old["seeds"] else ()
            Results([*before, *rows]).write(folder / "results.jsonl")
        seconds = old["seconds"] + time.monotonic() - began
        done = {"config": describe(arm), "starts from": self._starts(name)}
        done |= {"seeds": sorted({*old["seeds"], *seeds}), "seconds": round(seconds, 1)}
        write_json(path, done)

    def _computed(self, name, arm, seeds):
        rows = []
        for i, seed in enumerate(seeds):
            before = self._before(name, seed)
            rows += _rows(name, seed, 0, arm.run(seed, before))
            self.progress.at(i + 1, len(seeds))
        return rows

    def _together(self, name, arm, seeds, folder):
        config, rows, curves, chunk = arm.run, [], [], 4
        stages = {stage: self._stacked(stage, seeds) for stage in self.stages(name)}
        before = [_at(stages, i) for i in range(len(seeds))]
        run = Together(config, seeds, stages)
        for stop in _stops(arm):
            while run.done < stop:
                began = time.monotonic()
                curves.append(run.advance(min(chunk, stop - run.done)))
                self.progress.at(run.done, config.steps, len(seeds))
                slow = time.monotonic() - began > SECONDS
                chunk = max(1, chunk // 2) if slow and len(curves) > 1 else chunk * 2
            params = run.weights()
            joined = _joined(curves)
            for i, seed in enumerate(seeds):
                trained = Trained(
                    name, seed, run.done, replace(config, seed=seed), _at(params, i), before[i],
                    {metric: x[i] for metric, x in joined.items()},
                )  # fmt: skip
                rows += _rows(name, seed, run.done, self._measure(arm)(trained))
        for i, seed in enumerate(seeds):
            for learner, tree in params.items():
                path = folder / f"seed{seed}" / f"{learner}.safetensors"
                weights.save(path, jax.tree.map(lambda x, i=i: np.asarray(x[i]), tree))
        label = "-".join(map(str, (seeds[0], seeds[-1])))
        np.savez_compressed(folder / f"curves_{label}.npz", seeds=np.array(seeds), **joined)
        return rows

    def _one_by_one(self, name, arm, seeds, folder):
        config, rows = arm.run, []
        phases = prepared(config)
        for number, seed in enumerate(seeds):
            directory = folder / f"seed{seed}"
            stages = {s: self.folder(s) / f"seed{seed}" for s in self.stages(name)}
            before = self._before(name, seed)
            path = directory / "measured.jsonl"  # on its way, so that it can be interrupted
            found = list(Results.read(path).rows) if path.is_file() else []
            for stop in _stops(arm):
                if stop in {row.step for row in found}:
                    continue
                part = replace(config, seed=seed, steps=stop)
                again = (directory / "checkpoints").is_dir()
                directory.mkdir(parents=True, exist_ok=True)
                state = train(
                    part, directory, resume=again, stages=stages, stage=f"{name}/{seed}",
                    phases=phases,
                )  # fmt: skip
                if int(state.step) != stop:
                    raise ConfigError(
                        f"{directory} is at step {int(state.step)}, and was not measured at step "
                        f"{stop}; delete that folder to train it again"
                    )
                params = {key: learner.params for key, learner in state.learners.items()}
                curves = _logged(directory / "metrics.jsonl")
                whole = replace(part, steps=config.steps)
                trained = Trained(name, seed, stop, whole, params, before, curves)
                found += _rows(name, seed, stop, self._measure(arm)(trained))
                Results(found).write(path)
            rows += found
            self.progress.at(config.steps * (number + 1), config.steps * len(seeds))
        return rows

    def _measure(self, arm):
        return self.study.measure if arm.measure is None else arm.measure

    def _stacked(self, name: str, seeds) -> dict[str, Params]:
        """A finished part's weights, seeds stacked in front."""
        each = [self._weights(name, seed) for seed in seeds]
        return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *each)

    def _before(self, name, seed):
        return {
            stage: jax.tree.map(jnp.asarray, self._weights(stage, seed))
            for stage in self.stages(name)
        }

    def _weights(self, name: str, seed: int) -> dict[str, Params]:
        run = self.study.bases.get(name) or self.study.arms[name].run
        if not isinstance(run, Config):
            return {}
        directory, found = self.folder(name) / f"seed{seed}", {}
        for learner in run.learners:
            path = directory / f"{learner}.safetensors"
            stored = path.is_file()
            found[learner] = weights.load(path) if stored else restore_params(directory, learner)
        return found


def starts(run: Any) -> list[str]:
    """The stages that a run's weights start from."""
    if not isinstance(run, Config):
        return []
    given = [learner.start for learner in run.learners.values()]
    given += [frozen.start for frozen in run.frozen.values()]
    return list(dict.fromkeys(s.stage for s in given if s is not None and s.stage is not None))


def _stops(arm: Arm) -> list[int]:
    """The steps after which an arm is measured."""
    return sorted({*(step for step in arm.at if step <= arm.run.steps), arm.run.steps})


def _nothing(trained: Trained) -> dict[str, float]:
    return {}


def _at(tree: Any, i: int) -> Any:
    """One seed of stacked trees."""
    return jax.tree.map(lambda x: x[i], tree)


def _joined(curves: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in curves for name in part)
    return {name: np.concatenate([part[name] for part in curves], axis=1) for name in names}


def _logged(path: Path) -> dict[str, np.ndarray]:
    """Metrics of a run's metrics.jsonl as arrays; nan where a step logged none."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "wall"))
    return {n: np.array([line.get(n, np.nan) for line in lines], np.float64) for n in names}


def _rows(name: str, seed: int, step: int, found: Mapping[str, Any]) -> list[Row]:
    """Measured numbers as rows; an array [k] becomes metric/0 … metric/k−1."""
    rows = []
    for metric, value in found.items():
        value = np.asarray(value, np.float64)
        if value.ndim > 1:
            raise ConfigError(
                f"the measure of arm {name!r} returned {metric!r} with shape {value.shape}; a "
                "metric is a number, or [k]"
            )
        if value.ndim == 0:
            rows.append(Row(name, seed, step, metric, float(value)))
        else:
            rows += [Row(name, seed, step, f"{metric}/{i}", float(x)) for i, x in enumerate(value)]
    return rows


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    os.replace(part, path)
