import json
from dataclasses import replace
from functools import partial

import data_toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from rlhf_jax.data import DataError, streams, tokenizers
from rlhf_jax.data.endless import own_rows
from rlhf_jax.data.pairing import mean_rating
from rlhf_jax.score import score
from rlhf_jax.types import Labeled, Pairs, Prompts

ROWS = data_toys.rows(23)
COMMON = {"batch": 4, "tokenizer": "bytes", "source": ROWS}
TEXT = partial(streams.text, length=48, marks=None, **COMMON)
PROMPTS = partial(streams.prompts, length=24, words=(1, 3), **COMMON)
PAIRS = partial(streams.pairs, length=48, **COMMON)
ALL = pytest.mark.parametrize("stream", [TEXT, PROMPTS, PAIRS], ids=["text", "prompts", "pairs"])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def start(stream, **kwargs):
    return iter(stream(**{"seed": 0, "shard": (0, 1)} | kwargs))


def assert_same(one, other):
    assert type(one) is type(other)
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@ALL
def test_a_restored_iterator_goes_on_at_the_very_next_batch(stream):
    iterator = start(stream)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 9)  # past the end of an epoch of 23 rows
    fresh = start(stream)
    fresh.set_state(state)
    for one, other in zip(take(fresh, 9), expected, strict=True):
        assert_same(one, other)
    iterator.set_state(state)  # and in place, going back
    assert_same(next(iterator), expected[0])


@ALL
def test_the_same_seed_gives_the_same_stream_and_another_seed_another(stream):
    one, again, other = (take(start(stream, seed=seed), 3) for seed in (5, 5, 6))
    for a, b in zip(one, again, strict=True):
        assert_same(a, b)
    assert any((a.tokens != b.tokens).any() for a, b in zip(one, other, strict=True))


