"""Weights as files: a parameter tree in one .safetensors file; filling one tree from another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_jax.sharding import path_name
from rlhf_jax.types import Params

HEADS = ("value_head", "head")  # what a model may have and the one it starts from may lack


def save(path: str | Path, params: Params, *, dtype: str | None = None) -> None:
    """Write a parameter tree; names are its paths. `dtype="bfloat16"` halves the file."""
    leaves = {name: np.asarray(jax.device_get(x), dtype) for name, x in flat(params).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(leaves, str(path), metadata={"format": "rlhf_jax"})


def load(path: str | Path) -> Params:
    """Read what `save` wrote, as nested dicts of numpy arrays.

    Raises:
        ValueError: if there is no such file, or it is not a whole safetensors file.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        return nested(load_file(str(path)))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete .safetensors file: {error}") from error


def flat(params: Params) -> dict[str, Any]:
    """Leaves by their paths, such as `layers_0/query/kernel`."""
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def nested(leaves: Mapping[str, Any]) -> Params:
    """The tree of leaves by their paths."""
    tree: Params = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def trained(params: Params, paths: str) -> Params:
    """The part of a tree whose paths the regular expression `paths` finds."""
    return nested({name: x for name, x in flat(params).items() if re.search(paths, name)})


def merged(base: Params, own: Params) -> Params:
    """`base` with the leaves of `own` in their places, or beside it: no copy, the same buffers."""
    found = dict(base)
    for name, x in own.items():
        both = isinstance(x, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], x) if both else x
    return found


def in_dtype(params: Params, dtype: str) -> Params:
    """Matrices in the dtype that they are multiplied in, where that is smaller than their own.

    A model makes the same of them at every use; its norms and its value head are float32 at heart.
    """

    def one(path, x):
        name, small = path_name(path), jnp.dtype(dtype)
        matrix = re.search(r"/(kernel|embedding|lora_[ab])$", name) and "value_head" not in name
        return x.astype(small) if matrix and small.itemsize < x.dtype.itemsize else x

    return jax.tree_util.tree_map_with_path(one, params)


def check_fits(target: Params, source: Params, *, origin: str) -> None:
    """Compare two trees by paths and shapes; heads and terms of low rank may be missing in either.

    Raises:
        ValueError: listing every other leaf that is missing, extra or of another shape.
    """
    wanted, given = flat(target), flat(source)

    def optional(name, *, unless=()):  # part of a head that is there is not
        head = name.split("/")[0]
        return (head in HEADS and head not in unless) or "/lora_" in name

    missing = [n for n in wanted if n not in given and not optional(n)]
    extra = [n for n in given if n not in wanted and not optional(n, unless=target)]
    wrong = [f"missing: {n} {wanted[n].shape}" for n in missing]
    wrong += [f"extra: {n} {given[n].shape}" for n in extra]
    wrong += [
        f"shape: {n} is {given[n].shape}, the model wants {x.shape}"
        for n, x in wanted.items()
        if n in given and given[n].shape != x.shape
    ]
    if wrong:
        raise ValueError(f"the weights of {origin} do not fit the model:\n  " + "\n  ".join(wrong))


def fill(target: Params, source: Params, *, origin: str) -> Params:
    """`target` with the leaves of `source`, in the target's dtypes and shardings.

    A leaf that only the target has stays what it is: a critic starts from a policy with a fresh
    value head. The target's leaves may be shapes with shardings, and a source may hold anything
    that is indexed like an array: each device reads its own part.

    Raises:
        ValueError: if they do not fit.
    """
    check_fits(target, source, origin=origin)
    given = flat(source)

    def one(path, leaf):
        found = given.get(path_name(path))
        if found is None:
            return leaf
        if isinstance(found, jax.Array):
            # A copy, so that two trees never share a buffer that one of them donates.
            return jax.device_put(found.astype(leaf.dtype), leaf.sharding, may_alias=False)
        return jax.make_array_from_callback(  # every device reads its own part
            leaf.shape, leaf.sharding, lambda index: np.asarray(found[index]).astype(leaf.dtype)
        )

    return jax.tree_util.tree_map_with_path(one, target)
