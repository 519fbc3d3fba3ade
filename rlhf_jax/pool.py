"""Batches that outlive their step: a pool of all that was made, drawn from again and again.

A pool is host memory beside a run's directory: the rows of step s are in `pools/<name>/<s>.npz`, so
a run that resumes at a step has what it had there, bit for bit, and forgets what came later.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def uniformly(rows: Any, rng: np.random.Generator, n: int) -> Any:
    """N rows of a batch, each at most once if there are that many."""
    have = len(rows.tokens)
    chosen = rng.choice(have, n, replace=have < n)
    return jax.tree.map(lambda x: x[chosen], rows)


def by_quantile(rows: Any, rng: np.random.Generator, n: int, *, parts: int) -> Any:
    """The same, with each score replaced by the part of the whole pool that it is in: 0 is worst.

    Part k holds texts with a share of k/parts to (k + 1)/parts of the pool below them, so texts of
    equal score are in one part. The pool is quantised anew at every draw (Quark: Lu et al. 2022,
    §2): `condition(edges=(0.5, 1.5, …), tags=…)` then turns parts into control tokens.
    """
    below = np.searchsorted(np.sort(rows.score), rows.score, side="left") / len(rows.score)
    part = np.minimum(np.floor(below * parts), parts - 1).astype(np.float32)
    return uniformly(rows.replace(score=part), rng, n)


@dataclass(frozen=True)
class Pool:
    """What a derived batch becomes: `rows` of the newest `size` rows that were ever made."""

    rows: int
    size: int = 100_000
    draw: Callable = uniformly  # all rows (numpy), random generator, number -> batch


class Kept:
    """The rows of one pool, on disk and in memory."""

    def __init__(self, path: Path, pool: Pool, start: int):
        self.path, self.pool = path, pool
        path.mkdir(parents=True, exist_ok=True)
        files = {int(file.stem): file for file in path.glob("*.npz")}
        for step in [step for step in files if step >= start]:
            later = files.pop(step)  # written after the checkpoint that is resumed from
            if jax.process_index() == 0:
                later.unlink()
        self.parts = []
        for step in sorted(files):
            with np.load(files[step]) as found:
                self.parts.append(dict(found))

    def add_and_draw(self, step: int, batch: Any, key: jax.Array) -> Any:
        """Keep the rows of this step; a batch of `pool.rows` of all that are kept."""
        names = [field.name for field in dataclasses.fields(batch)]
        batch = multihost_utils.process_allgather(batch, tiled=True)  # every process has all rows
        made = {name: np.asarray(getattr(batch, name)) for name in names}
        if jax.process_index() == 0:
            self._write(step, made)
        self.parts.append(made)
        together = {name: np.concatenate([x[name] for x in self.parts]) for name in names}
        newest = {name: x[-self.pool.size :] for name, x in together.items()}
        self.parts = [newest]
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        return self.pool.draw(type(batch)(**newest), rng, self.pool.rows)

    def _write(self, step, made):
        """Whole or not at all: no checkpoint is newer than the pool that it goes with."""
        unfinished = self.path / f"{step}.tmp"
        with unfinished.open("wb") as file:
            np.savez(file, **made)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path / f"{step}.npz")
