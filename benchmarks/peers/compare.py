"""One PPO iteration here and in other libraries, interleaved: the same weights, the same work.

    benchmarks/peers/setup.sh
    python benchmarks/peers/compare.py --size S
    python benchmarks/peers/compare.py --size M --mean 23 --peers trl --out compared.json

Each library is a process of its own that is built and warmed up once; then they take turns, one
iteration each, while the others wait.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = {  # environment, program, what it is told beside the directory of the work
    "trl": ("trl", "trl_ppo.py"),
    "trl-compiled": ("trl", "trl_ppo.py", "compiled"),
    "tunix": ("tunix", "tunix_ppo.py"),
    "hf": ("hf", "hf_generate.py"),
}
OURS = "ours"
TIMES = ("seconds", "rollout", "score", "update")
TICK = os.sysconf("SC_CLK_TCK")


class WorkerError(RuntimeError):
    """A worker that did not answer."""


class Worker:
    """A process that answers each "go" with a line of JSON."""

    def __init__(self, name: str, command: Sequence[str], log: Path):
        self.name, self.log, pipe = name, log, subprocess.PIPE
        with log.open("w") as said:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=said, text=True
            )

    def ready(self) -> dict[str, Any]:
        """What it says of itself once it is built and warm."""
        return self.answer()["ready"]

    def turn(self) -> dict[str, float]:
        """One iteration, and the cores that it and everyone else had meanwhile."""
        own, everyone = _ticks(self.process.pid)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self.answer()
        own, everyone = (
            b - a for a, b in zip((own, everyone), _ticks(self.process.pid), strict=True)
        )
        each = TICK * found["seconds"]
        return found | {"cores": own / each, "others": max(everyone - own, 0) / each}

    def close(self) -> None:
        """No more turns."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON."""
        for line in self.process.stdout:  # libraries print there, too
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
        self.process.wait()
        last = "".join(self.log.read_text().splitlines(keepends=True)[-15:])
        raise WorkerError(f"{self.name} ended with status {self.process.returncode}:\n{last}")


def _ticks(process: int) -> tuple[int, int]:
    """Ticks of a process with all its threads, and of the whole machine (user, nice, system)."""
    own = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    everyone = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]
    return int(own[11]) + int(own[12]), sum(map(int, everyone))


def compared(turns: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Median, least and most of each worker's times; of peers also how often we fit into theirs.

    A ratio is a peer's seconds over ours in the same round: 2 means that we are twice as fast.
    """
    table = {}
    for name, found in turns.items():
        keys = TIMES if "update" in found[0] else ("rollout",)  # what does nothing else
        row = {"times": {key: _spread([x[key] for x in found]) for key in keys}}
        if name != OURS and OURS in turns:
            pairs = list(zip(found, turns[OURS], strict=True))
            row["ratios"] = {k: _spread([peer[k] / own[k] for peer, own in pairs]) for k in keys}
        row["tokens"] = statistics.mean(x["tokens"] for x in found)
        row["speed"] = statistics.median(x["tokens"] / x["rollout"] for x in found)
        table[name] = row | {k: statistics.mean(x[k] for x in found) for k in ("cores", "others")}
    return table


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def show(table: Mapping[str, Mapping[str, Any]], rows: int) -> str:
    """The result as two tables: times, and ratios."""
    heads = ("iteration", *TIMES[1:])
    lines = ["".join([" " * 13, *(f"{x:>22}" for x in heads), "  tokens/s  length  cores  others"])]
    for name, row in table.items():
        cells = "".join(_cell(row["times"].get(key), 3) for key in TIMES)
        counts = f"{row['speed']:10,.0f}{row['tokens'] / rows:8.1f}"
        lines.append(f"{name:13}{cells}{counts}{row['cores']:7.2f}{row['others']:8.2f}")
    lines.append("times as fast as they are we are")
    for name, row in table.items():
        if "ratios" in row:
            lines.append(f"{name:13}" + "".join(_cell(row["ratios"].get(key), 2) for key in TIMES))
    return "\n".join(lines)


def _cell(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return " " * 22
    median, least, most = (f"{found[k]:.{digits}f}" for k in ("median", "least", "most"))
    return f"{median} ({least}–{most})".rjust(22)


def run(commands: Mapping[str, Sequence[str]], logs: Path, repeats: int) -> tuple[dict, dict]:
    """All turns by worker, and what the workers said of themselves."""
    workers: list[Worker] = []
    facts = {}
    try:
        for name, command in commands.items():
            print(f"{name}: building and warming up", flush=True)
            workers.append(Worker(name, command, logs / f"{name}.log"))
            facts[name] = workers[-1].ready()
        turns: dict[str, list] = {name: [] for name in commands}
        for number in range(repeats):
            for worker in workers:
                turns[worker.name].append(worker.turn())
            said = ", ".join(
                f"{name} {found[-1]['seconds']:.2f} s" for name, found in turns.items()
            )
            print(f"round {number + 1} of {repeats}: {said}", flush=True)
        return turns, facts
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    """Export, run, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S", help="of benchmarks/ppo.py; default: S")
    parser.add_argument("--mean", type=float, help="mean length of a response; default: all full")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="iterations that count; default: 5")
    parser.add_argument("--peers", default="trl,tunix,hf",
                        help=f"of {', '.join(PEERS)}; default: trl,tunix,hf")  # fmt: skip
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A=VALUE",
                        help="more of benchmarks/ppo.py, such as length=128")  # fmt: skip
    parser.add_argument("--venvs", type=Path, default=HERE / ".venvs", help="as setup.sh made them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .json file for all of it")
    options = parser.parse_args()
    peers = [name for name in options.peers.split(",") if name]
    for name in peers:
        if name not in PEERS:
            parser.error(f"no peer {name!r}; valid: {', '.join(PEERS)}")
        venv = PEERS[name][0]
        if not (options.venvs / venv / "bin/python").exists():
            parser.error(f"no {options.venvs / venv}: benchmarks/peers/setup.sh {venv} makes it")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    mean = [] if options.mean is None else [f"mean={options.mean}"]
    best = ["chunks=2", "windows=4"]  # two halves of the rows at once; a cache of four sizes
    if options.mean is None:  # with it there are four micro-batches anyway
        best.append("microbatches=2")
    given = [f"size={options.size}", f"epochs={options.epochs}", *best, *mean, *options.settings]
    ours = [sys.executable, str(HERE / "ours.py"), *(x for s in given for x in ("--set", s))]
    with tempfile.TemporaryDirectory() as where:
        subprocess.run([*ours, "--export", where], check=True)
        work = json.loads((Path(where) / "work.json").read_text())
        commands = {OURS: ours}
        for name in peers:
            venv, program, *more = PEERS[name]
            python = options.venvs / venv / "bin/python"
            commands[name] = [str(python), str(HERE / program), where, *more]
        try:
            turns, facts = run(commands, Path(where), options.repeats)
        except WorkerError as error:
            raise SystemExit(str(error)) from None
    table = compared(turns)
    print(show(table, work["rows"]))
    if options.out is not None:
        found = {"work": work, "workers": facts, "turns": turns, "table": table}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