@ALL
@pytest.mark.parametrize("count", [2, 4])
def test_global_batches_are_the_same_on_any_number_of_processes(stream, count):
    whole = take(start(stream), 8)
    parts = [take(start(stream, shard=(index, count)), 8) for index in range(count)]
    for step, expected in enumerate(whole):
        pieces = [part[step] for part in parts]
        assert all(len(piece.tokens) == 4 // count for piece in pieces)
        for name, value in vars(expected).items():
            joined = np.concatenate([getattr(piece, name) for piece in pieces])
            np.testing.assert_array_equal(joined, value, err_msg=name)


def whole_batches(shards, count, place=None):
    """The texts of `count` batches of 8, row by row, made by processes with these shards."""
    readers, seen = [start(TEXT, batch=8, shard=shard) for shard in shards], []
    for reader in readers if place is not None else ():
        reader.set_state(json.loads(place))
    for _ in range(count):
        rows = np.empty(8, object)
        for shard, reader in zip(shards, readers, strict=True):
            rows[own_rows(shard, 8)] = tokenizers.texts(tokenizers.load("bytes"), next(reader))
        seen += rows.tolist()
    (place,) = {json.dumps(reader.get_state()) for reader in readers}  # one for all of them
    return seen, place


@pytest.mark.parametrize(
    "others",
    [[(0, 1)], [(0, 2), (1, 2)], [(i, 8) for i in range(8)], [((0, 2), 4), ((1, 3), 4)]],
    ids=["one", "two", "eight", "two, interleaved"],
)
def test_each_row_comes_once_an_epoch_when_four_stop_and_others_go_on(others):
    before, place = whole_batches([(index, 4) for index in range(4)], 4)
    after, _ = whole_batches(others, 19, place)
    seen = before + after  # 23 batches of 8 are 8 epochs of 23 rows
    for epoch in range(8):
        rows = sorted(seen[23 * epoch : 23 * epoch + 23])
        assert rows == sorted(row["text"] for row in ROWS), epoch


def test_over_two_shards_every_sentence_comes_once_an_epoch_and_epochs_differ():
    shards = [start(TEXT, shard=(index, 2)) for index in range(2)]
    seen = []
    for _ in range(23):  # 4 epochs of 23 rows
        for iterator in shards:
            seen += tokenizers.texts(tokenizers.load("bytes"), next(iterator))
    epochs = [seen[i : i + 23] for i in range(0, 92, 23)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(row["text"] for row in ROWS)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_many_rows_are_shuffled_the_same_way():
    """From 1,000 rows on the order is grain's."""
    source = [str(i) for i in range(1000)]
    shards = [start(TEXT, source=source, batch=100, length=6, shard=(i, 2)) for i in range(2)]
    t = tokenizers.load("bytes")
    seen = [text for _ in range(20) for it in shards for text in tokenizers.texts(t, next(it))]
    assert sorted(seen[:1000]) == sorted(seen[1000:]) == sorted(source)
    assert len({tuple(seen[:1000]), tuple(seen[1000:]), tuple(source)}) == 3


def test_text_is_bos_text_eos_with_the_mask_on_all_but_bos_and_padding():
    (batch,) = take(start(TEXT, source=[{"text": "abc", "score": 0.7}], batch=1, length=8), 1)
    t = tokenizers.load("bytes")
    assert isinstance(batch, Labeled)
    assert batch.tokens.tolist() == [[t.bos, *t.encode("abc"), t.eos, t.pad, t.pad, t.pad]]
    assert batch.mask.tolist() == [[False, True, True, True, True, False, False, False]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.score == np.float32(0.7)
    dtypes = {name: str(value.dtype) for name, value in vars(batch).items()}
    assert dtypes == {
        "tokens": "int32", "mask": "bool", "segments": "int32",
        "score": "float32", "token_score": "float32",
    }  # fmt: skip


def test_a_text_that_is_too_long_is_cut_and_has_no_end():
    (batch,) = take(start(TEXT, source=["abcdef"], batch=1, length=4), 1)
    t = tokenizers.load("bytes")
    assert batch.tokens.tolist() == [[t.bos, *t.encode("abc")]]
    assert batch.mask.tolist() == [[False, True, True, True]]


def test_marks_stand_on_the_tokens_they_speak_of():
    def marks(text, offsets):
        return np.array([2.5 if text[a:b] == "b" else 0.0 for a, b in offsets], np.float32)

    (batch,) = take(start(TEXT, source=["abcb"], batch=1, length=4, marks=marks), 1)
    np.testing.assert_array_equal(batch.token_score, [[0, 0, 2.5, 0]])  # BOS a b c


def test_prompts_are_the_first_words_and_their_number_is_their_place():
    batches = take(start(PROMPTS, empty=0.3), 12)
    t = tokenizers.load("bytes")
    assert all(isinstance(batch, Prompts) for batch in batches)
    ids = np.concatenate([batch.prompt_id for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(48))
    words = []
    for batch in batches:
        assert batch.sample_id.tolist() == [0] * 4
        for tokens, length in zip(batch.tokens, batch.length, strict=True):
            assert tokens[0] == t.bos and (tokens[length:] == t.pad).all()
            text = t.decode(tokens[:length])
            words.append(len(text.split()))
            assert any(row["text"].startswith(text) for row in ROWS)
            assert length == 1 + len(t.encode(text))
    assert set(words) == {0, 1, 2, 3}
    assert 0.15 < words.count(0) / 48 < 0.5


def test_a_prompt_that_is_too_long_is_shown_or_cut_on_request():
    source = ["abcdefgh ijk"]
    with pytest.raises(DataError, match=r"'abcdefgh' has 9 tokens .* length=5.*truncate"):
        next(start(PROMPTS, source=source, batch=1, length=5, words=(1, 1)))
    cut = next(start(PROMPTS, source=source, batch=1, length=5, words=(1, 1), truncate=True))
    assert tokenizers.load("bytes").decode(cut.tokens[0]) == "abcd" and cut.length == 5


def test_pairs_hold_two_rated_texts_of_one_kind_at_least_the_gap_apart():
    by_text = {row["text"]: row for row in ROWS}
    t = tokenizers.load("bytes")
    for batch in take(start(PAIRS, gap=2.0, label=mean_rating), 10):
        assert isinstance(batch, Pairs) and batch.tokens.shape == (4, 2, 48)
        assert not batch.mask[..., 0].any()
        np.testing.assert_array_equal(batch.mask[..., 1:], batch.segments[..., 1:] == 1)
        for pair in batch.tokens:
            chosen, rejected = (by_text[t.decode(tokens)] for tokens in pair)
            assert chosen["part"] == rejected["part"]
            assert chosen["score"] - rejected["score"] >= 2.0 - 1e-9


def test_the_raters_noise_reaches_the_pairs():
    """Where raters disagree, some labels go against the mean rating; with the mean none does."""
    ratings = {"a": [2, 2, 2, -2], "b": [-1, -1, -1, 1]}  # P(a preferred) = 12/16
    rows = [{"text": text, "ratings": np.array(r), "part": 0} for text, r in ratings.items()]
    t = tokenizers.load("bytes")
    stream = partial(PAIRS, source=rows, batch=100, length=3)
    first = np.concatenate([b.tokens[:, 0, 1] for b in take(start(stream), 10)])
    assert abs((first == t.encode("a")[0]).mean() - 0.75) < 0.05
    assert (next(start(stream, label=mean_rating)).tokens[:, 0, 1] == t.encode("a")).all()


@ALL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": (0, 3)}, r"batch=4 does not divide into the 3 parts .* use .* such as 6"),
        ({"shard": (2, 2)}, "index < count"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"length": 0}, "length=0"),
        ({"source": "one text"}, "not the text"),
        ({"tokenizer": "nowhere.json"}, r"no tokenizer file nowhere\.json"),
    ],
)
def test_mistakes_are_answered_before_the_first_batch(stream, change, message):
    with pytest.raises(DataError, match=message):
        start(stream, **change)


@ALL
@pytest.mark.parametrize("source", [[], lambda: []])
def test_an_empty_data_set_is_an_error(stream, source):
    with pytest.raises(DataError, match="data set is empty"):
        start(stream, source=source)


def test_a_field_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(DataError, match="no field 'review'; they have id, part, text"):
        next(start(TEXT, field="review"))


def test_the_default_streams_are_disjoint_sentences_of_the_real_corpus():
    data_toys.need_corpus()
    texts = [
        {row["text"] for row in source()}
        for source in (streams.BASE, streams.REWARD, streams.HELDOUT)
    ]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    batch = next(iter(streams.text(seed=0, shard=(0, 1), batch=64, length=64, tokenizer="bytes")))
    assert (batch.token_score != 0).any() and abs(batch.score).max() <= 4


def texts_of(batch):
    """Tokens of every segment of every row, without padding."""
    return [
        tuple(tokens[segments == n])
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True)
        for n in range(1, segments.max() + 1)
    ]


