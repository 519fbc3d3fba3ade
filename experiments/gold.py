"""A judge that training never meets: ridge regression on words, fitted to people's ratings.

It reads sentences of the `gold` split, which neither the language model nor the reward model has
seen, and predicts the mean rating (−4 … 4) from counts of words and word pairs. It is a different
kind of model from the reward model on purpose: what both like is less likely to be an artefact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import sparse

from rlhf_jax.data import snippets

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")


def features(text: str) -> list[str]:
    """Lower-case words and neighbouring pairs, each once."""
    words = WORD.findall(text.lower())
    return sorted({*words, *(f"{a} {b}" for a, b in pairwise(words))})


class Gold:
    """min ‖Xw + c − y‖² + α‖w‖², X = idf-weighted presence, rows scaled to length 1."""

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], *, alpha: float = 1.0):
        lists = [features(text) for text in texts]
        count = Counter(f for one in lists for f in one)
        kept = sorted(f for f, n in count.items() if n >= 2)
        self.index = {f: i for i, f in enumerate(kept)}
        self.idf = np.array([np.log(len(texts) / count[f]) + 1.0 for f in kept])
        x, y = self._matrix(lists), np.asarray(ratings, np.float64)
        self.mean = y.mean()
        # The dual: as many unknowns as sentences, fewer than words and pairs.
        kernel = (x @ x.T).toarray()
        kernel[np.diag_indices_from(kernel)] += alpha
        self.weights = x.T @ np.linalg.solve(kernel, y - self.mean)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Predicted mean ratings."""
        return self._matrix([features(text) for text in texts]) @ self.weights + self.mean

    def _matrix(self, lists: Sequence[list[str]]) -> sparse.csr_matrix:
        rows, columns = [], []
        for row, one in enumerate(lists):
            found = [self.index[f] for f in one if f in self.index]
            rows += [row] * len(found)
            columns += found
        values = self.idf[columns] if columns else np.zeros(0)
        x = sparse.csr_matrix((values, (rows, columns)), shape=(len(lists), len(self.index)))
        length = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
        return sparse.diags(1.0 / np.maximum(length, 1e-12)) @ x


def fitted(parts: Sequence[str] = ("movie", "product")) -> tuple[Gold, float]:
    """The judge, and its correlation with people on the sentences of the `heldout` split."""
    train = snippets.rows(split="gold", parts=parts)
    judge = Gold([r["text"] for r in train], [r["score"] for r in train])
    test = snippets.rows(split="heldout", parts=parts)
    r = np.corrcoef(judge([r["text"] for r in test]), [r["score"] for r in test])[0, 1]
    return judge, float(r)
