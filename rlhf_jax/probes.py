"""What the doctor measures: facts of every process, none of them judged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.bucket import place

SIZE = 16 * 2**20  # bytes that every device sends, and every process writes
PACKAGES = ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def gathered(mine: Any) -> list[Any]:
    """What every process has, in order of their numbers; anything that is JSON."""
    if jax.process_count() == 1:
        return [mine]
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.full(length, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


class Patience:
    """Ends the process, saying why, if what is inside takes longer than that many seconds."""

    def __init__(self, seconds: float = 180):
        self._timer = threading.Timer(seconds, self._give_up, [seconds])
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exception) -> None:
        self._timer.cancel()

    def _give_up(self, seconds: float) -> None:
        print(
            f"fail  time         process {jax.process_index()} on {socket.gethostname()} is not "
            f"done after {seconds:.0f} s\n                   → a host is down, the network between "
            "the hosts is closed (open all ports among them), or the checkpoint directory hangs",
            flush=True,
        )
        os._exit(1)  # nothing else interrupts a main thread that waits in a collective


def local_facts() -> dict[str, Any]:
    """What this process can say alone."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    with open("/proc/meminfo") as file:
        kib = {name: int(rest.split()[0]) for name, rest in (x.split(":") for x in file)}
    return {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version()} | {x: version(x) for x in PACKAGES},
        "kinds": sorted({device.device_kind for device in jax.local_devices()}),
        "platform": jax.local_devices()[0].platform,
        "devices": jax.local_device_count(),
        "free": kib["MemAvailable"] * 1024,
        "total": kib["MemTotal"] * 1024,
        "limit": min(x.get("bytes_limit", 0) for x in stats),
        "used": max(x.get("bytes_in_use", 0) for x in stats),
    }


def clock_readings(rounds: int = 5) -> list[list[float]]:
    """Rounds of clock readings of all processes, each taken as they leave one barrier."""
    found = []
    for _ in range(rounds):
        gathered(0)
        found.append(gathered(time.time()))
    return found


def all_reduce(mesh: Mesh, axis: str) -> tuple[float, bool]:
    """Bytes per second and device of a sum over one axis of the mesh, and whether it is right.

    2 (n − 1)/n · bytes / seconds: what a ring sends, whatever the algorithm is.
    """
    n = mesh.shape[axis]
    made = jax.jit(
        lambda: jax.lax.broadcasted_iota(jnp.float32, (n, SIZE // 4), 0) + 1,
        out_shardings=NamedSharding(mesh, P(axis)),
    )()
    add = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    seconds = []
    for _ in range(4):  # the first one compiles
        began = time.perf_counter()
        total = jax.block_until_ready(add(made))
        seconds.append(time.perf_counter() - began)
    right = (np.asarray(total.addressable_data(0)) == n * (n + 1) / 2).all()
    return 2 * (n - 1) / n * SIZE / min(seconds[1:]), all(gathered(bool(right)))


def stored(directory: str) -> dict[str, Any]:
    """Write a file, read the one of the next process, look whether it is what that one wrote."""
    count, index = jax.process_count(), jax.process_index()
    content = np.random.default_rng(index).bytes(SIZE)
    folder, found = epath.Path(directory), {"host": socket.gethostname()}
    own, other = (folder / f".doctor-{i % count}" for i in (index, index + 1))

    def attempt(what: str, fn: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            result = fn()
        except Exception as error:  # file systems of clouds raise what they like
            found[f"cannot {what}"] = f"{type(error).__name__}: {error}"[:300]
            return None
        found[what] = time.perf_counter() - began
        return result

    def write():
        place(directory)  # says what is missing for a bucket
        folder.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as file:
            file.write(content)
            if "://" not in directory:  # past the page cache, which is faster than any disk
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read():
        for _ in range(5):
            if other.exists():
                break
            time.sleep(1.0)  # network file systems may look late
        return time.perf_counter(), other.read_bytes(), time.perf_counter()

    attempt("write", write)
    digests = gathered(hashlib.sha256(content).hexdigest())  # all have written
    if all(gathered("write" in found)) and (done := attempt("see", read)) is not None:
        found["read"] = done[2] - done[0]
        found["same"] = hashlib.sha256(done[1]).hexdigest() == digests[(index + 1) % count]
    gathered(0)  # all have read
    with contextlib.suppress(Exception):
        own.unlink()
    if "://" not in directory and folder.is_dir():
        found["free"] = shutil.disk_usage(folder).free
    return found