def test_packed_rows_hold_every_text_once_an_epoch_whole_and_little_padding():
    plain = partial(streams.text, length=96, marks=None, **{**COMMON, "batch": 1})
    written = {texts_of(next_)[0] for next_ in take(start(plain), 46)}  # two epochs
    packed, found, used = start(partial(plain, pack=True)), [], []
    for row in take(packed, len(written)):
        if len(found) >= len(written):
            break
        found += texts_of(row)
        used.append((row.segments > 0).mean())
        for n in range(1, row.segments.max() + 1):
            here = row.segments == n
            assert row.mask[here].tolist() == [False] + [True] * (here.sum() - 1)
    assert len(found) == len(written) and set(found) == written
    assert np.mean(used) > 0.8 and len(used) < 0.6 * len(written)
    assert not row.mask[row.segments == 0].any() and row.score.tolist() == [0.0]


def test_a_text_in_a_packed_row_is_scored_as_it_is_alone(model, params):
    plain = partial(streams.text, length=64, marks=None, tokenizer="bytes", source=ROWS[:6])
    wide = replace(model, vocab=264)
    weights = toys.weights(wide)

    @jax.jit
    def logp(batch):
        batch = jax.tree.map(jnp.asarray, batch)
        return score({"self": weights}, batch, models={"self": wide}).logp

    def by_text(batch):
        said = np.asarray(logp(batch))
        return {
            tuple(t[s == n]): said_row[s == n]
            for t, s, said_row in zip(batch.tokens, batch.segments, said, strict=True)
            for n in range(1, s.max() + 1)
        }

    alone = by_text(next(start(partial(plain, batch=6))))
    rows = start(partial(plain, batch=1, pack=True))
    together = {}
    for row in take(rows, 12):
        together |= by_text(row)
    assert together.keys() == alone.keys()
    for text, expected in alone.items():
        np.testing.assert_allclose(together[text], expected, atol=1e-5)
