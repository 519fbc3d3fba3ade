"""What a chip can do, by its vendor's publications, and devices of a topology that is not there.

`target("v5p:4x4x8")` needs libtpu (extra `plan-tpu`), `target("h200:1x8x8")` the CUDA plugin (extra
`plan-gpu`), `target("cpu:8")` nothing. Nothing is run on such devices: programs are compiled for
them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from rlhf_jax.config import ConfigError
from rlhf_jax.topologies import refuse_type, topology

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Limits of one chip, in bytes, operations and seconds."""

    name: str
    memory: float
    flops: float | None = None  # a second, bfloat16, dense
    bandwidth: float | None = None  # of its memory
    link: float | None = None  # one way: of one of a torus's links, or of all of a GPU's NVLinks
    network: float | None = None  # one way, between hosts that no such link joins
    source: str = ""


# ICI is published per chip, both ways, over 4 links (v5e, v6e) or 6 (v5p, TPU7x). A GPU's rate is
# that of dense products, half of what is published with sparsity.
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 275e12, 1200e9, 50e9,
               source="cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023, table 4"),
    "v5e": Chip("TPU v5e", 16 * GIB, 197e12, 819e9, 50e9,
                source="cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9, 100e9,
                source="cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("TPU v6e", 32 * GIB, 918e12, 1638e9, 100e9,
                source="cloud.google.com/tpu/docs/v6e"),
    "tpu7x": Chip("half a TPU7x", 96 * GIB, 1153.5e12, 3690e9, 50e9,  # JAX sees two of a chip
                  source="cloud.google.com/tpu/docs/tpu7x"),
    "h100": Chip("H100 SXM", 80e9, 989e12, 3350e9, 450e9, 50e9,
                 "NVIDIA H100 data sheet; between hosts a ConnectX-7 of 400 Gb/s for each GPU"),
    "h200": Chip("H200 SXM", 141e9, 989e12, 4800e9, 450e9, 50e9,
                 "NVIDIA H200 data sheet; between hosts a ConnectX-7 of 400 Gb/s for each GPU"),
}  # fmt: skip
GPUS = ("h100", "h200")

# What XLA wants to know of a GPU it cannot ask; Hopper's numbers (NVIDIA H100 white paper).
HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
clock_rate_ghz: 1.98 device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "NVIDIA {name}" """


@dataclass(frozen=True)
class Target:
    """Devices to compile for, and what each can do."""

    name: str
    devices: Sequence[Any]
    chip: Chip
    host: int | None = None  # GPUs that NVLink joins; None: a torus

    def speed(self, mesh: Mesh, axes: Sequence[str]) -> float | None:
        """Bytes a second that a device receives from its neighbours along some axes of the mesh.

        In a torus both links of every dimension that the axes cover; between GPUs NVLink while all
        members are in one host, else the network.
        """
        if self.chip.link is None:
            return None
        other = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
        group = mesh.devices[other].reshape(-1)
        if self.host is not None:
            place = {device.id: i for i, device in enumerate(self.devices)}
            hosts = {place[device.id] // self.host for device in group}
            return self.chip.link if len(hosts) == 1 else self.chip.network
        dimensions = sum(
            len(set(along)) > 1 for along in zip(*(d.coords for d in group), strict=True)
        )
        return max(dimensions, 1) * 2 * self.chip.link


def target(text: str | None) -> Target:
    """`v5p:4x4x8`, `h200:1x8x8` (slices × hosts × GPUs) or `cpu:8`.

    Raises:
        ConfigError: if there is no such topology, or what compiles for it is not installed.
    """
    refuse_type(text)
    name, _, shape = (text or "").partition(":")
    if name == "cpu":
        return _cpu(text, shape)
    if name in GPUS:
        return _gpus(text, name, shape)
    if name not in CHIPS:
        raise ConfigError(
            f"--topology {text}: valid are v5e:16x16, v5p:4x4x8 and the like of "
            f"{', '.join(c for c in CHIPS if c not in GPUS)}; h100:1x1x8 or h200:1x8x8, slices × "
            "hosts × GPUs; and cpu:8, devices of this machine"
        )
    kind = topology(text).type
    _installed("libtpu", "plan-tpu", text)
    # Without these libtpu asks for the machine's metadata, and lets one process in at a time.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", kind)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return Target(text, _described(text, topology_name=text, platform="tpu"), CHIPS[name])


def _gpus(text: str, name: str, shape: str) -> Target:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
        raise ConfigError(f"--topology {text}: slices × hosts × GPUs, such as {name}:1x8x8")
    _installed("jax_plugins.xla_cuda12", "plan-gpu", text)
    chip = CHIPS[name]
    info = HOPPER.format(name=name.upper(), bandwidth=chip.bandwidth, memory=chip.memory,
                         cache=(60 if name == "h200" else 50) * 2**20)  # fmt: skip
    devices = _described(
        text, topology_name=shape, platform="cuda", topology=shape, target_config=info
    )
    return Target(text, devices, chip, host=int(shape.rpartition("x")[2]))


def _cpu(text: str, shape: str) -> Target:
    if not re.fullmatch(r"[1-9]\d*", shape):
        raise ConfigError(f"--topology {text}: a number of devices, such as cpu:8")
    count = int(shape)
    with suppress(RuntimeError):  # too late: they have been counted already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--topology {text}: this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count
    return Target(text, devices[:count], Chip("CPU", memory, source="this machine"))


def _installed(module: str, extra: str, text: str) -> None:
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        found = False
    if not found:
        raise ConfigError(
            f"--topology {text}: its compiler is not installed: pip install 'rlhf-jax[{extra}]'; "
            "no accelerator is needed"
        )


def _described(text: str, **given: Any) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(**given).devices)
    except Exception as error:  # of several kinds, by the plugin
        raise ConfigError(f"--topology {text}: the compiler does not know it: {error}") from error
