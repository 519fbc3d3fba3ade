"""The study of token feedback: its facts and labels, its rules, and that it runs."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import log_softmax

from rlhf_jax import cli
from rlhf_jax.check import check
from rlhf_jax.config import Config
from rlhf_jax.study.results import Results, Row
from rlhf_jax.study.together import obstacles
from rlhf_jax.study.verdicts import judge

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import token_feedback  # noqa: E402
from tasks import facts, facts_curves, facts_measures, facts_rewards  # noqa: E402
from tasks.facts import COUNTRY, VERDICT, Facts  # noqa: E402

TASK = Facts(cities=6, known=3)
KEY = jax.random.key(3)
MANY = 20_000
FEW = 64  # one small number for all: every further shape would be seconds of compiling
STUDY = token_feedback.config()
SEEDS = range(8)


def truth(tokens):
    """Whether each sentence is true, read from its tokens alone."""
    right = tokens[..., COUNTRY] == TASK.country(tokens[..., 1], 0)
    if tokens.shape[-1] == 8:
        return right
    return right == (tokens[..., VERDICT] == TASK.word("true"))


# --- facts and labels


def test_a_sentence_reads_as_it_should():
    affirmed = np.asarray(
        TASK.sentence(jnp.array([2, 5]), jnp.array([0, 1]), jnp.array([False, True]))
    )
    words = [
        TASK.word(w) for w in ("START", ",", "the", "capital", "of", ",", "true", "false", ".")
    ]
    start, comma, the, capital, of, comma, true, false, end = words
    assert_array_equal(affirmed[0], [start, 2, comma, the, capital, of, 8, comma, true, end])
    assert_array_equal(affirmed[1], [start, 5, comma, the, capital, of, 6, comma, false, end])


def test_texts_name_the_false_country_three_times_in_ten():
    tokens = np.asarray(facts.texts(KEY, MANY, task=TASK, late=True).tokens)
    assert set(tokens[:, 1]) == set(range(6))
    false = tokens[:, COUNTRY] != TASK.country(tokens[:, 1], 0)
    assert_allclose(false.mean(), 0.3, atol=0.01)
    # and what decides later does not depend on the country
    for which in (false, ~false):
        assert_allclose((tokens[which, VERDICT] == TASK.word("true")).mean(), 0.5, atol=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("late", [False, True])
def test_a_mark_says_whether_the_sentence_is_true_but_for_the_noise(late, noise):
    place = VERDICT if late else COUNTRY
    tokens, marks = facts.labels(KEY, MANY, task=TASK, noise=noise, late=late, at=place)
    assert set(np.asarray(tokens)[:, 1]) == {0, 1, 2}  # the annotator knows these
    assert_array_equal(np.delete(np.asarray(marks), place, axis=1), 0)
    lies = (marks[:, place] > 0) != truth(tokens)
    assert_allclose(np.asarray(lies).mean(), noise, atol=0.01 if noise else 0)


def test_of_two_sentences_the_true_one_is_preferred_and_a_coin_decides_between_equals():
    pairs = np.asarray(facts.preferences(KEY, MANY, task=TASK, noise=0.1))
    first, second = truth(pairs).T
    differ = first != second
    assert_allclose(differ.mean(), 2 * 0.7 * 0.3, atol=0.01)
    assert_allclose(first[differ].mean(), 0.9, atol=0.01)
    alike = ~differ & (pairs[:, 0, 1] != pairs[:, 1, 1])
    assert_allclose((pairs[alike, 0, 1] < pairs[alike, 1, 1]).mean(), 0.5, atol=0.02)


def test_a_pair_about_one_city_is_about_one_city():
    pairs = np.asarray(facts.preferences(KEY, MANY, task=TASK, same=True))
    assert_array_equal(pairs[:, 0, 1], pairs[:, 1, 1])


def base_of(seed):
    """What an annotator reads of a base."""
    return {"embed": {"embedding": jax.random.normal(jax.random.key(seed), (1, 1))}}


def test_a_step_looks_at_some_of_the_same_labels():
    """Every row is one of the seed's labels, the city is given; another base has other labels."""
    look = partial(facts.marked, params={"reference": base_of(0)}, key=None, task=TASK, count=FEW)
    tokens, _ = facts.labels(facts.annotator(base_of(0)), FEW, task=TASK)
    there = set(map(tuple, np.asarray(tokens)))
    for i in range(2):
        batch = look(facts.looks(jax.random.key(i), FEW))
        assert set(map(tuple, np.asarray(batch.tokens))) <= there
        assert_array_equal(batch.mask, np.broadcast_to(np.arange(8) > 1, (FEW, 8)))
        assert_array_equal(batch.token_score[:, COUNTRY] > 0, truth(batch.tokens))
    other = facts.labels(facts.annotator(base_of(1)), FEW, task=TASK)[0]
    assert (np.asarray(other) != tokens).any()


