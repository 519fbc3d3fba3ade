from functools import partial

import data_toys
import numpy as np
import pytest

from rlhf_jax.data import DataError
from rlhf_jax.data.pairing import Partners, mean_rating, one_rater_each, same_part, same_words


def row(text, *ratings, part="movie"):
    return {"text": text, "ratings": np.array(ratings, np.int8), "part": part}


def drawn(partners, anchor, count=300):
    rng = np.random.default_rng(0)
    return [tuple(x["text"] for x in partners.draw(anchor, rng)) for _ in range(count)]


def test_partners_are_all_texts_of_the_group_at_least_the_gap_away_drawn_evenly():
    rows = [row(name, mean) for name, mean in zip("abcdef", (-3, -2, -1, 0, 1, 2), strict=True)]
    partners = Partners([*rows, row("x", 4, part="tweet")], gap=3, group=same_part)
    found = {}
    for anchor in range(len(partners)):
        pairs = drawn(partners, anchor)
        found[pairs[0][0]] = {other for _, other in pairs}
        share = np.unique([other for _, other in pairs], return_counts=True)[1] / len(pairs)
        np.testing.assert_allclose(share, 1 / len(share), atol=0.1)
    assert found == {
        "a": set("def"), "b": set("ef"), "c": set("f"), "d": set("a"), "e": set("ab"),
        "f": set("abc"),
    }  # fmt: skip
    listed = [(high["text"], low["text"]) for high, low in partners]
    assert sorted(listed) == [
        ("d", "a"),
        ("e", "a"),
        ("e", "b"),
        ("f", "a"),
        ("f", "b"),
        ("f", "c"),
    ]


def test_a_gap_that_is_met_exactly_counts_in_spite_of_binary_fractions():
    rows = [row("a", 0, 0, 0, 0, 1), row("b", 1, 1, 1, 1, 2)]  # 0.2 and 1.2: 1.2 − 0.2 < 1
    assert len(Partners(rows, gap=1, group=same_part)) == 2


def test_texts_that_differ_in_case_and_marks_only_are_not_compared():
    partners = Partners(
        [row("Good film", 4), row("good film!", -4), row("bad", -3)], gap=1, group=same_part
    )
    assert {pair for i in range(len(partners)) for pair in drawn(partners, i)} == {
        ("Good film", "bad"), ("bad", "Good film"),
    }  # fmt: skip


def test_same_words_compares_continuations_of_one_prompt():
    rows = [row("A film to see", 3), row("a film to avoid", -3), row("A story", -4)]
    partners = Partners(rows, gap=1, group=partial(same_words, count=2))
    assert [(a["text"], b["text"]) for a, b in partners] == [("A film to see", "a film to avoid")]


def test_a_label_is_one_draw_from_the_rater_pairs_that_do_not_tie():
    one, other = np.array([2, 1, 0]), np.array([1, 1, -1])
    # 9 pairs: 2 beats all three; 1 ties twice and beats −1; 0 loses twice and beats −1.
    rng = np.random.default_rng(0)
    wins = np.mean([one_rater_each(one, other, rng) for _ in range(4000)])
    assert abs(wins - 5 / 7) < 0.02
    reverse = np.mean([one_rater_each(other, one, rng) for _ in range(4000)])
    assert abs(reverse - 2 / 7) < 0.02


def test_the_rule_of_drawing_again_until_the_raters_differ_gives_the_same_share():
    rng = np.random.default_rng(1)
    one, other = rng.integers(-4, 5, 15), rng.integers(-4, 5, 17)

    def loop():
        while True:
            a, b = rng.choice(one), rng.choice(other)
            if a != b:
                return a > b

    expected = np.mean([loop() for _ in range(4000)])
    found = np.mean([one_rater_each(one, other, rng) for _ in range(4000)])
    assert abs(found - expected) < 0.03


def test_raters_who_all_agree_on_both_texts_leave_a_fair_coin():
    rng = np.random.default_rng(0)
    same = np.array([1, 1])
    assert 0.4 < np.mean([one_rater_each(same, same, rng) for _ in range(500)]) < 0.6


def test_the_mean_rating_has_no_noise():
    assert mean_rating(np.array([4, -4, 1]), np.array([0, 0, 0]), None)
    assert not mean_rating(np.array([0, 0, 0]), np.array([4, -4, 1]), None)


@pytest.mark.parametrize(
    ("rows", "gap", "message"),
    [
        (data_toys.rows(4), 0.0, "gap=0.0: must be above 0"),
        (data_toys.rows(4), 9.0, "no two of 4 texts .* differ by 9"),
        (["a", "b"], 1.0, "rows with ratings"),
        ([{"text": "a"}], 1.0, "rows with ratings"),
    ],
)
def test_what_cannot_be_paired_is_an_error(rows, gap, message):
    with pytest.raises(DataError, match=message):
        Partners(rows, gap=gap, group=same_part)


def test_the_real_corpus_has_the_pairs_that_are_claimed():
    data_toys.need_corpus()
    from rlhf_jax.data import snippets

    pairs = Partners(snippets.rows(parts=("movie",)), gap=1.0, group=same_words)
    apart = [np.mean(a["ratings"]) - np.mean(b["ratings"]) > 1 + 1e-9 for a, b in pairs]
    assert sum(apart) == 32_679  # identical sentences counted once
