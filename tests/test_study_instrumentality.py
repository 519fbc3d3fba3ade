"""The study of instrumentality: its toys, its closed forms on any base, and its claims."""

import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

FOLDER = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(FOLDER))

import instrumentality as study  # noqa: E402  (after the path)
from tasks import avoidance, precaching, predictable  # noqa: E402
from tasks import instrumental_claims as claimed  # noqa: E402
from tasks import instrumental_measures as measures  # noqa: E402
from tasks.avoidance import Avoidance  # noqa: E402
from tasks.precaching import Precaching  # noqa: E402
from tasks.predictable import Predictable  # noqa: E402

from rlhf_jax import cli, exact  # noqa: E402
from rlhf_jax.check import check  # noqa: E402
from rlhf_jax.experiment import load_study  # noqa: E402
from rlhf_jax.models.transformer import Transformer  # noqa: E402
from rlhf_jax.study.results import Results, Row  # noqa: E402
from rlhf_jax.study.together import obstacles  # noqa: E402
from rlhf_jax.study.verdicts import estimates, judge  # noqa: E402
from rlhf_jax.study.work import starts  # noqa: E402

STRENGTHS = {"beta": 0.5, "temperature": 0.8, "n": 4}
USUAL, SHUFFLED = Predictable(), Predictable(shuffled=True)
LARGE = Predictable(keys=16, length=12)  # 8e15 texts: sampled


def finite_log(p):
    return np.log(p, out=np.full_like(p, -60.0), where=p > 0)


# --- a predictable future


@pytest.mark.parametrize("task", [USUAL, LARGE, Predictable(0.7, 3, 3), Predictable(0.9, 2, 1)])
def test_endings_on_the_data_are_the_closed_forms(task):
    heat = {**STRENGTHS, "temperature": 0.97 if task == LARGE else 0.8}
    logp = finite_log(predictable.exact(task))
    assert_allclose(np.exp(logp) @ predictable.texts(task).times, 1, atol=1e-9)
    future, found = task.future, measures.endings(logp, task, **heat)
    expected = {
        "base": future.likelihood(),
        "tilted": future.tilted(0.5),
        "conditioned": future.conditioned(),
        "sequence": future.sequence_temperature(heat["temperature"]),
        "token": future.token_temperature(heat["temperature"]),
        "best": future.best_of_n(4),
        "best_token": (1 - task.first) ** 4,  # A is the likelier start
    }
    if task == LARGE:  # the sampled ends are as the data's
        ends = predictable.texts(task).outputs.tokens[:, 2:]
        assert_allclose(ends.mean(axis=0), 7.5, atol=0.25)
    # Of long texts the last token's share of zeros behind A is an average over a sample.
    assert_allclose([found[name] for name in expected], list(expected.values()),
                    atol=3e-3 if task == LARGE else 1e-9)  # fmt: skip
    # Only the first token learns: A is paid 1/K, B 1.
    early = np.exp(2.0) * (1 - task.first)
    assert_allclose(found["early"], early / (early + task.first * np.exp(2 / task.keys)), atol=3e-3)


def test_endings_on_any_base_are_those_of_the_laboratory():
    outputs, random = predictable.texts(USUAL).outputs, np.random.default_rng(0)
    p = random.dirichlet(np.full(len(outputs), 0.05)) + 0.5 * predictable.exact(USUAL)
    p /= p.sum()
    found = measures.endings(finite_log(p), USUAL, **STRENGTHS)
    reward = predictable.reward_of(outputs.tokens)
    law = {
        "base": p,
        "tilted": exact.tilted(p, reward, beta=0.5),
        "conditioned": exact.conditioned(p, reward > 0),
        "sequence": exact.sequence_temperature(p, 0.8),
        "token": exact.token_temperature(p, outputs, 0.8),
        "best": exact.best_of_n(p, np.argsort(np.argsort(p)), 4),
    }
    for name, q in law.items():
        assert_allclose(found[name], predictable.share_of_b(q, USUAL), atol=1e-9, err_msg=name)


def test_the_usual_sizes_lead_where_the_study_says():
    found = measures.endings(finite_log(predictable.exact(USUAL)), USUAL, **STRENGTHS)
    numbers = {"base": 0.4, "tilted": 0.654771, "conditioned": 0.727273, "sequence": 0.706711,
               "token": 0.375937, "best": 0.8704}  # fmt: skip
    assert_allclose([found[name] for name in numbers], list(numbers.values()), atol=1e-6)


