"""What a study says while it runs: the arm, the step, the seeds and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

LINE_SECONDS = 15.0  # between two lines where there is no terminal


class Progress:
    """One line that is rewritten, or one now and then. `work` is steps × seeds of each part."""

    def __init__(self, study: str, work: Mapping[str, int]):
        self.study, self.work = study, dict(work)
        self._done, self._busy, self._part, self._inside = 0, 0.0, "", 0.0
        self._console, self._said = Console(), 0.0
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is inside is one arm or base."""
        self._part, self._inside = name, 0.0
        self._began, self._first = time.monotonic(), None
        self._say(f"{self._where()}  compiling", now=True)
        yield
        self._done += self.work[name]
        took = time.monotonic() - self._began
        line = f"{self._where()}  done in {_time(took)}"
        print(line, flush=True) if self._live is None else self._console.print(line)

    def at(self, done: int, total: int, seeds: int = 0) -> None:
        """So many of a part's steps are done, on so many seeds at once."""
        now = time.monotonic()
        if self._first is None:  # it compiled: no measure of the others
            self._first = (now, done)
        since, start = self._first
        share = done / max(total, 1)
        of = f" × {seeds} seeds" if seeds else ""
        left = ""
        if done > start and self.work[self._part]:  # computed arms take no steps
            rate = (now - since) / (done - start) * total / self.work[self._part]
            steps = sum(self.work.values()) - self._done - share * self.work[self._part]
            left = f"  about {_time(rate * steps)} left"
        self._say(f"{self._where()}  step {done}/{total}{of}{left}", now=done == total)

    def _where(self) -> str:
        number = list(self.work).index(self._part) + 1
        return f"{self.study} [{number}/{len(self.work)}] {self._part}"

    def _say(self, line: str, *, now: bool) -> None:
        if self._live is not None:
            self._live.update(Text(line))
            return
        if now or time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            print(line, flush=True)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
