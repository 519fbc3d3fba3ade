"""Directories of Hugging Face: read slice by slice into sharded arrays, and written in shards.

model = pretrained.model("~/models/SmolLM2-135M")          # config.json
learner = Learner(model, ..., start=From(path="~/models/SmolLM2-135M"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rlhf_jax.models import weights
from rlhf_jax.models.families import (
    BUFFERS,
    FAMILIES,
    Family,
    FamilyError,
    Names,
    read,
)
from rlhf_jax.models.tensor_files import INDEX as INDEX
from rlhf_jax.models.tensor_files import Files, PretrainedError, Tensor
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Params

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
}  # fmt: skip


def is_directory(path: str | Path) -> bool:
    """Whether there is a config.json of a model, and no run of ours."""
    path = Path(path).expanduser()
    return (path / "config.json").is_file() and not (path / "run.json").is_file()


def config(path: str | Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        PretrainedError: if there is none, or it is not JSON.
    """
    file = Path(path).expanduser() / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PretrainedError(
            f"cannot read {file}: {error.strerror}; a model's directory holds config.json, "
            "*.safetensors and tokenizer.json"
        ) from error
    except ValueError as error:
        raise PretrainedError(f"{file} is not valid JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise PretrainedError(f"{file} must hold an object, not {type(found).__name__}")
    return found


def model(path: str | Path, **changes: Any) -> Transformer:
    """The model of a directory's config.json; `changes` are fields of ours, such as `scan=True`.

    Raises:
        PretrainedError: if the file is missing, or says what is not computed here.
    """
    try:
        return replace(read(config(path))[1], **changes)
    except FamilyError as error:
        raise PretrainedError(f"{Path(path) / 'config.json'}: {error}") from error


# -------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Leaf:
    """One of our arrays in a file: `leaf[index]` reads that part of it and no more."""

    tensor: Tensor
    layout: str
    part: int  # which of the leaves that share the tensor
    shape: tuple[int, ...]
    head: int  # head_dim, of the interleaved layout

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    def __getitem__(self, index) -> np.ndarray:
        cut = [range(size)[i] for i, size in zip(_full(index, self.ndim), self.shape, strict=True)]
        *rows, out = ((r.start, r.stop) for r in cut)
        if self.layout == "transposed":
            return self._read(out, *rows).T
        if self.layout == "columns":
            at = self.part * self.shape[-1]
            return self._read(*rows, (at + out[0], at + out[1]))
        if self.layout == "interleaved":
            first, last = out[0] // self.head, -(-out[1] // self.head)
            block = self._read((first * 3 * self.head, last * 3 * self.head), *rows)
            block = block.reshape(last - first, 3, self.head, -1)[:, self.part]
            block = block.reshape((last - first) * self.head, -1)
            block = block[out[0] - first * self.head : out[1] - first * self.head]
            return block.T if rows else block[:, 0]
        return self._read(*rows, out)

    def _read(self, *bounds: tuple[int, int]) -> np.ndarray:
        return self.tensor[tuple(slice(*b) for b in bounds)]


@dataclass(frozen=True)
class Stack:
    """The same leaf of all layers, as scanned layers have it."""

    layers: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Layers first."""
        return (len(self.layers), *self.layers[0].shape)

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    def __getitem__(self, index) -> np.ndarray:
        first, *rest = _full(index, self.ndim)
        return np.stack([leaf[tuple(rest)] for leaf in self.layers[first]])


def _full(index, ndim: int) -> tuple[slice, ...]:
    index = index if isinstance(index, tuple) else (index,)
    return index + (slice(None),) * (ndim - len(index))


def load(path: str | Path, model: Transformer) -> Params:
    """The directory's weights as a tree of `Leaf`: nothing is read before it is indexed.

    Raises:
        PretrainedError: listing every tensor that is missing, unknown or of a shape that the
            config.json does not say.
    """
    files = Files(path)
    family = FAMILIES[read(config(path))[0]]
    flat, known, wrong = {}, set(), []
    for entry, names in entries(family, model.layers):
        tensor = _present(entry.tensor, family, files.where)
        if tensor is None:
            continue
        known.add(tensor)
        found = files.tensor(tensor)
        shape = found.shape
        if found.dtype not in DTYPES:
            wrong.append(f"{tensor} is {found.dtype}; valid: {', '.join(DTYPES)}")
            continue
        for part, leaf in enumerate(names):
            ours = _ours(shape, entry.layout, len(names))
            if ours is None:
                wrong.append(f"{tensor} {shape} does not divide into {len(names)}")
                continue
            flat[leaf] = Leaf(found, entry.layout, part, ours, model.size_of_head)
    if model.tied:
        flat.pop("head/kernel", None)  # the embedding once more
    if not model.value_head:
        flat.pop("value_head/kernel", None)  # a policy from a reward model
    extra = [n for n in files.where if n not in known and not re.search(BUFFERS, n)]
    wrong += [f"{name} is a tensor that this family does not have" for name in extra]
    shapes = jax.eval_shape(replace(model, scan=False).init, jax.random.key(0))
    wrong += _differences(shapes, flat, model)
    if wrong:
        raise PretrainedError(
            f"the weights in {files.path} are not those of its config.json:\n  "
            + "\n  ".join(wrong[:30])
            + (f"\n  and {len(wrong) - 30} more" if len(wrong) > 30 else "")
            + "\nis config.json of another model, or a file not whole? Download the directory again"
        )
    return weights.nested(_stacked(flat, model.layers) if model.scan else flat)


def _differences(shapes: Params, flat: Mapping[str, Leaf], model: Transformer) -> Iterator[str]:
    wanted = {name: x.shape for name, x in weights.flat(shapes).items()}
    own = {name for name in wanted if "lora_" in name or name.startswith("value_head/")}
    for name, shape in wanted.items():
        if name not in flat and name not in own:
            yield f"missing: {name} {shape}"
        elif name in flat and flat[name].shape != shape:
            yield f"{name} is {flat[name].shape}; config.json says {shape}"
    for name in flat:
        if name not in wanted and not (name == "head/kernel" and not model.lm_head):
            yield f"{name} {flat[name].shape} is in the file and not in the model"


def entries(family: Family, layers: int) -> Iterator[tuple[Names, tuple[str, ...]]]:
    """The family's table for so many layers."""
    for entry in family.names:
        for i in range(layers) if "{i}" in entry.tensor else [0]:
            leaves = tuple(leaf.format(i=i) for leaf in entry.leaves)
            yield replace(entry, tensor=entry.tensor.format(i=i)), leaves


def _present(name: str, family: Family, where: Mapping[str, str]) -> str | None:
    """The name that a tensor has in the files: those of the bare model lack the prefix."""
    short = name.removeprefix(family.prefix)
    return name if name in where else short if short in where else None


def _ours(shape: tuple[int, ...], layout: str, parts: int) -> tuple[int, ...] | None:
    if layout in ("transposed", "interleaved"):
        shape = shape[::-1]
    if shape[-1] % parts:
        return None
    return (*shape[:-1], shape[-1] // parts)


def _stacked(flat: Mapping[str, Leaf], layers: int) -> dict[str, Leaf | Stack]:
    found: dict[str, Leaf | Stack] = {}
    for name, leaf in flat.items():
        if name.startswith("layers_0/"):
            rest = name.removeprefix("layers_0/")
            all_of = tuple(flat[f"layers_{i}/{rest}"] for i in range(layers))
            found[f"layers/{rest}"] = Stack(all_of)
        elif not name.startswith("layers_"):
            found[name] = leaf
    return found
