"""Directories of Hugging Face: read slice by slice into sharded arrays, and written in shards.

model = pretrained.model("~/models/SmolLM2-135M")          # config.json
learner = Learner(model, ..., start=From(path="~/models/SmolLM2-135M"))
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.models import weights
from rlhf_jax.models.families import (
    BUFFERS,
    FAMILIES,
    HARMLESS,
    Family,
    FamilyError,
    Names,
    read,
    says,
    write,
)
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Params

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
TOKENS = (  # what belongs to the text side of a model, copied as it is
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


class PretrainedError(ValueError):
    """A directory that does not hold a whole model; the message says what is wrong where."""


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
        raise PretrainedError(f"{file} is not valid JSON: {error}") from error
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


class Files:
    """Tensors of a directory's safetensors files, opened when they are asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._open: dict[str, Any] = {}

    @cached_property
    def where(self) -> dict[str, str]:
        """The file of every tensor."""
        index = self.path / INDEX
        if index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise PretrainedError(f"{index} is not a safetensors index: {error!r}") from error
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
        return dict.fromkeys(self._file(names[0]).keys(), names[0])

    def _file(self, name: str):
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise PretrainedError(
                    f"{self.path / name} is not a complete .safetensors file ({error}); download it"
                    " again"
                ) from error
        return self._open[name]

    def tensor(self, name: str):
        """A tensor that is read where it is indexed."""
        try:
            return self._file(self.where[name]).get_slice(name)
        except SafetensorError as error:
            raise PretrainedError(
                f"{self.path / self.where[name]} has no tensor {name!r}, which {INDEX} says it has"
            ) from error


