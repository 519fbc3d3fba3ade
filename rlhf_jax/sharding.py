"""The mesh, and one table from parameter paths to how they are split.

Axes: `data` splits rows and repeats the weights, `fsdp` splits rows and weights, `tensor` splits
heads, MLP width and vocabulary, `sequence` splits the tokens of a row, and weights as `fsdp` does.
Optimiser states end with their parameter's path, so the same table splits them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = P(("data", "fsdp"))
WRITERS = P(("data", "fsdp", "sequence"))  # rows that are being written: one token has no sequence
SHARE = ("fsdp", "sequence")  # between whom a weight is divided that all of them need

# First match wins. Kernels are [in, out]; what multiplies the residual stream from the left is
# split over tensor on its output, what writes into it on its input, so that one all-reduce per
# block half is all that tensor parallelism costs (Shoeybi et al. 2019, section 3).
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", SHARE)),
    (r"position/embedding$", P(None, SHARE)),
    (r"(query|key|value|gate|up)/kernel$", P(SHARE, "tensor")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(out|down)/kernel$", P("tensor", SHARE)),
    (r"(out|down)/bias$", P()),
    (r"(query|key|value|gate|up)/lora_a$", P(SHARE, None)),
    (r"(query|key|value|gate|up)/lora_b$", P(None, "tensor")),
    (r"(out|down)/lora_a$", P("tensor", None)),
    (r"(out|down)/lora_b$", P(None, SHARE)),
    (r"value_head/kernel$", P(SHARE, None)),
    (r"value_head/bias$", P()),
    (r"head/kernel$", P(SHARE, "tensor")),
    (r"norm/(scale|bias)$", P()),
)


def mesh_shape(shape: Sequence[int], devices: int) -> tuple[int, ...]:
    """The sizes of a mesh over `AXES`; one entry may be -1: all devices that are left.

    Raises:
        ValueError: if the shape does not use exactly the devices there are.
    """
    sizes = list(shape)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if len(sizes) != len(AXES) or not whole or sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes:
        raise ValueError(
            f"mesh {tuple(sizes)}: needs four positive sizes ({', '.join(AXES)}), of which one may "
            f"be -1, such as {(devices, 1, 1, 1)}"
        )
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        asked = " × ".join(f"{axis} {n}" for axis, n in zip(AXES, sizes, strict=True) if n != 1)
        wrong = f"{known} does not divide" if -1 in sizes else f"these are {known} of"
        raise ValueError(
            f"mesh {tuple(shape)}: {asked or 'one device'}, and {wrong} the {devices} devices; "
            f"try {_nearest(sizes, devices)}"
        )
    return tuple(sizes)


def _nearest(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """A mesh of all the devices with these sizes but data's, or with tensor's and sequence's."""
    _, fsdp, *inner = sizes
    for used, made in (
        (math.prod(sizes[1:]), (-1, fsdp, *inner)),
        (math.prod(inner), (1, -1, *inner)),
    ):
        if used > 0 and devices % used == 0:  # below 0: one of them is -1
            return tuple(devices // used if n == -1 else n for n in made)
    return devices, 1, 1, 1


def slices_of(devices: Sequence) -> int:
    """How many slices of TPUs, or hosts of GPUs that NVLink joins, they are in."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_slices(shape: Sequence[int], slices: int) -> None:
    """Tensor and sequence stay inside a slice of TPUs, or of GPUs that NVLink joins.

    Raises:
        ValueError: if they cannot, saying which sizes can.
    """
    data, fsdp, tensor, sequence = shape
    if data * fsdp % slices:
        each = math.prod(shape) // slices
        fits = [n for n in range(1, each + 1) if each % n == 0]
        raise ValueError(
            f"mesh {tuple(shape)} over {slices} slices (or hosts) of {each} devices: tensor × "
            f"sequence = {tensor * sequence} must stay inside one and data × fsdp = {data * fsdp} "
            f"be a multiple of {slices}; tensor × sequence can be {', '.join(map(str, fits))}"
        )


def make_mesh(shape: Sequence[int] = (-1, 1, 1, 1), devices: Sequence | None = None) -> Mesh:
    """A mesh over the devices; see `mesh_shape` and `device_grid`."""
    devices = list(jax.devices() if devices is None else devices)
    grid = device_grid(mesh_shape(shape, len(devices)), devices)
    # Auto: the compiler places collectives. The default, Explicit, breaks every plain gather.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(shape: Sequence[int], devices: Sequence) -> np.ndarray:
    """The devices in a mesh's order: neighbours on an axis are neighbours in the network.

    Slices, of TPUs or of GPUs that NVLink joins, lie along data, and along fsdp where data is too
    small; tensor and sequence never leave one.

    Raises:
        ValueError: if they would have to (`check_slices`).
    """
    slices = slices_of(devices)
    check_slices(shape, slices)
    data = shape[0]
    outer = math.gcd(data, slices), slices // math.gcd(data, slices), 1, 1
    inner = [n // across for n, across in zip(shape, outer, strict=True)]
    make = partial(mesh_utils.create_device_mesh, inner)
    if slices > 1:
        make = partial(mesh_utils.create_hybrid_device_mesh, inner, outer)
    try:
        return make(devices=devices)
    except NotImplementedError:  # an axis that is a part of one of the torus's
        return make(devices=devices, allow_split_physical_axes=True)


def path_name(path: tuple[Any, ...]) -> str:
    """`layers_0/query/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec(path: tuple[Any, ...], leaf: Any, rules: Sequence[tuple[str, P]] = RULES) -> P:
    """The partition of one leaf: scalars and keys are replicated, arrays follow the table.

    A vector that no rule names, of a model of one's own, is small and replicated, too.

    Raises:
        ValueError: if no rule matches a matrix, so that none is silently replicated.
    """
    if leaf.ndim == 0 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return P()
    name = path_name(path)
    for pattern, found in rules:
        if re.search(pattern, name):
            # Scanned layers carry a leading layer axis, which is never split.
            return P(None, *found) if "layers/" in name else found
    if leaf.ndim - ("layers/" in name) <= 1:
        return P()
    raise ValueError(
        f"no sharding rule for {name} {tuple(leaf.shape)}; give it a name that one of "
        "rlhf_jax.sharding.RULES matches, such as up/kernel or down/kernel, or add a pattern there"
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
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise ValueError(
                    f"{path_name(path)} {tuple(leaf.shape)}: axis {axis} of size {size} does not "
                    f"divide over {parts} devices of {names}; make it {-(-size // parts) * parts} "
                    f"or choose a smaller mesh axis"
                )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(one, tree)


def for_decoding(places: Any) -> Any:
    """The same without the axes that share weights out: a step of decoding finds them all there.

    Only tensor divides them. What decoding reads is small: in the dtype that is computed in.
    """

    def one(place):
        return NamedSharding(
            place.mesh, P(*(None if axes == SHARE else axes for axes in place.spec))
        )

    return jax.tree.map(one, places)


def received(shapes: Any, places: Any, new: Any) -> int:
    """Bytes that each device receives when arrays of these shapes go from `places` to `new`.

    For a `new` in which every device keeps what it had, such as `for_decoding`.
    """

    def one(x, place, new):
        more = math.prod(new.shard_shape(x.shape)) - math.prod(place.shard_shape(x.shape))
        return more * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, shapes, places, new)))


def spread(tree: Any, devices: Sequence | None = None) -> Any:
    """Shapes with shardings that no table needs to know: the longest axis over all devices.

    An array of which no axis divides is whole on each.
    """
    mesh = make_mesh((1, -1, 1, 1), devices)

    def one(leaf):
        fits = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        longest = max(fits, key=lambda axis: leaf.shape[axis], default=None)
        found = P() if longest is None else P(*(None,) * longest, "fsdp")
        found = NamedSharding(mesh, found)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)

    return jax.tree.map(one, tree)


def one_cpu(mesh: Mesh) -> bool:
    """The whole mesh is one CPU."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


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


def row_share(mesh: Mesh) -> tuple[int | tuple[int, ...], int]:
    """Which equal slices of a batch's rows this process brings, in order, and of how many.

    The mesh decides, not the number of the process: where tensor or sequence lies across processes,
    those whose devices hold the same rows bring the same; and in a slice of TPUs the rows of one
    process need not be next to each other. Without a mesh every process brings its own.
    """
    if mesh.empty:
        return jax.process_index(), jax.process_count()
    groups = math.prod(mesh.shape[axis] for axis in ROWS[0])
    places = rows(mesh).devices_indices_map((groups,)).items()
    me = jax.process_index()
    return in_slices(
        {at.start or 0 for device, (at,) in places if device.process_index == me}, groups
    )


def in_slices(own: set[int], groups: int) -> tuple[tuple[int, ...], int]:
    """Some of `groups` equal parts of a batch as slices that are as large as they can be."""
    for count in range(1, groups + 1):
        size, rest = divmod(groups, count)
        slices = {group // size for group in own} if rest == 0 else set()
        if slices and len(slices) * size == len(own):
            break
    return tuple(sorted(slices)), count


def split(x: jax.Array, *axes: Any) -> jax.Array:
    """Inside a compiled function: keep the axes of an array split so; those not named are whole.

    Without a mesh in context (one device, `vmap` over seeds) it does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def split_rows(tree: Any, axis: int = 0, over: P = ROWS) -> Any:
    """Inside a compiled function: keep `axis` of every array split over those who share rows."""
    return jax.tree.map(lambda x: split(x, *(None,) * axis, *over), tree)


def split_tokens(tree: Any) -> Any:
    """Inside a compiled function: keep arrays [b, t, …] split by rows and by their tokens."""
    return jax.tree.map(lambda x: split(x, *ROWS, "sequence"), tree)


def row_groups(over: P = ROWS) -> int:
    """Inside a compiled function: into how many parts the mesh splits rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in over[0]) if "data" in mesh.axis_names else 1


def data_groups() -> int:
    """Inside a compiled function: how many copies of the weights the mesh has."""
    return jax.sharding.get_abstract_mesh().shape.get("data", 1)


def token_groups() -> int:
    """Inside a compiled function: into how many parts the mesh splits the tokens of a row."""
    return row_groups(WRITERS) // row_groups()


def by_group(x: jax.Array) -> jax.Array:
    """Inside a compiled function: [b, t, …] as [b · s, t / s, …], each part of a row a row.

    No token leaves its device. `whole_rows` is its inverse.
    """
    groups, parts, (b, t, *rest) = row_groups(), token_groups(), x.shape
    found = split(x.reshape(groups, b // groups, parts, t // parts, *rest), *ROWS, None, "sequence")
    found = split(found.swapaxes(1, 2), *ROWS, "sequence")
    return split_rows(found.reshape(b * parts, t // parts, *rest), over=WRITERS)


def whole_rows(x: jax.Array) -> jax.Array:
    """Inside a compiled function: the [b, t, …] of which `by_group` made x."""
    groups, parts, (rows, part, *rest) = row_groups(), token_groups(), x.shape
    found = split(x.reshape(groups, parts, rows // parts // groups, part, *rest), *ROWS, "sequence")
    found = split(found.swapaxes(1, 2), *ROWS, None, "sequence")
    return split_tokens(found.reshape(rows // parts, part * parts, *rest))