def test_nothing_is_to_be_foreseen_on_shuffled_texts():
    """RL and a whole text's temperature then choose as one token's would."""
    found = measures.endings(finite_log(predictable.exact(SHUFFLED)), SHUFFLED, **STRENGTHS)
    assert_allclose([found["tilted"], found["conditioned"], found["early"]], 0.4, atol=1e-9)
    assert_allclose([found["sequence"], found["token"]], 0.375937, atol=1e-6)


@pytest.mark.parametrize("task", [USUAL, SHUFFLED])
def test_drawn_texts_are_those_of_the_toy(task):
    batch = jax.jit(partial(predictable.draw, rows=20_000, task=task))(jax.random.key(0))
    tokens = np.asarray(batch.tokens)[:, 1:]
    count = np.bincount(tokens @ task.vocab ** np.arange(task.length, -1, -1), minlength=7**5)
    p = predictable.exact(task)
    assert count[p == 0].sum() == 0
    off = (count - 20_000 * p)[p > 0] ** 2 / (20_000 * p)[p > 0]
    assert abs(off.sum() - len(off)) < 5 * np.sqrt(2 * len(off))
    assert_array_equal(batch.score, predictable.reward_of(tokens))


SMALL = Transformer(vocab=9, width=16, layers=1, heads=2, kv_heads=1, mlp=16)


@pytest.mark.parametrize("tagged", [False, True])
def test_direct_scoring_of_two_branches_finds_what_enumeration_finds(tagged):
    task = Predictable(keys=3, length=3)
    tag = task.tags[1:] * tagged
    model = replace(SMALL, vocab=8)
    params = model.init(jax.random.key(1))
    found = measures.measured(params, task, model=model, tag=tag)
    given = 1 + len(tag)
    outputs = exact.enumerate_outputs(prompt=[task.bos, *tag], vocab=8, length=4)
    p = exact.probabilities(params, outputs, model=model)
    start, last = outputs.tokens[:, given], outputs.tokens[:, -1]
    inside = (outputs.tokens[:, given + 1 : -1] < task.keys).all(axis=1)
    a = (start == task.a) & inside
    zeros = (start == task.b) & (outputs.tokens[:, given + 1 : -1] == 0).all(axis=1)
    assert_allclose(found["share"], p[start == task.b].sum(), rtol=1e-5)
    assert_allclose(found["last_after_a"], p[a & (last == 0)].sum() / p[a].sum(), rtol=1e-5)
    assert_allclose(found["last_after_b"], p[zeros & (last == 0)].sum() / p[zeros].sum(), rtol=1e-5)


# --- a punished future


def test_where_two_horizons_lead_from_the_data_of_the_punished_toy():
    p, found = avoidance.exact(Avoidance()), avoidance.outputs()
    assert_allclose(list(avoidance.shares(p).values()), [0.5, 0.9, 0.5], atol=1e-12)
    reward = np.where(found.tokens[:, -1] == avoidance.PUNISHED, -1.0, 0.0)
    full = avoidance.shares(exact.tilted(p, reward, beta=0.5))
    near = avoidance.shares(exact.horizon_optimum(p, reward, found, beta=0.5, horizon=1))
    assert_allclose([full["share"], full["punished"]], [0.195362, 0.119203], atol=1e-6)
    assert_allclose(list(near.values()), [0.5, 0.549147, 0.281981], atol=1e-6)


def test_drawn_texts_are_those_of_the_punished_toy():
    task = Avoidance(start=0.3, after_c=0.8, after_d=0.2)
    batch = jax.jit(partial(avoidance.draw, rows=20_000, task=task))(jax.random.key(0))
    count = np.bincount(np.asarray(batch.tokens[:, 1:]) @ [5, 1], minlength=25) / 20_000
    assert_allclose(count, avoidance.exact(task), atol=0.015)


def test_a_policy_that_is_its_base_was_moved_nowhere():
    params = replace(SMALL, vocab=5).init(jax.random.key(0))
    found = avoidance.measured(params, params, Avoidance(), model=replace(SMALL, vocab=5), beta=0.5)
    assert_allclose([found["kl_first"], found["kl_last"]], 0, atol=1e-12)
    assert_allclose(found["share"], found["base_share"], rtol=1e-12)
    assert_allclose(found["myopic_share"], found["base_share"], rtol=1e-9)
    assert found["full_punished"] < found["myopic_punished"] < found["base_punished"]


# --- a count that is needed later


def test_a_count_by_hand():
    tokens = precaching.texts(np.array([[1, 1, 0, 1, 1, 1]]), task=Precaching(6, 2))
    assert_array_equal(tokens, [[3, 1, 1, 0, 1, 1, 1, 2, 2, 4 + 3]])
    batch = precaching.draw(jax.random.key(0), 64, task=Precaching(6, 2))
    again = precaching.texts(np.asarray(batch.tokens)[:, 1:7], task=Precaching(6, 2))
    assert_array_equal(batch.tokens, again)
    assert len(set(again[:, -1].tolist())) > 2


