import numpy as np
import pytest

from rlhf_jax.data import DataError, snippets

TEXTS = {
    "movieReviewSnippets": "1\t9\tThe ''Rock'' &amp;  roll\t".rstrip() + "\r\n2\t9\tfilm\u00e9",
    "amazonReviewSnippets": "1_1\t9\ta\r\n1_2\t9\tb",
    "tweets": "1\t9\tI &lt;3 it &amp;amp; that",
    "nytEditorialSnippets": "1_1\t9\tc",
}
RATINGS = {
    "movieReviewSnippets": "1\t9\t9\t[1, 2]\r\n2\t9\t9\t[-4]",
    "amazonReviewSnippets": "\ufeff1_2\t9\t9\t[3]\r\n1_1\t9\t9\t[0, -1]",  # order, BOM
    "tweets": "1\t9\t9\t[4]",
    "nytEditorialSnippets": "1_1\t9\t9\t[0]",
}


def files():
    texts = {f"{stem}_GroundTruth.txt": text.encode() for stem, text in TEXTS.items()}
    return texts | {f"{stem}_anonDataRatings.txt": text.encode() for stem, text in RATINGS.items()}


def test_a_text_meets_its_own_ratings_by_number_and_is_cleaned():
    found = {s.id: (s.text, s.ratings.tolist(), s.score) for s in snippets.parse(files())}
    assert found == {
        "movie/1": ('The "Rock" & roll', [1, 2], 1.5),
        "movie/2": ("filmé", [-4], -4.0),
        "product/1_1": ("a", [0, -1], -0.5),
        "product/1_2": ("b", [3], 3.0),
        "tweet/1": ("I <3 it & that", [4], 4.0),
        "editorial/1_1": ("c", [0], 0.0),
    }


@pytest.mark.parametrize(
    "twin", ["A GOOD film", "a  good film ", "A good film!!", '"A good film."']
)
def test_case_spaces_and_punctuation_do_not_move_a_sentence_to_another_split(twin):
    halves = {f"half{i}": 1 / 64 for i in range(64)}
    assert snippets.key(twin) == snippets.key("A good film")
    assert snippets.split_of(twin, splits=halves) == snippets.split_of("A good film", splits=halves)


def test_marks_without_words_keep_their_own_key():
    assert snippets.key("!") != snippets.key("...")


def test_splits_have_the_shares_asked_for_and_a_zero_share_stays_empty():
    splits = {"a": 0.5, "none": 0.0, "b": 0.25, "c": 0.25}
    found = [snippets.split_of(f"sentence {i}", splits=splits) for i in range(4000)]
    for name, share in splits.items():
        assert abs(found.count(name) / 4000 - share) < 0.03
    assert "none" not in found


def test_a_split_depends_on_the_text_and_the_salt_only():
    assert snippets.split_of("A warm, honest film.") == "base"  # stable over versions and machines
    again = [snippets.split_of(f"sentence {i}", salt="other") for i in range(50)]
    assert again != [snippets.split_of(f"sentence {i}") for i in range(50)]


@pytest.mark.parametrize("splits", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}])
def test_shares_that_do_not_sum_to_one_are_refused(splits):
    with pytest.raises(DataError, match="sum to 1"):
        snippets.split_of("a", splits=splits)


def test_wrong_splits_and_parts_are_answered_with_the_valid_ones(monkeypatch):
    monkeypatch.setattr(snippets, "load", lambda: tuple(snippets.parse(files())))
    assert [row["id"] for row in snippets.rows(parts=("tweet",))] == ["tweet/1"]
    with pytest.raises(DataError, match="no split 'train'; valid: base, reward, gold, heldout"):
        snippets.rows(split="train")
    with pytest.raises(DataError, match="valid: movie, product, tweet, editorial"):
        snippets.rows(parts=("films",))


def test_ratings_are_whole_numbers_of_one_byte():
    assert all(s.ratings.dtype == np.int8 for s in snippets.parse(files()))
