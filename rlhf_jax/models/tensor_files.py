"""The safetensors files of a directory, which are read where they are indexed."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"


class PretrainedError(ValueError):
    """A directory that does not hold a whole model; the message says what is wrong where."""


@contextmanager
def _opened(file: Path):
    try:
        with safe_open(file, framework="numpy") as found:
            yield found
    except (SafetensorError, OSError) as error:
        raise PretrainedError(
            f"{file} is not a complete .safetensors file ({error}); download it again"
        ) from error


@dataclass(frozen=True)
class Tensor:
    """One of a file: `tensor[index]` reads that part.

    The file is open while it is read, and no longer: what is mapped counts as memory.
    """

    file: Path
    name: str
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]

    def __getitem__(self, index) -> np.ndarray:
        with _opened(self.file) as found:
            return np.asarray(found.get_slice(self.name)[index])


class Files:
    """Tensors of a directory's safetensors files; what they are is read once, they when asked."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._known: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def where(self) -> dict[str, str]:
        """The file of every tensor."""
        index = self.path / INDEX
        if index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise PretrainedError(
                    f"{index} is not a safetensors index: {error!r}; download it again"
                ) from error
            if missing := sorted({f for f in found.values() if not (self.path / f).is_file()}):
                raise PretrainedError(
                    f"{index} names files that are not there: {', '.join(missing)}; download the "
                    "rest of the model"
                )
            return found
        names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(names) != 1:
            raise PretrainedError(
                f"{self.path} holds {len(names)} .safetensors files and no {INDEX}: "
                + (
                    "one file or an index is needed"
                    if names
                    else "weights in another format? transformers' save_pretrained writes these"
                )
            )
        return dict.fromkeys(self._tensors(names[0]), names[0])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if name not in self._known:
            file = self.path / name
            with _opened(file) as found:
                slices = {key: found.get_slice(key) for key in found.keys()}  # noqa: SIM118
                self._known[name] = {
                    key: Tensor(file, key, one.get_dtype(), tuple(one.get_shape()))
                    for key, one in slices.items()
                }
        return self._known[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor that is read where it is indexed."""
        if (found := self._tensors(self.where[name]).get(name)) is None:
            raise PretrainedError(
                f"{self.path / self.where[name]} has no tensor {name!r}, which {INDEX} says it has"
            )
        return found