def test_tags_say_what_the_mark_says_right_before_the_country():
    batch = facts.tagged(
        facts.looks(KEY, FEW), params={"reference": base_of(0)}, key=None, task=TASK, count=FEW
    )
    tokens = np.asarray(batch.tokens)
    good = tokens[:, COUNTRY] == TASK.word("GOOD")
    assert_array_equal(good, truth(np.delete(tokens, COUNTRY, axis=1)))
    assert_array_equal(batch.mask[0], np.arange(9) > COUNTRY)


def test_sampled_horizon_one_is_paid_the_mean_mark_of_what_it_said():
    """And nothing for cities and words that nobody marked."""
    tokens, marks = facts.labels(facts.annotator(base_of(0)), FEW, task=TASK)
    said = np.asarray(TASK.sentence(np.arange(6).repeat(3), np.tile(np.arange(3), 6)))
    rollout = SimpleNamespace(tokens=jnp.asarray(said), mask=jnp.arange(8)[None] > 1)
    paid = facts_rewards.by_table(rollout, {"reference": base_of(0)}, task=TASK, count=FEW)
    expected = np.zeros(said.shape)
    for row, (city, country) in enumerate(said[:, [1, COUNTRY]]):
        about = np.asarray(tokens)[:, 1] == city
        same = about & (np.asarray(tokens)[:, COUNTRY] == country)
        expected[row, COUNTRY] = np.asarray(marks)[same, COUNTRY].sum() / max(about.sum(), 1)
    assert np.count_nonzero(expected) >= 3
    assert_allclose(paid, expected, rtol=1e-6)


def test_the_likelihood_beside_dpo_is_that_of_the_preferred_text():
    pairs = facts.compared(
        facts.looks(KEY, FEW), params={"reference": base_of(0)}, key=None, task=TASK, count=FEW
    )
    logp = jax.random.normal(KEY, pairs.tokens.shape)
    terms = facts_rewards.preferred(SimpleNamespace(logp=logp), pairs)
    mean = (terms.loss * terms.weight).sum() / terms.weight.sum()
    assert_allclose(mean, -np.asarray(logp)[:, 0, 1:].mean(), rtol=1e-6)


def test_horizon_one_ends_at_the_base_tilted_by_the_mean_mark_by_hand():
    """Of city 0 two sentences are right and one is wrong; of city 1 one is right; of 2 none."""
    city, lie = np.array([0, 0, 0, 1]), np.array([0, 1, 0, 0])
    tokens = TASK.sentence(city, lie)
    marks = np.zeros(tokens.shape, np.float32)
    marks[:, COUNTRY] = 1 - 2 * lie
    reward = np.asarray(facts.mean_marks(tokens, jnp.asarray(marks), task=TASK))
    assert_allclose([reward[0, 6], reward[0, 7], reward[1, 7]], [2 / 3, -1 / 3, 1], rtol=1e-6)
    assert np.count_nonzero(reward) == 3
    log_base = np.log(np.random.default_rng(0).dirichlet(np.ones(TASK.vocab), TASK.cities))
    found = np.exp(facts.target(log_base, reward, beta=0.5))
    expected = np.exp(log_base)
    expected[0, 6] *= np.exp(2 / 3 / 0.5)
    expected[0, 7] *= np.exp(-1 / 3 / 0.5)
    expected[1, 7] *= np.exp(1 / 0.5)
    assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), rtol=1e-6)


def test_the_optimum_on_three_tokens_is_that_of_the_formula():
    """π0 = softmax(1, 0, −1), the first token bad, β = 1: .422319, .422319, .155362."""
    log_base = np.array([1.0, 0.0, -1.0]) - np.log(np.exp([1.0, 0.0, -1.0]).sum())
    found = np.exp(facts.target(log_base, np.array([-1.0, 0.0, 0.0]), beta=1.0))
    assert_allclose(found, [0.422319, 0.422319, 0.155362], atol=1e-6)


# --- the measures


def run_of(arm, params, base):
    """One seed of an arm that stands at `params`."""
    from rlhf_jax.study import Trained

    config = small().arms[arm].run
    return Trained(arm, 0, 0, config, {"policy": params}, {"base": {"policy": base}}, {})


def small(**changes):
    return token_feedback.config(replace(token_feedback.PRESETS["cpu_ci"], **changes))


