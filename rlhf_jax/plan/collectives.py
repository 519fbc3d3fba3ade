"""What a compiled program sends between devices, over which axes, and its largest arrays."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.plan.compiled import MESSAGES, SHAPE, Program, size, visited

NO_MEMORY = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


@dataclass(frozen=True)
class Collective:
    """One kind of message over some axes of the mesh, summed over the program."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which the members of a group differ
    count: int  # how often it runs
    bytes: int  # of the arrays that a group sends in all these runs, whole on one device
    moved: float  # that each device receives in a ring: the least that its links must carry
    bounded: bool  # inside a loop that may end earlier: count and bytes are the most
    unknown: bool  # inside a loop of which nobody knows how often it runs: counted once


def collectives(program: Program, mesh: Mesh, *, at_most: int | None = None) -> list[Collective]:
    """Every message of the program, by kind and axes; most bytes first.

    `at_most` says how often a loop can run whose end depends on data: the decoding loop.
    """
    rows: dict[tuple, list[float]] = {}
    chains = set()
    for instruction, where, times, bounded, unknown in visited(program, at_most):
        kind = next((k for k in MESSAGES if instruction.op in (k, f"{k}-start")), None)
        if kind is None:
            continue
        if chain := re.search(r"channel_id=(\d+).*chain_id=\"(\d+)\"", instruction.text):
            # A TPU's message that is cut into pieces between other work: each piece names it.
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())
        own = program.computations[where]
        axes, members = _axes(instruction.text, mesh)
        sent = sum(size(own[name].shape) for name in instruction.operands if name in own)
        if "all-reduce-scatter" in where:  # a TPU's fusion of an all-reduce and a slice of it
            kind = "reduce-scatter"
        payload = sent * members if kind == "all-gather" else sent
        part = (members - 1) / members
        moved = payload * {"all-reduce": 2 * part, "collective-permute": 1.0}.get(kind, part)
        row = rows.setdefault((kind, axes, bounded, unknown), [0, 0, 0.0])
        for i, x in enumerate((1, payload, moved)):
            row[i] += times * x
    found = [
        Collective(kind, axes, int(n), int(total), moved, bounded, unknown)
        for (kind, axes, bounded, unknown), (n, total, moved) in rows.items()
        if axes
    ]
    return sorted(found, key=lambda one: -one.bytes)


def largest(program: Program, n: int) -> list[tuple[int, str, str]]:
    """Bytes, shape and origin of the n largest arrays that instructions make, each shape once."""
    found: dict[str, tuple[int, str]] = {}
    for instruction, where, *_ in visited(program, 1):
        if instruction.op in NO_MEMORY or instruction.op.endswith("-done"):
            continue
        if "fused" in where:
            continue
        for kind, dims, layout in SHAPE.findall(instruction.shape):
            if "S(" in layout:  # a TPU's own memory, beside its HBM
                continue
            shape = f"{kind}[{dims}]"
            origin = re.search(r'op_name="([^"]*)"', instruction.text)
            found.setdefault(shape, (size(shape), origin[1] if origin else instruction.op))
    order = sorted(found.items(), key=lambda item: -item[1][0])[:n]
    return [(bytes_, shape, origin) for shape, (bytes_, origin) in order]


def _axes(text: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which one group of devices differs, and how many it has.

    Devices are numbered as in `mesh.devices.flat`.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        groups = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    else:
        groups = _groups(text, mesh.size)
    places = np.array(np.unravel_index(groups, mesh.devices.shape))  # [axes, groups, members]
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(n for n, x in zip(mesh.axis_names, varies, strict=True) if x), groups.shape[1]


def _groups(text: str, devices: int) -> np.ndarray:
    """`[groups, members]` of device numbers, from any of the ways in which XLA writes them."""
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array([re.findall(r"\d+", g) for g in re.findall(r"\{([^}]*)\}", found[1])], int)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape(_ints(found[1]))
    if found := re.search(r"replica_groups=(mesh\[.*?\{.*?\})", text):
        return _named_groups(found[1])
    return np.arange(devices)[None]


def _named_groups(text: str) -> np.ndarray:
    """`mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}`: axes, the order of devices, a group's.

    `'a':(2)4` is the part of size 4 of axis a that has a part of size 2 before it.
    """
    axes, between, chosen = re.match(r"mesh\[(.*?)\](.*?)\{(.*?)\}", text).groups()
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", between)
    numbers = _iota(*order.groups()) if order else np.arange(math.prod(sizes.values()))
    inside = {
        name: (int(before), int(own)) if before else (1, sizes[name])
        for name, before, own in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    grid, inner = [], []
    for i, (name, n) in enumerate(sizes.items()):
        before, own = inside.get(name, (n, 1))
        grid += [before, own, n // before // own]
        inner += [3 * i + 1] if name in inside else []
    outer = [i for i in range(len(grid)) if i not in inner]
    members = math.prod(grid[i] for i in inner)
    return numbers.reshape(grid).transpose(*outer, *inner).reshape(-1, members)


def _iota(shape: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (numbers.transpose(_ints(order)) if order else numbers).reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
