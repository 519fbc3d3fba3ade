import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import data_toys
import numpy as np
import pytest

from rlhf_jax.data import tokenizers, vader

# The examples of the authors' README, version 3.3.2.
KNOWN = {
    "VADER is smart, handsome, and funny.": 0.8316,
    "VADER is smart, handsome, and funny!": 0.8439,
    "VADER is very smart, handsome, and funny.": 0.8545,
    "VADER is VERY SMART, handsome, and FUNNY.": 0.9227,
    "VADER is VERY SMART, handsome, and FUNNY!!!": 0.9342,
    "VADER is VERY SMART, uber handsome, and FRIGGIN FUNNY!!!": 0.9469,
    "VADER is not smart, handsome, nor funny.": -0.7424,
    "The book was good.": 0.4404,
    "At least it isn't a horrible book.": 0.431,
    "The book was only kind of good.": 0.3832,
    "The plot was good, but the characters are uncompelling and the dialog is not great.": -0.7042,
    "Today SUX!": -0.5461,
    "Today only kinda sux! But I'll get by, lol": 0.5249,
    "Make sure you :) or :D today!": 0.8633,
    "Catch utf-8 emoji such as 💘 and 💋 and 😁": 0.8750,
    "Not bad at all": 0.4310,
}
WORDS = {"good": 1.9, "bad": -2.5, ":)": 2.0, ":d": 2.3, "isn't": -1.0, "great": 3.1}


@pytest.fixture
def corpus():
    data_toys.need_corpus()


def test_the_score_is_the_authors(corpus):
    assert {text: vader.vader_compound(text) for text in KNOWN} == KNOWN


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_a_text_without_words_scores_zero(corpus, text):
    assert vader.vader_compound(text) == 0.0


def test_the_score_works_in_worker_processes(corpus):
    assert pickle.loads(pickle.dumps(vader.vader_compound)) is vader.vader_compound
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(vader.vader_compound, list(KNOWN)[:3])) == [0.8316, 0.8439, 0.8545]


def test_vader_is_a_weak_proxy_of_what_people_feel_about_films(corpus):
    from rlhf_jax.data import snippets

    movie = [s for s in snippets.load() if s.part == "movie"][::3]
    found = np.corrcoef([vader.vader_compound(s.text) for s in movie], [s.score for s in movie])
    assert 0.35 < found[0, 1] < 0.5


def test_the_lexicon_has_the_words_and_emoticons_of_the_paper(corpus):
    words = vader.lexicon()
    assert len(words) == 7506 and words["good"] == 1.9 and words[":("] == -1.9
    assert max(abs(v) for v in words.values()) <= 4


def test_every_token_of_a_word_carries_its_valence_and_no_other_does():
    found = vader.token_marks("so good", [(0, 2), (2, 5), (5, 7)], words=WORDS)
    np.testing.assert_allclose(found, [0, 1.9, 1.9])  # "so", " go", "od"
    assert found.dtype == np.float32
    found = vader.token_marks("goods good", [(0, 5), (6, 10)], words=WORDS)
    np.testing.assert_allclose(found, [0, 1.9])  # a word within another is none


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GOOD, bad!", ["GOOD", "bad"]),
        ('"great"-good', ["great", "good"]),
        ("great's", ["great"]),
        ("isn't it :)", ["isn't", ":)"]),
        ("(good)...", ["good"]),
        ("GooD :D", ["GooD", ":D"]),
    ],
)
def test_words_are_found_beside_marks_and_in_any_case(text, expected):
    _, offsets = tokenizers.load("bytes").encode_with_offsets(text)
    found = vader.token_marks(text, offsets, words=WORDS)
    marked = [text[a:b] if m else " " for (a, b), m in zip(offsets, found, strict=True)]
    assert "".join(marked).split() == expected
