"""One self-contained HTML page about a run or a pipeline, and its curves as report.png.

What is shown is what the run wrote: metrics.jsonl, samples.jsonl, run.json, and results.json if an
experiment left one: `{"title", "text", "rows": [{"name", "value", "low", "high", "unit", "note"}],
"samples": [{"before", "after", "gain"}]}`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

# Panels that every run with rollouts has: title, unit, metrics. The rest is found by its name.
PANELS = (
    ("Reward", "per sample", ("rollout/reward", "rollout/return")),
    ("KL(policy‖reference)", "nats per sample", ("rollout/kl",)),
    ("Entropy", "nats per token", ("rollout/entropy",)),
    ("Length of responses", "tokens", ("rollout/length",)),
)
LEGEND = {"rollout/reward": "score", "rollout/return": "after KL and penalties"}


class ReportError(ValueError):
    """A directory that no report can be written about."""


def report(directory: str | Path) -> Path:
    """Write report.html and report.png into a run's directory; returns the page's path.

    Raises:
        ReportError: if the directory holds no metrics.
    """
    directory = Path(directory)
    stages = _stages(directory)
    record = _json(directory / "run.json")
    result = _json(directory / "results.json")
    figures = {name: _figure(name, rows) for name, (rows, _) in stages.items()}
    last = list(figures)[-1]
    (directory / "report.png").write_bytes(figures[last])

    parts = [f"<h1>{_text(record.get('config', {}).get('name', directory.name))}</h1>"]
    if result:
        parts.append(_result(result))
    for name, (rows, samples) in stages.items():
        heading = f"<h2>{_text(name)}</h2>" if len(stages) > 1 else ""
        image = base64.b64encode(figures[name]).decode()
        parts += [
            f"<section>{heading}<p>{_text(summary(rows))}</p>",
            f'<img alt="curves of {_text(name)}" src="data:image/png;base64,{image}">',
            _samples(samples),
            "</section>",
        ]
    parts.append(_record(record))
    page = PAGE.replace("{title}", _text(directory.name)).replace("{body}", "\n".join(parts))
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summary(rows: Rows) -> str:
    """What happened, in a sentence: the main metrics of the first steps and of the last."""
    wanted = [m for _, _, names in PANELS for m in names[:1]]
    wanted += [m for m in rows[-1] if m.endswith("/loss")]
    parts = []
    for metric in wanted:
        values = [r[metric] for r in rows if r.get(metric) is not None]
        if values and len(parts) < 5:
            n = max(1, min(5, len(values) // 2))
            first, last = sum(values[:n]) / n, sum(values[-n:]) / n
            parts.append(f"{metric} {first:.3g} → {last:.3g}")
    seconds = rows[-1]["wall"] - rows[0]["wall"] if "wall" in rows[0] else 0.0
    return f"{rows[-1]['step'] + 1} steps in {seconds:.0f} s: " + ", ".join(parts) + "."


# ------------------------------------------------------------------------------------------ files


def _stages(directory: Path) -> dict[str, tuple[Rows, Rows]]:
    """Metrics and samples of the run, or of each stage in the order in which they ran."""
    if not directory.is_dir():
        raise ReportError(f"there is no directory {directory}; give the --out of a train command")
    found = [directory] if (directory / "metrics.jsonl").is_file() else []
    found += sorted(
        (p.parent for p in directory.glob("*/metrics.jsonl")),
        key=lambda p: (_lines(p / "metrics.jsonl") or [{}])[0].get("wall", 0.0),
    )
    stages = {p.name: (_lines(p / "metrics.jsonl"), _lines(p / "samples.jsonl")) for p in found}
    stages = {name: both for name, both in stages.items() if both[0]}
    if not stages:
        raise ReportError(f"{directory} holds no metrics yet (no metrics.jsonl with a step in it)")
    return stages


def _lines(path: Path) -> Rows:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that a killed run was writing
            continue
    return rows


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---------------------------------------------------------------------------------------- figures


def _panels(rows: Rows) -> list[tuple[str, str, list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = [(t, unit, [m for m in metrics if m in names]) for t, unit, metrics in PANELS]
    losses = [m for m in names if m.endswith("/loss") and not m.startswith("eval/")]
    for loss in losses:
        learner = loss.removesuffix("/loss")
        panels.append((f"Loss of {learner}", "per token or group", [loss]))
    held = [m for m in names if m.startswith("eval/") and m.endswith("/loss")]
    panels.append(("Loss on held-out data", "", held))
    panels.append(("Accuracy", "share", [m for m in names if m.endswith("/accuracy")]))
    panels.append(("Throughput", "tokens/s", [m for m in names if m.startswith("speed/")]))
    return [panel for panel in panels if panel[2]]


def _figure(name: str, rows: Rows) -> bytes:
    """All panels of a stage as a PNG."""
    panels = _panels(rows)
    columns = min(3, max(1, len(panels)))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    for place, (title, unit, metrics) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        for metric in metrics:
            points = [(r["step"] + 1, r[metric]) for r in rows if r.get(metric) is not None]
            if not points:
                continue
            few = len(points) <= len(rows) / 4 or len(points) < 15
            steps, values = zip(*points, strict=True)
            label = LEGEND.get(metric, metric.removeprefix("speed/"))
            axes.plot(steps, values, marker="." if few else None, linewidth=1.4, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if title == "Throughput":
            axes.set_yscale("log")
        if len(metrics) > 1:
            axes.legend(fontsize=7, framealpha=0.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- HTML


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else _text(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _result(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result.get("rows", ()):
        interval = f"[{_number(row['low'])}, {_number(row['high'])}]" if "low" in row else ""
        cells = (row["name"], _number(row["value"]), interval, row.get("unit", ""))
        rows.append([_text(cell) for cell in (*cells, row.get("note", ""))])
    found = f"<section><h2>{_text(result.get('title', 'Result'))}</h2>"
    found += f'<p class="lead">{_text(result.get("text", ""))}</p>'
    found += _table(("", "value", "95 % interval", "unit", ""), rows)
    if result.get("samples"):
        found += "<h3>The best, some in the middle, and the worst changes</h3>"
        found += _table(
            ("gain", "before", "after"),
            [
                (_number(s["gain"]), _text(s["before"]), _text(s["after"]))
                for s in result["samples"]
            ],
        )
    return found + "</section>"


def _samples(rows: Rows) -> str:
    """The same prompts, with the same random numbers, at the first step and at the last."""
    if not rows:
        return ""
    first, last = rows[0]["step"], rows[-1]["step"]
    before = [r for r in rows if r["step"] == first]
    after = [r for r in rows if r["step"] == last]
    if first == last:
        head = ("prompt", f"response at step {first}", "reward")
        body = [
            [_text(r["prompt"]), _text(r["response"]), _number(r.get("reward", ""))] for r in after
        ]
        return "<h3>Samples</h3>" + _table(head, body)
    head = ("prompt", f"step {first}", "reward", f"step {last}", "reward")
    body = [
        [
            _text(a["prompt"]), _text(a["response"]), _number(a.get("reward", "")),
            _text(b["response"]), _number(b.get("reward", "")),
        ]
        for a, b in zip(before, after, strict=False)
    ]  # fmt: skip
    return "<h3>Samples before and after, on the same prompts</h3>" + _table(head, body)


def _record(record: Mapping[str, Any]) -> str:
    if not record:
        return ""
    versions = [(_text(k), _text(v)) for k, v in record.get("versions", {}).items()]
    config = _text(json.dumps(record.get("config", {}), indent=1, ensure_ascii=False))
    settings = " ".join(f"--set {s}" for s in record.get("settings", ()))
    return (
        "<section><h2>How it was made</h2>"
        f"<p><code>rlhf-jax train {_text(Path(record.get('file', '')).name)} {_text(settings)}"
        "</code></p>"
        + _table(("", "version"), versions)
        + f"<details><summary>The whole configuration</summary><pre>{config}</pre></details>"
        "</section>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.lead { font-size: 1.1rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 8px; padding: 4px;
      box-sizing: border-box; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
         border-bottom: 1px solid var(--line); }
th { background: var(--soft); } td { font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: .8rem; background: var(--soft); padding: .8rem; }
</style></head><body>
{body}
</body></html>
"""
