"""One self-contained page about a study: what was asked, what came out, and how sure it is."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax import page as html
from rlhf_jax.config import Config
from rlhf_jax.page import details, number, text
from rlhf_jax.study.design import Claim, Study
from rlhf_jax.study.results import NotRun, Results, ResultsError
from rlhf_jax.study.verdicts import Estimate, Verdict, estimates, judge
from rlhf_jax.study.words import answer, duration, interval, remark, rule, surprises

COLOUR = {"supported": "good", "refuted": "bad", "undecided": "warn", "not run": "soft"}
DOTS = 170  # per inch of the figure
CARD = (
    "background:#fff;color:#333;border:1px solid var(--line);border-radius:8px;"
    "padding:1rem;max-width:60rem"
)
WHOLE = "white-space:nowrap"
HOW = (
    "A claim speaks of the mean of one number per seed. Exact sign-flip tests over the paired "
    "seeds support it if they put the mean inside the prediction, refute it if they put it outside "
    "(or outside of the wider interval named there), and leave it undecided otherwise; p is twice "
    "the smaller p of the two and, corrected by Holm for {family}, must be below .05. Intervals "
    "are bootstrap-t over seeds and decide nothing. d is how far the mean lies from the nearest "
    "bound of the prediction, in standard deviations of the seeds; its sign says on which side."
)


def save(study: Study, results: Results, record: Mapping[str, Any], out: str | Path) -> Path:
    """Write index.html and figure.png into `out`; returns the page's path.

    Raises:
        ResultsError: if a claim cannot be tested, or a file cannot be written.
    """
    out, picture = Path(out), drawn(study, results)
    path = out / "index.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            (out / "figure.png").write_bytes(picture)
        path.write_text(_page(study, results, record, picture), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror}") from error
    return path


def page(study: Study, results: Results, record: Mapping[str, Any]) -> str:
    """A whole HTML document.

    `record` is how the results were made, all of it optional: command (a list), preset, settings,
    versions, revision, seconds (by arm), config.
    """
    return _page(study, results, record, drawn(study, results))


def drawn(study: Study, results: Results) -> bytes | None:
    """The study's figure as PNG; None if it needs an arm that was not run."""
    try:
        figure = study.figure(results)
    except NotRun:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS, facecolor="white")
    return buffer.getvalue()


# -------------------------------------------------------------------------------------- sections


def _page(study: Study, results: Results, record: Mapping[str, Any], picture: bytes | None) -> str:
    verdicts = judge(study.primaries, results, arms=study.arms)
    others = estimates(study.secondary, results)
    body = [
        f'<header><h1>{text(study.name)}</h1><p class="lead">{text(study.question)}</p></header>',
        f'<p class="lead"><b>{text(answer(verdicts))}</b></p>',
        _claims(verdicts) if verdicts else "",
        _figure(study, picture),
        _primaries(verdicts) if verdicts else "",
        _surprises(verdicts, others),
        _secondary(others),
        _arms(study, results, record),
        _larger(study, record),
        _record(record),
    ]
    return html.page(study.name, "\n".join(part for part in body if part))


def _claims(verdicts: Sequence[Verdict]) -> str:
    """What became of each claim, to be read before the figure."""
    lines = (
        f"<li><p>{_coloured(v.verdict)}: {text(v.claim.says)} "
        f'<span class="soft">({text(v.claim.name)})</span></p></li>'
        for v in verdicts
    )
    return f"<ul>{''.join(lines)}</ul>"


def _figure(study: Study, picture: bytes | None) -> str:
    if picture is None:
        return '<p class="warn">The figure needs an arm that was not run.</p>'
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return (
        f'<figure style="{CARD};margin:1.4rem 0 0"><img src="{source}" '
        f'alt="{text(study.caption)}" style="width:100%;display:block"></figure>'
        f'<p class="soft">{text(study.caption)}</p>'
    )