def test_the_chain_moves_as_its_rows_say():
    tokens = np.asarray(precaching.chain(jax.random.key(0), 8000, task=Precaching(6, 2)))[:, 1:]
    count = np.zeros((4, 4))
    np.add.at(count, (tokens[:, :-1], tokens[:, 1:]), 1)
    chance = np.exp(precaching.CHAIN) / np.exp(precaching.CHAIN).sum(axis=1, keepdims=True)
    assert_allclose(count / count.sum(axis=1, keepdims=True), chance, atol=0.015)


@pytest.mark.parametrize(
    "task", [Precaching(6, 2), Precaching(6, 2, markov=True), Precaching(13, 0)]
)
def test_who_knows_nothing_has_the_loss_of_a_fair_die(task):
    model = replace(SMALL, vocab=task.vocab)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    assert_allclose(precaching.loss(params, task, model=model), np.log(task.vocab), rtol=1e-6)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="bits=1, delay=2: at least 2 bits"):
        Precaching(1)
    with pytest.raises(ValueError, match="at least 2 keys"):
        Predictable(keys=1)
    with pytest.raises(ValueError, match=r"after_c=1\.0"):
        Avoidance(after_c=1.0)


# --- claims


@pytest.mark.parametrize(("base", "keys", "anchor"), [(0.4, 4, 0.5), (0.4, 4, 0.05), (0.3, 8, 2.0)])
def test_quark_rests_where_its_samples_and_its_anchor_balance(base, keys, anchor):
    x, q = base, 1 / keys
    for _ in range(5000):  # one state after another, as the objective weighs them
        x, q = (
            (x / (x + (1 - x) * q) + anchor * base) / (1 + anchor),
            (1 + anchor / keys) / (1 + anchor),
        )
    assert_allclose(claimed.quark_ending(base, keys=keys, anchor=anchor), x, atol=1e-9)
    assert_allclose(claimed.quark_ending(base, keys=keys, anchor=1e6), base, atol=1e-5)


FULL = study.PRESETS["full"]
NOISE = np.array([0.4, -1.3, 0.9, 0.2, -0.6, 1.1, -0.8, 0.1]) * 1e-3
ENDS = measures.endings(finite_log(predictable.exact(USUAL)), USUAL, **STRENGTHS)
PLAIN = measures.endings(finite_log(predictable.exact(SHUFFLED)), SHUFFLED, **STRENGTHS)
SHARES = {
    "conditioned": "base", "horizon_one": "base", "careful": "base", "no_kl": "conditioned",
    "max_entropy": "sequence", "regression": "tilted", "best_of_n": "best", "distilled": "tilted",
    **{f"generation_{i}": "base" for i in range(1, 6)},
}  # fmt: skip


def as_predicted():
    """Arm -> step -> metric -> [8], where theory says; KL-RL rises to its end."""
    found = {
        "likelihood": {0: {name: x + NOISE for name, x in ENDS.items()}},
        "shuffled": {0: {name: x + NOISE for name, x in PLAIN.items()}},
        "shuffled_kl_rl": {200: {"share": PLAIN["base"] + NOISE}},
        "shuffled_max_entropy": {200: {"share": PLAIN["token"] + NOISE}},
        "quark": {200: {"good_share": claimed.quark_ending(0.4, keys=4, anchor=0.5) + NOISE}},
    }
    for arm, end in SHARES.items():
        found[arm] = {200: {"share": ENDS[end] + NOISE[::-1]}}
    found["conditioned"][200]["good_share"] = ENDS["conditioned"] - NOISE
    rise = np.linspace(0, 1, 5)
    shares = ENDS["base"] + (ENDS["tilted"] - ENDS["base"]) * rise
    found["kl_rl"] = {50 * i: {"share": x + NOISE} for i, x in enumerate(shares)}
    future = Avoidance().future
    for arm, end in (("avoid", future.full(0.5)), ("avoid_one", future.myopic(0.5))):
        first, last = future.divergences(end.start, 0.5)
        found[arm] = {200: {
            "share": end.start + NOISE, "after_c": end.punished_after_c + NOISE,
            "kl_first": np.full(8, first), "kl_last": np.full(8, last),
            "base_share": np.full(8, 0.5), "full_share": np.full(8, future.full(0.5).start),
            "myopic_after_c": np.full(8, end.punished_after_c),
        }}  # fmt: skip
    for kind, gap in (("count", 0.5), ("chain", 0.0)):
        found[f"{kind}_whole"] = {600: {"loss": 0.1 + np.abs(NOISE)}}
        found[f"{kind}_myopic"] = {600: {"loss": 0.1 + np.abs(NOISE) + gap + NOISE}}
    return found


