"""One self-contained HTML page about a run or a pipeline, and its main curves as report.png.

What is shown is what the run wrote: metrics.jsonl, samples.jsonl, run.json, eval.json if `eval` was
called, and results.json if an experiment left one:
`{"title", "text", "rows": [{"name", "value", "low", "high", "unit", "note"}],
"samples": [{"before", "after", "gain"}]}`.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax import figures
from rlhf_jax.figures import Rows
from rlhf_jax.page import change, details, number, page, said, table, text

SHOWN_SAMPLES = 24


class ReportError(ValueError):
    """A directory that no report can be written about."""


@dataclass(frozen=True)
class Stage:
    """What one run wrote."""

    name: str
    rows: Rows
    samples: Rows
    evaluation: dict[str, Any]
    config: dict[str, Any]


def report(directory: str | Path) -> Path:
    """Write report.html and report.png into a run's directory; returns the page's path.

    Raises:
        ReportError: if the directory holds no metrics, a file in it is not what a run writes, or it
            cannot be written.
    """
    directory = Path(directory)
    record = _json(directory / "run.json")
    result = _json(directory / "results.json")
    stages = _stages(directory, record.get("config", {}))
    name = record.get("config", {}).get("name", directory.resolve().name)

    last = stages[-1]
    lead = result.get("text") or summary(last)
    body = [f'<header><h1>{text(name)}</h1><p class="lead">{text(lead)}</p>']
    if len(stages) > 1:
        links = (f'<a href="#{text(s.name)}">{text(s.name)}</a>' for s in stages)
        body.append(f'<nav class="soft">Stages: {"".join(links)}<a href="#made">settings</a></nav>')
    body.append("</header>")
    if result:
        body.append(_result(result))
    body += [_stage(stage, alone=len(stages) == 1) for stage in stages]
    body.append(_record(record, stages))
    heading = name if last.name == name else f"{name}: {last.name}"
    picture = figures.png(figures.main_panels(last.rows), last.rows, title=heading)
    path = directory / "report.html"
    try:
        (directory / "report.png").write_bytes(picture)
        path.write_text(page(name, "\n".join(body)), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from error
    return path


def summary(stage: Stage) -> str:
    """What happened, in a sentence: the main metrics of the first steps and of the last."""
    rows, parts = stage.rows, []
    for panel in figures.main_panels(rows):
        for metric in panel.metrics if panel.title == "Accuracy" else panel.metrics[:1]:
            values = [y for _, y in figures.points(rows, metric)]
            if len(parts) == 6 or not values or metric.startswith("speed/"):
                continue
            n = max(1, min(5, len(values) // 2))
            first, last = statistics.fmean(values[:n]), statistics.fmean(values[-n:])
            what = panel.title[0].lower() + panel.title[1:]
            what = panel.title if panel.title.startswith("KL") else what
            of = f" of {metric.removesuffix('/accuracy')}" if panel.title == "Accuracy" else ""
            parts.append(f"{what}{of} {number(first)} → {number(last)}")
    done, planned = rows[-1]["step"] + 1, stage.config.get("steps")
    part = f" of {planned}" if planned is not None and planned > done else ""
    means = f" From the first steps to the last: {', '.join(parts)}." if parts else ""
    return f"{done}{part} step{'' if (planned or done) == 1 else 's'}.{means}"


# ------------------------------------------------------------------------------------------ files


def _stages(directory: Path, config: Mapping[str, Any]) -> list[Stage]:
    """The run, or each stage of a pipeline in the order in which they run."""
    if not directory.is_dir():
        raise ReportError(f"there is no directory {directory}; give the --out of a train command")
    configs = config.get("stages", {})
    found = {p.parent.name: p.parent for p in sorted(directory.glob("*/metrics.jsonl"))}
    order = [name for name in configs if name in found]
    order += [name for name in found if name not in order]
    places = [(name, found[name], configs.get(name, {})) for name in order]
    if (directory / "metrics.jsonl").is_file():
        name = config.get("name", directory.resolve().name)
        places.insert(0, (name, directory, config))
    stages = []
    for name, place, one in places:
        rows = _lines(place / "metrics.jsonl")
        if rows:
            samples = _lines(place / "samples.jsonl")
            stages.append(Stage(name, rows, samples, _json(place / "eval.json"), dict(one)))
    if not stages:
        raise ReportError(
            f"{directory} holds no metrics yet: there is no metrics.jsonl with a step in it, here "
            "or one directory below; give the --out of a train command that has taken a step"
        )
    return stages


def _lines(path: Path) -> Rows:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line that a killed run was writing
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not valid JSON ({error}); mend it or move it away") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path} must hold a JSON object; mend it or move it away")
    return found


# --------------------------------------------------------------------------------------- sections


def _stage(stage: Stage, *, alone: bool) -> str:
    parts = [f'<section id="{text(stage.name)}">']
    if not alone:
        parts.append(f"<h2>{text(stage.name)}</h2><p>{text(summary(stage))}</p>")
    parts += [_warnings(stage.rows), _curves(stage), _evaluation(stage), _samples(stage.samples)]
    parts.append(_time(stage.rows))
    others = figures.other_panels(stage.rows)
    if others:
        content = "".join(
            f"<h3>{text(group)}</h3>" + _grid(stage, panels) for group, panels in others.items()
        )
        parts.append(details("Everything else that was logged", content))
    return "\n".join([*parts, "</section>"])


def _warnings(rows: Rows) -> str:
    found = []
    for metric in figures.metric_names(rows):
        values = [row[metric] for row in rows if metric in row]
        missing = values.count(None)
        if missing:
            found.append(f"{metric} was not finite in {missing} of {len(values)} steps")
        if metric.endswith("/skipped") and values and (values[-1] or 0) > 0:
            learner = metric.removesuffix("/skipped")
            found.append(f"{learner} skipped {number(values[-1])} updates that were not finite")
    return "".join(f'<p class="warn">Note: {text(line)}.</p>' for line in found)


def _curves(stage: Stage) -> str:
    panels = figures.main_panels(stage.rows)
    if not panels:
        return ""
    note = "Thin lines are steps, thick ones running means." if len(stage.rows) >= 40 else ""
    return _grid(stage, panels) + (f'<p class="soft">{note}</p>' if note else "")


def _grid(stage: Stage, panels: list[figures.Panel]) -> str:
    drawn = "".join(figures.svg(panel, stage.rows) for panel in panels)
    return f'<div class="curves">{drawn}</div>'


def _evaluation(stage: Stage) -> str:
    if not stage.evaluation:
        return ""
    rows = [(text(k), number(v)) for k, v in stage.evaluation.items()]
    return "<h3>Evaluation of the last checkpoint</h3>" + table(
        ("metric", "mean"), rows, numbers=(1,), kind="numbers"
    )


def _result(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result.get("rows", ()):
        bounds = [row.get("low"), row.get("high")]
        interval = "" if None in bounds else f"[{number(bounds[0])}, {number(bounds[1])}]"
        note = f"<small>{text(row['note'])}</small>" if row.get("note") else ""
        name = text(row.get("name", "")) + note
        rows.append((name, number(row.get("value")), interval, text(row.get("unit", ""))))
    found = f"<section><h2>{text(result.get('title', 'Result'))}</h2>"
    if rows:
        found += table(("", "value", "95 % interval", "unit"), rows, numbers=(1, 2), kind="numbers")
    if result.get("samples"):
        found += "<h3>The best, some in the middle, and the worst changes</h3>"
        pairs = [
            (said(s.get("before", "")), said(s.get("after", "")), _coloured(s.get("gain")))
            for s in result["samples"]
        ]
        found += table(("before", "after", "gain"), pairs, numbers=(2,), kind="texts")
    return found + "</section>"


def _coloured(value: float | None) -> str:
    if value is None:
        return number(value)
    kind = "good" if value > 0 else "bad" if value < 0 else "soft"
    return f'<span class="{kind}">{change(value)}</span>'


def _samples(rows: Rows) -> str:
    """The same prompts, with the same random numbers, before the first step and after the last."""
    if not rows:
        return ""
    first, last = rows[0]["step"], rows[-1]["step"]
    before = [r for r in rows if r["step"] == first]
    after = [r for r in rows if r["step"] == last]
    if first == last:
        head = ("prompt", f"response after step {last}", "reward")
        body = [(text(r["prompt"]), said(r["response"]), number(r.get("reward"))) for r in after]
        return "<h3>Samples</h3>" + table(head, body, numbers=(2,), kind="texts")
    both = list(zip(before, after, strict=False))
    gains = [(b.get("reward") or 0.0) - (a.get("reward") or 0.0) for a, b in both]
    order = sorted(range(len(both)), key=lambda i: -gains[i])
    note = "Sorted by the change of reward."
    if len(order) > SHOWN_SAMPLES:
        half = SHOWN_SAMPLES // 2
        order = order[:half] + order[-half:]
        note = f"The {half} that gained most and the {half} that gained least of {len(both)}."
    body = []
    for i in order:
        a, b = both[i]
        cells = (text(a["prompt"]), said(a["response"]), number(a.get("reward")))
        body.append((*cells, said(b["response"]), number(b.get("reward")), _coloured(gains[i])))
    head = ("prompt", f"at step {first}", "reward", f"at step {last}", "reward", "change")
    return (
        "<h3>Samples before and after, on the same prompts with the same random numbers</h3>"
        f'<p class="soft">{note}</p>' + table(head, body, numbers=(2, 4, 5), kind="texts")
    )


def _time(rows: Rows) -> str:
    """Where the time went; the first step, which compiles, is in the total and in no speed."""
    names = [m for m in figures.metric_names(rows) if m.startswith("time/")]
    total = {m: sum(row.get(m) or 0.0 for row in rows) for m in names}
    everything = sum(total.values())
    if not everything:
        return ""
    body = []
    for metric in names:
        phase = metric.removeprefix("time/")
        seconds = [y for _, y in figures.points(rows, metric)]
        speeds = [y for _, y in figures.points(rows, f"speed/{phase}")]
        body.append(
            (
                text(phase),
                number(rows[0].get(metric)),
                number(statistics.median(seconds) if seconds else None),
                number(statistics.median(speeds) if speeds else None),
                f"{total[metric] / everything:.0%}",
            )
        )
    head = ("phase", "first step, s", "median step, s", "median tokens/s", "share of all")
    return f"<h3>Where {number(everything)} s went</h3>" + table(
        head, body, numbers=(1, 2, 3, 4), kind="numbers"
    )


def _record(record: Mapping[str, Any], stages: list[Stage]) -> str:
    if not record:
        return ""
    found = '<section id="made"><h2>How it was made</h2>'
    if record.get("command"):
        found += f"<p><code>{text(shlex.join(map(str, record['command'])))}</code></p>"
    if record.get("settings"):
        found += f"<p>Settings beside the file: {text(', '.join(record['settings']))}</p>"
    versions = [(text(k), text(v)) for k, v in record.get("versions", {}).items()]
    if versions:
        found += table(("software and hardware", ""), versions, kind="numbers")
    config = record.get("config", {})
    for stage in [s for s in stages if config.get("stages", {}).get(s.name)]:
        found += details(f"Configuration of {stage.name}", _pre(stage.config))
    return found + details("The whole configuration", _pre(config)) + "</section>"


def _pre(config: Mapping[str, Any]) -> str:
    return f"<pre>{text(json.dumps(config, indent=1, ensure_ascii=False))}</pre>"
