"""What a run says while it runs: metrics.jsonl, TensorBoard events, samples.jsonl, a progress line.

Only host 0 writes. Metrics are written one step late, so that a step never waits for its numbers;
`flush` writes what is pending. A resumed run drops the lines of steps that it will take again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

LINE_SECONDS = 10.0  # between two lines where there is no terminal

# What the progress line shows, if it is there: metric, label, format.
SHOWN = (("rollout/reward", "reward", "{:+.3f}"), ("rollout/kl", "KL", "{:.2f}"))


class Meter:
    """The writers of one run (or one stage of a pipeline); use it as a context manager."""

    def __init__(self, out: Path, *, name: str, start: int, total: int):
        self.name, self.start, self.total = name, start, total
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._phases: dict[str, tuple[float, int]] = {}  # seconds, tokens
        self._began = self._said = time.monotonic()
        self._host = jax.process_index() == 0
        self._console = Console()
        self._progress: Progress | None = None
        if not self._host:
            return
        self._files = {}
        for file in ("metrics.jsonl", "samples.jsonl"):
            # Samples of step 0 are from before the first step: a run that starts over takes them
            # again, one that goes on does not.
            first = start if file == "metrics.jsonl" or start == 0 else start + 1
            keep_lines_before(out / file, first)
            self._files[file] = (out / file).open("a")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start, flush_secs=30)

    def __enter__(self) -> Meter:
        if self._host and self._console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task(
                self.name, total=self.total, completed=self.start, said="compiling"
            )
            self._progress.start()
        elif self._host and self.start < self.total:
            print(f"{self.name} {self.start}/{self.total}  compiling", flush=True)
        return self

    def __exit__(self, kind, *exception) -> None:
        failed = kind is not None
        try:
            self.flush()
        except OSError:
            if failed:  # the first error says more
                return
            failed = True
            raise
        finally:
            if self._progress is not None:
                self._progress.stop()
            if self._host:
                self._close(quietly=failed)

    def _close(self, *, quietly: bool) -> None:
        """Close all files; `quietly`: what cannot be written any more is no error."""
        events = self._board.file_writer.event_writer
        for file in (*self._files.values(), self._board):
            with suppress(OSError) if quietly else nullcontext():
                file.close()
        if quietly:
            events.close = lambda: None  # else it tries again at exit, with a traceback

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[Callable[[int], None]]:
        """Time what is inside, which must wait for its device; yields a way to say its tokens."""
        count = [tokens]
        began = time.perf_counter()
        yield lambda n: count.__setitem__(0, n)
        seconds, before = self._phases.get(name, (0.0, 0))
        self._phases[name] = (seconds + time.perf_counter() - began, before + count[0])

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take a step's metrics, arrays still on the device, with the phases timed since the last.

        `time/<phase>` is seconds, `speed/<phase>` tokens per second; the first step's compilation
        is in them.
        """
        self.flush()
        timed: dict[str, Any] = {}
        for name, (seconds, tokens) in self._phases.items():
            timed[f"time/{name}"] = seconds
            if tokens:
                timed[f"speed/{name}"] = tokens / max(seconds, 1e-9)
        self._phases = {}
        for x in metrics.values():
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        self._pending = (step, {**metrics, **timed})

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        if not self._host:
            return
        values = {name: _number(name, x) for name, x in metrics.items()}
        row: dict[str, Any] = {"step": step, "wall": round(time.time(), 3)}
        # JSON has no nan: such a value is null.
        row |= {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._append("metrics.jsonl", row)
        for name, x in values.items():
            self._board.add_scalar(name, x, step)
        self._show(step + 1, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write texts: `{"prompt", "response", "reward", ...}`, said by the weights of a step."""
        if self._host:
            for row in rows:
                self._append("samples.jsonl", {"step": step, **row})

    def _append(self, file: str, row: Mapping[str, Any]) -> None:
        try:
            self._files[file].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._files[file].flush()
        except OSError as error:
            raise OSError(
                f"cannot write {self._files[file].name}: {error.strerror}; free some space, then "
                "resume the run: lines past its last checkpoint will be written again"
            ) from error

    def _show(self, done: int, values: Mapping[str, float]) -> None:
        parts = [f"{label} {form.format(values[m])}" for m, label, form in SHOWN if m in values]
        if not parts:
            parts = [f"{m} {x:.3f}" for m, x in values.items() if m.endswith("/loss")][:2]
        speeds = [
            f"{name.removeprefix('speed/')} {_short(x)}"
            for name, x in values.items()
            if name.startswith("speed/")
        ]
        if speeds:
            parts.append("tok/s: " + ", ".join(speeds))
        said = "  ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, said=said)
            return
        now = time.monotonic()
        if now - self._said < LINE_SECONDS and done not in (self.start + 1, self.total):
            return
        self._said = now
        if done == self.start + 1:  # it compiled: no measure of the others
            self._began, left = now, ""
        else:
            each = (now - self._began) / (done - self.start - 1)
            left = f"  {each * (self.total - done):.0f} s left"
        print(f"{self.name} {done}/{self.total}  {said}{left}", flush=True)


def _number(name: str, x: Any) -> float:
    x = np.asarray(x)
    if x.ndim:
        raise ValueError(f"metric {name!r} has shape {x.shape}; a metric is one number")
    return float(x)


def _short(x: float) -> str:
    """1234 → 1.2k."""
    for unit in ("", "k", "M"):
        if x < 1000:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}G"


def keep_lines_before(path: Path, step: int) -> None:
    """Drop lines of a .jsonl file whose `step` is not below `step`, and a half-written last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if found < step:
            kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    os.replace(part, path)
