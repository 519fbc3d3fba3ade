"""How many different things are said: n-grams, texts, modes.

`tokens [n, t]` are texts and `mask` marks the tokens to look at; nothing else touches a result.
An n-gram is n masked tokens side by side. Whole texts are equal if their masked tokens are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from rlhf_jax.measure import estimate
from rlhf_jax.measure.estimate import Estimate

Tokens, Mask = Int[np.ndarray, "n t"], Bool[np.ndarray, "n t"]


# ---- n-grams


def distinct(tokens: Tokens, mask: Mask, n: int) -> float:
    """Different n-grams/n-grams of all texts together (Li et al. 2016).

    An exact count of these texts. It falls with the number of texts and with their length: compare
    at equal numbers of both.
    """
    _, gram = _some_grams(tokens, mask, n)
    return len(np.unique(gram)) / len(gram)


def distinct_by_sample(tokens: Tokens, mask: Mask, n: int) -> Estimate:
    """The same of each text alone, averaged over the texts that have an n-gram; error sd/√n."""
    row, gram = _some_grams(tokens, mask, n)
    one = np.unique(row * (gram.max() + 1) + gram) // (gram.max() + 1)
    there = np.bincount(row)
    return estimate.mean((np.bincount(one) / np.maximum(there, 1))[there > 0])


def expectation_adjusted_distinct(tokens: Tokens, mask: Mask, n: int, *, vocab: int) -> float:
    """U/(V (1 − ((V − 1)/V)^C)): U different of C n-grams over what uniform ones would give.

    Does not fall with the length (Liu et al. 2022). Departs: V is the number of n-grams
    that can be said, vocabⁿ, not the vocabulary for every n, where values beyond 1 mean nothing.
    """
    _, gram = _some_grams(tokens, mask, n)
    different = len(np.unique(gram))
    possible = float(vocab) ** n
    if different > possible:
        raise ValueError(f"there are {different} different {n}-grams; vocab={vocab} is too small")
    if vocab == 1:
        return float(different)
    # expm1 and log1p: V may be so large that (V − 1)/V rounds to 1.
    return float(different / (-possible * np.expm1(len(gram) * np.log1p(-1 / possible))))


def ngram_entropy(tokens: Tokens, mask: Mask, n: int) -> Estimate:
    """Entropy of the pooled n-gram counts, nats (plug-in: too low); jackknife error over texts."""
    row, gram = _some_grams(tokens, mask, n)
    _, gram = np.unique(gram, return_inverse=True)
    pooled, total = np.bincount(gram), len(gram)
    score = _xlogx(pooled).sum()
    value = np.log(total) - score / total
    # Without one text: only the counts of its own n-grams change.
    rows = np.unique(row)
    pair, own = np.unique(row * len(pooled) + gram, return_counts=True)
    text, which = np.searchsorted(rows, pair // len(pooled)), pair % len(pooled)
    lost = _xlogx(pooled[which]) - _xlogx(pooled[which] - own)
    rest, score = total - np.bincount(text, own), score - np.bincount(text, lost)
    error = np.nan
    if len(rows) > 1:
        without = np.log(rest) - score / rest
        error = np.sqrt((len(rows) - 1) * without.var())
    return Estimate(float(value), float(error), len(rows))


def self_bleu(
    tokens: Tokens,
    mask: Mask,
    *,
    n: int = 5,
    references: int = 200,
    seed: int = 0,
    epsilon: float = 0.1,
) -> Estimate:
    """Mean BLEU-n of each text against others: 1 if all are equal (Zhu et al. 2018).

    Each text has at most `references` others, drawn with `seed`; more of them raise it, so fix the
    number. A precision of 0 becomes `epsilon`/its n-grams (Chen and Cherry 2014, method 1).
    Departs: orders longer than the text are left out, so that short texts that are equal score 1,
    too. The error is sd/√n of the texts, given the references they share.
    """
    tokens, mask = _checked(tokens, mask)
    texts, length = len(tokens), mask.sum(axis=1)
    if texts < 2 or references < 1 or n < 1:
        raise ValueError(
            f"{texts} texts, references={references}, n={n}: needs 2 texts, the rest at least 1"
        )
    parts = [_count_matrix(tokens, mask, order) for order in range(1, n + 1)]
    order = np.repeat(np.arange(n), [x.shape[1] for x in parts])  # of each column
    counts = sparse.hstack(parts, format="csr")
    rng, found = np.random.default_rng(seed), np.zeros(texts)
    for i in range(texts):
        others = np.delete(np.arange(texts), i)
        if references < len(others):
            others = rng.choice(others, references, replace=False)
        found[i] = _bleu(counts, order, length, i, others, epsilon)
    return estimate.mean(found)


def _bleu(counts, order, length, i, others, epsilon):
    """BLEU of text i: brevity · exp(mean log precision) (Papineni et al. 2002)."""
    if length[i] == 0:
        return float((length[others] == 0).any())
    own = counts[[i]]
    most = counts[others][:, own.indices].max(axis=0).toarray().ravel()
    total = np.bincount(order[own.indices], own.data)
    matched = np.bincount(order[own.indices], np.minimum(own.data, most))
    if matched[0] == 0:
        return 0.0  # not a single token in common: nothing to smooth
    logs = np.log(np.where(matched > 0, matched, epsilon) / total)
    near = min(length[others], key=lambda size: (abs(size - length[i]), size))
    return float(np.exp(min(0.0, 1 - near / length[i]) + logs.mean()))


def _count_matrix(tokens, mask, n):
    """How often each text has each n-gram."""
    row, gram = _grams(tokens, mask, n)
    different, gram = np.unique(gram, return_inverse=True)
    shape = (len(tokens), max(1, len(different)))
    return sparse.csr_array((np.ones(len(row)), (row, gram)), shape=shape)  # sums duplicates


# ---- whole texts


def text_counts(tokens: Tokens, mask: Mask) -> Int[np.ndarray, "m"]:
    """How often each different text occurs, most frequent first."""
    tokens, mask = _checked(tokens, mask)
    order = np.argsort(~mask, axis=1, kind="stable")  # masked tokens to the left
    here = np.take_along_axis(mask, order, axis=1)
    texts = np.where(here, np.take_along_axis(tokens, order, axis=1), -1)
    _, counts = np.unique(texts, axis=0, return_counts=True)
    return np.sort(counts)[::-1]


def plug_in_entropy(counts: Int[np.ndarray, "m"]) -> Estimate:
    """−Σ p̂ log p̂ of counts, nats: about (m − 1)/2n too low, far more if n is not ≫ m; jackknife."""
    return _of_counts(counts, _entropy)


def miller_madow(counts: Int[np.ndarray, "m"]) -> Estimate:
    """The plug-in entropy + (m − 1)/2n for m outcomes seen in n draws, nats; jackknife error."""
    return _of_counts(counts, lambda c: _entropy(c) + (len(c) - 1) / (2 * c.sum()))


def collision(counts: Int[np.ndarray, "m"]) -> Estimate:
    """Σ p²: equal pairs/pairs, the chance that two draws agree, unbiased; jackknife error."""
    return _of_counts(counts, lambda c: (c * (c - 1.0)).sum() / (c.sum() * (c.sum() - 1.0)))


def hill_two(counts: Int[np.ndarray, "m"]) -> Estimate:
    """1/Σ p²: the number of equally likely outcomes that would agree as often (Hill 1973).

    Σ p² is unbiased, its inverse is not; inf if no two draws agree. The error is that of Σ p²,
    linearised.
    """
    value, error, n = collision(counts)
    if value == 0:
        return Estimate(np.inf, np.inf, n)
    return Estimate(1 / value, error / value**2, n)


def effective_number(entropy: float | Estimate) -> float | Estimate:
    """exp(H): how many equally likely outcomes have that entropy; an error is linearised."""
    if isinstance(entropy, Estimate):
        value = float(np.exp(entropy.value))
        return Estimate(value, value * entropy.error, entropy.n)
    return float(np.exp(entropy))


def mode_mass(p: Float[np.ndarray, "m"], *, top: int = 1) -> float:
    """The mass of the `top` likeliest outcomes, of probabilities or of counts.

    Exact for probabilities; of counts it is the sample's, too high by as much as n is small.
    """
    if top < 1:
        raise ValueError(f"top={top}: the mass of at least 1 outcome")
    return float(_descending(p)[:top].sum())


def modes_holding(p: Float[np.ndarray, "m"], *, mass: float = 0.5) -> int:
    """The least number of outcomes that together have at least this mass."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass}: above 0 and at most 1")
    reached = np.cumsum(_descending(p))
    return int(np.searchsorted(reached, mass - 1e-12) + 1)


