"""The mesh, and one table from parameter paths to how they are split.

Axes: `data` splits rows and repeats the weights, `fsdp` splits rows and weights, `tensor` splits
heads, MLP width and vocabulary. Optimiser states end with their parameter's path, so the same table
splits them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))

# First match wins. Kernels are [in, out]; what multiplies the residual stream from the left is
# split over tensor on its output, what writes into it on its input, so that one all-reduce per
# block half is all that tensor parallelism costs (Shoeybi et al. 2019, section 3).
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"position/embedding$", P(None, "fsdp")),
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"(out|down)/bias$", P()),
    (r"(query|key|value|gate|up)/lora_a$", P("fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b$", P(None, "tensor")),
    (r"(out|down)/lora_a$", P("tensor", None)),
    (r"(out|down)/lora_b$", P(None, "fsdp")),
    (r"value_head/(kernel|bias)$", P()),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"norm/(scale|bias)$", P()),
)


def mesh_shape(shape: Sequence[int], devices: int) -> tuple[int, ...]:
    """The sizes of a `(data, fsdp, tensor)` mesh; one entry may be -1: all devices that are left.

    Raises:
        ValueError: if the shape does not use exactly the devices there are.
    """
    sizes = list(shape)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if len(sizes) != len(AXES) or not whole or sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes:
        raise ValueError(
            f"mesh {tuple(sizes)}: needs three positive sizes {AXES}, of which one may be -1"
        )
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ValueError(
            f"mesh {tuple(shape)} over {AXES} does not use exactly the {devices} devices; "
            f"try ({devices}, 1, 1)"
        )
    return tuple(sizes)


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices: Sequence | None = None) -> Mesh:
    """A `(data, fsdp, tensor)` mesh over the devices; see `mesh_shape`."""
    devices = list(jax.devices() if devices is None else devices)
    # Auto: the compiler places collectives. The default, Explicit, breaks every plain gather.
    types = (AxisType.Auto,) * len(AXES)
    shape = mesh_shape(shape, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """`layers_0/query/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec(path: tuple[Any, ...], leaf: Any, rules: Sequence[tuple[str, P]] = RULES) -> P:
    """The partition of one leaf: scalars and keys are replicated, arrays follow the table.

    Raises:
        ValueError: if no rule matches, so that no weight is silently replicated.
    """
    if leaf.ndim == 0 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return P()
    name = path_name(path)
    for pattern, found in rules:
        if re.search(pattern, name):
            # Scanned layers carry a leading layer axis, which is never split.
            return P(None, *found) if "layers/" in name else found
    raise ValueError(
        f"no sharding rule for {name} {tuple(leaf.shape)}; add a pattern to rlhf_jax.sharding.RULES"
    )


def shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """A `NamedSharding` for every leaf of a tree of arrays or `ShapeDtypeStruct`.

    Raises:
        ValueError: for an unknown path, or a dimension that does not divide over its mesh axes.
    """

    def one(path, leaf):
        found = spec(path, leaf, rules)
        for axis, (size, names) in enumerate(zip(leaf.shape, found, strict=False)):
            names = (names,) if isinstance(names, str) else names or ()
            parts = 1
            for name in names:
                parts *= mesh.shape[name]
            if size % parts:
                raise ValueError(
                    f"{path_name(path)} {tuple(leaf.shape)}: axis {axis} of size {size} does not "
                    f"divide over {parts} devices of {names}; make it {-(-size // parts) * parts} "
                    f"or choose a smaller mesh axis"
                )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(one, tree)


def spread(tree: Any, devices: Sequence | None = None) -> Any:
    """Shapes with shardings that no table needs to know: the longest axis over all devices.

    An array of which no axis divides is whole on each.
    """
    mesh = make_mesh((1, -1, 1), devices)

    def one(leaf):
        fits = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        longest = max(fits, key=lambda axis: leaf.shape[axis], default=None)
        found = P() if longest is None else P(*(None,) * longest, "fsdp")
        found = NamedSharding(mesh, found)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)

    return jax.tree.map(one, tree)


def rows(mesh: Mesh) -> NamedSharding:
    """How a batch is split: its leading axis over data and fsdp."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def local(tree: Any) -> Any:
    """This process's rows of arrays that are split by rows, in numpy; without copies of rows."""

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])

    return jax.tree.map(one, tree)


def split_rows(tree: Any, axis: int = 0) -> Any:
    """Inside a compiled function: keep `axis` of every array split over data and fsdp.

    Without a mesh in context (one device, `vmap` over seeds) it does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, P(*(None,) * axis, *ROWS)), tree
    )


def row_groups() -> int:
    """Inside a compiled function: into how many parts the mesh splits rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in ROWS[0]) if "data" in mesh.axis_names else 1


def gather_columns(embedding: jax.Array) -> jax.Array:
    """Inside a compiled function: an embedding table split over the vocabulary only.

    A lookup in a table split both ways makes XLA rematerialise it in full.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return embedding
    return jax.lax.with_sharding_constraint(embedding, P("tensor", None))