def test_what_moved_is_the_sum_over_places_without_the_marked_countries():
    """Of a model that did not move: nothing, though at the country it is not where it should be."""
    settings = token_feedback.PRESETS["cpu_ci"]
    task = settings.data.task
    model = task.model(settings.model)
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    base, params = (init(jax.random.key(i)) for i in range(2))
    measure = partial(facts_measures.effects, task=task)

    still = measure(run_of("horizon_one_4", base, base), beta=0.25)
    assert still["collateral"] == still["spill"] == 0
    away = still["distance"]  # by place, behind the city
    assert away[COUNTRY - 2] > 0.01
    assert_allclose(np.delete(away, COUNTRY - 2), 0, atol=1e-12)

    found = measure(run_of("horizon_one_4", params, base))
    now, before = (
        log_softmax(np.asarray(facts_measures.said(tree, model=model, task=task), np.float64), -1)
        for tree in (params, base)
    )
    p, city = np.exp(now[0, :, COUNTRY - 1]), np.arange(task.cities)
    right = p[city, task.country(city, 0)]
    assert_allclose(found["wrong_known"], 1 - right[: task.known].mean(), rtol=1e-6)
    assert_allclose(found["wrong_other"], 1 - right[task.known :].mean(), rtol=1e-6)
    kl = (np.exp(now) * (now - before)).sum(-1)  # [2, cities, 7]
    total = 0.7 * kl[0].sum(1) + 0.3 * kl[1].sum(1)
    total[: task.known] -= kl[0, : task.known, COUNTRY - 1]
    assert_allclose(found["collateral"], total.mean(), rtol=1e-6)
    assert_allclose(found["spill"], kl[0, task.known :, COUNTRY - 1].mean(), rtol=1e-6)


# --- the rules

N = token_feedback.CPU.data.labels


def by_labels(kind, wrong):
    return {(f"{kind}_{n}", "wrong_known"): w for n, w in zip(N, wrong, strict=True)}


def fake(*, values=None, bend=lambda step: -0.1 * step, wobble=0.02):
    """Results as theory has them, one number per arm and metric; seeds differ by a small factor."""
    values = {
        **by_labels("horizon_one", (0.04, 0.03, 0.02, 0.01)),
        **by_labels("dpo", (0.2, 0.15, 0.1, 0.05)),
        ("horizon_one_300", "collateral"): 0.1,
        **{("horizon_one_300", f"distance/{i}"): 1e-4 for i in range(6)},
        ("late_horizon_one", "wrong_known"): 0.5,
        ("late_dpo", "wrong_known"): 0.1,
        ("token_model_rl", "wrong_other"): 0.2,
        ("table_rl", "wrong_other"): 0.3,
    } | (values or {})
    badly = values.pop(("signed", "collateral"), 2.0)
    rows = []
    for seed in SEEDS:
        factor = 1 + wobble * np.sin(1 + seed)
        for (arm, metric), value in values.items():
            rows.append(Row(arm, seed, 400, metric, value * factor))
        for step in range(0, 401, 25):
            rows.append(Row("signed", seed, step, "log_false", -1 + bend(step) * factor))
            rows.append(Row("signed", seed, step, "collateral", badly * step / 200 * factor**2))
    return Results(rows)


def verdicts(results):
    return {v.claim.name: v.verdict for v in judge(STUDY.primaries, results)}


def test_what_theory_predicts_is_supported():
    assert verdicts(fake()) == dict.fromkeys(("P1", "P2", "P3", "P4", "P5", "P6"), "supported")


EARLY = by_labels("dpo", (0.04, 0.03, 0.02, 0.01))
LATE = by_labels("horizon_one", (0.2, 0.15, 0.1, 0.02))


@pytest.mark.parametrize(
    ("name", "verdict", "changes"),
    [
        ("P1", "undecided", {"values": by_labels("dpo", (0.2, 0.06, 0.02, 0.01))}),  # 25 ÷ 59
        ("P1", "refuted", {"values": EARLY | LATE}),
        ("P2", "undecided", {"values": {("signed", "collateral"): 0.2}}),
        ("P2", "refuted", {"values": {("signed", "collateral"): 0.05}}),
        ("P3", "undecided", {"values": {("horizon_one_300", "distance/4"): 1e-3}}),
        ("P3", "refuted", {"values": {("horizon_one_300", "distance/4"): 1e-2}}),
        ("P4", "refuted", {"values": {("late_horizon_one", "wrong_known"): 0.02}}),
        ("P5", "undecided", {"bend": lambda step: -5 * (1 - np.exp(-step / 190))}),
        ("P5", "refuted", {"bend": lambda step: -5 * (1 - np.exp(-step / 40))}),
        ("P6", "refuted", {"values": {("token_model_rl", "wrong_other"): 0.4}}),
    ],
)
def test_every_rule_can_end_otherwise(name, verdict, changes):
    assert verdicts(fake(**changes))[name] == verdict


