"""Arrangements of TPU chips that can be had, and what Google Cloud calls them.

Names and shapes are those of the Cloud TPU documentation (TPU versions; TPUs in GKE).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rlhf_jax.config import ConfigError


@dataclass(frozen=True)
class Chip:
    """One generation of TPUs, as Google Cloud's documentation names it."""

    type: str  # of gcloud and XPK, before the number
    cores: int  # counted by that number, per chip
    label: str  # of GKE's nodes
    runtime: str | None  # image of TPU VMs; None: there are none
    axes: int
    devices: int = 1  # of JAX, per chip


CHIPS = {
    "v4": Chip("v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", 3),
    "v5e": Chip("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 2),
    "v5p": Chip("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", 3),
    "v6e": Chip("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", 2),
    "tpu7x": Chip("tpu7x", 2, "tpu7x", None, 3, devices=2),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # larger ones are made of cubes of 4x4x4


@dataclass(frozen=True)
class Slice:
    """A topology that exists."""

    chip: Chip
    shape: str  # 4x4x8

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(int(n) for n in self.shape.split("x"))

    @property
    def devices(self) -> int:
        """How many JAX sees."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """With four chips each, or one that has fewer."""
        return max(self.chips // 4, 1)

    @property
    def type(self) -> str:
        """v5p-256."""
        return f"{self.chip.type}-{self.chips * self.chip.cores}"


def _shapes(name: str, chips: int) -> list[str]:
    """All that so many chips of a kind can have, sides in order."""
    if CHIPS[name].axes == 2:
        known = FLAT
    else:
        sides = [n for n in range(4, chips + 1, 4) if chips % n == 0]
        cubes = ((a, b, chips // (a * b)) for a in sides for b in sides)
        known = [*SMALL, *("x".join(map(str, x)) for x in cubes if list(x) == sorted(x))]
        known = [x for x in known if x in SMALL or all(int(n) % 4 == 0 for n in x.split("x"))]
    return [x for x in known if Slice(CHIPS[name], x).chips == chips]


def refuse_type(text: str | None) -> None:
    """Google Cloud's name of a slice says how many chips it has, but not in what shape.

    Raises:
        ConfigError: if `text` is one, with the shapes of so many chips.
    """
    types = {chip.type: known for known, chip in CHIPS.items()}
    google, _, cores = (text or "").rpartition("-")
    if google in types and cores.isdecimal():
        chips = int(cores) // CHIPS[types[google]].cores
        fits = " or ".join(f"{types[google]}:{x}" for x in _shapes(types[google], chips))
        raise ConfigError(
            f"--topology {text}: Google Cloud's name of {chips} chips; here their shape is needed, "
            f"{fits or 'and no shape has so many'}"
        )


def topology(text: str | None) -> Slice:
    """`v5p:4x4x8`, or an error that says what there is."""
    name, _, shape = (text or "").partition(":")
    refuse_type(text)
    if name not in CHIPS:
        raise ConfigError(f"--topology {text}: valid is CHIP:SHAPE with one of {', '.join(CHIPS)}")
    valid = ", ".join(FLAT if CHIPS[name].axes == 2 else (*SMALL, "4x4x4 and its multiples"))
    sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"\d+(x\d+)+", shape) else []
    cubes = CHIPS[name].axes == 3 == len(sizes) and all(n and n % 4 == 0 for n in sizes)
    if not (cubes or shape in (FLAT if CHIPS[name].axes == 2 else SMALL)):
        raise ConfigError(f"--topology {text}: valid shapes of {name} are {valid}")
    return Slice(CHIPS[name], shape)
