"""One tree on disk: is it whole, is it the one that was saved, and does it fit?

Orbax notices a file that is cut short, but not a flipped bit; digests, taken on the device when a
tree is saved and again when it is read, notice both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32

from rlhf_jax.sharding import path_name

FROZEN = "frozen"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


def read(path: epath.Path, target: Any) -> Any:
    """The tree at a path, checked against its target before and its digests after."""
    with reading(path):
        saved = about(path)
        _check_fits(path, _stored(path), target)
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore(path / "state", target)
        _check_digests(digests(tree), saved["digests"])
    return tree


def part(path: epath.Path, inside: tuple[str, ...], target: Any = None) -> Any:
    """One subtree, nothing else read: numpy without a target, else its shardings and dtypes.

    A function as target makes one of the shapes there, or of some of them: the rest is not read.
    """
    with reading(path):
        saved, found = about(path), _stored(path)
        for depth, name in enumerate(inside):
            if name not in found:
                raise CheckpointError(
                    f"{path} has no {'/'.join(inside[: depth + 1])}; "
                    f"valid there: {', '.join(sorted(found))}"
                )
            found = found[name]
    if callable(target):
        target = target(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found))
        found = _within(found, target)
        if not jax.tree.leaves(found):
            return {}
    with reading(path):
        if target is None:
            target = jax.tree.map(lambda x: np.zeros((), x.dtype), found)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
        else:
            _check_fits(path, found, target, dtypes=False)
            how = ocp.checkpoint_utils.construct_restore_args(target)
        for name in reversed(inside):
            target, how = {name: target}, {name: how}
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore(
                path / "state",
                args=ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True),
            )
        for name in inside:
            tree = tree[name]
        if not differences(found, tree):  # where a dtype was converted the bits are others
            prefix = "/".join(inside) + "/"
            _check_digests({prefix + k: v for k, v in digests(tree).items()}, saved["digests"])
    return tree


def _within(tree: Any, other: Any) -> Any:
    """The part of nested dicts that another tree has, too."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: _within(x, other[name]) for name, x in tree.items() if name in other}


def about(path: epath.Path) -> dict[str, Any]:
    """The JSON beside a tree: its digests, and what the run added."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path / "about")


def _stored(path: epath.Path) -> Any:
    """Shapes and dtypes on disk, as nested dicts and lists."""
    with ocp.StandardCheckpointer() as reader:
        return reader.metadata(path / "state").item_metadata.tree


def place(path: epath.Path, name: str) -> Any:
    """Where a stream stood, in every process."""
    with reading(path):
        found = about(path).get("data")
    if found is None:
        raise CheckpointError(
            f"{path} is of an older version, which kept a place in the data for each process; "
            "start again in an empty directory, from its weights if you like (From(path=RUN))"
        )
    if name not in found:
        raise CheckpointError(
            f"{path} knows no data stream {name!r}; it was saved with {sorted(found) or 'none'}"
        )
    return found[name]


@contextlib.contextmanager
def reading(path: epath.Path):
    """Turn whatever a damaged file makes Orbax say into one message that helps."""
    try:
        yield
    except (CheckpointError, jax.errors.JaxRuntimeError):  # the latter: out of device memory
        raise
    except Exception as error:
        reason = " ".join(str(error).split("See full TensorStore")[0].split())[:200]
        parent = path.parent
        earlier = [int(p.name) for p in parent.iterdir() if p.name.isdigit() and p != path]
        earlier = sorted(s for s in earlier if path.name.isdigit() and s < int(path.name))
        if path.name == FROZEN:
            advice = "put an intact copy of it back, or start again in an empty directory"
        elif earlier:
            advice = f"to resume from step {earlier[-1]}, move it away and resume as before:\n"
            advice += f"  mv {path} {parent.parent / f'damaged-{path.name}'}"
        else:
            advice = "there is no earlier step to resume from: start again in an empty directory"
        what = f"step {path.name}" if path.name.isdigit() else f"the {path.name} weights"
        raise CheckpointError(
            f"{what} in {parent} cannot be read: a file is truncated, damaged or missing "
            f"({type(error).__name__}: {reason}); {advice}"
        ) from error


def _check_fits(path: epath.Path, stored: Any, target: Any, *, dtypes: bool = True) -> None:
    lines = differences(stored, target, dtypes=dtypes)
    if lines:
        shown = "\n  ".join(lines[:12])
        more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
        raise CheckpointError(
            f"{path} was saved by another model, optimiser or set of learners:\n  {shown}{more}\n"
            "use the experiment and settings it was saved with, or another directory"
        )


def _check_digests(found: Mapping[str, int], saved: Mapping[str, int]) -> None:
    changed = sorted(name for name, x in found.items() if saved.get(name) != x)
    if changed:
        raise OSError(f"{len(changed)} arrays are not what was saved, the first is {changed[0]}")


def differences(stored: Any, target: Any, *, dtypes: bool = True) -> list[str]:
    """A line for every path, shape or dtype that differs; random keys count as their integers."""

    def flat(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {path_name(path): _plain(leaf) for path, leaf in leaves}

    stored, target = flat(stored), flat(target)
    lines = [f"{k}: in the checkpoint, not in this run" for k in stored.keys() - target.keys()]
    lines += [f"{k}: in this run, not in the checkpoint" for k in target.keys() - stored.keys()]
    for name in stored.keys() & target.keys():
        (shape, dtype), (wanted, wanted_dtype) = stored[name], target[name]
        if shape != wanted or (dtypes and dtype != wanted_dtype):
            lines.append(f"{name}: {dtype}{list(shape)} saved, {wanted_dtype}{list(wanted)} here")
    return sorted(lines)


def _plain(leaf: Any) -> tuple[tuple[int, ...], str]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit digest of every array's bits, computed where it lies; the same on every mesh."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # One at a time: several programs with collectives in flight can starve each other of threads
    # where one CPU stands in for many devices, and then none ever ends.
    return {path_name(path): int(_digest(leaf)) for path, leaf in leaves}


@jax.jit
def _digest(x: Array) -> UInt32[Array, ""]:
    """Σ mix(bits ⊕ mix(position)) modulo 2³²: integers, so no order of summation changes it."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}").astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = _mix(place ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    return _mix(bits ^ place).sum(dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit integers that changes about half of the bits (Ellis's lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