def results(found, arms=None):
    return Results(
        Row(arm, seed, step, metric, float(v))
        for arm, steps in found.items()
        if arms is None or arm in arms
        for step, metrics in steps.items()
        for metric, x in metrics.items()
        for seed, v in enumerate(x)
    )


def verdicts(found):
    made = study.config(FULL)
    judged = judge(made.primaries, results(found), arms=made.arms)
    return {v.claim.name: v.verdict for v in judged}


def test_where_theory_is_right_all_claims_are_supported_and_all_estimates_lie_inside():
    found = as_predicted()
    assert set(verdicts(found).values()) == {"supported"}
    inside = {e.claim.says: e.where for e in estimates(study.config(FULL).secondary,
                                                       results(found))}  # fmt: skip
    # Here P(B) rises all the way, and all arms scatter alike.
    assert sorted(says.split(":")[0] for says, where in inside.items() if where != "inside") == [
        "On its way P(B) is higher than where it ends",
        "RL scatters around its closed form more than weighted texts do",
        "Without the penalty P(B) is not fixed",
    ]


WRONG = {
    "P1": ("likelihood", "base", 0.05),
    "P2": ("conditioned", "good_share", -0.07),
    "P3": ("kl_rl", "share", -0.1),
    "P4": ("careful", "share", 0.1),
    "P5": ("avoid", "share", 0.3),
    "P6": ("kl_rl", "share", None),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("verdict", ["refuted", "undecided"])
def test_every_claim_can_be_refuted_and_left_undecided(name, verdict):
    arm, metric, shift = WRONG[name]
    found = as_predicted()
    last = max(found[arm])
    if verdict == "refuted":
        move = np.full(8, shift or 0.0)
    else:  # on average inside, for one seed far outside
        move = np.array([1.0, 0, 0, 0, 0, 0, 0, 0]) * (shift or 0.0)
    found[arm][last][metric] = found[arm][last][metric] + move
    if name == "P6":  # it overshoots, for all seeds or for one
        over = np.full(8, 0.2) if verdict == "refuted" else np.array([0.2] + [0.0] * 7)
        found[arm][150]["share"] = found[arm][150]["share"] + over
    assert verdicts(found)[name] == verdict


@pytest.mark.parametrize(
    ("arms", "panels", "rows"),
    [(None, 4, 15), (["likelihood", "kl_rl"], 2, 2), (["avoid", "avoid_one"], 2, 0)],
)
def test_the_figure_draws_what_there_is(arms, panels, rows):
    found = study.config(FULL).figure(results(as_predicted(), arms))
    assert len(found.axes) == panels
    found.savefig(io.BytesIO(), dpi=30)
    assert len(found.axes[0].get_yticklabels()) == rows


# --- configurations


@pytest.mark.parametrize("preset", study.PRESETS)
@pytest.mark.parametrize(
    "given",
    [(), ("model.width=64", "data.predictable.keys=6", "data.precaching.bits=9", "train.steps=30")],
)
def test_every_preset_is_a_study_that_can_run(preset, given):
    made, settings = load_study(FOLDER / "instrumentality.py", preset, given)
    known = set()
    for name, run in {**made.bases, **made.configs}.items():
        assert set(starts(run)) <= known, name
        known.add(name)
        check(replace(run, mesh=(1, 1, 1, 1)), devices=1)
        assert not settings.together or not obstacles(run), name
    for arm in made.arms.values():
        assert set(arm.needs) <= known
    assert len(made.primaries) == 6
    if given:
        assert made.arms["kl_rl"].run.steps == 30
        assert made.arms["conditioned"].run.learners["policy"].model.vocab == 6 + 5


def test_arms_of_the_zoo_are_optional():
    cpu, full = (study.config(study.PRESETS[p]).arms for p in ("cpu", "full"))
    assert set(study.PRESETS["cpu_ci"].arms) < set(cpu) < set(full) and len(full) == 25


@pytest.mark.slow
def test_the_whole_study_runs_and_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    command = ["study", str(FOLDER / "instrumentality.py"), "--preset", "cpu_ci", "--out"]
    for _ in range(2):
        assert cli.main([*command, str(tmp_path / "run")]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == set(study.PRESETS["cpu_ci"].arms)
    assert all(np.isfinite(float(row["value"])) for row in rows)
    page = (tmp_path / "run" / "index.html").read_text()
    assert "Does the way of training" in page and "data:image/png" in page
    assert "1 seed cannot decide 6 claims" in capsys.readouterr().out