# ---- one prompt, many prompts


def diversity_per_input(
    tokens: Int[np.ndarray, "x k t"],
    mask: Bool[np.ndarray, "x k t"],
    measure: Callable[[Tokens, Mask], float | Estimate],
) -> Estimate:
    """A measure of k samples of one prompt, averaged over prompts (Kirk et al. 2023); error sd/√x.

    What the measure gives depends on k: use the same for all that is compared.
    """
    tokens, mask = _checked(tokens, mask, ndim=3)
    return estimate.mean([float(measure(*one)) for one in zip(tokens, mask, strict=True)])


def diversity_across_inputs(
    tokens: Int[np.ndarray, "x k t"],
    mask: Bool[np.ndarray, "x k t"],
    measure: Callable[[Tokens, Mask], float | Estimate],
) -> Estimate:
    """A measure of one sample of each prompt, averaged over k such sets (Kirk et al. 2023).

    The error, sd/√k, is that of sampling from these prompts; that of drawing them is not in it.
    """
    tokens, mask = _checked(tokens, mask, ndim=3)
    sets = zip(tokens.swapaxes(0, 1), mask.swapaxes(0, 1), strict=True)
    return estimate.mean([float(measure(*one)) for one in sets])


# ---- helpers


def _checked(tokens, mask, ndim=2):
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    if tokens.ndim != ndim or tokens.shape != mask.shape or mask.dtype != bool or not len(tokens):
        axes = "[n, t]" if ndim == 2 else "[prompts, k, t]"
        raise ValueError(
            f"needs tokens {axes} and a bool mask of that shape, with at least 1 text; these are "
            f"{list(tokens.shape)} and {mask.dtype} {list(mask.shape)}"
        )
    return tokens, mask


