"""Curves of a run: which metrics belong together, and drawing them as SVG for a page or as one PNG.

The page has tens of small drawings, so they are written as SVG directly: milliseconds, a few
kilobytes, and the page's own ink in light and in dark.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

from rlhf_jax.page import number, text

Rows = list[dict[str, Any]]

COLOURS = ("#3d85c8", "#e0803a", "#4ea172", "#b06ac4", "#d2555f", "#8f8f3c")  # on white and black
MANY = 40  # points that need a running mean
POINTS = 400  # drawn at most; longer curves are means of neighbouring steps


@dataclass(frozen=True)
class Panel:
    """Metrics on one pair of axes."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    log: bool = False
    labels: tuple[str, ...] = ()


# What every run with rollouts has. Learners, held-out data and phases are found by their names.
ROLLOUTS = (
    Panel(
        "Reward",
        "per sample",
        ("rollout/reward", "rollout/return"),
        labels=("score", "after KL and penalties"),
    ),
    Panel("KL(policy‖reference)", "nats per sample", ("rollout/kl",)),
    Panel("Entropy", "nats per token", ("rollout/entropy",)),
    Panel("Length of responses", "tokens", ("rollout/length",)),
)


def main_panels(rows: Rows) -> list[Panel]:
    """Reward, KL, entropy, length, losses, accuracies, throughput: those that were logged."""
    names = metric_names(rows)

    def ending(end: str, held_out: bool) -> tuple[str, ...]:
        return tuple(m for m in names if m.endswith(end) and m.startswith("eval/") == held_out)

    panels = []
    for panel in ROLLOUTS:
        here = [i for i, m in enumerate(panel.metrics) if m in names]
        metrics = tuple(panel.metrics[i] for i in here)
        labels = tuple(panel.labels[i] for i in here if panel.labels)
        panels.append(Panel(panel.title, panel.unit, metrics, labels=labels))
    panels += [
        Panel(f"Loss of {m.removesuffix('/loss')}", "loss", (m,)) for m in ending("/loss", False)
    ]
    panels.append(Panel("Loss on held-out data", "loss", ending("/loss", True)))
    accuracies = ending("/accuracy", False) + ending("/accuracy", True)
    panels.append(Panel("Accuracy", "share of pairs or tokens", accuracies))
    speeds = tuple(m for m in names if m.startswith("speed/"))
    panels.append(Panel("Throughput by phase", "tokens per second", speeds, log=True))
    return [panel for panel in panels if panel.metrics]


def other_panels(rows: Rows) -> dict[str, list[Panel]]:
    """Every metric that the main panels leave out, one panel each, by what stands before its /."""
    shown = {m for panel in main_panels(rows) for m in panel.metrics}
    groups: dict[str, list[Panel]] = {}
    for name in metric_names(rows):
        if name not in shown:
            group, _, rest = name.rpartition("/")
            unit = "seconds" if name.startswith("time/") else ""
            if name.startswith("time/"):
                group, rest = "time", name.removeprefix("time/")
            groups.setdefault(group or "other", []).append(Panel(rest, unit, (name,)))
    return groups


def metric_names(rows: Rows) -> list[str]:
    """Everything that was logged as a number, in the order of its first appearance."""
    return list(dict.fromkeys(m for row in rows for m in row if m not in ("step", "wall")))


def points(rows: Rows, metric: str) -> list[tuple[int, float]]:
    """(steps done, value) where there is a number. First steps are not timed: they compile."""
    first = rows[0]["step"] if metric.startswith(("speed/", "time/")) and len(rows) > 1 else None
    return [
        (row["step"] + 1, row[metric])
        for row in rows
        if row.get(metric) is not None and row["step"] != first
    ]


@dataclass(frozen=True)
class Curve:
    """One metric, ready to draw: `smooth` is a running mean where there are many points."""

    label: str
    colour: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    smooth: tuple[float, ...] | None


