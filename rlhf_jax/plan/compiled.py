"""A compiled program's text as instructions, and how often each of them runs.

XLA prints an instruction inside a loop once. Here it counts as often as it runs: trip counts are
XLA's own where it says them, and else follow from the loop's counter, its step and its bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

MESSAGES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line: its name, the shape it makes, what it does and with what."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str  # the whole line
    root: bool


@dataclass(frozen=True)
class Program:
    """A compiled program's text, by computation."""

    entry: str
    computations: Mapping[str, Mapping[str, Instruction]]
    trips: Mapping[str, int | None] = field(default_factory=dict)  # of each loop, by its body


def parse(text: str) -> Program:
    """The text of `compiled.as_text()`."""
    found, entry, own = {}, "", None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}") and line.endswith("{") and "->" in line:
            name = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            own = found[name[2]] = {}
            entry = name[2] if name[1] else entry
        elif own is not None and (match := _LINE.match(line)):
            made = _instruction(*match.groups())
            own[made.name] = made
    program = Program(entry, found)
    return Program(entry, found, {loop: n for loop, n in _all_trips(program)})


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    shape, rest = rest[: end + 1], rest[end + 2 :]
    op, _, behind = rest.partition("(")
    inside = behind[: _closing("(" + behind) - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        x.split()[-1] for x in inside.split(",") if op not in ("constant", "parameter") and x
    )
    return Instruction(name, shape, op, operands, rest, root is not None)


def _closing(text: str) -> int:
    """Where the parenthesis closes that text begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"no end of {text[:80]!r}")


def size(shape: str) -> int:
    """Bytes of a printed shape; of a tuple, all its members; tiling is not counted."""
    total = 0
    for kind, dims, _ in SHAPE.findall(shape):
        bits = BITS.get(kind) or int((re.match(r"\D+(\d+)", kind) or [0, 0])[1])
        total += bits * math.prod(int(n) for n in dims.split(",") if n) // 8
    return total


def visited(program: Program, at_most: int | None) -> Iterator[tuple]:
    """Every instruction, its computation, how often it runs, and what is known of that.

    The last two are whether that is the most it can be, as in a loop whose end depends on data and
    that runs `at_most` times, whatever loop it is in, and whether nobody knows, because that is
    None: it counts once.
    """

    def walk(name, times, bounded, unknown):
        for one in program.computations[name].values():
            yield one, name, times, bounded, unknown
            if one.op == "while":
                body = re.search(r"body=%?([\w.\-]+)", one.text)[1]
                n = program.trips[body]
                if n is None:
                    again = times * (1 if at_most is None or bounded else at_most)
                    yield from walk(body, again, True, unknown or at_most is None)
                else:
                    yield from walk(body, times * n, bounded, unknown)
            elif one.op == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", one.text)
                names = re.findall(r"[\w.\-]+", listed[1]) if listed else _CALLED.findall(one.text)
                branches = [list(walk(name, times, bounded, unknown)) for name in names]
                # One of them runs: the one that sends most stands for all.
                yield from max(branches, key=_sent, default=())
            else:
                for called in _CALLED.findall(one.text):
                    if called in program.computations:
                        yield from walk(called, times, bounded, unknown)

    return walk(program.entry, 1, False, False)


def _sent(branch: Sequence[tuple]) -> int:
    return sum(
        times * size(one.shape)
        for one, _, times, *_ in branch
        if one.op.removesuffix("-start") in MESSAGES
    )


def _all_trips(program: Program) -> Iterator[tuple[str, int | None]]:
    """How often each loop's body runs; None: it depends on data."""
    for own in program.computations.values():
        for one in own.values():
            if one.op == "while":
                names = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", one.text)
                said = re.search(r'"known_trip_count":\s*\{"n":"?(\d+)', one.text)
                yield (
                    names[2],
                    int(said[1]) if said else _counted(program, own, one, *names.groups()),
                )


def _counted(program, own, loop, condition, body) -> int | None:
    """(bound − start) / step of a loop `for i in range(start, bound, step)`."""
    test = _root(program, condition)
    if test.op != "compare" or "direction=LT" not in test.text:
        return None
    counter = program.computations[condition].get(test.operands[0])
    bound = _scalar(program, condition, test.operands[1], {})
    if bound is None or counter is None or counter.op != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", counter.text)[1])
    carried = own.get(loop.operands[0])
    start = None
    if carried is not None and carried.op == "tuple":
        start = _scalar(program, _home(program, own), carried.operands[index], {})
    new = _root(program, body)
    if new.op != "tuple":
        return None
    step = _scalar(program, body, new.operands[index], {index: 0})
    if not step:
        return None
    return max(0, -(-(bound - (start or 0)) // step))


def _root(program: Program, name: str) -> Instruction:
    return next(one for one in program.computations[name].values() if one.root)


def _home(program: Program, own: Mapping[str, Instruction]) -> str:
    return next(name for name, found in program.computations.items() if found is own)


def _scalar(program, where: str, name: str, carried: Mapping[int, int]) -> int | None:
    """The value of an integer that hangs on constants, and on what the loop carries, alone."""
    one = program.computations[where].get(name)
    if one is None:
        return None
    if one.op == "constant":
        value = re.match(r"constant\((-?\d+)\)", one.text)
        return int(value[1]) if value else None
    if one.op == "get-tuple-element":
        return carried.get(int(re.search(r"index=(\d+)", one.text)[1]))
    if one.op == "parameter":
        return carried.get(int(re.match(r"parameter\((\d+)\)", one.text)[1]))
    values = [_scalar(program, where, operand, carried) for operand in one.operands]
    if one.op in ("fusion", "call"):
        called = _CALLED.search(one.text)[1]
        given = {i: x for i, x in enumerate(values) if x is not None}
        return _scalar(program, called, _root(program, called).name, given)
    if None in values or not values:
        return None
    if one.op in ("copy", "bitcast", "convert", "reshape"):
        return values[0]
    return {"add": sum(values), "subtract": values[0] - sum(values[1:])}.get(one.op)