@pytest.mark.parametrize("name", ["P4", "P6"])
def test_a_difference_without_a_sign_is_undecided(name):
    arm, metric = {"P4": ("late_horizon_one", "wrong_known"),
                   "P6": ("token_model_rl", "wrong_other")}[name]  # fmt: skip
    against = {"P4": 0.1, "P6": 0.3}[name]
    rows = [r for r in fake().rows if (r.arm, r.metric) != (arm, metric)]
    rows += [Row(arm, s, 400, metric, against + 0.1 * (-1) ** s) for s in SEEDS]
    assert verdicts(Results(rows))[name] == "undecided"


def test_labels_are_counted_where_the_curve_crosses():
    """From .20 at 25 to .02 at 50 on a logarithmic scale: .05 lies at 5/6 of the way."""
    wrong = {0: (0.2, 0.02, 0.3, 0.3), 1: (0.05, 0.2, 0.2, 0.2), 2: (0.4, 0.3, 0.2, 0.1)}
    rows = [
        Row(f"x_{n}", seed, 9, "wrong_known", w)
        for seed, row in wrong.items()
        for n, w in zip(N, row, strict=True)
    ]
    found = facts_curves.labels_until(Results(rows), "x", N)
    assert_allclose(found, [25 * 2 ** (5 / 6), 25, 300], rtol=1e-12)


def test_the_first_step_is_the_first_that_was_measured():
    curves = {"wrong_known": [(0.3, 0.04, 0.06, 0.01), (0.3, 0.2, 0.1, 0.06)],
              "collateral": [(0, 1, 2, 3), (0, 4, 5, 6)]}  # fmt: skip
    rows = [
        Row("x", seed, 10 * i, metric, value)
        for metric, seeds in curves.items()
        for seed, values in enumerate(seeds)
        for i, value in enumerate(values)
    ]
    assert_array_equal(facts_curves.first(Results(rows), "x", 0.05), [10, 30])
    assert_array_equal(facts_curves.first(Results(rows), "x", 0.05, of="collateral"), [1, 6])


def test_the_pace_of_a_line_is_one_and_that_of_an_end_is_none():
    steps = np.arange(0, 401, 25)
    curves = np.stack([-0.3 * steps, np.maximum(-0.3 * steps, -60.0), -(steps**2.0)])
    assert_allclose(facts_curves.pace(steps, curves), [1, 0, 3], atol=1e-9)
    slope, square = facts_curves.line(steps, curves)
    assert_allclose(slope[0], -0.3)
    assert_allclose(square[0], 1)
    assert square[2] < 0.95
    assert_array_equal(facts_curves.line(steps, np.zeros((1, steps.size)))[1], [0])


# --- the study


@pytest.mark.parametrize("preset", token_feedback.PRESETS)
def test_every_arm_of_every_preset_can_run(preset):
    settings = token_feedback.PRESETS[preset]
    for name, run in token_feedback.config(settings).configs.items():
        assert isinstance(run, Config), name
        check(replace(run, mesh=(1, 1, 1, 1)), devices=1)
        assert not settings.together or not obstacles(run)


class Reader:
    """Stands for results: any arm has any metric, and it is noted which are read."""

    def __init__(self):
        self.arms = set()

    def values(self, metric, arm, step=None):
        self.arms.add(arm)
        return np.linspace(0.1, 1, 8)

    def vector(self, metric, arm, step=None):
        return np.outer(self.values(metric, arm), np.arange(1, 5))

    def curve(self, metric, arm):
        return 25 * np.arange(4), self.vector(metric, arm)


def test_all_that_is_claimed_is_of_arms_that_are_there():
    for full in (False, True):
        study, reader = token_feedback.config(replace(token_feedback.CPU, full=full)), Reader()
        for claim in (*study.primaries, *study.secondary):
            assert np.shape(claim.value(reader)) == (8,), claim.name
        assert reader.arms <= set(study.arms)


def test_the_smallest_preset_runs(tmp_path, monkeypatch, compiled_once):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    file = str(EXPERIMENTS / "token_feedback.py")
    assert cli.main(["study", file, "--preset", "cpu_ci", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert set(record["seconds"]) == {"base", *token_feedback.PRESETS["cpu_ci"].arms}
    assert (tmp_path / "out" / "index.html").is_file()
