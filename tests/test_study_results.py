"""Rows of a study: paired by seed, written and read whole, with errors that name what there is."""

import json
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.study.results import NotRun, Results, ResultsError, Row


def some(arms=("base", "ppo"), seeds=(0, 1, 2), steps=(0, 10)):
    """kl = 100·step + 10·arm + seed, of which kl/0 and kl/1 are halves; reward only at the end."""
    rows = []
    for a, arm in enumerate(arms):
        for seed in seeds:
            for step in steps:
                kl = 100.0 * step + 10 * a + seed
                rows += [Row(arm, seed, step, f"kl/{i}", kl / 2) for i in range(2)]
                rows.append(Row(arm, seed, step, "kl", kl))
            rows.append(Row(arm, seed, steps[-1], "reward", -seed))
    return rows


def test_values_are_ordered_by_seed_whatever_the_order_of_the_rows():
    for rows in (some(), some()[::-1], some(seeds=(2, 0, 1))):
        results = Results(rows)
        assert results.seeds == (0, 1, 2)
        assert_array_equal(results.values("kl", "ppo"), [1010, 1011, 1012])
        assert_array_equal(results.values("kl", "ppo", 0), [10, 11, 12])
        assert_array_equal(results.values("reward", "base"), [0, -1, -2])
    assert_array_equal(Results(some(seeds=(2, 9))).values("kl", "ppo", 0), [12, 19])


def test_curves_and_vectors():
    results = Results(some())
    steps, kl = results.curve("kl", "ppo")
    assert_array_equal(steps, [0, 10])
    assert_array_equal(kl, [[10, 1010], [11, 1011], [12, 1012]])
    assert_array_equal(results.vector("kl", "ppo", 0), [[5, 5], [5.5, 5.5], [6, 6]])
    assert results.vector("kl", "base").shape == (3, 2)
    assert results.arms == ("base", "ppo")
    assert results.metrics("ppo") == ("kl/0", "kl/1", "kl", "reward")
    assert results.steps("ppo") == (0, 10) and results.steps("ppo", "reward") == (10,)


def test_a_metric_is_read_where_another_one_first_rises_to_a_level():
    reward, entropy = (0.1, 0.5, 0.4, 0.9), (4.0, 3.0, 2.0, 1.0)
    rows = [Row("a", 0, i, "reward", x) for i, x in enumerate(reward)]
    rows += [Row("a", 0, i, "entropy", x) for i, x in enumerate(entropy)]
    results = Results([*rows, *(Row("a", 1, r.step, r.metric, r.value) for r in rows)])
    found = results.when("entropy", "a", by="reward", level=np.array([0.3, 0.65]))
    assert_allclose(found, [3.5, 1.5])
    assert_allclose(results.when("entropy", "a", by="reward", level=2.0), [1, 1])  # never


def test_vectors_of_more_than_ten_are_in_the_order_of_their_numbers():
    results = Results([Row("a", 0, 0, f"p/{i}", i) for i in reversed(range(12))])
    assert_array_equal(results.vector("p", "a"), [np.arange(12)])


def test_what_is_written_is_read_back(tmp_path):
    rows = [*some(), Row("ppo", 0, 10, "µ", math.pi)]
    rows += [Row("base", i, 10, "odd", v) for i, v in enumerate((math.inf, -math.inf, math.nan))]
    path = tmp_path / "results.jsonl"
    Results(rows).write(path)
    found = Results.read(path)
    assert [repr(r) for r in found.rows] == [
        repr(Row(**{**vars(r), "value": float(r.value)})) for r in rows
    ]
    assert_array_equal(found.values("odd", "base"), [math.inf, -math.inf, math.nan])
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_the_file_is_strict_json_line_by_line(tmp_path):
    path = tmp_path / "results.jsonl"
    Results([Row("a", 0, 3, "kl", np.float32(0.5)), Row("a", 1, 3, "kl", math.nan)]).write(path)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert found == [
        {"arm": "a", "seed": 0, "step": 3, "metric": "kl", "value": 0.5},
        {"arm": "a", "seed": 1, "step": 3, "metric": "kl", "value": "nan"},
    ]


GOOD = '{"arm": "a", "seed": 0, "step": 0, "metric": "kl", "value": 1.5}'


@pytest.mark.parametrize(
    "line, says",
    [
        (GOOD[:-20], "line 2 is not valid JSON"),
        (GOOD.replace("1.5", "null"), "line 2 must be an object of arm, seed, step, metric, value"),
        (GOOD.replace("1.5", '"big"'), "'big' must be a number or one of nan, inf, -inf"),
        (GOOD.replace('"seed": 0, ', ""), "must be an object of arm, seed"),
        (GOOD.replace("0,", "0.5,", 1), "must be an object of arm, seed"),
        ("[1]", "must be an object"),
        (GOOD, "two rows for 'kl' of arm 'a', seed 0, step 0"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, says):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ResultsError, match=says):
        Results.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"cannot read .*none\.jsonl"):
        Results.read(tmp_path / "none.jsonl")
    with pytest.raises(ResultsError, match=r"cannot write .*results\.jsonl"):
        Results(some()).write(tmp_path / "none" / "results.jsonl")


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda r: r.values("kl", "dpo"), "arm 'dpo' was not run; there is base, ppo"),
        (lambda r: r.values("KL", "ppo"), "no metric 'KL'; it has kl/0, kl/1, kl, reward"),
        (lambda r: r.values("reward", "ppo", 0), "no 'reward' at step 0; it is there at 10"),
        (lambda r: r.vector("tv", "ppo"), "no 'tv/0'; its metrics are kl/0"),
        (lambda r: r.curve("kl", "dpo"), "arm 'dpo' was not run"),
    ],
)
def test_what_is_missing_is_named_beside_what_there_is(ask, says):
    with pytest.raises(ResultsError, match=says):
        ask(Results(some()))


def test_an_arm_that_was_not_run_can_be_told_from_a_mistake():
    with pytest.raises(NotRun) as error:
        Results(some()).values("kl", "dpo")
    assert error.value.arm == "dpo"
    with pytest.raises(ResultsError) as error:
        Results(some()).values("dpo", "ppo")
    assert not isinstance(error.value, NotRun)


def test_arms_with_different_seeds_are_not_paired():
    results = Results([*some(arms=("base",)), *some(arms=("ppo",), seeds=(0, 1))])
    with pytest.raises(ResultsError, match="'base' has 0, 1, 2; 'ppo' has 0, 1"):
        results.values("kl", "base")


def test_a_seed_that_lacks_a_metric_is_named():
    rows = [row for row in some() if not (row.metric == "kl" and row.seed == 1 and row.step == 10)]
    with pytest.raises(ResultsError, match="'kl' of arm 'base' at step 10 is missing for seeds 1"):
        Results(rows).values("kl", "base")


def test_a_vector_with_a_hole_is_an_error():
    rows = [Row("a", 0, 0, f"p/{i}", i) for i in (0, 1, 3)]
    with pytest.raises(ResultsError, match="no metric 'p/2'"):
        Results(rows).vector("p", "a")