def _primaries(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for v in verdicts:
        note = f"<small>{text(remark(v))}</small>" if v.note else ""
        effect = f"<small>d = {number(v.effect)}</small>" if math.isfinite(v.effect) else ""
        rows.append(
            (
                _name(v.claim),
                text(v.claim.says),
                number(v.estimate) + effect,
                interval(v),
                text(v.claim.unit),
                _rule(v.claim),
                str(v.n),
                number(v.p),
                number(v.p_adjusted),
                _coloured(v.verdict) + note,
            )
        )
    head = ("name", "claim", "estimate", "95 % interval", "unit", "predicted", "n", "p", "Holm p")
    how = HOW.format(family="1 claim" if len(verdicts) == 1 else f"{len(verdicts)} claims")
    if any(v.verdict == "not run" for v in verdicts):
        how += " Claims that were not run count in that number, too."
    return (
        "<h2>What was claimed beforehand, and what came out</h2>"
        + html.table((*head, "verdict"), rows, numbers=(2, 3, 6, 7, 8), kind="texts")
        + f'<p class="soft">{text(how)}</p>'
    )


def _surprises(verdicts: Sequence[Verdict], others: Sequence[Estimate]) -> str:
    found = surprises(verdicts, others)
    ran = [one for one in (*verdicts, *others) if one.n]
    if found:
        content = "<ul>" + "".join(f"<li><p>{text(line)}</p></li>" for line in found) + "</ul>"
    elif not ran:
        content = "<p>No claim has been put to the test.</p>"
    elif all(one.inside for one in ran):
        some = "every estimate lies" if len(ran) == len(verdicts) + len(others) else "what ran lies"
        content = f"<p>Nothing: {some} where it was predicted.</p>"
    else:
        content = "<p>Nothing: no result contradicts its prediction.</p>"
    return f"<h2>What was surprising</h2>{content}"


def _secondary(others: Sequence[Estimate]) -> str:
    if not others:
        return ""
    colour = {"inside": "good", "outside": "bad"}
    rows = [
        (
            _name(e.claim),
            text(e.claim.says),
            number(e.estimate),
            interval(e),
            text(e.claim.unit),
            text(rule(e.claim)[0]),
            f'<span class="{colour.get(e.where, "soft")}">{e.where}</span>'
            + (f"<small>{text(e.note)}</small>" if e.note else ""),
        )
        for e in others
    ]
    head = ("name", "claim", "estimate", "95 % interval", "unit", "predicted", "interval lies")
    return (
        "<h2>Secondary claims</h2><p>Estimates without a verdict: with a few seeds no more claims "
        "than the ones above can be decided.</p>"
        + html.table(head, rows, numbers=(2, 3), kind="texts")
    )


def _arms(study: Study, results: Results, record: Mapping[str, Any]) -> str:
    seconds = record.get("seconds") or {}
    rows = [
        (text(name), "a base: trained once, shared by arms", f"{run.steps:,}", _time(seconds, name))
        for name, run in study.bases.items()
    ]
    for name, arm in study.arms.items():
        steps = f"{arm.run.steps:,}" if isinstance(arm.run, Config) else "computed"
        time = _time(seconds, name) if name in results.arms else "not run"
        rows.append((text(name), text(arm.says), steps, time))
    seeds = len(results.seeds)
    total = f" Together {duration(sum(seconds.values()))}." if seconds else ""
    return (
        f"<h2>The arms</h2><p>{seeds} seed{'' if seeds == 1 else 's'} of each, paired: a seed "
        f"stands for the same base, data and random numbers in every arm.{total}</p>"
        + html.table(("arm", "what it is", "steps", "time"), rows, numbers=(2, 3), kind="texts")
    )


def _larger(study: Study, record: Mapping[str, Any]) -> str:
    command = [str(part) for part in record.get("command") or ()]
    file = next((part for part in command if part.endswith(".py")), None)
    shown = f"<p>{text(study.larger)}</p>" if study.larger else ""
    if file is not None:
        again = f"rlhf-jax study {shlex.quote(file)} --preset gpu1 --out runs/{study.name}_gpu1"
        shown += f"<p><code>{text(again)}</code></p>"
    return f"<h2>How to run it larger</h2>{shown}" if shown else ""


def _record(record: Mapping[str, Any]) -> str:
    rows = [("revision", record.get("revision")), ("preset", record.get("preset"))]
    if record.get("seconds"):
        rows.append(("time of arms and bases", duration(sum(record["seconds"].values()))))
    rows += list((record.get("versions") or {}).items())
    shown = ""
    if record.get("command"):
        shown += f"<p><code>{text(shlex.join(map(str, record['command'])))}</code></p>"
    rows = [(text(name), text(value)) for name, value in rows if value is not None]
    if rows:
        shown += html.table(("software and hardware", ""), rows, kind="numbers")
    for name, heading in (("settings", "Settings"), ("config", "Configuration")):
        if record.get(name) is not None:
            shown += f"<h3>{heading}</h3>{_pre(record[name])}"
    shown += '<p class="soft">Every number stands in results.jsonl beside this page.</p>'
    return f"<h2>How it was made</h2>{details('Command, versions, settings', shown)}"


def _name(claim: Claim) -> str:
    return f'<b style="{WHOLE}">{text(claim.name)}</b>'


def _coloured(verdict: str) -> str:
    return f'<b class="{COLOUR[verdict]}" style="{WHOLE}">{verdict}</b>'


def _rule(claim: Claim) -> str:
    inside, *possible = rule(claim)
    return text(inside) + "".join(f"<small>refuted if not {text(p)}</small>" for p in possible)


def _time(seconds: Mapping[str, float], name: str) -> str:
    return duration(seconds[name]) if name in seconds else "–"


def _pre(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    return f"<pre>{text(shown)}</pre>"
