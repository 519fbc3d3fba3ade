"""Models as directories of Hugging Face: whole, in shards, or an adapter alone in PEFT's format."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from rlhf_jax.models import weights
from rlhf_jax.models.families import FAMILIES, HARMLESS, Family, FamilyError, says, write
from rlhf_jax.models.pretrained import INDEX, PretrainedError, config, entries
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Params

TOKENS = (  # what belongs to the text side of a model, copied as it is
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


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
    if origin is not None and Path(origin).expanduser().resolve() == out.resolve():
        raise PretrainedError(f"{out} is the model that this one came from; choose another")
    dtype = dtype or given.get("dtype") or given.get("torch_dtype") or "float32"
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    made = {k: v for k, v in made.items() if k != "torch_dtype"} | {"dtype": dtype}
    family = FAMILIES[made["model_type"]]
    flat = weights.flat(params)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_shards(out, _tensors(family, model, flat, stored), shard_bytes)
        (out / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        for name in TOKENS if origin is not None else ():
            if (file := Path(origin).expanduser() / name).is_file():
                shutil.copyfile(file, out / name)
    except OSError as error:
        raise PretrainedError(f"cannot write to {out}: {error.strerror}") from error
    return out


def export_adapter(
    out: str | Path, model: Transformer, params: Params, *, origin: str | Path | None = None
) -> Path:
    """Write the terms of low rank alone, as PEFT reads them beside the base model in `origin`.

    Raises:
        PretrainedError: if the model has none, its family holds query, key and value in one matrix
            (which PEFT would give one term), or the disk refuses.
    """
    out, given = Path(out).expanduser(), {} if origin is None else config(origin)
    if model.lora is None:
        raise PretrainedError("the model has no adapter: it was trained whole; export it whole")
    try:
        kind = (given or write(model))["model_type"]
    except FamilyError as error:
        raise PretrainedError(str(error)) from error
    flat, found, targets = weights.flat(params), {}, set()
    for entry, names in entries(FAMILIES[kind], model.layers):
        stems = [name.removesuffix("kernel") for name in names if name.endswith("/kernel")]
        terms = [
            (_part(flat, s + "lora_a", model), _part(flat, s + "lora_b", model)) for s in stems
        ]
        if all(down is None for down, _ in terms):
            continue
        if len(terms) > 1:
            raise PretrainedError(
                f"{kind} holds query, key and value in one matrix, of which PEFT would want one "
                "term: export the model whole, or train with lora.on='out|up|down'"
            )
        path = entry.tensor.removesuffix(".weight")
        down, up = terms[0]
        for name, x in (("lora_A", down), ("lora_B", up)):
            found[f"base_model.model.{path}.{name}.weight"] = np.ascontiguousarray(x.T)
        targets.add(path.rsplit(".", 1)[-1])
    made = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if origin is None else str(origin),
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": kind == "gpt2",
        "target_modules": sorted(targets),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(found, str(out / "adapter_model.safetensors"), metadata={"format": "pt"})
        text = json.dumps(made, indent=2) + "\n"
        (out / "adapter_config.json").write_text(text, encoding="utf-8")
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


def _part(flat: Mapping[str, Any], name: str, model: Transformer) -> np.ndarray | None:
    """One of our arrays on the host, of scanned layers too; None if there is none."""
    layer = re.match(r"layers_(\d+)/", name)
    if model.scan and layer:
        stacked = flat.get(re.sub(r"^layers_\d+/", "layers/", name))
        return None if stacked is None else _host(stacked[int(layer[1])])
    return None if name not in flat else _host(flat[name])


def _whole(flat: Mapping[str, Any], name: str, model: Transformer) -> np.ndarray | None:
    """The same with its term of low rank."""
    found, stem = _part(flat, name, model), name.removesuffix("kernel")
    if found is None or model.lora is None or stem == name:
        return found
    down, up = _part(flat, f"{stem}lora_a", model), _part(flat, f"{stem}lora_b", model)
    if down is None:
        return found
    return found + np.float32(model.lora.alpha / model.lora.rank) * (down @ up)


def _tensors(family: Family, model: Transformer, flat, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a file, in its order."""
    for entry, names in entries(family, model.layers):
        if entry.tensor == "lm_head.weight" and model.tied:
            continue
        parts = [_whole(flat, name, model) for name in names]
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


def write_shards(out: Path, tensors: Iterator[tuple[str, np.ndarray]], limit: int) -> None:
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
