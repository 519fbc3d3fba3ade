"""Weights as files: a parameter tree in one .safetensors file; filling one tree from another."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_jax.sharding import path_name
from rlhf_jax.types import Params

HEADS = ("value_head", "head")  # what a model may have and the one it starts from may lack


def save(path: str | Path, params: Params, *, dtype: str | None = None) -> None:
    """Write a parameter tree; names are its paths. `dtype="bfloat16"` halves the file."""
    leaves = {
        path_name(where): np.asarray(jax.device_get(x), dtype=dtype)
        for where, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
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
        flat = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete .safetensors file: {error}") from error
    tree: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def fill(target: Params, source: Params, *, origin: str) -> Params:
    """`target` with the leaves of `source`, in the target's dtypes and shardings.

    Heads may be missing on either side: a critic starts from a policy with a fresh value head.

    Raises:
        ValueError: listing every other leaf that is missing, extra or of another shape.
    """

    def by_name(tree):
        return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    wanted, given = by_name(target), by_name(source)

    def optional(name):
        return name.split("/")[0] in HEADS

    wrong = [f"missing: {n} {x.shape}" for n, x in wanted.items() if n not in given]
    wrong = [line for line in wrong if not optional(line.split()[1])]
    wrong += [f"extra: {n} {given[n].shape}" for n in given if n not in wanted and not optional(n)]
    wrong += [
        f"shape: {n} is {given[n].shape}, the model wants {x.shape}"
        for n, x in wanted.items()
        if n in given and given[n].shape != x.shape
    ]
    if wrong:
        raise ValueError(f"the weights of {origin} do not fit the model:\n  " + "\n  ".join(wrong))

    def one(path, leaf):
        found = given.get(path_name(path))
        if found is None:
            return leaf
        if isinstance(found, jax.Array):
            # A copy, so that two trees never share a buffer that one of them donates.
            return jax.device_put(found.astype(leaf.dtype), leaf.sharding, may_alias=False)
        return jax.device_put(np.asarray(found).astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, target)
