"""Who has come: processes that wait for each other keep a file alive each, where all can read it.

JAX's service knows who takes part only when all do, so its own time-out names nobody. A file counts
while its content changes: neither clocks nor files that an earlier start left behind matter.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

from etils import epath

HINT = 30.0  # seconds before those that are there say that they wait


class Arrivals:
    """While entered, this process says that it waits; after `seconds` it names who is missing, and
    ends. The first whose time is over decides for all.

    `directory` None: nothing is shared, and nobody can be named. `process` and `processes` None:
    only JAX will know them.
    """

    def __init__(
        self,
        directory: epath.PathLike | None,
        *,
        process: int | None,
        processes: int | None,
        seconds: float,
    ):
        self.process, self.processes, self.seconds = process, processes, seconds
        self.beat = max(2.0, (processes or 1) / 8)  # so that thousands do not wear out a disk
        host = socket.gethostname()
        self.me = {"process": process, "host": host, "start": f"{time.time()} {os.getpid()}"}
        self._folder = epath.Path(directory) / "processes" if directory else None
        self._own = str(process if process is not None else host)
        self._seen: dict[str, tuple[dict, float | None]] = {}  # content, when it changed
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        if self._folder is not None:
            (self._folder / self._own).unlink(missing_ok=True)

    def _wait(self) -> None:
        """In a thread, for the main one waits inside JAX, which ends the process without a word."""
        began, hinted = time.monotonic(), False
        beats = 0
        while not self._done.wait(self.beat if beats else 0.0):
            beats += 1
            self._write(beats=beats)
            self._read()
            waited = time.monotonic() - began
            for content, changed in self._seen.values():
                if changed is not None and content.get("gave up"):
                    self._end(content["gave up"])
            if waited >= self.seconds:
                said = self.missing(f"within {self.seconds:.0f} s")
                self._write(**{"gave up": said})
                self._end(said)
            if waited >= HINT and not hinted:
                hinted = True
                said = self.missing(f"after {waited:.0f} s")
                print(f"waiting up to {self.seconds:.0f} s: {said}", flush=True)

    def missing(self, when: str) -> str:
        """Who is not there, and who is."""
        recent = time.monotonic() - 4 * self.beat
        here = [c for c, changed in self._seen.values() if changed is not None and changed > recent]
        here = sorted([*here, self.me], key=lambda x: (x["process"] or 0, x["host"]))
        there = ", ".join(
            x["host"] if x["process"] is None else f"process {x['process']} on {x['host']}"
            for x in here
        )
        absent = sorted(set(range(self.processes or 0)) - {x["process"] for x in here})
        if self._folder is None or self.processes is None:
            who = "not all processes have come"
        elif absent:
            names = ", ".join(map(str, absent))
            have = "process {} of {} has" if len(absent) == 1 else "processes {} of {} have"
            who = f"{have.format(names, self.processes)} not come"
        else:
            who = f"all {self.processes} processes are there, but they have not joined"
        return f"{who} {when}; there: {there}"

    def _write(self, **more: Any) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / self._own).write_text(json.dumps(self.me | more))
        except Exception as error:  # file systems of clouds raise what they like
            print(f"cannot write {self._folder / self._own}: {error}", flush=True)
            self._folder = None  # the run itself will say what to do

    def _read(self) -> None:
        if self._folder is None:
            return
        for path in self._folder.iterdir():
            if path.name == self._own:
                continue
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError):  # gone, or half written
                continue
            before = self._seen.get(path.name)
            if before is None:
                self._seen[path.name] = (content, None)
            elif before[0] != content:
                self._seen[path.name] = (content, time.monotonic())

    def _end(self, said: str) -> None:
        print(
            f"error: {said}\nIs every host up, started with the same command, and free to reach "
            "process 0? RLHF_JAX_WAIT=SECONDS waits longer",
            flush=True,
        )
        os._exit(1)
