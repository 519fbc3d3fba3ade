"""Diversity: worked examples, laws, and other people's implementations."""

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax import measure

FOUR = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]])  # aabb aabb abab bbbb
ALL = np.ones(FOUR.shape, bool)
COUNTS = measure.text_counts(FOUR, ALL)

MEASURES = {
    "distinct": partial(measure.distinct, n=2),
    "distinct_by_sample": partial(measure.distinct_by_sample, n=2),
    "ead": partial(measure.expectation_adjusted_distinct, n=2, vocab=30),
    "ngram_entropy": partial(measure.ngram_entropy, n=2),
    "self_bleu": measure.self_bleu,
    "entropy": lambda tokens, mask: measure.miller_madow(measure.text_counts(tokens, mask)),
    "hill_two": lambda tokens, mask: measure.hill_two(measure.text_counts(tokens, mask)),
    "mode_mass": lambda tokens, mask: measure.mode_mass(measure.text_counts(tokens, mask)),
}


def close(found, expected):
    assert_allclose(found, expected, atol=1e-6, rtol=0)


def some_texts(rows=30, t=9, vocab=4, seed=0):
    """Texts of 5 to t tokens behind a prompt of two, some of them equal."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, t + 1, rows)
    tokens = rng.integers(0, vocab, (rows, t + 2))
    mask = (np.arange(t + 2) >= 2) & (np.arange(t + 2) < length[:, None] + 2)
    tokens[1:4], mask[1:4] = tokens[0], mask[0]
    return tokens, mask


def lists(tokens, mask):
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


# ---- worked examples


def test_four_texts_have_the_known_diversities():
    close(measure.distinct(FOUR, ALL, 1), 2 / 16)
    close(measure.distinct(FOUR, ALL, 2), 4 / 12)
    close(float(measure.distinct_by_sample(FOUR, ALL, 2)), (1 + 1 + 2 / 3 + 1 / 3) / 4)
    ead = measure.expectation_adjusted_distinct(FOUR, ALL, 2, vocab=2)
    close(ead, 1.032713)
    close(ead, 4 / (4 * (1 - 0.75**12)))
    n_grams = np.array([2, 5, 4, 1]) / 12  # aa ab bb ba
    close(float(measure.ngram_entropy(FOUR, ALL, 2)), -(n_grams * np.log(n_grams)).sum())


def test_four_texts_have_the_known_entropies_and_numbers_of_modes():
    assert COUNTS.tolist() == [2, 1, 1]
    close(float(measure.collision(COUNTS)), 1 / 6)
    close(float(measure.hill_two(COUNTS)), 6)
    close(float(measure.plug_in_entropy(COUNTS)), 1.039721)
    close(float(measure.miller_madow(COUNTS)), 1.289721)
    close(measure.mode_mass(COUNTS), 0.5)
    close(measure.mode_mass(COUNTS, top=2), 0.75)
    close(measure.mode_mass([0.1, 0.6, 0.3], top=2), 0.9)
    assert [measure.modes_holding(COUNTS, mass=x) for x in (0.5, 0.51, 1)] == [1, 2, 3]
    close(measure.effective_number(np.log(7)), 7)


def test_a_uniform_distribution_has_as_many_modes_as_outcomes():
    close(float(measure.plug_in_entropy(np.full(8, 5))), np.log(8))
    entropy = measure.plug_in_entropy(np.full(8, 5))
    found = measure.effective_number(entropy)
    close(float(found), 8)
    assert found.n == 40 and found.error == pytest.approx(8 * entropy.error)
    close(measure.mode_mass(np.full(8, 1 / 8), top=4), 0.5)
    assert measure.modes_holding(np.full(8, 1 / 8)) == 4
    every = np.stack(np.meshgrid(range(3), range(3)), axis=-1).reshape(-1, 2)
    close(float(measure.ngram_entropy(every, every >= 0, 2)), np.log(9))


def test_texts_that_are_equal_score_1_with_each_other_however_short_and_others_less():
    for t in (1, 3, 8):
        same = np.tile(np.arange(t), (4, 1))
        found = measure.self_bleu(same, same >= 0)
        close([*found], [1, 0, 4])
    assert float(measure.self_bleu(FOUR, ALL)) < 0.9
    close(float(measure.self_bleu(np.arange(12).reshape(3, 4), ALL[:3])), 0)


# ---- references


@pytest.mark.parametrize("n", [1, 2, 4])
def test_distinct_is_a_count_of_tuples(n):
    tokens, mask = some_texts()
    grams = [[tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in lists(tokens, mask)]
    pooled = [x for one in grams for x in one]
    close(measure.distinct(tokens, mask, n), len(set(pooled)) / len(pooled))
    each = [len(set(x)) / len(x) for x in grams]
    found = measure.distinct_by_sample(tokens, mask, n)
    close([*found], [np.mean(each), np.std(each, ddof=1) / 30**0.5, 30])
    counts = np.array([pooled.count(x) for x in set(pooled)])
    close(float(measure.ngram_entropy(tokens, mask, n)), float(measure.plug_in_entropy(counts)))


@pytest.mark.parametrize("vocab", [3, 12])
def test_self_bleu_is_that_of_nltk(vocab):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    tokens, mask = some_texts(12, vocab=vocab)
    texts, smooth = lists(tokens, mask), bleu.SmoothingFunction(epsilon=0.1).method1
    expected = [
        bleu.sentence_bleu(texts[:i] + texts[i + 1 :], x, [0.2] * 5, smoothing_function=smooth)
        for i, x in enumerate(texts)
    ]
    found = measure.self_bleu(tokens, mask)
    assert_allclose(float(found), np.mean(expected), rtol=1e-12)
    assert_allclose(found.error, np.std(expected, ddof=1) / 12**0.5, rtol=1e-12)


def test_a_text_shorter_than_the_order_has_the_bleu_of_its_own_length():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    short = np.array([[0, 1, 2], [0, 1, 0], [1, 2, 0]])
    smooth = bleu.SmoothingFunction().method1
    expected = [
        bleu.sentence_bleu(
            np.delete(short, i, 0).tolist(), x, [1 / 3] * 3, smoothing_function=smooth
        )
        for i, x in enumerate(short.tolist())
    ]
    assert_allclose(float(measure.self_bleu(short, short >= 0)), np.mean(expected), rtol=1e-12)


def test_an_error_is_the_jackknife_over_draws():
    tokens, mask = some_texts(14, vocab=2)
    counts = np.array([5, 3, 3, 1, 1])
    draws = np.repeat(np.arange(5), counts)

    def jackknife(values):
        return np.sqrt((len(values) - 1) * np.var(values))

    for function in (measure.plug_in_entropy, measure.miller_madow, measure.collision):
        without = [float(function(np.bincount(np.delete(draws, i)))) for i in range(13)]
        close(function(counts).error, jackknife(without))
    collision, hill = measure.collision(counts), measure.hill_two(counts)
    close(hill.error, collision.error / collision.value**2)
    without = [
        float(measure.ngram_entropy(np.delete(tokens, i, 0), np.delete(mask, i, 0), 2))
        for i in range(14)
    ]
    close(measure.ngram_entropy(tokens, mask, 2).error, jackknife(without))


def test_the_estimates_are_right_on_average_and_their_errors_are_their_spread():
    p, rng = np.array([0.5, 0.2, 0.2, 0.1]), np.random.default_rng(0)
    draws = rng.multinomial(60, p, size=1500)
    exact = {measure.collision: p @ p, measure.miller_madow: -(p * np.log(p)).sum()}
    for function, truth in exact.items():
        found = np.array([function(x)[:2] for x in draws])
        spread = found[:, 0].std()
        assert abs(found[:, 0].mean() - truth) < 4 * spread / 1500**0.5
        assert_allclose(np.sqrt((found[:, 1] ** 2).mean()), spread, rtol=0.1)
    plug_in = np.mean([float(measure.plug_in_entropy(x)) for x in draws])
    assert_allclose(exact[measure.miller_madow] - plug_in, 3 / 120, rtol=0.15)


# ---- laws


@pytest.mark.parametrize("name", MEASURES)
def test_the_order_of_the_texts_changes_nothing(name):
    tokens, mask = some_texts()
    order = np.random.default_rng(1).permutation(len(tokens))
    found = [MEASURES[name](tokens, mask), MEASURES[name](tokens[order], mask[order])]
    assert_allclose(*map(np.array, found), rtol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_what_stands_outside_the_mask_touches_nothing(name):
    tokens, mask = some_texts()
    noise = np.random.default_rng(2).integers(-9, 99, tokens.shape)
    wider = np.pad(np.where(mask, tokens, noise), ((0, 0), (3, 1)), constant_values=-1)
    shifted = np.pad(mask, ((0, 0), (3, 1)))
    found = [MEASURES[name](tokens, mask), MEASURES[name](wider, shifted)]
    assert_allclose(*map(np.array, found), rtol=1e-12)


def test_no_n_gram_reaches_across_what_is_not_masked():
    tokens = np.array([[0, 7, 1, 2], [0, 1, 2, 2]])
    mask = np.array([[True, False, True, True], [True, True, True, False]])
    close(measure.distinct(tokens, mask, 2), 2 / 3)  # 1 2, 0 1, 1 2
    assert measure.text_counts(tokens, mask).tolist() == [2]  # but the texts are equal


def test_the_adjusted_count_does_not_fall_with_the_length_and_the_plain_one_does():
    rng = np.random.default_rng(0)
    short, long = rng.integers(0, 50, (20, 10)), rng.integers(0, 50, (20, 100))
    plain = [measure.distinct(x, x >= 0, 1) for x in (short, long)]
    adjusted = [
        measure.expectation_adjusted_distinct(x, x >= 0, 1, vocab=50) for x in (short, long)
    ]
    assert plain[1] < 0.2 * plain[0]
    assert_allclose(adjusted, 1, atol=0.05)
    huge = measure.expectation_adjusted_distinct(short, short >= 0, 5, vocab=50_000)
    assert_allclose(huge, measure.distinct(short, short >= 0, 5))  # none can collide by chance
    close(measure.expectation_adjusted_distinct(0 * FOUR, ALL, 2, vocab=1), 1)


def test_a_deterministic_policy_is_as_diverse_across_inputs_as_ever_and_not_per_input():
    texts = np.random.default_rng(0).integers(0, 3, (5, 6))
    tokens = np.broadcast_to(texts[:, None], (5, 4, 6))
    mask = np.ones(tokens.shape, bool)
    distinct = partial(measure.distinct, n=2)
    one = [distinct(x[None], np.ones((1, 6), bool)) for x in texts]
    per_input = measure.diversity_per_input(tokens, mask, distinct)
    close([*per_input], [np.mean(one) / 4, np.std(one, ddof=1) / 4 / 5**0.5, 5])
    across = measure.diversity_across_inputs(tokens, mask, distinct)
    close([*across], [distinct(texts, np.ones((5, 6), bool)), 0, 4])
    modes = measure.diversity_per_input(tokens, mask, MEASURES["mode_mass"])
    close([*modes], [1, 0, 5])


def test_fewer_references_are_drawn_with_the_seed():
    tokens, mask = some_texts()
    drawn = [float(measure.self_bleu(tokens, mask, references=4, seed=i)) for i in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] < float(measure.self_bleu(tokens, mask))
    with_all = [float(measure.self_bleu(tokens, mask, references=i)) for i in (29, 200)]
    assert with_all[0] == with_all[1]


def test_errors_of_one_draw_are_unknown_and_two_that_differ_never_agree():
    one = measure.ngram_entropy(FOUR[:1], ALL[:1], 2)
    assert np.isnan(one.error) and one.n == 1
    assert np.isnan(measure.plug_in_entropy([1, 1]).error)
    assert [*measure.hill_two([1, 1, 1])] == [np.inf, np.inf, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure.distinct(FOUR, ALL, 5), "no text has 5 masked tokens side by side"),
        (lambda: measure.distinct(FOUR, ALL, 0), "at least 1 token"),
        (lambda: measure.distinct(FOUR[0], ALL[0], 1), r"needs tokens \[n, t\].*\[4\]"),
        (lambda: measure.distinct(FOUR, 1.0 * ALL, 1), "bool mask.*float64"),
        (
            lambda: measure.expectation_adjusted_distinct(FOUR, ALL, 1, vocab=1),
            "2 different 1-grams; vocab=1 is too small",
        ),
        (lambda: measure.self_bleu(FOUR[:1], ALL[:1]), "1 texts.*needs 2 texts"),
        (lambda: measure.plug_in_entropy([0.5, 0.5]), "whole numbers"),
        (lambda: measure.collision([1]), "1 draws: needs at least 2"),
        (lambda: measure.mode_mass([0.0, 0.0]), "not all of them 0"),
        (lambda: measure.modes_holding(COUNTS, mass=0), "mass=0: above 0"),
        (lambda: measure.mode_mass(COUNTS, top=0), "top=0"),
        (
            lambda: measure.diversity_per_input(FOUR, ALL, measure.text_counts),
            r"tokens \[prompts, k, t\]",
        ),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
