"""What came out of a study, in words: a sentence, a list of surprises, a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_jax.page import number
from rlhf_jax.study.design import Claim
from rlhf_jax.study.verdicts import Estimate, Verdict

ORDER = ("supported", "refuted", "undecided", "not run")


def answer(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in a sentence or two."""
    parts, of = [], len(verdicts)
    if not verdicts:
        return "Nothing was claimed beforehand."
    for verdict in ORDER:
        names = [v.claim.name for v in verdicts if v.verdict == verdict]
        if not names:
            continue
        was = "" if verdict == "not run" else "is " if len(names) == 1 else "are "
        was += ("was " if len(names) == 1 else "were ") * (not was) + verdict
        if len(names) == of:
            whole = {1: "The one claim", 2: "Both claims"}.get(of, f"All {of} claims")
            parts.append(f"{whole} {was}")
        else:
            whole = f"{len(names)} of {of} claims" if not parts else str(len(names))
            parts.append(f"{whole} {was} ({', '.join(names)})")
    few = [v for v in verdicts if v.n and v.note]
    if not few:
        return joined(parts) + "."
    right = sum(v.inside for v in few)
    return (
        f"{joined(parts)}. {few[0].note}; {right} of {len(few)} estimates "
        f"{'lies where it was' if right == 1 else 'lie where they were'} predicted."
    )


def surprises(verdicts: Sequence[Verdict], others: Sequence[Estimate]) -> list[str]:
    """What did not come out as predicted, and what was left open, a sentence each."""
    found = []
    for v in verdicts:
        name, says = v.claim.name, _told(v.claim)
        if v.verdict == "refuted":
            found.append(f"{name} is refuted: {says}; found: {estimate(v)}.")
        elif v.verdict == "undecided" and not v.note:
            found.append(
                f"{name} is undecided: {says}; found: {estimate(v)}, which {v.n} seeds do not "
                f"settle (p {number(v.p_adjusted)} after correction)."
            )
        elif v.verdict == "undecided" and not v.inside:  # of seeds that cannot decide
            found.append(f"{name}: {says}; found: {estimate(v)}, though {v.note}.")
    for e in others:
        if e.where in ("outside", "not finite") or (e.where == "one seed" and not e.inside):
            seen = e.note or estimate(e)
            found.append(f"{e.claim.name}, a secondary claim: {_told(e.claim)}; found: {seen}.")
    return found


def table(verdicts: Sequence[Verdict]) -> str:
    """The primaries as a Markdown table."""
    head = (
        "name",
        "claim",
        "predicted",
        "estimate",
        "95 % interval",
        "n",
        "p",
        "Holm p",
        "verdict",
    )
    rows = [
        (
            v.claim.name,
            v.claim.says,
            "; refuted if not ".join(rule(v.claim)),
            f"{number(v.estimate)} {v.claim.unit}".strip(),
            interval(v),
            str(v.n),
            number(v.p),
            number(v.p_adjusted),
            v.verdict + (f" ({remark(v)})" if v.note else ""),
        )
        for v in verdicts
    ]
    lines = [head, tuple("--:" if i in (3, 5, 6, 7) else "---" for i in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def rule(claim: Claim) -> tuple[str, ...]:
    """What would make a claim true; and, if it is not the opposite, what would make it false."""
    words = within(*claim.supported)
    same = claim.possible in (None, claim.supported)
    return (words,) if same else (words, within(*claim.possible))


def within(low: float, high: float) -> str:
    """An interval: above 0, below 3, within ±0.02, 0.8 to 1.2."""
    if math.isinf(low) and math.isinf(high):
        return "a number"
    if math.isinf(low) or math.isinf(high):
        return f"below {_bound(high)}" if math.isinf(low) else f"above {_bound(low)}"
    return f"within ±{_bound(high)}" if low == -high else f"{_bound(low)} to {_bound(high)}"


def interval(found: Verdict | Estimate) -> str:
    """[low, high], or a dash."""
    return f"[{number(found.low)}, {number(found.high)}]" if math.isfinite(found.low) else "–"


def estimate(found: Verdict | Estimate) -> str:
    """Mean, interval and unit."""
    between = f" {interval(found)}" if math.isfinite(found.low) else ""
    return f"{number(found.estimate)}{between} {found.claim.unit}".strip()


def remark(found: Verdict) -> str:
    """Beside a verdict that seeds are too few for: what the estimate says all the same."""
    if not found.n:
        return found.note
    return f"the estimate lies {'where' if found.inside else 'elsewhere than'} predicted"


def duration(seconds: float) -> str:
    """In minutes from two on."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def joined(parts: Sequence[str]) -> str:
    """One, another and a third."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _told(claim: Claim) -> str:
    return f"“{claim.says.rstrip('.')}”. Predicted: {within(*claim.supported)}"


def _bound(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", r"\|")
