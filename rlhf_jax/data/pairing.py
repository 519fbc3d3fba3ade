"""Who is compared with whom, and whom people prefer."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf_jax.data import DataError
from rlhf_jax.data.snippets import key


def same_part(row: Mapping) -> object:
    """Group: texts of one part of the corpus (of one kind)."""
    return row.get("part")


def same_words(row: Mapping, *, count: int = 2, field: str = "text") -> object:
    """Group: texts of one part that begin with the same `count` words, whatever their case."""
    return (row.get("part"), *row[field].casefold().split()[:count])


def one_rater_each(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> bool:
    """Is `one` preferred: a rater of each is drawn, again where the two ratings tie.

    Drawing again until there is no tie is one even draw from the (rater, rater) pairs without one:
    P(one) = #(r > r′) / #(r ≠ r′). If all ratings are equal, a fair coin.
    """
    wins = np.count_nonzero(one[:, None] > other[None, :])
    losses = np.count_nonzero(one[:, None] < other[None, :])
    if wins + losses == 0:
        return bool(rng.integers(2))
    return bool(rng.integers(wins + losses) < wins)


def mean_rating(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> bool:
    """Is `one` preferred: the mean of all its ratings is the higher one; no noise."""
    return float(np.mean(one)) > float(np.mean(other))


class Partners:
    """For each text, the texts of its group whose mean rating lies at least `gap` away.

    Texts that are the same but for case, spaces and punctuation count once. A group is kept sorted
    by mean, so partners are the two ends of it: an even draw needs no search.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        *,
        gap: float,
        group: Callable[[Mapping], object],
        field: str = "text",
    ):
        if not gap > 0:
            raise DataError(f"gap={gap}: must be above 0, for equal texts have no preferred one")
        self.groups, seen = collections.defaultdict(list), set()
        for row in rows:
            if isinstance(row, str) or len(row.get("ratings", ())) == 0:
                raise DataError("pairs need rows with ratings: {'text': ..., 'ratings': [...]}")
            name = group(row)
            if (name, key(row[field])) not in seen:
                seen.add((name, key(row[field])))
                self.groups[name].append((float(np.mean(row["ratings"])), row))
        self.anchors = []  # (group, own row, partners below, first partner above)
        for name, members in self.groups.items():
            members.sort(key=lambda member: member[0])
            means = np.array([mean for mean, _ in members])
            # A hair of tolerance: 1.4 − 0.4 is not quite 1 in binary.
            below = np.searchsorted(means, means - gap + 1e-9, side="right")
            above = np.searchsorted(means, means + gap - 1e-9, side="left")
            for i, (lower, upper) in enumerate(zip(below, above, strict=True)):
                if lower > 0 or upper < len(means):
                    self.anchors.append((name, i, int(lower), int(upper)))
        if not self.anchors:
            raise DataError(
                f"no two of {len(rows)} texts share a group and differ by {gap} in mean rating; "
                "lower gap or widen group"
            )

    def __len__(self) -> int:
        return len(self.anchors)

    def __iter__(self):
        """All pairs as (higher, lower) rows, each once."""
        for name, i, lower, _ in self.anchors:
            for j in range(lower):
                yield self.groups[name][i][1], self.groups[name][j][1]

    def draw(self, anchor: int, rng: np.random.Generator) -> tuple[Mapping, Mapping]:
        """The anchor's row and that of an evenly drawn partner."""
        name, i, lower, upper = self.anchors[anchor]
        members = self.groups[name]
        j = int(rng.integers(lower + len(members) - upper))
        return members[i][1], members[j if j < lower else upper + j - lower][1]