def curves(panel: Panel, rows: Rows) -> list[Curve]:
    """The curves of a panel that have points."""
    prefix = _common_prefix(panel.metrics)
    drawn = []
    for place, metric in enumerate(panel.metrics):
        found = thinned(points(rows, metric))
        if not found:
            continue
        label = panel.labels[place] if panel.labels else metric.removeprefix(prefix)
        label = label.removesuffix("/loss").removesuffix("/accuracy")
        steps, values = zip(*found, strict=True)
        smooth = running_mean(values, len(values) // 20) if len(values) >= MANY else None
        drawn.append(Curve(label, COLOURS[place % len(COLOURS)], steps, values, smooth))
    return drawn


WIDTH, HEIGHT = 400, 232  # of a drawing; it scales with the page
LEFT, RIGHT, TOP, BOTTOM = 50, 392, 8, 190  # of the axes in it


def svg(panel: Panel, rows: Rows) -> str:
    """A panel as an HTML figure: title and legend above, an inline SVG below."""
    drawn = curves(panel, rows)
    if not drawn:
        return ""
    low, high = _range([y for c in drawn for y in c.values if y > 0 or not panel.log], panel.log)
    first, last = min(c.steps[0] for c in drawn), max(c.steps[-1] for c in drawn)
    scale = math.log10 if panel.log else float

    def x(step: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * (step - first) / max(1, last - first):.1f}"

    def y(value: float) -> str:
        value = max(value, low) if panel.log else value
        part = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return f"{BOTTOM - (BOTTOM - TOP) * part:.1f}"

    ink = []
    marks = log_ticks(low, high) if panel.log else ticks(low, high, 4)
    for tick, label in zip(marks, tick_labels(marks), strict=True):
        ink.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{RIGHT}"/>')
        ink.append(f'<text x="{LEFT - 6}" y="{y(tick)}" dy=".35em" class="y">{label}</text>')
    for tick in ticks(first, last, 5):
        if tick == int(tick):
            ink.append(f'<text x="{x(tick)}" y="{BOTTOM + 16}" class="x">{short(tick)}</text>')
    ink.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    ink.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" class="x">step</text>')
    for c in drawn:
        for values, kind in ((c.values, "thin" if c.smooth else "thick"), (c.smooth, "thick")):
            if values:
                path = "L".join(f"{x(s)} {y(v)}" for s, v in zip(c.steps, values, strict=True))
                ink.append(f'<path class="{kind}" stroke="{c.colour}" d="M{path}"/>')
        if len(c.steps) < MANY / 2:
            ink += [
                f'<circle cx="{x(s)}" cy="{y(v)}" r="2.4" fill="{c.colour}"/>'
                for s, v in zip(c.steps, c.values, strict=True)
            ]
    return (
        f"<figure><figcaption><b>{text(panel.title)}</b> {text(panel.unit)}{_legend(drawn)}"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(panel.title)} by step">{"".join(ink)}</svg></figure>'
    )


def _legend(drawn: list[Curve]) -> str:
    """Colours and last values; a single curve needs no name."""
    parts = []
    for c in drawn:
        end = c.values[-1] if c.smooth is None else c.smooth[-1]
        name = f"{text(c.label)} " if len(drawn) > 1 else "last "
        parts.append(f'<span><i style="background:{c.colour}"></i>{name}{number(end)}</span>')
    return f'<span class="legend">{"".join(parts)}</span>'


def png(panels: list[Panel], rows: Rows, *, title: str) -> bytes:
    """Several panels as one picture, black on white."""
    # Here, not above: it takes seconds to import, and only the report needs it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", parse_math=False)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        drawn = curves(panel, rows)
        for c in drawn:
            label = c.label.replace("$", r"\$")
            if c.smooth is not None:
                axes.plot(c.steps, c.values, color=c.colour, linewidth=0.7, alpha=0.4)
            marker = "o" if len(c.steps) < MANY / 2 else None
            thick = c.values if c.smooth is None else c.smooth
            axes.plot(c.steps, thick, color=c.colour, lw=1.7, marker=marker, ms=2.5, label=label)
        axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold", parse_math=False)
        axes.set_xlabel("step", fontsize=8.5)
        axes.set_ylabel(panel.unit, fontsize=8.5)
        axes.tick_params(labelsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.log:
            axes.set_yscale("log")
            axes.set_yticks(log_ticks(*axes.get_ylim()), minor=False)
            axes.set_yticks([], minor=True)
            axes.yaxis.set_major_formatter(lambda value, _: short(value))
        if len(drawn) > 1:
            axes.legend(fontsize=7.5, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _range(values: list[float], log: bool) -> tuple[float, float]:
    """What the axis spans: all values and a little room, also where they are all the same."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if log:
        return low / 1.2, high * 1.2
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two."""
    if high <= low:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / count))
    size *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * size) <= count + 0.5)
    found = [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]
    return [round(t, 12 - math.floor(math.log10(size))) if size < 1 else t for t in found]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two, with 2 and 5 where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 1000 else (1, 2, 5)
    return [f * 10.0**n for n in powers for f in factors if low <= f * 10.0**n <= high]


def tick_labels(marks: list[float]) -> list[str]:
    """As few digits as tell the marks of one axis apart: 5.569 and 5.5695."""
    for digits in range(3, 9):
        found = [short(mark, digits) for mark in marks]
        if len(set(found)) == len(found):
            break
    return found


def short(value: float, digits: int = 4) -> str:
    """A tick's label: 0.25, 1,500, 20k, 3M, 5e−07."""
    size = abs(value)
    if 1e4 <= size < 1e10:
        unit, scale = ("M", 1e6) if size >= 1e6 else ("k", 1e3)
        return f"{value / scale:.{digits}g}{unit}".replace("-", "−")
    plain = size >= 1000 and size < 1e4 and value == int(value)
    return (f"{value:,.0f}" if plain else f"{value:.{digits}g}").replace("-", "−")


def thinned(found: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` points: means over equal runs of neighbours, placed at their last step."""
    size = math.ceil(len(found) / POINTS)
    if size <= 1:
        return found
    runs = [found[i : i + size] for i in range(0, len(found), size)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def running_mean(values: tuple[float, ...], width: int) -> list[float]:
    """Mean over `width` neighbours on each side, fewer at the ends."""
    found = []
    for i in range(len(values)):
        near = values[max(0, i - width) : i + width + 1]
        found.append(sum(near) / len(near))
    return found


def _common_prefix(names: tuple[str, ...]) -> str:
    """`speed/` of speed/rollout and speed/update/policy."""
    first = names[0].split("/")[0] + "/"
    return first if all(name.startswith(first) for name in names) else ""
