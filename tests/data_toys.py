"""Small rated texts for the tests of the data, and the real corpus where there is a network."""

import functools

import numpy as np
import pytest

from rlhf_jax.data import DataError, corpus

WORDS = ["the", "film", "is", "a", "good", "bad", "slow", "warm", "story", "of", "friends"]


def rows(count: int = 23) -> list[dict]:
    """Sentences of two parts with ten ratings each; every mean is different."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        text = " ".join([*rng.choice(WORDS, size=3 + i % 5), str(i)])
        ratings = np.clip(np.round(rng.normal(-3 + 6 * i / count, 1.0, size=10)), -4, 4)
        made.append(
            {
                "id": f"toy/{i}",
                "part": ("movie", "tweet")[i % 2],
                "text": text,
                "ratings": ratings.astype(np.int8),
                "score": float(ratings.mean()),
            }
        )
    return made


@functools.cache
def _missing() -> str | None:
    try:
        corpus.sdist()
    except DataError as error:
        return str(error)
    return None


def need_corpus() -> None:
    """Skip the test where the corpus is neither cached nor to be had."""
    if (why := _missing()) is not None:
        pytest.skip(f"the corpus cannot be fetched: {why.splitlines()[0]}")
