"""Programs that do not need each other, at once on the cores of one CPU.

A small operation does not fill all cores, and XLA:CPU runs the programs that one thread starts one
after another; those that several threads start run side by side. A GPU or a TPU is full with one,
and processes that share a mesh must start their programs in one order, so there nothing changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.sharding import one_cpu


def count(mesh: Mesh) -> int:
    """Programs that run at once: as many as this process has cores where one CPU is the mesh."""
    if not one_cpu(mesh):
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(mesh: Mesh, lane: int, program: Callable, *args: Any) -> Any:
    """`program(*args)`, which those of other lanes need not wait for; it returns as ever, at once.

    Lanes are counted from 0, and begin again behind the last.
    """
    lanes = count(mesh)
    if lanes == 1:
        return program(*args)

    def run():
        with jax.set_mesh(mesh):  # a thread has a context of its own
            return program(*args)

    return _thread(lane % lanes).submit(run).result()


@cache
def _thread(lane: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=f"lane{lane}")
