"""Real processes on this machine that join each other by RLHF_JAX_*, one CPU device each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # to compile
RLHF_JAX = (sys.executable, "-m", "rlhf_jax")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def started(commands: Sequence[Sequence], *, processes: int | None = None, **environment):
    """The processes that run these commands, stdout and stderr in one pipe; killed at the end.

    `processes`: how many are expected, if there are to be more than commands.
    """
    port = free_port()
    plain = {**os.environ, "XLA_FLAGS": QUICK} | {k: str(v) for k, v in environment.items()}
    plain["RLHF_JAX_COORDINATOR"] = f"127.0.0.1:{port}"
    plain["RLHF_JAX_PROCESSES"] = str(len(commands) if processes is None else processes)
    children = [
        subprocess.Popen(
            list(map(str, command)),
            env=plain | {"RLHF_JAX_PROCESS": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def ended(children, timeout: float = 900) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said."""
    said = [child.communicate(timeout=timeout)[0] for child in children]
    return [child.returncode for child in children], said


def together(commands: Sequence[Sequence], **options) -> tuple[list[int], list[str]]:
    """Statuses and outputs of processes that run these commands to their end."""
    with started(commands, **options) as children:
        return ended(children)
