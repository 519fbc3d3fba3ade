"""Whole texts put together in one row, each a segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.types import Labeled


def packed(records: Sequence, row: Callable, length: int) -> tuple[list[tuple[int, ...]], Callable]:
    """Lots of records (their places) that each fit a row, and the function of a lot's row.

    `row(record, rng) -> Labeled` makes a text's own row of `length` tokens. Best fit, longest
    first; every record is in one lot.
    """
    sizes = [int(row(record, None).segments.sum()) for record in records]
    room: list[list[list[int]]] = [[] for _ in range(length + 1)]  # lots by what is left in them
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        left = next((r for r in range(sizes[i], length) if room[r]), length)
        lot = room[left].pop() if room[left] else []
        room[left - sizes[i]].append([*lot, i])

    def one(lot, rng) -> Labeled:
        parts = [row(records[i], rng) for i in lot]

        def joined(name):
            used = [getattr(part, name)[part.segments > 0] for part in parts]
            end = getattr(parts[-1], name)[parts[-1].segments == 0]  # padding
            return np.concatenate([*used, np.resize(end, length)])[:length]

        filled = np.concatenate([np.full(sizes[i], n) for n, i in enumerate(lot, 1)])
        segments = np.zeros(length, np.int32)
        segments[: len(filled)] = filled
        names = ("tokens", "mask", "token_score")
        return Labeled(
            **{name: joined(name) for name in names}, segments=segments, score=np.float32(0.0)
        )

    return [tuple(lot) for lots in room for lot in lots], one
