"""The HTML of a report: tables, escaping, and the one page that everything stands on."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any


def text(value: Any) -> str:
    """Escaped, with control characters made visible: a small model writes any byte."""
    shown = "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value)
    )
    return html.escape(shown)


def said(value: str) -> str:
    """A sample's text."""
    return text(value) if value else '<span class="soft">(nothing)</span>'


def number(value: Any) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int) or 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")  # 16.0 beside 14.8


def change(value: float) -> str:
    """A number with its sign."""
    return ("+" if value > 0 else "") + number(value)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), kind: str
) -> str:
    """Cells are HTML already; `numbers` are the columns set flush right.

    `kind` is a class: `texts` tables become cards on narrow screens, where each cell needs its
    column's name.
    """

    def cell(tag: str, column: int, content: str) -> str:
        right = ' class="n"' if column in numbers else ""
        label = f' data-label="{html.escape(head[column])}"' if tag == "td" else ""
        return f"<{tag}{right}{label}>{content}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(tag, i, c) for i, c in enumerate(cells)) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead>{line("th", head)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """Something to open: `summary` is text, `content` HTML."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def page(title: str, body: str) -> str:
    """A whole document that loads nothing from anywhere."""
    return PAGE.replace("{title}", text(title)).replace("{style}", STYLE).replace("{body}", body)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5d646e; --line: #d9dde3;
  --back: #ffffff; --shade: #f4f6f8; --good: #1d7a46; --bad: #b3383f; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa2ad; --line: #343a42;
  --back: #15181c; --shade: #1e2227; --good: #6cc995; --bad: #ee8b90; --warn: #e3b15a; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--back); max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.12rem; }
.soft { color: var(--soft); font-size: .88rem; }
.warn { color: var(--warn); font-weight: 600; }
nav a { margin-right: 1rem; } a { color: inherit; }
.good { color: var(--good); } .bad { color: var(--bad); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.4rem 1.6rem; margin: 1.2rem 0 .6rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); line-height: 1.35; }
figcaption b { color: var(--ink); font-size: .95rem; }
small { display: block; color: var(--soft); font-size: .85em; max-width: 22rem; }
.legend { display: block; min-height: 1.35em; }
.legend span { display: inline-block; margin-right: .9em; }
.legend i { display: inline-block; width: .8em; height: .22em; border-radius: 2px;
  margin: 0 .35em .22em 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; } svg .x { text-anchor: middle; }
svg .y { text-anchor: end; } svg path { fill: none; } svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--soft); } svg .thick { stroke-width: 2.2; stroke-linejoin: round; }
svg .thin { stroke-width: 1; stroke-opacity: .4; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
table.texts { width: 100%; } table.texts td { overflow-wrap: anywhere; }
table.texts td.n { overflow-wrap: normal; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; background: var(--shade);
  padding: .9rem; border-radius: 6px; }
code { background: var(--shade); padding: .1rem .3rem; border-radius: 4px; font-size: .9em;
  overflow-wrap: anywhere; }
@media (max-width: 42rem) {
  table.texts thead { display: none; }
  table.texts, table.texts tbody, table.texts tr, table.texts td { display: block; width: 100%; }
  table.texts tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  table.texts td { border: 0; padding: .1rem 0; text-align: left; }
  table.texts td::before { content: attr(data-label) ": "; color: var(--soft); font-size: .85em; }
}
@media print { details > * { display: block; } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head><body>
{body}
</body></html>
"""
