"""Models as directories of Hugging Face: whole, in shards, or an adapter alone in PEFT's format."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from rlhf_jax.models import weights
from rlhf_jax.models.families import (
    FAMILIES,
    HARMLESS,
    Family,
    FamilyError,
    Names,
    headed,
    says,
    scores,
    write,
)
from rlhf_jax.models.families.fields import SCORE
from rlhf_jax.models.pretrained import INDEX, PretrainedError, config, entries
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Params

# Leaves by their paths, those of the given paths that there are.
Read = Callable[[Collection[str]], Mapping[str, Any]]
TOKENS = (  # what belongs to the text side of a model, copied as it is
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def export(
    out: str | Path,
    model: Transformer,
    params: Params | Read,
    *,
    origin: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 2 * 2**30,
) -> Path:
    """Write a model as transformers reads it: config.json, shards with their index, tokenizer.

    `params` is a tree of arrays, or reads some of its leaves when asked. One tensor at a time is
    gathered, so that a model larger than the host's memory can be written; a shard of `shard_bytes`
    is. Of several processes, all of which call this, the first writes. `origin`, a directory of
    Hugging Face, gives the family, what its config.json says beside the numbers, the tokenizer, and
    the dtype if `dtype` is None. Terms of low rank are added to their matrices. A model with a
    value head alone is a reward model of transformers (*ForSequenceClassification, one label);
    beside a head of the next token a value head stays out: transformers has no such model.

    Raises:
        PretrainedError: if no family computes this model, its value head has a bias, or the disk
            refuses.
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
    made, read = headed(made, model), _reader(params)
    if scores(model) and (bias := read(["value_head/bias"])):
        _check_bias(_host(bias["value_head/bias"]))
    tensors = _tensors(FAMILIES[made["model_type"]], model, read, stored)
    if jax.process_index() != 0:
        for _ in tensors:  # each takes part in gathering
            pass
        return _written(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_shards(out, tensors, shard_bytes)
        (out / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        for name in TOKENS if origin is not None else ():
            if (file := Path(origin).expanduser() / name).is_file():
                shutil.copyfile(file, out / name)
    except OSError as error:
        raise PretrainedError(f"cannot write to {out}: {error.strerror}") from error
    return _written(out)


def export_adapter(
    out: str | Path, model: Transformer, params: Params | Read, *, origin: str | Path | None = None
) -> Path:
    """Write the terms of low rank alone, as PEFT reads them beside the base model in `origin`.

    Raises:
        PretrainedError: if the model has none, is a reward model, its family holds query, key and
            value in one matrix (which PEFT would give one term), or the disk refuses.
    """
    out, given = Path(out).expanduser(), {} if origin is None else config(origin)
    if model.lora is None:
        raise PretrainedError("the model has no adapter: it was trained whole; export it whole")
    if scores(model):
        raise PretrainedError("the head of a reward model is no adapter: export the model whole")
    try:
        kind = (given or write(model))["model_type"]
    except FamilyError as error:
        raise PretrainedError(str(error)) from error
    found, targets = {}, set()
    for entry, names, leaves in _groups(FAMILIES[kind], model, _reader(params)):
        pairs = [_terms(name, model) for name in names]
        terms = [[_part(leaves, term, model) for term in pair] for pair in pairs if pair]
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
    if jax.process_index() != 0:
        return _written(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(found, str(out / "adapter_model.safetensors"), metadata={"format": "pt"})
        text = json.dumps(made, indent=2) + "\n"
        (out / "adapter_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise PretrainedError(f"cannot write to {out}: {error.strerror}") from error
    return _written(out)


def _written(out: Path) -> Path:
    """Where all processes go on once the first has written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("written")  # a path may be another on each host
    return out


def _check_bias(bias: np.ndarray) -> None:
    if bias.any():
        raise PretrainedError(
            f"the value head has the bias {float(bias[0]):.3g}, and a reward model of transformers "
            "has none: train one with replace(model, value_bias=False)"
        )


def _made(model: Transformer, given: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a model that is not quite the one it came from."""
    kept = {name: x for name, x in given.items() if name in HARMLESS}
    return kept | write(model, given.get("model_type"))


def _reader(params: Params | Read) -> Read:
    if callable(params):
        return params
    flat = weights.flat(params)
    return lambda names: {name: flat[name] for name in names if name in flat}


def _host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this process's host."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _stored(name: str, model: Transformer) -> str:
    """The path of an array as the model has it: scanned layers are one."""
    return re.sub(r"^layers_\d+/", "layers/", name) if model.scan else name


def _terms(name: str, model: Transformer) -> list[str]:
    """The paths of a matrix's terms of low rank, if it may have some."""
    stem = name.removesuffix("/kernel")
    low = model.lora is not None and stem != name
    return [f"{stem}/lora_a", f"{stem}/lora_b"] if low else []


def _part(found: Mapping[str, Any], name: str, model: Transformer) -> np.ndarray | None:
    """One of our arrays on the host, of scanned layers too; None if there is none."""
    x, layer = found.get(_stored(name, model)), re.match(r"layers_(\d+)/", name)
    if x is None:
        return None
    if model.scan and layer:
        return _host(x[int(layer[1])])
    # A copy: an array keeps what it once brought to the host, and these may be the user's own.
    return _host(jnp.copy(x) if isinstance(x, jax.Array) else x)


def _whole(found: Mapping[str, Any], name: str, model: Transformer) -> np.ndarray:
    """The same with its term of low rank."""
    x = _part(found, name, model)
    terms = [_part(found, term, model) for term in _terms(name, model)]
    if not terms or terms[0] is None:
        return x
    return x + np.float32(model.lora.alpha / model.lora.rank) * (terms[0] @ terms[1])


def _groups(family: Family, model: Transformer, read: Read) -> Iterator[tuple[Names, tuple, dict]]:
    """Tensors of a file, the leaves of ours that they hold, and the arrays of these leaves.

    What is one tensor of every layer is read at once, and is all that is held at a time.
    """
    for kind in family.names:
        these = list(entries(replace(family, names=(kind,)), model.layers))
        leaves = [leaf for _, names in these for leaf in names]
        leaves += [term for leaf in leaves for term in _terms(leaf, model)]
        found = read({_stored(leaf, model) for leaf in leaves})
        for entry, names in these:
            yield entry, names, found


def _tensors(
    family: Family, model: Transformer, read: Read, dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a file, in its order."""
    shapes = weights.flat(jax.eval_shape(model.init, jax.random.key(0)))
    for entry, names, found in _groups(family, model, read):
        own = [_stored(name, model) for name in names]
        if own[0] not in shapes or (own[0] == SCORE.leaves[0] and not scores(model)):
            continue
        own += [term for name in own for term in _terms(name, model) if term in shapes]
        if wrong := [n for n in own if n not in found or found[n].shape != shapes[n].shape]:
            raise PretrainedError(
                f"the weights are not those of the model, which wants {wrong[0]} "
                f"{shapes[wrong[0]].shape}; was the experiment changed since they were trained?"
            )
        parts = [_whole(found, name, model) for name in names]
        if entry.layout == "transposed":
            made = parts[0].T
        elif entry.layout == "columns":
            made = np.concatenate(parts, axis=-1)
        elif entry.layout == "interleaved":
            heads = [p.T.reshape(model.heads, 1, model.size_of_head, -1) for p in parts]
            made = np.concatenate(heads, axis=1).reshape(3 * parts[0].shape[-1], -1)
            made = made if parts[0].ndim == 2 else made[:, 0]
        else:
            made = parts[0]
        yield entry.tensor, np.ascontiguousarray(made.astype(dtype))


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
