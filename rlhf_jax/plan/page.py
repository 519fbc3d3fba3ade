"""A plan as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

GIB, MIB, GB = 2**30, 2**20, 1e9


def wide() -> Console:
    """The terminal, or lines of a file that are long enough to cut no name."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Memory, messages and times of every phase, and the verdict."""
    console = console or wide()
    mesh = " × ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    chip = found["chip"]["name"]
    console.print(f"{found['experiment']} on {found['topology']}: {found['devices']} × {chip}")
    console.print(f"mesh: {mesh}\n")
    console.print(_memory(found))
    console.print(_resident(found) + "\n", highlight=False)
    console.print(_messages(found))
    console.print(_times(found))
    for line in verdict(found):
        console.print(line, highlight=False, markup=False)
    wall, own = found["planned_in"], found["processor_seconds"]
    console.print(f"planned in {wall:,.0f} s, with {own:,.0f} s of processors", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("phase", "what", "over") else "right")
    return table


def _unit(found) -> tuple[int, str]:
    """Bytes and name of the unit that shows what there is: of a small trial, MiB."""
    small = all(
        "memory" in phase and phase["memory"]["total"] < GIB / 4 for phase in found["phases"]
    )
    return (MIB, "MiB") if small else (GIB, "GiB")


def _memory(found) -> Table:
    limit, (unit, name) = found["chip"]["memory"], _unit(found)
    table = _table(
        f"memory of each device, {name}; the chip has {limit / GIB:,.1f} GiB",
        *("phase", "arguments", "new results", "temporaries", "peak", "beside it", "in all", ""),
        "compiled in",
    )
    for phase in found["phases"]:
        seconds = f"{phase['seconds']:,.0f} s"
        if "refused" in phase:
            needs = phase["refused"]["needs"]
            cells = ["", "", "", "" if needs is None else f"{needs / unit:,.2f}", "", "", "refused"]
        else:
            own = phase["memory"]
            new = own["outputs"] - own["aliased"]
            sizes = (own["arguments"], new, own["temporaries"], own["peak"], own["elsewhere"])
            cells = [f"{x / unit:,.2f}" for x in (*sizes, own["total"])]
            cells.append(f"{own['total'] / limit:.0%}")
        table.add_row(phase["name"], *cells, seconds)
    return table


def _resident(found) -> str:
    """What stays, and the largest of it."""
    unit, called = _unit(found)
    whole = sum(found["resident"].values())
    parts = ", ".join(f"{name} {size / unit:,.2f}" for name, size in found["resident"].items())
    lines = [f"between phases: {whole / unit:,.2f} {called} ({parts})"]
    if found["cache"]:
        lines.append(f"keys and values while sampling: {found['cache'] / unit:,.2f} {called}")
    largest = [f"{path} {shape} {size / unit:,.3f}" for size, path, shape in found["largest"][:3]]
    lines.append("largest that stay: " + "; ".join(largest))
    for phase in found["phases"]:
        arrays = phase.get("arrays") or [
            (n, s, "") for n, s in phase.get("refused", {}).get("largest", ())
        ]
        if arrays:
            named = "; ".join(f"{shape} {size / unit:,.3f}" for size, shape, _ in arrays[:3])
            lines.append(f"largest of {phase['name']}: {named}")
    return "\n".join(lines)


def _messages(found) -> Table:
    table = _table(
        "messages of one iteration",
        *("phase", "what", "over", "times", "GB in all", "GB a device receives", "seconds"),
    )
    sent = [(phase, one) for phase in found["phases"] for one in phase.get("collectives", ())]
    least = 1e-3 * sum(one["moved"] for _, one in sent)
    for phase, one in sent:
        if one["moved"] >= least:
            mark = "≤ " if one["bounded"] else ""
            mark = "? × " if one["unknown"] else mark
            seconds = "" if one["seconds"] is None else f"{one['seconds']:.3g}"
            cells = [f"{mark}{one['count']:,}", f"{one['bytes'] / GB:,.3g}"]
            cells += [f"{one['moved'] / GB:,.3g}", seconds]
            table.add_row(phase["name"], one["kind"], " × ".join(one["axes"]), *cells)
    table.caption = f"{sum(one['moved'] < least for _, one in sent)} more are below a thousandth"
    table.caption_justify = "left"
    return table


def _times(found) -> Table:
    columns = ("phase", "TFLOP a device", "useful", "compute", "memory", "links")
    title = "least seconds of one iteration, by the chip's limits"
    table = _table(title, *columns, "overlapped", "in turn")

    def said(x):
        return "" if x is None else f"{x:.3g}"

    for phase in found["phases"]:
        for name, part in phase.get("parts", {}).items():
            limits = [part[key] for key in ("compute", "memory", "links")]
            useful = phase["useful_flops"]
            share = f"{useful / phase['flops']:.0%}" if useful and phase["flops"] else ""
            label = f"{phase['name']}: {name}" if name else phase["name"]
            both = [None, None] if None in limits else [max(limits), sum(limits)]
            cells = [f"{part['flops'] / 1e12:,.3g}", share, *map(said, (*limits, *both))]
            table.add_row(label, *cells)
    return table


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Does it fit, how fast at most, and what to change."""
    lines = []
    if found["seconds"] is not None:
        best, worst = found["seconds"]
        line = (
            f"an iteration: at least {best:,.3g} s if all overlaps, {worst:,.3g} s if nothing does"
        )
        if found["speed"] is not None:
            fast, slow = found["speed"]["tokens_per_second"]
            line += f"; so at most {fast:,.0f} sampled tokens/s ({slow:,.0f})"
        lines.append(line)
    if found["left_out"]:
        lines.append(f"not planned: {'; '.join(found['left_out'])}")
    if found["fits"]:
        lines.append("it fits")
        return lines
    limit = found["chip"]["memory"]
    for phase in found["phases"]:
        needs = phase["refused"]["needs"] if "refused" in phase else phase["memory"]["total"]
        if "refused" in phase or needs > limit:
            amount = "more than there is" if needs is None else f"{needs / GIB:,.2f} GiB"
            lines.append(f"{phase['name']} does not fit: {amount} of {limit / GIB:,.2f} GiB")
            if needs is None or needs <= limit:
                lines.append(f"  the compiler: {phase['refused']['said']}")
            least = "at least " if needs is None else ""
            lines += [
                f"  {least}{one['saves'] / GIB:,.2f} GiB less: {one['change']}"
                for one in found["advice"]
                if one["phase"] == phase["name"]
            ]
    return lines
