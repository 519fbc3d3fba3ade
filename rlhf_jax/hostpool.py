"""Worker processes that score texts with a user's function; imports nothing heavy.

Not `concurrent.futures`: there a task that hangs cannot be told from one that waits for its turn,
nor stopped. Here a worker holds one text at a time, so its clock starts when the text does. Not
`multiprocessing` either: a fork of a process with JAX's threads may dead-lock, and its spawn runs
the user's script once more in each worker.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

START_SECONDS = 180.0  # importing the user's module; not charged to any text


class RewardError(ValueError):
    """A reward that cannot be learned from; the message shows the row."""


@functools.cache
def shared(score: Callable[..., float], workers: int | None) -> Pool:
    """The one pool for this function, started when first used and closed at exit."""
    return Pool(score, workers if workers is not None else min(16, os.cpu_count() or 1))


class Pool:
    """Processes that call `score(text)`; whatever goes wrong is a RewardError naming the text."""

    def __init__(self, score: Callable[..., float], workers: int):
        if workers < 1:
            raise ValueError(f"workers={workers}: a pool needs at least 1")
        self.score, self.workers = score, workers
        self.name = getattr(_inner(score), "__qualname__", None) or repr(score)
        self._alive = {}  # connection -> process
        atexit.register(self.close)

    def map(
        self,
        texts: Sequence[str | tuple],
        *,
        timeout: float,
        names: Sequence[int] | None = None,
    ) -> list[float]:
        """One finite number per text, each within `timeout` seconds of being begun.

        A text in a tuple comes with more arguments for the function.

        Raises:
            RewardError: for the first text that fails; `names` are the row numbers to show.
        """
        names = range(len(texts)) if names is None else names
        try:
            return self._map(texts, timeout, names)
        except BaseException:
            self.close()  # a worker may still be busy with a text nobody waits for
            raise

    def _map(self, texts, timeout, names):
        self._start(min(self.workers, len(texts)))
        found: list[float | None] = [None] * len(texts)
        todo = iter(range(len(texts)))
        busy = {}  # connection -> (text's index, deadline)

        def give(connection):
            index = next(todo, None)
            if index is not None:
                self._send(connection, texts[index])
                busy[connection] = (index, time.monotonic() + timeout)

        for connection in self._alive:
            give(connection)
        failed: dict[int, RewardError] = {}
        while busy:
            left = min(deadline for _, deadline in busy.values()) - time.monotonic()
            for connection in wait(list(busy), max(left, 0.0)):
                index, _ = busy.pop(connection)
                where = f"row {names[index]}\n  text: {_shown(texts[index])}"
                try:
                    found[index] = self._answer(connection, where)
                except RewardError as error:
                    failed[index] = error
                if not failed:
                    give(connection)
            if failed:  # the first is shown: those begun before it are still to answer
                first = min(failed)
                busy = {c: own for c, own in busy.items() if own[0] < first}
                if not busy:
                    raise failed[first]
            for connection, (index, deadline) in busy.items():
                if time.monotonic() >= deadline and not connection.poll():
                    raise RewardError(
                        f"the reward function {self.name} took longer than {timeout:g} s on row "
                        f"{names[index]}; make it faster or raise from_text's timeout, such as "
                        "--set rollouts.reward.timeout=300\n"
                        f"  text: {_shown(texts[index])}"
                    )
        return found

    def _answer(self, connection, where):
        kind, answer = self._receive(connection, f"while it scored {where}")
        if kind == "raised":
            raise RewardError(f"the reward function {self.name} raised on {where}\n{answer}")
        if kind == "type":
            raise RewardError(
                f"the reward function {self.name} must return one number per text, but returned "
                f"{answer} on {where}"
            )
        if not math.isfinite(answer):
            raise RewardError(f"the reward function {self.name} returned {answer} on {where}")
        return answer

    def _start(self, workers):
        """Bring the pool to so many workers, all having imported the function."""
        missing = workers - len(self._alive)
        if missing <= 0:
            return
        payload = self._payload()
        new = [self._spawn() for _ in range(missing)]
        for connection in new:
            self._send(connection, payload)
        deadline = time.monotonic() + START_SECONDS
        for connection in new:
            if not connection.poll(max(deadline - time.monotonic(), 0.0)):
                raise RewardError(
                    f"the worker processes of the reward function {self.name} did not start within "
                    f"{START_SECONDS:g} s: what does its module do while it is imported?"
                )
            kind, answer = self._receive(connection, "while it started")
            if kind != "ready":
                raise RewardError(
                    f"a worker process could not import the reward function {self.name}:\n{answer}"
                )

    def _payload(self):
        inner = _inner(self.score)
        reason = "it is defined in the script that runs, not in a module"
        if getattr(inner, "__module__", None) != "__main__":
            try:
                return pickle.dumps(self.score)
            except Exception as error:
                reason = str(error)
        raise RewardError(
            f"worker processes cannot import the reward function {self.name} ({reason}); define it "
            "with def at the top level of a module (no lambda, no inner function)"
        )

    def _spawn(self):
        ours, theirs = Pipe()
        child = theirs.fileno()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from rlhf_jax.hostpool import serve; serve({child})"],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},  # not the accelerator
            stdin=subprocess.DEVNULL,
            pass_fds=[child],
        )
        theirs.close()  # so that a worker's death is seen as the end of the stream
        self._alive[ours] = process
        return ours

    def _send(self, connection, text):
        try:
            connection.send(text)
        except OSError:  # its process is gone
            self._receive(connection, "while it waited for work")

    def _receive(self, connection, when):
        try:
            return connection.recv()
        except (EOFError, OSError):
            try:
                code = self._alive[connection].wait(5.0)
            except subprocess.TimeoutExpired:
                code = None
            raise RewardError(
                f"a worker process of the reward function {self.name} died (exit code {code}; -9 "
                f"is often memory) {when}"
            ) from None

    def close(self) -> None:
        """Stop the workers; the next call starts new ones."""
        for connection, process in self._alive.items():
            process.kill()
            process.wait()
            connection.close()
        self._alive.clear()


def _inner(fn):
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def serve(descriptor: int) -> None:
    """What a worker does: import the function, then answer texts until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(descriptor)
    try:
        score = pickle.loads(connection.recv())
    except BaseException:
        connection.send(("broken", traceback.format_exc()))
        return
    connection.send(("ready", None))
    while True:
        try:
            text = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_scored(score, text))


def _scored(score, text):
    try:
        value = score(*text) if isinstance(text, tuple) else score(text)
    except Exception:
        return "raised", traceback.format_exc()
    is_number = hasattr(value, "__float__") and getattr(value, "shape", ()) == ()
    if not is_number:
        return "type", f"{type(value).__name__}: {_shown(value)}"
    return "value", float(value)


def _shown(value, limit=400):
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