@dataclass(frozen=True)
class Leaf:
    """One of our arrays in a file: `leaf[index]` reads that part of it and no more."""

    tensor: Any  # of Files
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
        return np.asarray(self.tensor[tuple(slice(*b) for b in bounds)])


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
    for entry, names in _entries(family, model.layers):
        tensor = _present(entry.tensor, family, files.where)
        if tensor is None:
            continue
        known.add(tensor)
        found = files.tensor(tensor)
        shape = tuple(found.get_shape())
        if found.get_dtype() not in DTYPES:
            wrong.append(f"{tensor} is {found.get_dtype()}; valid: {', '.join(DTYPES)}")
            continue
        for part, leaf in enumerate(names):
            ours = _ours(shape, entry.layout, len(names))
            if ours is None:
                wrong.append(f"{tensor} {shape} does not divide into {len(names)}")
                continue
            flat[leaf] = Leaf(found, entry.layout, part, ours, model.size_of_head)
    if model.tied:
        flat.pop("head/kernel", None)  # the embedding once more
    extra = [n for n in files.where if n not in known and not re.search(BUFFERS, n)]
    wrong += [f"{name} is a tensor that this family does not have" for name in extra]
    shapes = jax.eval_shape(replace(model, scan=False).init, jax.random.key(0))
    wrong += _differences(shapes, flat, model)
    if wrong:
        raise PretrainedError(
            f"the weights in {files.path} are not those of its config.json:\n  "
            + "\n  ".join(wrong[:30])
            + (f"\n  and {len(wrong) - 30} more" if len(wrong) > 30 else "")
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


def _entries(family: Family, layers: int) -> Iterator[tuple[Names, tuple[str, ...]]]:
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


# -------------------------------------------------------------------------------------- writing


def export(
    out: str | Path,
    model: Transformer,
    params: Params,
    *,
    origin: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 4 * 2**30,
) -> Path:
    """Write a model as transformers reads it: config.json, shards with their index, tokenizer.

    One tensor at a time is gathered, so that a model larger than the host's memory can be written;
    a shard of `shard_bytes` is. `origin`, a directory of Hugging Face, gives the family, what its
    config.json says beside the numbers, the tokenizer, and the dtype if `dtype` is None. Terms of
    low rank are added to their matrices. A value head stays out: transformers has no such head.

    Raises:
        PretrainedError: if no family computes this model, or the disk refuses.
    """
    out, given = Path(out).expanduser(), {} if origin is None else config(origin)
    try:
        made = given if given and says(given, model) else _made(model, given)
    except FamilyError as error:
        raise PretrainedError(str(error)) from error
    dtype = dtype or given.get("dtype") or given.get("torch_dtype") or "float32"
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    made = {k: v for k, v in made.items() if k != "torch_dtype"} | {"dtype": dtype}
    family = FAMILIES[made["model_type"]]
    flat = weights.flat(params)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_shards(out, _tensors(family, model, flat, stored), shard_bytes)
        (out / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        for name in TOKENS if origin is not None else ():
            if (file := Path(origin).expanduser() / name).is_file():
                shutil.copyfile(file, out / name)
    except OSError as error:
        raise PretrainedError(f"cannot write to {out}: {error.strerror}") from error
    return out


def _made(model: Transformer, given: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a model that is not quite the one it came from."""
    kept = {name: x for name, x in given.items() if name in HARMLESS}
    return kept | write(model, given.get("model_type"))


def _host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this process's host."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _leaf(flat: Mapping[str, Any], name: str, model: Transformer) -> np.ndarray | None:
    """One of our arrays on the host, its term of low rank added."""
    layer = re.match(r"layers_(\d+)/", name)

    def one(name):
        if model.scan and layer:
            stacked = flat.get(re.sub(r"^layers_\d+/", "layers/", name))
            return None if stacked is None else _host(stacked[int(layer[1])])
        return None if name not in flat else _host(flat[name])

    found = one(name)
    if found is None or model.lora is None or not name.endswith("/kernel"):
        return found
    stem = name.removesuffix("kernel")
    down, up = one(f"{stem}lora_a"), one(f"{stem}lora_b")
    if down is None:
        return found
    return found + np.float32(model.lora.alpha / model.lora.rank) * (down @ up)


def _tensors(family: Family, model: Transformer, flat, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a file, in its order."""
    for entry, names in _entries(family, model.layers):
        if entry.tensor == "lm_head.weight" and model.tied:
            continue
        parts = [_leaf(flat, name, model) for name in names]
        if any(part is None for part in parts):
            continue
        if entry.layout == "transposed":
            found = parts[0].T
        elif entry.layout == "columns":
            found = np.concatenate(parts, axis=-1)
        elif entry.layout == "interleaved":
            heads = [p.T.reshape(model.heads, 1, model.size_of_head, -1) for p in parts]
            found = np.concatenate(heads, axis=1).reshape(3 * parts[0].shape[-1], -1)
            found = found if parts[0].ndim == 2 else found[:, 0]
        else:
            found = parts[0]
        yield entry.tensor, np.ascontiguousarray(found.astype(dtype))


def _write_shards(out: Path, tensors: Iterator[tuple[str, np.ndarray]], limit: int) -> None:
    """Files of at most `limit` bytes, or one tensor; an index if there are several."""
    shard: dict[str, np.ndarray] = {}
    files: list[dict[str, int]] = []

    def close():
        name = out / f"part-{len(files)}.safetensors"
        save_file(shard, str(name), metadata={"format": "pt"})
        files.append({name: x.nbytes for name, x in shard.items()})
        shard.clear()

    for name, x in tensors:
        if shard and sum(y.nbytes for y in shard.values()) + x.nbytes > limit:
            close()
        shard[name] = x
    close()
    for old in [*out.glob("model*.safetensors"), out / INDEX]:
        old.unlink(missing_ok=True)
    if len(files) == 1:
        (out / "part-0.safetensors").rename(out / "model.safetensors")
        return
    where = {}
    for i, found in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (out / f"part-{i}.safetensors").rename(out / final)
        where |= dict.fromkeys(found, final)
    total = sum(size for found in files for size in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
