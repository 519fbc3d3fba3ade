"""The study of narrowing on real text: what it reads, what it compares, and its claims."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

FILE = Path(__file__).parent.parent / "experiments" / "sentiment" / "narrowing.py"
sys.path[:0] = [str(FILE.parent), str(FILE.parent.parent)]

import narrowing  # noqa: E402  (after the path)
import quickstart  # noqa: E402
import quickstart_base as base  # noqa: E402

from rlhf_jax.check import check  # noqa: E402
from rlhf_jax.data import snippets, tokenizers  # noqa: E402
from rlhf_jax.experiment import load_study  # noqa: E402
from rlhf_jax.study.results import Results, Row  # noqa: E402
from rlhf_jax.study.verdicts import judge  # noqa: E402

SEEDS, STEPS = 6, (0, 20, 60)
GOOD = {
    "sft": {"gold": (0.1, 0.5, 0.9), "entropy": (4.8, 4.6, 4.4), "distinct_2": 0.9,
            "kl": (0, 3, 9), "returned": -0.3, "followed": 0.2},
    "ppo": {"gold": (0.1, 0.4, 0.7), "entropy": 4.5, "distinct_2": 0.9, "kl": 4.0, "returned": -0.1,
            "followed": 0.5},
}  # fmt: skip


def study(preset="cpu"):
    return load_study(str(FILE), preset, [])[0]


def results(spread=1e-4, **changes):
    """Results of six seeds; `changes` are numbers of PPO."""
    rows, noise = [], spread * np.random.default_rng(0).normal(size=SEEDS)
    for arm, given in GOOD.items():
        for metric, x in {**given, **(changes if arm == "ppo" else {})}.items():
            values = zip(STEPS, np.broadcast_to(x, len(STEPS)), strict=True)
            for (step, value), seed in itertools.product(values, range(SEEDS)):
                wobble = noise[seed] if arm == "ppo" and metric == "entropy" else 0.0
                rows.append(Row(arm, seed, step, metric, float(value + wobble)))
    return Results(rows)


@pytest.mark.parametrize(
    "entropy, spread, expected",
    [(4.5, 1e-4, "supported"), (4.0, 1e-4, "refuted"), (4.35, 0.3, "undecided")],
)
def test_the_primary_can_end_in_all_three(entropy, spread, expected):
    (found,) = judge(study().primaries, results(spread, entropy=entropy))
    assert found.verdict == expected


def test_arms_are_compared_at_the_highest_gold_score_that_both_reach():
    found = narrowing._apart(results(0.0), metric="kl")  # PPO's end; supervised, before its own
    assert_allclose(found, np.full(SEEDS, 6.0 - 4.0))
    further = results(0.0, gold=(0.1, 0.7, 1.1), kl=(0.0, 4.0, 8.0))  # PPO before its end
    assert_allclose(narrowing._apart(further, metric="kl"), np.full(SEEDS, 9.0 - 6.0))


def test_the_figure_has_both_arms_and_labels():
    figure = study().figure(results())
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel()
        assert {t.get_text() for t in axes.get_legend().get_texts()} == {
            "supervised", "base", "PPO",
        }  # fmt: skip


@pytest.mark.parametrize("preset", ["cpu_ci", "cpu", "full", "gpu1", "pod"])
def test_every_preset_can_be_run(preset):
    made = study(preset)
    for run in made.configs.values():
        check(run, devices=8)
    shipped = made.arms["ppo"].run.learners["policy"].model == base.MODEL
    assert ("language" in made.bases) == (not shipped)


@pytest.fixture
def sentences(monkeypatch):
    """Sixty sentences, half of them liked, spread over all splits."""
    text = "the film is {} good and the story is about a man who {}"
    words = ["not", "very", "really", "so", "too"]
    found = [
        snippets.Snippet(
            f"movie/{i}", "movie", text.format(words[i % 5], f"has {i} friends"),
            np.array([3 if i % 2 else -3], np.int8),
        )
        for i in range(60)
    ]  # fmt: skip
    monkeypatch.setattr(snippets, "load", lambda: tuple(found))


def test_supervision_sees_what_was_liked_and_the_test_what_was_not(sentences):
    liked = narrowing.liked(least=1.0)
    assert liked and {row["score"] for row in liked} == {3.0}
    seen = {row["text"] for row in liked}
    held = narrowing.disliked()
    assert held and not seen & set(held)
    assert not seen & {row["text"] for row in quickstart.rows("heldout")()}


def test_an_interruption_stands_behind_the_same_opening(sentences):
    plain, interrupted = narrowing._openings.__wrapped__(8, 5)
    assert_array_equal(interrupted.length, plain.length + 5)
    encode = tokenizers.load(base.TOKENIZER).encode
    starts = {tuple(encode(text)[:5]) for text in narrowing.disliked()}
    for before, after, n in zip(plain.tokens, interrupted.tokens, plain.length, strict=True):
        assert_array_equal(before[:n], after[:n])
        assert tuple(np.asarray(after[n : n + 5]).tolist()) in starts
        assert (np.asarray(after[n + 5 :]) == quickstart.PAD).all()


def test_settings_reach_both_arms():
    made = narrowing.config(replace(narrowing.PRESETS["cpu"], mesh=(1, 1, 1, 1)))
    assert {arm.run.steps for arm in made.arms.values()} == {60}
    assert made.arms["ppo"].run.rollouts.show == 0
