"""A worker's side of `compare.py`: two iterations to warm up, then one for each "go" on stdin.

Each answer is one line of JSON: seconds of the iteration, in all and by phase, and the tokens of
its responses. In between a worker is blocked in a read and uses no core.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WARM = 2  # iterations before "ready": the first compiles


def work() -> dict[str, Any]:
    """What `ours.py --export` wrote: the workload; `weights` is where policy and critic are."""
    where = Path(sys.argv[1])
    return json.loads((where / "work.json").read_text()) | {"weights": where}


def said_tokens(rows: Sequence[Sequence[int]], stop: int | None) -> int:
    """Tokens of all responses, each with the token that ends it; what follows is padding."""
    return sum(row.index(stop) + 1 if stop in row else len(row) for row in rows)


class Turns:
    """The clock of a worker. Phases follow each other: one begins where the last has ended."""

    def __init__(self, **facts: Any):
        self.facts, self.count = facts, 0
        self.start()

    def start(self) -> None:
        """An iteration begins now."""
        self.found = {}
        self.began = self.last = time.perf_counter()

    def ended(self, phase: str) -> None:
        """A phase ends now."""
        now = time.perf_counter()
        self.found[phase], self.last = now - self.last, now

    def at_end_of(self, fn: Callable, phase: str, look: Callable = lambda made: {}) -> Callable:
        """The function, whose return ends a phase; `look` makes facts of what it returns."""

        def wrapped(*args, **kwargs):
            made = fn(*args, **kwargs)
            self.ended(phase)
            self.found |= look(made)
            return made

        return wrapped

    def done(self, phase: str | None = None, **found: Any) -> None:
        """The iteration ends, with its last phase: answer, wait for a "go"; none left: exit."""
        if phase is not None:
            self.ended(phase)
        self.found |= {"seconds": time.perf_counter() - self.began} | found
        self.count += 1
        if self.count >= WARM:
            warm = self.count == WARM
            print(json.dumps({"ready": self.facts} if warm else self.found), flush=True)
            if sys.stdin.readline().strip() != "go":
                raise SystemExit
        self.start()
