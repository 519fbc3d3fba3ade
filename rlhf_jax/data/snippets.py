"""23,703 sentences, each rated from −4 to 4 by 15 to 99 people (Hutto & Gilbert 2014, MIT).

Four parts: 10,605 sentences of movie reviews (198,810 ratings), 3,708 of product reviews (74,160),
4,200 tweets (159,750) and 5,190 of newspaper editorials (103,800). A sentence's score is the mean
of its ratings. (For 199 tweets, variants of 30 sentences in the authors' study of punctuation, the
corpus's own table states the mean of another round of rating; only the ratings are used here.)
"""

import bisect
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_jax.data import DataError, corpus

PARTS = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
    "editorial": "nytEditorialSnippets",
}

# Shares of the sentences. base: text for the language model. reward: preference pairs. gold: the
# regressor that judges, which training never sees. heldout: losses, pair accuracy and prompts.
SPLITS = {"base": 0.40, "reward": 0.20, "gold": 0.30, "heldout": 0.10}


@dataclass(frozen=True, eq=False)
class Snippet:
    """One sentence and what each of its raters thought of it."""

    id: str  # part/number in the corpus
    part: str
    text: str
    ratings: np.ndarray  # int8, -4 (very negative) .. 4 (very positive)

    @property
    def score(self) -> float:
        """Mean of the ratings, −4 to 4."""
        return float(np.mean(self.ratings, dtype=np.float64))


def clean(text: str) -> str:
    """Undo the corpus's escapes: `''` → `"`, `&amp;` → `&`, runs of white space → one space."""
    text = text.replace("\ufeff", "").replace("''", '"')
    while "&amp;amp;" in text:  # some were escaped twice
        text = text.replace("&amp;amp;", "&amp;")
    for escape, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(escape, character)
    return " ".join(text.split())


def parse(files: Mapping[str, bytes]) -> list[Snippet]:
    """Snippets from the corpus's tables: texts and ratings, joined by their number."""
    snippets = []
    for part, stem in PARTS.items():
        ratings = {row[0]: row[3] for row in _table(files[f"{stem}_anonDataRatings.txt"])}
        for number, _, text in _table(files[f"{stem}_GroundTruth.txt"]):
            values = np.array(json.loads(ratings[number]), np.int8)
            snippets.append(Snippet(f"{part}/{number}", part, clean(text), values))
    return snippets


def _table(content: bytes) -> Iterable[list[str]]:
    for line in content.decode("utf-8-sig").split("\n"):
        if line.strip():
            yield line.split("\t")


def key(text: str) -> str:
    """What two sentences share if they are the same but for case, spaces and punctuation."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or " ".join(text.split())


def split_of(text: str, *, splits: Mapping[str, float] = SPLITS, salt: str = "snippets") -> str:
    """The split of a sentence, decided by its `key`: the same text is never on two sides."""
    if not splits or min(splits.values()) < 0 or abs(sum(splits.values()) - 1) > 1e-6:
        raise DataError(f"shares of the splits must be at least 0 and sum to 1, not {dict(splits)}")
    at = bisect.bisect_right(list(itertools.accumulate(splits.values())), _place(text, salt))
    return list(splits)[min(at, len(splits) - 1)]


@functools.lru_cache(maxsize=1 << 16)
def _place(text: str, salt: str) -> float:
    """Where a sentence lies in [0, 1)."""
    digest = hashlib.sha256(f"{salt}:{key(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@functools.cache
def load() -> tuple[Snippet, ...]:
    """The whole corpus in its own order; downloaded on first use."""
    tables = ("GroundTruth", "anonDataRatings")
    names = [f"{stem}_{table}.txt" for stem in PARTS.values() for table in tables]
    return tuple(parse(corpus.read_snippets(names)))


def rows(
    *,
    split: str | None = None,
    parts: Sequence[str] = tuple(PARTS),
    splits: Mapping[str, float] = SPLITS,
) -> list[dict]:
    """Sentences of one split (None: all) as rows for a stream: text, score, ratings, part, id."""
    if split is not None and split not in splits:
        raise DataError(f"no split {split!r}; valid: {', '.join(splits)}")
    if unknown := set(parts) - set(PARTS):
        raise DataError(f"no part {sorted(unknown)}; valid: {', '.join(PARTS)}")
    return [
        {"text": s.text, "score": s.score, "ratings": s.ratings, "part": s.part, "id": s.id}
        for s in load()
        if s.part in parts and (split is None or split_of(s.text, splits=splits) == split)
    ]
