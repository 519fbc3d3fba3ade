"""The study of the prior over worlds: its task, where theory puts RL, its claims."""

import itertools
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

FILE = Path(__file__).parent.parent / "experiments" / "world_prior.py"
sys.path.insert(0, str(FILE.parent))

import world_prior as study_file  # noqa: E402  (after the path)
from tasks import prior, prior_measures  # noqa: E402
from tasks.prior import Prior  # noqa: E402

from rlhf_jax import exact  # noqa: E402
from rlhf_jax.check import check  # noqa: E402
from rlhf_jax.experiment import load_study  # noqa: E402
from rlhf_jax.measure import Worlds, filter_predictions  # noqa: E402
from rlhf_jax.study import command  # noqa: E402
from rlhf_jax.study.results import Results, Row  # noqa: E402
from rlhf_jax.study.together import obstacles  # noqa: E402
from rlhf_jax.study.verdicts import judge  # noqa: E402

SEEDS = 8
TINY = Worlds(
    prior=(0.7, 0.3), block=1, noise=0.2, switch=0.1, segment=0.1, chat=0.1, code=0.05,
    answered=0.8, digits=1,
)  # fmt: skip
LENGTH = 4
SHORT = Prior(length=16)


def study(preset="cpu", *settings):
    return load_study(str(FILE), preset, list(settings))[0]


def all_texts(worlds, length):
    """Every text, and its probability by the chain rule of the filter's predictions."""
    bodies = np.array(list(itertools.product(range(worlds.bos), repeat=length)))
    tokens = np.column_stack([np.full(len(bodies), worlds.bos), bodies])
    says = filter_predictions(tokens, worlds)[:, 1:]
    return tokens, np.take_along_axis(says, bodies[..., None], axis=2)[..., 0].prod(axis=1)


@pytest.fixture(scope="module")
def alone():
    """Texts of the wanted world alone."""
    draw = jax.jit(partial(prior.texts, rows=64, worlds=SHORT.alone, length=16))
    return draw(jax.random.key(0))


# ---------------------------------------------------------------------------------- the task


@pytest.mark.parametrize("world", [0, 1])
@pytest.mark.parametrize("worlds", [TINY, replace(TINY, answered=0.0)])
def test_levels_are_those_of_all_texts(worlds, world):
    tokens, p = all_texts(worlds, LENGTH)
    assert_allclose(p.sum(), 1, atol=1e-12)
    count = worlds.says(tokens[:, 1:], world).sum(axis=1)
    expected = np.bincount(count, p, LENGTH + 1)
    assert_allclose(prior.levels(worlds, length=LENGTH, world=world), expected, atol=1e-12)


def test_where_rl_ends_is_the_tilt_of_all_texts():
    tokens, p = all_texts(TINY, LENGTH)
    reward = TINY.says(tokens[:, 1:], 1).sum(axis=1) / LENGTH
    best = exact.tilted(p, reward, beta=0.1)
    found = prior.tilted(prior.levels(TINY, length=LENGTH, world=1), beta=0.1)
    kl = exact.kl(best, p)
    assert_allclose(found["reward"], best @ reward, atol=1e-9)
    assert_allclose(found["kl"], kl, atol=1e-9)
    assert_allclose(found["objective"], best @ reward - 0.1 * kl, atol=1e-9)


def test_an_interrupted_optimum_is_the_tilt_of_all_that_may_follow():
    task, start = Prior(worlds=TINY, length=16), np.array([[TINY.bos, 0, 0]])
    tokens, p = all_texts(TINY, 2 + LENGTH)
    goes_on = (tokens[:, 1:3] == 0).all(axis=1)
    tokens, p = tokens[goes_on, 3:], p[goes_on] / p[goes_on].sum()
    hits = TINY.says(tokens, task.wanted)
    best = exact.tilted(p, hits.sum(axis=1) / task.length, beta=0.02)
    found = prior.tilted_share(start, task, beta=0.02, lags=LENGTH)
    assert_allclose(found, best @ hits, atol=1e-9)
    assert found[0] > 2 * (p @ hits)[0]