def _grams(tokens, mask, n):
    """Every n-gram: the text it stands in, and a number that equal ones share."""
    tokens, here = _checked(tokens, mask)
    if n < 1:
        raise ValueError(f"n={n}: an n-gram has at least 1 token")
    mask = here
    different, ids = np.unique(tokens, return_inverse=True)
    ids = gram = ids.reshape(tokens.shape)
    for k in range(1, min(n, tokens.shape[1] + 1)):
        longer = gram[:, :-1] * len(different) + ids[:, k:]
        gram = np.unique(longer, return_inverse=True)[1].reshape(longer.shape)
        here = here[:, :-1] & mask[:, k:]
    return np.nonzero(here)[0], gram[here]


def _some_grams(tokens, mask, n):
    row, gram = _grams(tokens, mask, n)
    if not len(gram):
        raise ValueError(f"no text has {n} masked tokens side by side: there is no {n}-gram")
    return row, gram


def _xlogx(x):
    return x * np.log(np.maximum(x, 1))


def _entropy(counts):
    return np.log(counts.sum()) - _xlogx(counts).sum() / counts.sum()


def _of_counts(counts, statistic):
    """The statistic, and its jackknife error: without each draw in turn."""
    counts = np.asarray(counts)
    if counts.ndim != 1 or (counts < 0).any() or (counts != np.round(counts)).any():
        raise ValueError("counts are whole numbers, one per outcome and none below 0")
    counts = counts[counts > 0].astype(np.float64)
    n = int(counts.sum())
    if n < 2:
        raise ValueError(f"{n} draws: needs at least 2")
    error = np.nan
    if n > 2:
        # Draws of outcomes that were seen equally often are alike: one of each is left out.
        sizes, at, outcomes = np.unique(counts, return_index=True, return_counts=True)
        without = []
        for i in at:
            fewer = counts.copy()
            fewer[i] -= 1
            without.append(statistic(fewer[fewer > 0]))
        share = sizes * outcomes / n
        spread = share @ (np.array(without) - share @ without) ** 2
        error = np.sqrt((n - 1) * spread)
    return Estimate(float(statistic(counts)), float(error), n)


def _descending(p):
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not (p >= 0).all() or not p.sum() > 0:
        raise ValueError("needs one number per outcome, none below 0 and not all of them 0")
    return np.sort(p / p.sum())[::-1]
