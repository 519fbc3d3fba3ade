"""A hash of all that decides a run's weights: numbers, files of functions, what it starts from."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

CORE = (
    "step", "score", "rollout", "phases", "start", "masked", "optimizer", "data.drawn",
    "models.blocks", "models.attention",
)  # fmt: skip
# How a run is cut up, shown and kept changes no weight.
FREE = {"Config": ("name", "seed", "mesh", "checkpoint", "evaluation"), "Rollouts": ("show",)}


def digest(run: Any, stages: Mapping[str, str], *, together: bool) -> str:
    """Sixteen hexadecimal digits; `stages` holds those of what the run starts from.

    A function counts with the whole file it stands in, so that a change of a helper or a constant
    beside it counts too: a base is trained again rather than once too little.
    """
    found = hashlib.sha256()
    found.update(f"{jax.__version__} {together} {sorted(stages.items())}".encode())
    files: set[str] = {f"rlhf_jax.{name}" for name in CORE}
    _add(run, found, files)
    for name in sorted(files):
        found.update(f"{name} {_file_hash(name)}".encode())
    return found.hexdigest()[:16]


def _add(value: Any, found, files: set[str]) -> None:
    """Everything in a value that can matter, into the hash; modules of functions into `files`."""
    kind = type(value)
    found.update(f"<{kind.__qualname__}>".encode())
    if isinstance(value, partial):
        for part in (value.func, value.args, value.keywords):
            _add(part, found, files)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        files.add(kind.__module__)
        for field in dataclasses.fields(value):
            if field.name not in FREE.get(kind.__name__, ()):
                found.update(field.name.encode())
                _add(getattr(value, field.name), found, files)
    elif isinstance(value, Mapping):
        for key in value:
            found.update(str(key).encode())
            _add(value[key], found, files)
    elif isinstance(value, tuple | list):
        for part in value:
            _add(part, found, files)
    elif isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif hasattr(value, "__wrapped__"):  # jax.jit, functools.wraps
        _add(value.__wrapped__, found, files)
    elif inspect.isfunction(value) or inspect.isclass(value) or inspect.ismethod(value):
        files.add(value.__module__)
        found.update(value.__qualname__.encode())
        if inspect.ismethod(value):
            _add(value.__self__, found, files)
        for cell in getattr(value, "__closure__", None) or ():
            _add(cell.cell_contents, found, files)
    elif kind.__repr__ is object.__repr__:  # an address says nothing
        files.add(kind.__module__)
        _add(vars(value) if hasattr(value, "__dict__") else None, found, files)
    else:
        found.update(repr(value).encode())


def _file_hash(module: str) -> str:
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None and module.startswith("rlhf_jax."):
        path = str(
            Path(__file__).parent.parent / (module.split(".", 1)[1].replace(".", "/") + ".py")
        )
    return "" if path is None else _of_file(path, Path(path).stat().st_mtime_ns)


@lru_cache
def _of_file(path: str, changed: int) -> str:
    del changed
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