def test_kl_of_levels_is_without_bias_at_the_process_itself():
    p = prior.levels(TINY, length=LENGTH, world=1)
    random = np.random.default_rng(0)
    found = [prior.kl_of_levels(random.choice(len(p), 400, p=p), p) for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert prior.kl_of_levels(np.full(1000, 4), p) > 1


def test_the_wanted_world_is_moved_or_left_alone(alone):
    worlds, tokens = SHORT.worlds, np.asarray(alone.tokens)
    assert SHORT.wanted == 3
    assert_allclose(SHORT.reweighted.prior, (0.4 / 9, 0.3 / 9, 0.2 / 9, 0.9))
    assert not (tokens == worlds.code_id).any() and (tokens == worlds.chat_id).any()
    assert not ((tokens >= worlds.surface) & (tokens < worlds.chat_id)).any()
    assert worlds.says(tokens[:, 1:], 3).mean() > 0.85


def test_a_corpus_has_so_many_texts_in_every_seed():
    given = {"worlds": SHORT.alone, "length": 16, "count": 5}
    draw = jax.jit(partial(prior.documents, rows=64, **given))
    one, other = (np.asarray(draw(jax.random.key(i)).tokens) for i in range(2))
    assert len({row.tobytes() for row in np.concatenate([one, other])}) == 5
    assert not (one == other).all()


def test_a_text_earns_the_wanted_worlds_share_of_its_tokens(alone):
    paid = np.asarray(prior.by_token(alone, {}, task=SHORT))
    says = SHORT.worlds.says(np.asarray(alone.tokens[:, 1:]), 3)
    assert_allclose(paid.sum(axis=1), says.mean(axis=1), atol=1e-6)
    assert (paid[:, 0] == 0).all()


def test_a_task_too_short_for_an_interruption_is_refused():
    with pytest.raises(ValueError, match="length=8 16 or more"):
        Prior(length=8)


# ------------------------------------------------------------------------------- its measures


def test_a_model_is_not_away_from_itself_and_is_from_another():
    made = study("cpu_ci")
    model = made.arms["rl_02"].run.learners["policy"].model
    one, other = (model.init(jax.random.key(i)) for i in range(2))
    other = jax.tree.map(lambda x: 3 * x, other)
    sizes = replace(study_file.PRESETS["cpu_ci"].data, task=SHORT, samples=8)
    found = partial(prior_measures.away, model=model, sizes=sizes)
    assert found(one, one)["gap"] == pytest.approx(0, abs=1e-9)
    assert found(one, other)["gap"] > 1e-3


# --------------------------------------------------------------------------------- its claims


STEPS = (0, 50, 100)
GOOD = {
    "reweighted": {"share/3": 0.85},
    "sft": {
        "share/3": (0.1, 0.8, 0.9), "gap": (0.5, 0.02, 0.01), "hazard_4": (0.1, 0.3, 0.5),
        "refit_hazard_4": 0.5, "process_hazard_4": 0.1, "code_kl": 0.01, "chat_kl": (0, 1, 2),
        "reward": (0.1, 0.7, 0.85), "world_entropy": (1.28, 0.5, 0.3), "kl": (0, 4, 6),
        "in_block": 1.386,
    },
    "rl_02": {
        "share/3": (0.1, 0.7, 0.9), "star_share": 0.8, "star_kl": 5.0, "code_kl": 0.01,
        "reward": (0.1, 0.7, 0.85), "world_entropy": (1.28, 0.5, 0.3), "kl": (0, 4, 6),
        "in_block": 1.386, "hazard_4": 0.5, "refit_hazard_4": 0.5, "best_objective": 0.74,
        "kl_within": 0.01,
    },
    "rl_0": {"in_block": (1.386, 1.37, 1.3), "kl_within": 1.0},
}  # fmt: skip


def results(spread=1e-5, **changes):
    """Results of eight seeds where everything is as claimed, but for some: arm__metric=number."""
    rows, noise = [], spread * np.random.default_rng(0).normal(size=SEEDS)
    changes = {tuple(name.split("__")): x for name, x in changes.items()}
    for arm, given in GOOD.items():
        for metric, x in given.items():
            x = np.broadcast_to(changes.get((arm, metric.replace("/", "_")), x), len(STEPS))
            for (step, value), seed in itertools.product(zip(STEPS, x, strict=True), range(SEEDS)):
                rows.append(Row(arm, seed, step, metric, float(value + noise[seed] * (step > 0))))
    return Results(rows)


CASES = {
    "P1": ({}, {"sft__gap": 0.1}, {"sft__gap": 0.03}),
    "P2": ({}, {"sft__hazard_4": 0.2}, {"sft__hazard_4": 0.35}),
    "P3": ({}, {"sft__code_kl": (0.01, 1, 1)}, {"sft__code_kl": (0.01, 0.03, 0.03)}),
    "P4": ({}, {"rl_02__star_share": 0.1}, {"rl_02__star_share": 0.45}),
    "P5": (
        {},
        {"rl_02__world_entropy": (1.28, 0.9, 0.8)},
        {"rl_02__world_entropy": (1.28, 0.6, 0.4 + 1 / 30)},
    ),
    "P6": ({}, {"rl_0__in_block": (1.386, 1.4, 1.42)}, {"rl_0__in_block": 1.386}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_primary_can_end_in_all_three(name):
    wide = {"P3": 0.05, "P4": 0.5, "P5": 0.2}
    for changes, expected in zip(CASES[name], ("supported", "refuted", "undecided"), strict=True):
        spread = wide.get(name, 1e-5) if expected == "undecided" else 1e-5
        found = judge(study().primaries, results(spread, **changes))
        assert {v.claim.name: v.verdict for v in found}[name] == expected, changes


def test_the_figure_names_every_model():
    rows = list(results().rows)
    shapes = {"returned_4": 20, "refit_returned_4": 20, "heated_share": 8}
    for arm, seed in itertools.product(GOOD, range(SEEDS)):
        for (metric, k), step in itertools.product(shapes.items(), STEPS):
            rows += [Row(arm, seed, step, f"{metric}/{i}", i / k) for i in range(k)]
        if arm == "rl_02":
            rows += [
                Row(arm, seed, s, f"best_returned_4/{i}", 1.0) for s in STEPS for i in range(20)
            ]
        for metric in ("reward", "world_entropy", "star_temperature", "star_share"):
            if metric not in GOOD[arm]:
                rows += [Row(arm, seed, step, metric, 0.5) for step in STEPS]
    figure = study().figure(Results(rows))
    assert len(figure.axes) == 3
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert {"base", "supervised", "RL, β = 0", "RL, β = 0.02", "pretrained anew"} < set(labels)
    assert len(set(labels)) == len(labels)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


# ------------------------------------------------------------------------------- its settings


@pytest.mark.parametrize("preset", ["cpu_ci", "cpu", "full", "gpu1", "pod"])
def test_every_preset_can_be_run(preset):
    made = study(preset)
    assert len(made.primaries) == 6
    assert made.seeds == (1 if preset == "cpu_ci" else 8)
    for run in made.configs.values():
        if made.together:
            check(replace(run, mesh=(1, 1, 1, 1)), devices=1)
            assert not obstacles(run)
        else:
            check(run, devices=8)


def test_full_adds_arms_and_changes_none():
    few, all_of_them = study("cpu").arms, study("full").arms
    assert list(few) == ["reweighted", "sft", "rl_0", "rl_02"]
    assert set(all_of_them) - set(few) == {
        "rl_005", "rl_08", "sft_100_texts", "sft_2000_texts", "filtered",
    }  # fmt: skip


@pytest.mark.slow
def test_from_one_command_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    command.run(str(FILE), [], tmp_path / "out", preset="cpu_ci")
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    found = Results.read(tmp_path / "out" / "results.jsonl")
    verdicts = judge(study("cpu_ci").primaries, found)
    run = {v.claim.name for v in verdicts if math.isfinite(v.estimate)}
    assert run == {"P2", "P3", "P4", "P5"}
    assert {v.verdict for v in verdicts} == {"undecided", "not run"}  # of one seed, of two arms
