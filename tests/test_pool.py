"""Pools: all that was made, drawn from again and again, and as it was after a resume."""

from functools import partial

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from rlhf_jax.pool import Kept, Pool, by_quantile, uniformly
from rlhf_jax.types import Labeled


def texts(scores, name=0):
    """Rows that carry their score, and where they come from in their tokens."""
    scores = np.asarray(scores, np.float32)
    tokens = np.full((len(scores), 3), name, np.int32)
    tokens[:, 2] = np.arange(len(scores))
    mask = np.tile([False, True, True], (len(scores), 1))
    return Labeled(tokens, mask, mask.astype(np.int32), scores, np.zeros((len(scores), 3), "f"))


def played(kept, steps):
    return [
        kept.add_and_draw(step, texts([step, step + 0.5], name=step), jax.random.key(step))
        for step in steps
    ]


def test_a_pool_draws_from_all_steps_each_row_at_most_once(tmp_path):
    *_, last = played(Kept(tmp_path, Pool(rows=6), 0), range(4))
    rows = {tuple(row) for row in last.tokens.tolist()}
    assert len(rows) == 6
    assert len({row[0] for row in rows}) >= 3


def test_while_it_is_small_rows_come_more_than_once(tmp_path):
    (first,) = played(Kept(tmp_path, Pool(rows=6), 0), range(1))
    assert first.tokens.shape == (6, 3)
    assert set(first.tokens[:, 2]) == {0, 1}


def test_only_the_newest_rows_are_kept(tmp_path):
    *_, last = played(Kept(tmp_path, Pool(rows=64, size=3), 0), range(5))
    assert {tuple(row) for row in last.tokens.tolist()} == {(3, 3, 1), (4, 4, 0), (4, 4, 1)}


@pytest.mark.parametrize("size", [3, 100])
def test_a_resumed_pool_draws_what_it_would_have_drawn_and_forgets_later_steps(tmp_path, size):
    pool = Pool(rows=5, size=size)
    whole = played(Kept(tmp_path, pool, 0), range(6))  # its last three are not in a checkpoint
    resumed = played(Kept(tmp_path, pool, 3), range(3, 6))
    for a, b in zip(whole[3:], resumed, strict=True):
        jax.tree.map(assert_array_equal, a, b)


def test_a_fresh_run_begins_with_an_empty_pool(tmp_path):
    played(Kept(tmp_path, Pool(rows=4), 0), range(3))
    (first,) = played(Kept(tmp_path, Pool(rows=64), 0), [7])
    assert set(first.tokens[:, 0]) == {7}


def test_what_a_crash_left_half_written_is_not_read(tmp_path):
    played(Kept(tmp_path, Pool(rows=4), 0), range(2))
    (tmp_path / "2.tmp").write_bytes(b"half")
    played(Kept(tmp_path, Pool(rows=4), 2), [2])


def test_parts_of_equal_size_that_part_no_ties():
    rng = np.random.default_rng(0)
    rows = texts([5, 1, 3, 7, 2, 4, 6, 0])
    found = by_quantile(rows, rng, 8, parts=4)
    by_row = dict(zip(found.tokens[:, 2].tolist(), found.score.tolist(), strict=True))
    assert [by_row[i] for i in range(8)] == [2, 0, 1, 3, 1, 2, 3, 0]
    tied = by_quantile(texts([1, 1, 1, 2]), rng, 4, parts=2)
    assert sorted(tied.score) == [0, 0, 0, 1]
    assert set(by_quantile(texts([3, 3, 3]), rng, 3, parts=4).score) == {0}


def test_the_pool_is_quantised_anew_as_it_grows(tmp_path):
    """A text that was among the best falls behind as better ones come."""
    pool = Pool(rows=8, draw=partial(by_quantile, parts=2))
    kept = Kept(tmp_path, pool, 0)
    seen = []
    for step, better in enumerate((0.0, 10.0, 20.0)):
        batch = texts([better, better + 1], name=step)
        drawn = kept.add_and_draw(step, batch, jax.random.key(step))
        old = (drawn.tokens[:, 0] == 0) & (drawn.tokens[:, 2] == 1)
        seen.append(set(drawn.score[old]))
    assert seen[0] == {1} and seen[2] == {0}


def test_the_same_key_draws_the_same_rows():
    rows = texts(range(50))
    drawn = [uniformly(rows, np.random.default_rng(seed), 5).score.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
