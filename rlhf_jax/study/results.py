"""What a study measured: one row per arm, seed, step and metric, in results.jsonl."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers


class ResultsError(ValueError):
    """Results that are not there or not what a study writes; the message says what there is."""


class NotRun(ResultsError):
    """An arm without a single row."""

    def __init__(self, arm: str, there: Sequence[str]):
        super().__init__(f"arm {arm!r} was not run; there is {listed(there) or 'none'}")
        self.arm = arm


@dataclass(frozen=True)
class Row:
    """One number."""

    arm: str
    seed: int
    step: int
    metric: str
    value: float


class Results:
    """Rows, by arm and metric. Arrays are ordered by seed, the same seeds in every arm: paired."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows = tuple(rows)
        self._found: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
        for row in self.rows:
            steps = self._found.setdefault(row.arm, {}).setdefault(row.metric, {})
            seeds = steps.setdefault(row.step, {})
            if row.seed in seeds:
                raise ResultsError(
                    f"two rows for {row.metric!r} of arm {row.arm!r}, seed {row.seed}, step "
                    f"{row.step}: results of different runs in one file?"
                )
            seeds[row.seed] = float(row.value)

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Rows of a results.jsonl."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ResultsError(f"cannot read {path}: {error.strerror}") from error
        return cls(_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line)

    def write(self, path: str | Path) -> None:
        """One JSON object per row; nan and ±inf as strings. The file appears whole or not at all.

        Raises:
            ResultsError: if it cannot be written.
        """
        path = Path(path)
        part = path.with_name(path.name + ".part")
        lines = (
            json.dumps({**asdict(row), "value": _json(row.value)}, ensure_ascii=False) + "\n"
            for row in self.rows
        )
        try:
            part.write_text("".join(lines), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise ResultsError(f"cannot write {path}: {error.strerror}") from error

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that were run, in order of their rows."""
        return tuple(self._found)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, ascending; all arms must have the same ones."""
        of = {arm: self._seeds(arm) for arm in self._found}
        if len(set(of.values())) > 1:
            each = "; ".join(f"{arm!r} has {listed(seeds)}" for arm, seeds in of.items())
            raise ResultsError(f"seeds are paired over arms, but {each}: run what is missing")
        return next(iter(of.values()), ())

    def metrics(self, arm: str) -> tuple[str, ...]:
        """Metrics of an arm, at any step."""
        return tuple(self._arm(arm))

    def steps(self, arm: str, metric: str | None = None) -> tuple[int, ...]:
        """Steps after which an arm, or one metric of it, was measured, ascending."""
        metrics = [metric] if metric is not None else self.metrics(arm)
        return tuple(sorted({step for m in metrics for step in self._metric(m, arm)}))

    def values(self, metric: str, arm: str, step: int | None = None) -> np.ndarray:
        """[seeds] after `step`, or after the arm's last step."""
        steps = self._metric(metric, arm)
        step = self.steps(arm)[-1] if step is None else step
        if step not in steps:
            raise ResultsError(
                f"arm {arm!r} has no {metric!r} at step {step}; it is there at "
                f"{listed(sorted(steps))}"
            )
        missing = [seed for seed in self.seeds if seed not in steps[step]]
        if missing:
            raise ResultsError(
                f"{metric!r} of arm {arm!r} at step {step} is missing for seeds {listed(missing)}"
            )
        return np.array([steps[step][seed] for seed in self.seeds], np.float64)

    def curve(self, metric: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps at which a metric was measured, and its values [seeds, steps]."""
        steps = self.steps(arm, metric)
        return np.array(steps), np.stack([self.values(metric, arm, step) for step in steps], axis=1)

    def when(self, metric: str, arm: str, *, by: str, level: float | np.ndarray) -> np.ndarray:
        """[seeds], a metric where another one first rises to a level; linear between steps.

        So arms are compared at equal reward, or equal KL, and not at the end of each. `level` is
        one number, or one per seed; where it is never reached: the metric when that came closest.
        """
        _, x = self.curve(by, arm)
        _, y = self.curve(metric, arm)
        found = []
        for a, b, goal in zip(x, y, np.broadcast_to(level, len(x)), strict=True):
            there = np.flatnonzero((a[:-1] < goal) & (a[1:] >= goal))
            if len(there):
                i = there[0]
                found.append(np.interp(goal, a[i : i + 2], b[i : i + 2]))
            else:
                found.append(b[np.abs(a - goal).argmin()])
        return np.array(found)

    def vector(self, prefix: str, arm: str, step: int | None = None) -> np.ndarray:
        """[seeds, k] of the metrics prefix/0 … prefix/k−1."""
        ends = [
            m.removeprefix(f"{prefix}/") for m in self.metrics(arm) if m.startswith(f"{prefix}/")
        ]
        k = sum(end.isdigit() for end in ends)
        if not k:
            raise ResultsError(
                f"arm {arm!r} has no {prefix + '/0'!r}; its metrics are {listed(self.metrics(arm))}"
            )
        return np.stack([self.values(f"{prefix}/{i}", arm, step) for i in range(k)], axis=1)

    def _arm(self, arm: str) -> dict[str, dict[int, dict[int, float]]]:
        if arm not in self._found:
            raise NotRun(arm, self.arms)
        return self._found[arm]

    def _metric(self, metric: str, arm: str) -> dict[int, dict[int, float]]:
        found = self._arm(arm)
        if metric not in found:
            raise ResultsError(f"arm {arm!r} has no metric {metric!r}; it has {listed(found)}")
        return found[metric]

    def _seeds(self, arm: str) -> tuple[int, ...]:
        found = (seeds for steps in self._found[arm].values() for seeds in steps.values())
        return tuple(sorted(set().union(*found)))


def _row(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{where} is not valid JSON ({error}); mend it or remove it") from error
    kinds = {"arm": str, "seed": int, "step": int, "metric": str, "value": int | float | str}
    right = isinstance(found, dict) and found.keys() == kinds.keys()
    if not right or not all(isinstance(found[k], kind) for k, kind in kinds.items()):
        raise ResultsError(f"{where} must be an object of {listed(kinds)}, not {line.strip()}")
    if isinstance(found["value"], str) and found["value"] not in NOT_FINITE:
        raise ResultsError(
            f"{where}: value {found['value']!r} must be a number or one of {listed(NOT_FINITE)}"
        )
    value = found["value"]
    return Row(**{**found, "value": NOT_FINITE[value] if isinstance(value, str) else float(value)})


def _json(value: float) -> float | str:
    """`value` as a JSON number, or the name of what is none."""
    return float(value) if math.isfinite(value) else str(float(value))


def listed(names: Iterable[object]) -> str:
    """Names for a message."""
    return ", ".join(map(str, names))
