"""Stopping when asked to: SIGTERM and Ctrl-C become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, and stopped with everything saved."""


class Preemption:
    """While entered, the first SIGTERM or Ctrl-C asks the loop to stop; a second one kills at once.

    With several processes (`jax.distributed`) the signal that counts is SIGTERM, which JAX's own
    service handles: it makes all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # that asked
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        # Only the main thread may set handlers, and JAX's handler must stay if it is there.
        if threading.current_thread() is threading.main_thread() and not _distributed():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # The default kills even inside a long computation, where Python handlers wait.
        for again in self._before:
            signal.signal(again, signal.SIG_DFL)
        print(
            f"\n{self.signal.name}: saving after this step, then stopping; "
            "once more to stop at once without saving",
            flush=True,
        )

    def requested(self, step: int) -> bool:
        """Must the run stop after this step? Every process asks, after every step."""
        if _distributed():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


def _distributed() -> bool:
    return jax.distributed.is_initialized()
