"""The study of credit: its toys are what they claim, its numbers are right, its claims can fail."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_chain  # puts the folder of the studies' tasks on the path
import toys
from numpy.testing import assert_allclose, assert_array_equal
from tasks import chain_measures, credit_arms, local_measures
from tasks.chain import Chain, Speaker, law, walk
from tasks.local import Local, Oracle, values

from rlhf_jax import exact
from rlhf_jax.check import check
from rlhf_jax.experiment import load_study
from rlhf_jax.score import score
from rlhf_jax.study import Trained, command
from rlhf_jax.study.results import Results, Row
from rlhf_jax.study.together import obstacles
from rlhf_jax.study.verdicts import estimates, judge

FILE = Path(__file__).parents[1] / "experiments" / "credit_horizon.py"
SMALL = Local(vocab=3, length=5, place=3, good=1)
SEEDS = 8


def study(preset="cpu", *settings):
    return load_study(FILE, preset, settings)[0]


# ------------------------------------------------------------------------------------ the toys


def test_the_base_learns_from_texts_of_the_chain():
    batch = walk(jax.random.key(0), 4000, vocab=4, length=3)
    tokens = np.asarray(batch.tokens)
    assert (tokens[:, 0] == 4).all() and tokens.shape == (4000, 4)
    assert_array_equal(np.asarray(batch.mask), np.arange(4) > np.zeros((4000, 1)))
    for before in range(5):
        after = tokens[:, 1:][tokens[:, :-1] == before]
        share = np.bincount(after, minlength=4) / len(after)
        assert_allclose(share, law(4)[before], atol=0.05)


def test_another_size_of_the_chain_is_a_distribution_with_its_own_reward():
    task = Chain(vocab=5, length=2)
    assert_allclose(task.p.sum(), 1)
    assert len(task.outputs) == 25
    texts = task.outputs.tokens
    assert task.reward[(texts == [5, 2, 2]).all(axis=1)] == 1.5
    assert_allclose(task.token_reward.sum(axis=1), task.reward)


def test_a_speaker_reads_its_start_and_never_says_it():
    model = Chain().model(toy_chain.MODEL)
    assert isinstance(model, Speaker) and model.vocab == 5
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.eval_shape(model.logits, params, jnp.zeros((2, 32))).shape == (2, 4)


def local_outputs():
    return exact.enumerate_outputs(prompt=[SMALL.start], vocab=SMALL.vocab, length=SMALL.length)


def test_an_oracle_knows_the_value_of_every_state():
    outputs = local_outputs()
    tokens = outputs.tokens
    p = law(3)[tokens[:, :-1], tokens[:, 1:]].prod(axis=1)
    expected = exact.state_values(p, SMALL.reward_of(tokens), outputs)
    oracle = Oracle(SMALL, 4)
    found = score({"self": {}}, outputs.batch(), models={"self": oracle}).value
    assert_allclose(found, expected, atol=1e-6)
    behind = np.asarray(found)[:, SMALL.place + 1 :]
    assert_array_equal(behind, np.broadcast_to(SMALL.reward_of(tokens)[:, None], behind.shape))


def test_behind_the_token_that_decides_no_advantage_is_left():
    tokens = local_outputs().tokens
    p = law(3)[tokens[:, :-1], tokens[:, 1:]].prod(axis=1)
    probability = law(3)[tokens[:, :-1]]
    # Every text as often as the chain says it, so that means over prefixes are exact.
    state, action = local_measures._known(probability, tokens, SMALL)
    steps = np.broadcast_to(law(3), (3, 4, 3))
    said = [[3], [0, 1, 2], [0, 1, 2]]  # what can stand before each of the first three tokens
    for t in range(3):
        assert_allclose(state[t][said[t]], values(steps, SMALL)[t][said[t]])
    found = local_measures._true_advantages(state, action, tokens)
    true = exact.advantages(p, SMALL.reward_of(tokens), local_outputs())[:, 1:]
    assert_allclose(found, true, atol=1e-6)
    assert_array_equal(found[:, SMALL.place :], 0)


def test_impossible_places_are_refused():
    with pytest.raises(ValueError, match="before the last of 5"):
        replace(SMALL, place=5)
    with pytest.raises(ValueError, match="fewer than the 3"):
        replace(SMALL, good=3)


# -------------------------------------------------------------------------------- the measures


def test_power_is_the_squared_gradient_by_the_logits():
    rng = np.random.default_rng(0)
    logits, advantage = rng.normal(size=(6, 2, 5)), rng.normal(size=(6, 2))
    tokens = np.concatenate([np.zeros((6, 1), int), rng.integers(0, 5, (6, 2))], axis=1)

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        return -(advantage * jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]).sum()

    gradient = jax.grad(loss)(jnp.asarray(logits))
    found = local_measures._power(jax.nn.log_softmax(logits), tokens, advantage)
    assert_allclose(found, (gradient**2).sum(-1).mean(0), rtol=1e-5)


def test_the_line_from_base_to_policy_is_the_price_of_a_horizon_of_1():
    """π ∝ p e^{r/β} at the last token: s of the way there is the same with the price β/s."""
    start, outputs = toy_chain.START, toy_chain.OUTPUTS
    optimum = partial(exact.horizon_optimum, start, toy_chain.REWARD, outputs, horizon=1)
    for s in (0.0, 0.4, 1.0, 1.7):
        found = chain_measures.between(start, optimum(beta=0.5), s, outputs)
        assert_allclose(found, optimum(beta=0.5 / s) if s else start, atol=1e-12)
    dear, cheap = optimum(beta=2.0), optimum(beta=0.3)
    found = chain_measures.reward_at(exact.kl(dear, start), start, cheap, toy_chain.TASK)
    assert_allclose(found, dear @ toy_chain.REWARD, atol=1e-9)


def test_a_policy_that_is_its_base_is_measured_too():
    start = toy_chain.START
    found = chain_measures.reward_at(0.5, start, start, toy_chain.TASK)
    assert_allclose(found, start @ toy_chain.REWARD)


def test_at_equal_kl_a_longer_horizon_earns_more():
    """E[r] of .690, .886 and 1.010 at the .5305 nats of a horizon of 1: the second claim."""
    start, outputs = toy_chain.START, toy_chain.OUTPUTS
    ends = [
        exact.horizon_optimum(start, toy_chain.REWARD, outputs, beta=0.5, horizon=h)
        for h in (1, 2, 3)
    ]
    kl = exact.kl(ends[0], start)
    found = [chain_measures.reward_at(kl, start, end, toy_chain.TASK) for end in ends]
    assert_allclose(kl, 0.530549, atol=1e-6)
    assert_allclose(found[0], 0.690357, atol=1e-6)
    assert (np.diff(found) > 0.1).all()


def test_a_horizon_is_measured_against_where_it_must_end_on_its_own_base():
    task, model = toy_chain.TASK, toys.Table(5)
    base = np.log(law(4)) + 0.3 * np.random.default_rng(0).normal(size=(5, 4))
    arm = study().arms["final_h1"]
    learners = {
        "policy": replace(arm.run.learners["policy"], model=model),
        "critic": replace(arm.run.learners["critic"], model=replace(model, value_head=True)),
    }
    trained = Trained(
        "final_h1", 0, 1, replace(arm.run, learners=learners),
        {"policy": toys.markov(base), "critic": toys.markov(base, [0.1, -0.2, 0.3, 0, -0.5])},
        {"chain_base": {"policy": toys.markov(base)}},
    )  # fmt: skip
    found = arm.measure(trained)
    p = exact.probabilities(toys.markov(base), task.outputs, model=model)
    target = exact.horizon_optimum(p, task.reward, task.outputs, beta=0.5, horizon=1)
    assert_allclose(found["distance"], exact.kl(p, target))
    assert_allclose(found["kl"], 0, atol=1e-12)
    assert_allclose(found["target_kl"][:2], 0, atol=1e-12)
    assert_allclose(found["best"], exact.tilted_value(p, task.reward, beta=0.5))
    first = np.bincount(task.outputs.tokens[:, 1], p)  # of the token before the second
    assert_allclose(found["value"][:2], [0.5, first @ [0.1, 0.2, 0.3, 0]], rtol=1e-6)


@pytest.fixture(scope="module")
def spent():
    """What three estimators make of an untrained policy: none, true values, a blind critic."""
    made = study("cpu_ci", "full=true")
    found = {}
    for name in ("none", "oracle", "gae"):
        run = made.arms[name].run
        weights = {key: toys.weights(one.model) for key, one in run.learners.items()}
        if "critic" in weights:
            head = weights["critic"]["value_head"]
            weights["critic"]["value_head"] = jax.tree.map(jnp.zeros_like, head)
        before = {"local_base": {"policy": weights["policy"]}}
        trained = Trained(name, 0, 0, run, weights, before)
        found[name] = made.arms[name].measure(trained)
    return found


def test_reinforce_spends_alike_on_all_tokens_and_true_values_spend_nothing_in_vain(spent):
    task = Local(8, 8, 3, 2)
    assert_allclose(spent["none"]["waste"], task.behind, atol=0.05)
    assert spent["oracle"]["waste"] == 0
    assert (spent["oracle"]["power"][: task.place] > 0).all()


def test_a_blind_critic_spends_most_where_the_reward_is_paid(spent):
    """All values 0: A_t = λ^{T − t} R, so that power grows towards the end as λ^{−2}."""
    task = Local(8, 8, 3, 2)
    weight = 0.95 ** (2.0 * np.arange(task.length - 1, -1, -1))
    expected = weight[task.place :].sum() / weight.sum()
    assert_allclose(spent["gae"]["waste"], expected, atol=0.05)
    assert spent["gae"]["waste"] > spent["none"]["waste"]


def test_true_advantages_point_closer_to_the_exact_gradient(spent):
    assert spent["none"]["cosine"] < spent["none"]["oracle_cosine"] < 1
    assert_allclose(spent["none"]["kl"], 0, atol=1e-9)


# ---------------------------------------------------------------------------- the study's claims

LENGTH, STEPS = 3, (0, 40, 100, 200, 400)
GOOD = {
    "final_h1": {"kl": (0, 0, 0.53), "value": (0, 0, 0.7), "level": 0.69},
    "final_h2": {"kl": (0, 0.3, 0.38), "value": (0, 0.9, 1), "level": 0.89},
    "final_whole": {"kl": (0.3, 0.2, 0.38), "value": (1.2, 1.2, 1.2), "level": 1.01},
    "token_h1": {"kl": (0.43, 0.39, 0.3), "level": 1.0, "objective": 0.81},
    "none": {"waste": 0.6875, "kl": 0.1},
    "mean": {"waste": 0.69, "kl": 0.1},
    "leave_one_out": {"waste": 0.68, "kl": 0.1},
    "gae": {"waste": 0.66, "kl": 0.1},
}  # fmt: skip
REST = {"best": 0.83, "start": 0.17, "objective": 0.6, "distance": 0.001, "cosine": 0.2}
REST |= {"oracle_cosine": 0.7, "reward": 0.25, "waste": 0.5, "power": (0.2, 0.2)}


def results(spread=1e-5, **changes):
    """Results of eight seeds where everything is as claimed, but for some: arm__metric=number."""
    rows, noise = [], spread * np.random.default_rng(0).normal(size=SEEDS)
    changes = {tuple(name.split("__")): x for name, x in changes.items()}
    for arm, given in GOOD.items():
        given = {m: changes.get((arm, m), x) for m, x in ({**REST, **given}).items()}
        given["target_kl"] = given.get("kl", 0.0)
        for metric, x in given.items():
            for seed in range(SEEDS):
                for step in STEPS:
                    for i, number in enumerate(np.atleast_1d(np.asarray(x, float))):
                        name = metric if np.ndim(x) == 0 else f"{metric}/{i}"
                        value = number + noise[seed] * (metric != "start")
                        rows.append(Row(arm, seed, step, name, value))
    return Results(rows)


def verdict(name, **changes):
    found = judge(study().primaries, results(**changes))
    return {one.claim.name: one.verdict for one in found}[name]


CASES = {
    "P1": ({}, {"final_h1__kl": (0, 0.01, 0.53)}, {"final_h1__kl": (0, 1e-3, 0.53)}),
    "P2": ({}, {"final_h2__level": 0.6}, {"final_h2__level": 0.69}),
    "P3": ({}, {"token_h1__objective": 0.7}, {"token_h1__objective": 0.80}),
    "P4": ({}, {"mean__waste": 0.9}, {"mean__waste": 0.6875 + 0.1}),
    "P5": ({}, {"gae__waste": 0.2}, {"gae__waste": 0.5}),
    "P6": ({}, {"final_h2__value": (0.1, 0.9, 1)}, {"final_h1__value": (0, 0.02, 0.7)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_primary_can_end_in_all_three(name):
    for changes, expected in zip(CASES[name], ("supported", "refuted", "undecided"), strict=True):
        assert verdict(name, **changes) == expected, changes


def test_the_farthest_of_three_baselines_counts_with_its_sign():
    value = study().primaries[3].value
    assert_allclose(value(results(none__waste=0.5)), 0.5 - 0.6875, atol=1e-4)
    assert_allclose(value(results(leave_one_out__waste=0.8)), 0.8 - 0.6875, atol=1e-4)


def test_secondary_claims_say_where_things_stand():
    found = {e.claim.name: e for e in estimates(study().secondary, results())}
    assert set(found) == {f"S{i}" for i in range(1, 11)}
    inside = {"S1", "S2", "S3", "S4", "S8", "S9"}
    assert {name for name, e in found.items() if e.where == "inside"} >= inside
    late = estimates(study().secondary, results(final_whole__distance=0.5))
    assert [e.where for e in late if e.claim.name == "S2"] == ["outside"]


def test_episodes_are_counted_until_nine_tenths_of_the_gain():
    rows = [r for r in results(spread=0).rows if r.metric != "objective"]
    for seed in range(SEEDS):
        for step in STEPS:
            for arm, slope in (("final_whole", 200), ("token_h1", 100)):
                value = 0.17 + 0.66 * min(1.0, step / slope)
                rows.append(Row(arm, seed, step, "objective", value))
    claim = next(one for one in study().secondary if one.name == "S5")
    assert_array_equal(claim.value(Results(rows)), np.full(SEEDS, (200 - 100) * 256.0))


def test_the_figure_shows_every_arm_that_ran():
    figure = study().figure(results())
    left, right = figure.axes
    assert len(left.containers) == 2 * 4  # bars and their spread
    labels = [line.get_label() for line in right.get_lines()]
    assert sum("REINFORCE" in label for label in labels) == 3
    assert any("11/16" in label for label in labels)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (left, right))


# --------------------------------------------------------------------------------- its settings


@pytest.mark.parametrize("preset", ["cpu_ci", "cpu", "full", "gpu1", "pod"])
def test_every_preset_can_be_run(preset):
    made = study(preset)
    assert len(made.primaries) == 6 and made.seeds == (1 if preset == "cpu_ci" else 8)
    for run in made.configs.values():
        if made.together:
            check(replace(run, mesh=(1, 1, 1, 1)), devices=1)
            assert not obstacles(run)
        else:
            check(run, devices=8)


def test_full_adds_arms_and_changes_none():
    few, all_of_them = study("cpu").arms, study("full").arms
    assert set(few) < set(all_of_them) and len(all_of_them) == 12 + 7
    assert list(few) == [*credit_arms.CPU_CHAIN, *credit_arms.CPU_LOCAL]


def test_overrides_reach_both_toys():
    settings = ("model.width=64", "train.steps=80", "data.chain.length=4", "data.local.place=7")
    made = study("cpu", *settings)
    assert {run.learners["policy"].model.width for run in made.configs.values()} == {64}
    assert {run.steps for name, run in made.configs.items() if name in made.arms} == {80}
    assert made.arms["final_whole"].run.rollouts.length == 4
    assert "9/16" in made.primaries[3].says
    assert made.arms["none"].at == (0, 10, 20, 40)


@pytest.mark.slow
def test_from_one_command_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    page = command.run(str(FILE), [], tmp_path / "out", preset="cpu_ci")
    found = Results.read(tmp_path / "out" / "results.jsonl")
    verdicts = judge(study("cpu_ci").primaries, found)
    assert {v.claim.name for v in verdicts if math.isfinite(v.estimate)} == {"P1"}
    assert {v.verdict for v in verdicts} == {"undecided", "not run"}  # of one seed, of two arms
    assert "5/8" in page.read_text()
