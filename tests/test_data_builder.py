import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import data_toys
import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhf_jax.data import DataError, builder, snippets, streams, tokenizers

ROWS = data_toys.rows(40)


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A user's own set, with fields of other names."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"review": tfds.features.Text(), "stars": np.float32}
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(ROWS)}

    def _generate_examples(self, rows):
        for row in rows:
            yield row["id"], {"review": row["text"], "stars": row["score"]}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    made = Reviews(data_dir=tmp_path_factory.mktemp("own"), file_format="array_record")
    made.download_and_prepare()
    return made.data_path


@pytest.fixture
def small(monkeypatch, tmp_path):
    """RatedSnippets of the toy texts, in an empty cache."""
    toys = tuple(snippets.Snippet(r["id"], r["part"], r["text"], r["ratings"]) for r in ROWS)
    monkeypatch.setattr(snippets, "load", lambda: toys)
    monkeypatch.setattr(builder.corpus, "sdist", lambda: None)
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    return tmp_path


def test_the_data_set_holds_what_the_snippets_hold_split_by_sentence(small):
    directory = builder.prepare()
    assert "tensorflow" not in sys.modules
    for split in snippets.SPLITS:
        stored = builder.tfds_rows(directory=directory, split=split)
        found = {row["id"]: row for row in (stored[i] for i in range(len(stored)))}
        expected = {row["id"]: row for row in snippets.rows(split=split, parts=("movie", "tweet"))}
        assert set(found) == set(expected) and found
        for name, row in expected.items():
            assert (found[name]["text"], found[name]["part"]) == (row["text"], row["part"])
            assert found[name]["score"] == np.float32(row["score"])
            np.testing.assert_array_equal(found[name]["ratings"], row["ratings"])


def test_it_is_prepared_once_even_when_several_start_at_once(small):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: builder.prepare(), range(2))
    stamp = (first / "dataset_info.json").stat().st_mtime_ns
    assert first == second == builder.prepare()
    assert (first / "dataset_info.json").stat().st_mtime_ns == stamp
    assert [path.name for path in (small / "tfds").iterdir()] == ["rated_snippets"]


def test_a_data_set_that_cannot_be_put_in_place_is_an_error(small, monkeypatch):
    real, target = os.rename, small / "tfds" / "rated_snippets" / "1.0.0"

    def rename(source, destination, **kwargs):  # TFDS renames too, within its own folder
        if str(destination) == str(target):
            raise PermissionError("not into the cache")
        return real(source, destination, **kwargs)

    monkeypatch.setattr(builder.os, "rename", rename)
    with pytest.raises(PermissionError, match="not into the cache"):
        builder.prepare()
    assert not target.exists()


def test_a_stream_reads_a_users_own_set_by_its_own_field_names(own):
    fields = {"text": "review", "score": "stars"}
    source = partial(builder.tfds_rows, directory=own, split="train", fields=fields)
    stream = streams.text(
        seed=0, shard=(0, 1), batch=40, length=64, tokenizer="bytes", source=source, marks=None
    )
    batch = next(iter(stream))
    texts = tokenizers.texts(tokenizers.load("bytes"), batch)
    found = dict(zip(texts, batch.score.tolist(), strict=True))
    assert found == {row["text"]: np.float32(row["score"]) for row in ROWS}


def test_a_part_of_a_split_can_be_asked_for(own):
    assert len(builder.tfds_rows(directory=own, split="train[:25%]")) == 10


def test_wrong_directories_splits_and_fields_are_answered_with_the_valid_ones(own, tmp_path):
    with pytest.raises(DataError, match="not a prepared TFDS data set"):
        builder.tfds_rows(directory=tmp_path, split="train")
    with pytest.raises(DataError, match="no split 'test'; valid: train"):
        builder.tfds_rows(directory=own, split="test")
    with pytest.raises(DataError, match=r"no field \['text'\]; valid: review, stars"):
        builder.tfds_rows(directory=own, split="train", fields={"text": "text"})


def test_an_empty_split_is_an_error(own):
    with pytest.raises(DataError, match=r"empty: split 'train\[:0%\]'"):
        builder.tfds_rows(directory=own, split="train[:0%]")


def test_the_real_corpus_is_prepared_with_all_its_sentences(tmp_path):
    data_toys.need_corpus()
    directory = builder.prepare()  # in the user's cache: made by the first run only
    splits = tfds.builder_from_directory(directory).info.splits
    assert sum(split.num_examples for split in splits.values()) == 23_703
