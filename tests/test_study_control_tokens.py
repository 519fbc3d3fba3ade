"""The study of control tokens: its task, its closed forms on any base, and its claims."""

import io
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toys
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit, softmax

FOLDER = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(FOLDER))

import control_tokens as study  # noqa: E402  (after the path)
from tasks import tagged, tagged_arms, tagged_fits  # noqa: E402
from tasks import tagged_exact as closed  # noqa: E402
from tasks import tagged_measures as measures  # noqa: E402
from tasks.tagged import Tagged  # noqa: E402

from rlhf_jax import cli, exact, measure  # noqa: E402
from rlhf_jax.check import check  # noqa: E402
from rlhf_jax.conditioning import condition  # noqa: E402
from rlhf_jax.experiment import load_study  # noqa: E402
from rlhf_jax.models.transformer import Transformer  # noqa: E402
from rlhf_jax.returns_to_go import returns_to_go  # noqa: E402
from rlhf_jax.study import Trained, work  # noqa: E402
from rlhf_jax.study.results import Results, Row  # noqa: E402
from rlhf_jax.study.together import obstacles  # noqa: E402
from rlhf_jax.study.verdicts import estimates, judge  # noqa: E402
from rlhf_jax.study.work import starts  # noqa: E402

TASK = Tagged(prompts=3)
LONG = Tagged(letters=5, prompts=2, length=6, texts=3000)  # 15 625 texts of each x: sampled
KEY = jax.random.key(0)
SHAPE = Transformer(vocab=1, width=16, layers=1, heads=2, kv_heads=1, mlp=16, context=16)
MODEL = tagged.sized(SHAPE, TASK)
REWARDS = jax.jit(partial(tagged.letter_rewards, task=TASK))
EDGES = closed.quantiles(TASK, (0.25, 0.5, 0.75))


@pytest.fixture(scope="module")
def lively():
    """Weights of two policies that heed their tags."""
    return [toys.weights(MODEL, seed=i) for i in (1, 2)]


def by_hand(x, y):
    """The reward of one text, letter by letter."""
    before = [None, *y[:-1]]
    return [(j == x % 4) - 0.5 * (j == i) for i, j in zip(before, y, strict=True)]


# --- the chain


def test_all_texts_of_an_x_are_there_with_their_rewards():
    found = closed.support(TASK)
    assert found.letters.shape == (3, 64, 3) and not found.log_weight.any()
    for x in range(3):
        assert found.letters[x].tolist() == [list(y) for y in product(range(4), repeat=3)]
        assert_allclose(found.reward[x], [sum(by_hand(x, y)) for y in found.letters[x]])


def test_rewards_by_dynamic_programming_are_those_of_all_texts():
    level, p = closed.reward_levels(TASK)
    law, reward = closed.chain_law(TASK), closed.support(TASK).reward
    for x in range(3):
        expected_level, expected = exact.levels(law[x], reward[x])
        assert_allclose(p[x].sum(), 1)
        assert_allclose(p[x][np.isin(level, expected_level)], expected, atol=1e-12)
    by_reward = np.sort(reward[0])
    assert set(EDGES) <= set(by_reward)
    upper = (law * (reward >= EDGES[2])).sum(axis=1).mean()
    assert abs(upper - 0.25) < 0.1


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0, np.inf])
def test_a_tilted_chain_by_dynamic_programming_is_the_tilt_of_all_texts(beta):
    chain, texts = closed.tilted_chain(TASK, beta), closed.support(TASK)
    found = np.exp(closed.chain_logp(chain, texts.letters, TASK))
    start = closed.chain_law(TASK)
    for x in range(3):
        if beta == np.inf:
            expected = start[x]
        else:
            expected = exact.tilted(start[x], texts.reward[x], beta=beta)
            value = exact.tilted_value(start[x], texts.reward[x], beta=beta)
            assert_allclose(beta * chain.log_z[x], value)
        assert_allclose(found[x], expected, atol=1e-12)


def test_texts_drawn_from_a_tilted_chain_are_of_it():
    chain = closed.tilted_chain(TASK, 0.5)
    letters = closed.drawn_letters(chain, 20_000, np.random.default_rng(0), TASK)
    index = letters @ [16, 4, 1]
    law = np.exp(closed.chain_logp(chain, closed.support(TASK).letters, TASK))
    for x in range(3):
        assert_allclose(np.bincount(index[x], minlength=64) / 20_000, law[x], atol=0.01)


def test_where_texts_are_too_many_a_weighted_sample_stands_for_them():
    """Reward of the chain, of its tilt and of the posterior, against dynamic programming."""
    texts, level_p = closed.support(LONG), closed.reward_levels(LONG)
    start = closed.chain_law(LONG)
    assert start.shape == (2, 3000)
    for score in (lambda r: 0 * r, lambda r: r / 0.5, lambda r: np.log(expit(r))):
        p = level_p[1] * np.exp(score(level_p[0]))
        p /= p.sum(axis=1, keepdims=True)
        found = closed.tilt(start, score(texts.reward))
        assert_allclose((found * texts.reward).sum(1), p @ level_p[0], atol=0.06)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * np.log(p / level_p[1]), 0).sum(1)
        assert_allclose(closed.kl(found, start), terms.mean(), atol=0.06)


def test_measures_of_several_prompts_are_means_of_the_laboratory():
    rng, reward = np.random.default_rng(0), closed.support(TASK).reward
    p, q = rng.dirichlet(np.ones(64), 3), rng.dirichlet(np.ones(64), 3)
    pairs = list(zip(p, q, reward, strict=True))
    assert_allclose(closed.kl(p, q), np.mean([exact.kl(a, b) for a, b, _ in pairs]))
    assert_allclose(closed.variation(p, q), np.abs(p - q).sum() / 6)
    within = [exact.kl_between_and_within(*row)[1] for row in pairs]
    assert_allclose(closed.kl_within(p, q, reward), np.mean(within))
    tilted = [exact.tilted(b, r, beta=0.5) for _, b, r in pairs]
    assert_allclose(closed.tilt(q, reward / 0.5), tilted)
    assert_allclose(closed.mean(p, reward), np.mean([a @ r for a, _, r in pairs]))


# --- what is drawn


@pytest.mark.parametrize("rows", [50, 600])
def test_texts_are_drawn_systematically_and_with_the_chances_of_the_chain(rows):
    draw = jax.jit(partial(tagged.letters_drawn, rows=rows, task=TASK))
    chain, count = TASK.chain(), np.zeros((3, 64))
    for i in range(300):
        x, y = (np.asarray(part) for part in draw(jax.random.key(i)))
        x = x - 4
        assert abs(np.bincount(x, minlength=3) - rows / 3).max() <= 1
        for at in range(3):
            first = np.bincount(y[x == at, 0], minlength=4)
            assert abs(first - chain[4 + at] * rows / 3).max() <= 2
        np.add.at(count, (x, y @ [16, 4, 1]), 1)
    found = count / count.sum(axis=1, keepdims=True)
    assert_allclose(found, closed.chain_law(TASK), atol=0.002 if rows > 64 else 0.012)


def test_people_call_texts_good_as_often_as_they_should_of_any_stretch():
    batch = jax.jit(partial(tagged.texts, rows=300, task=TASK))(KEY)
    chance = expit(np.asarray(batch.score, np.float64))
    keys = jax.vmap(jax.random.key)(jnp.arange(500))
    said = np.asarray(jax.jit(jax.vmap(lambda key: tagged.people_say(batch, key).score))(keys))
    assert set(np.unique(said)) == {0.0, 1.0}
    assert_allclose(said.mean(axis=0), chance, atol=0.1)
    assert abs(said.cumsum(axis=1) - chance.cumsum()).max() < 1.001


def test_every_tenth_tag_is_dropped_and_no_stretch_loses_more():
    tag = partial(condition, edges=(0.5,), tags=TASK.tags("BAD", "GOOD"))

    @jax.jit
    def draw(key):
        batch = tagged.texts(key, 200, task=TASK)
        batch = batch.replace(score=(batch.score > 0.6).astype(jnp.float32))
        return batch, tagged.dropped(batch, key, tagged=tag, drop=0.1)

    batch, found = jax.tree.map(np.asarray, draw(KEY))
    bare = found.tokens[:, 1] < TASK.bos
    assert bare.sum() == 20 and (np.diff(np.flatnonzero(bare)) == 10).all()
    assert_array_equal(found.tokens[bare, :5], batch.tokens[bare])
    good = found.tokens[~bare, 1] == TASK.tag("GOOD")
    assert_array_equal(good, batch.score[~bare] > 0.5)


def test_tags_of_the_bases_texts_say_nothing_and_stand_where_they_may():
    batch = jax.jit(partial(tagged.base_texts, rows=4000, task=TASK))(KEY)
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    assert (mask.sum(axis=1) == 3).all() and (tokens[mask] < 4).all()
    used = np.asarray(batch.segments) > 0
    count = ((tokens > TASK.bos) & used).sum(axis=1)
    assert_allclose(np.bincount(count) / 4000, [0.25, 0.375, 0.375], atol=0.03)
    one = tokens[count == 1, 1] - TASK.bos - 1
    assert_allclose(np.bincount(one, minlength=8) / len(one), 1 / 8, atol=0.03)
    assert (tokens[count == 2, 3 + TASK.switch] > TASK.bos).all()
    earned = np.asarray(REWARDS(batch.tokens, batch.mask)).sum(axis=1)
    assert abs(np.corrcoef(one, earned[count == 1])[0, 1]) < 0.08


def test_letters_are_paid_across_a_tag_in_their_midst():
    on, off = TASK.tags("ON", "OFF")
    tokens = jnp.array([[TASK.bos, on, 5, 1, off, 1, 0], [TASK.bos, 6, 2, 2, 2, 0, 0]])
    mask = jnp.array([[0, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0]], bool)
    found = np.asarray(REWARDS(tokens, mask))
    assert_allclose(found[0, [3, 5, 6]], by_hand(1, [1, 1, 0]))
    assert_allclose(found[1, 2:5], by_hand(2, [2, 2, 2]))
    assert not found[~np.asarray(mask)].any()


def test_all_samples_of_a_prompt_have_its_tag():
    rare = {"tags": ("ON", "OFF"), "shares": (0.9, 0.1)}
    prompts = jax.jit(partial(tagged.asked, rows=4000, task=TASK, **rare))(KEY)
    tag, x = np.asarray(prompts.tokens[:, 1]), np.asarray(prompts.tokens[:, 2])
    assert abs((tag == TASK.tag("OFF")).mean() - 0.1) < 0.02
    assert set(np.unique(x)) == {4, 5, 6} and (np.asarray(prompts.length) == 3).all()
    bare = tagged.asked(KEY, 5, task=TASK)
    assert bare.tokens.shape == (5, 2) and (np.asarray(bare.length) == 2).all()


def test_the_environment_turns_half_of_the_texts_over():
    world = tagged.switched(TASK)

    @jax.jit
    @jax.vmap
    def play(key):
        state, prompt = world.reset(key, {})
        told = []
        for letter in (2, 0, 1):
            state, *now = world.step(state, jnp.int32(letter), {})
            told.append(now)
        return prompt, told

    prompt, told = jax.tree.map(np.asarray, play(jax.random.split(KEY, 400)))
    first, tags = prompt[:, 1], np.array(TASK.tags("ON", "OFF"))
    assert (prompt[:, 0] == TASK.bos).all() and set(prompt[:, 2]) == {4, 5, 6}
    assert_allclose((first == tags[0]).mean(), 0.5, atol=0.1)
    forced, count, reward, done = (np.stack(x, axis=1) for x in zip(*told, strict=True))
    assert not reward.any() and not done.any()
    assert not np.delete(count, TASK.switch - 1, axis=1).any()
    turned = count[:, TASK.switch - 1] == 1
    assert_allclose(turned.mean(), 0.5, atol=0.1)
    assert_array_equal(forced[turned, TASK.switch - 1, 0], tags[1 - (first == tags[1])][turned])


# --- what models say


@pytest.mark.parametrize(("tag", "then"), [("ON", None), ("OFF", "ON")])
def test_the_law_of_a_model_is_that_of_the_laboratory(lively, tag, then):
    found = closed.law(lively[0], model=MODEL, task=TASK, tag=tag, then=then, rows=50)
    if then is None:
        prompt = [TASK.bos, *([] if tag is None else [TASK.tag(tag)])]
        for x in range(3):
            outputs = exact.enumerate_outputs(prompt=[*prompt, 4 + x], vocab=4, length=3)
            expected = exact.probabilities(lively[0], outputs, model=MODEL)
            assert_allclose(found[x], expected, rtol=1e-4)
    else:  # the letters before it do not know of a tag in the midst
        stays = closed.law(lively[0], model=MODEL, task=TASK, tag=tag).reshape(3, 4, 16)
        assert_allclose(found.reshape(3, 4, 16).sum(axis=2), stays.sum(axis=2), rtol=1e-4)
        assert closed.variation(found, stays.reshape(3, 64)) > 1e-3


def test_a_model_of_letters_cannot_be_made_to_say_a_tag(lively):
    hidden = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    found = MODEL.logits(lively[0], hidden)
    assert found.shape == (1, 3, 4)
    assert_allclose(found, hidden @ lively[0]["head"]["kernel"][:, :4], atol=1e-5)


def test_an_asked_for_return_is_written_as_returns_to_go_writes_it():
    """The request that equals what a text earns is the one it was trained with."""
    texts = closed.support(TASK)
    write = partial(returns_to_go, edges=EDGES, tags=TASK.tags(*tagged_arms.BINS))

    @jax.jit
    def draw(key):
        batch = tagged.texts(key, 40, task=TASK)
        return batch, write(batch, key)

    batch, found = jax.tree.map(np.asarray, draw(KEY))
    same = (batch.tokens[:, 1] - 4) * 64 + batch.tokens[:, 2:] @ [16, 4, 1]
    for request in np.unique(batch.score):
        rows = measures.requested(texts.letters, float(request), task=TASK, edges=EDGES)
        asked = batch.score == request
        tokens, mask = (np.asarray(x)[same[asked]] for x in (rows.tokens, rows.mask))
        assert_array_equal(tokens, found.tokens[asked, :8])  # behind it, padding
        assert_array_equal(mask, found.mask[asked, :8])


def test_rank_correlation_of_a_table_is_that_of_its_rows():
    table = np.array([[4, 1, 0], [2, 2, 1], [0, 1, 5]])
    a, b = (np.repeat(i.ravel(), table.ravel()) for i in np.indices(table.shape))
    expected = scipy.stats.spearmanr(a, b).statistic
    assert_allclose(measures.rank_correlation(table / table.sum()), expected)
    assert_allclose(measures.rank_correlation(np.eye(4) / 4), 1)


def test_the_best_matrix_is_found_and_the_best_bias_too():
    rng = np.random.default_rng(0)
    features, offset = rng.normal(size=(60, 3)), rng.normal(size=(60, 4))
    weight, wanted = rng.dirichlet(np.ones(60)), rng.normal(size=(3, 4))
    reachable = softmax(offset + features @ wanted, axis=1)
    assert closed.fitted(features, offset, reachable, weight) < 1e-8
    # Against a constant, the best bias alone gives the weighted mean of the targets.
    target = rng.dirichlet(np.ones(4), 60)
    mean = weight @ target
    expected = (weight[:, None] * target * np.log(target / mean)).sum()
    found = closed.fitted(np.ones((60, 1)), np.zeros((60, 4)), target, weight)
    assert_allclose(found, expected, atol=1e-8)


# --- what is measured, on policies that are no secret


def trained(weights, base, learner=MODEL, arm="gate"):
    run = study.config(study.CPU).arms[arm].run
    policy = replace(run.learners["policy"], model=learner)
    config = replace(run, learners={"policy": policy})
    return Trained(arm, 0, 1, config, {"policy": weights}, {"base": {"policy": base}})


def test_leaks_rewards_and_distances_are_their_formulas(lively):
    own, base = lively
    found = measures.off_token(trained(own, base), task=TASK)
    laws = {
        (name, who): closed.law(w, model=MODEL, task=TASK, tag=tag)
        for name, tag in (("none", None), ("ON", "ON"), ("OFF", "OFF"))
        for who, w in (("own", own), ("base", base))
    }
    kl = {n: closed.kl(laws[n, "own"], laws[n, "base"]) for n in ("none", "ON", "OFF")}
    assert_allclose([found[f"kl_{n}"] for n in kl], list(kl.values()))
    assert_allclose(found["leak"], kl["OFF"] / kl["ON"])
    bare = measures.off_token(trained(own, base), task=TASK, asked=None)
    assert_allclose(bare["leak"], kl["OFF"] / kl["none"])
    diluted = closed.tilt(laws["ON", "base"], closed.support(TASK).reward)  # β = 1: half of r/.5
    assert_allclose(found["to_diluted_ON"], closed.variation(laws["ON", "own"], diluted))
    same = measures.off_token(trained(base, base), task=TASK, asked=None)
    assert same["kl_ON"] == 0 and same["moved_embed"] == 0


def test_a_mixture_over_both_tags_weighs_them_by_their_chance(lively):
    own, base = lively
    found = measures.called(trained(own, base), task=TASK)
    start = closed.law(base, model=MODEL, task=TASK)
    good, bad, none = (
        closed.law(own, model=MODEL, task=TASK, tag=t) for t in ("GOOD", "BAD", None)
    )
    chance, posterior = [], []
    for p, r in zip(start, closed.support(TASK).reward, strict=True):
        share, laws = exact.posteriors(p, np.stack([expit(r), 1 - expit(r)], axis=1))
        chance.append(share)
        posterior.append(laws[0])
    mixture = np.array([c[0] * g + c[1] * b for c, g, b in zip(chance, good, bad, strict=True)])
    assert_allclose(found["mixture_to_base"], closed.variation(mixture, start))
    assert_allclose(found["to_posterior"], closed.variation(good, np.array(posterior)))
    assert_allclose(
        found["marginal"],
        max(closed.variation(a, b) for a, b in ((mixture, start), (none, start), (mixture, none))),
    )


def test_kl_by_letter_adds_up_to_the_texts(lively):
    own, base = lively
    found = measures.flipped(trained(own, base), task=TASK)
    laws = [closed.law(w, model=MODEL, task=TASK, tag="ON", then="OFF") for w in (own, base)]
    assert_allclose(found["kl_letter_flips"].sum(), closed.kl(*laws), rtol=1e-4)
    assert_allclose(found["kl_letter_stays"].sum(), found["kl_ON"], rtol=1e-4)
    assert len(found["share_after_off"]) == TASK.length - TASK.switch


def test_the_switch_is_followed_from_the_embedding_on(lively, monkeypatch):
    own, base = lively
    monkeypatch.setattr(measures, "SHOWN", 96)
    found = measures.switch(trained(own, base, arm="anchored"), task=TASK)
    assert_allclose(found["restored_tag"][[0, -1]], [1, 0], atol=1e-5)
    assert_allclose(found["restored_letters"][0], 0, atol=1e-5)  # no embedding there differs
    assert found["probe_trained_x"][0] < 0.6 < found["probe_trained_x"][1]


# --- partial fits


def test_the_search_finds_what_the_convex_problem_says(lively):
    """KL summed over letters is that of texts; an output matrix, by its weights or by features."""
    own, base = (jax.tree.map(np.asarray, w) for w in lively)
    of = tagged_fits.beginnings(own, model=MODEL, task=TASK)
    assert of.tokens.shape == (3 * 16, 5) and of.target.shape == (48, 3, 4)
    assert_allclose(of.weight.sum(), 1, rtol=1e-6)
    laws = [closed.law(w, model=MODEL, task=TASK, tag="ON") for w in (own, base)]
    logp = np.asarray(measure.next_logp(base, of.tokens, model=MODEL))[:, 2:]
    gap = of.weight @ (of.target * (np.log(of.target) - logp)).sum((1, 2))
    assert_allclose(gap, closed.kl(*laws), rtol=1e-4)
    expected = tagged_fits.heads(base, of, model=MODEL)
    found = tagged_fits.least(base, of, model=MODEL, pattern="^head/", steps=100)
    assert_allclose(found, expected["head"], rtol=1e-3)
    assert expected["head"] < expected["bias"] < gap


@pytest.mark.slow
def test_what_the_weights_of_a_part_can_say_is_found(lively):
    """Another block below the same head is the block's to say, and all weights', not the head's."""
    own, base = (jax.tree.map(np.asarray, w) for w in lively)
    block = jax.tree.map(lambda a, b: a + 0.1 * b, base["layers_0"], own["layers_0"])
    before = {"gate_long": {"policy": base | {"layers_0": block}}, "base_long": {"policy": base}}
    found = tagged_fits.fits(0, before, task=TASK, model=MODEL)
    assert max(found["last_block"], found["whole"]) < 0.02 < found["head"] < found["bias"] <= 1
    assert found["rank_4"] < found["rank_1"] < 1


def test_low_rank_terms_start_at_nothing_and_have_that_rank(lively):
    model = tagged_fits.Adapted(**{**vars(MODEL), "rank": 2})
    start = model.part_of(lively[0])
    assert_array_equal(model.merged(start)["layers_0"]["query"]["kernel"],
                       lively[0]["layers_0"]["query"]["kernel"])  # fmt: skip
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), start)
    block = moved["layers_0"]
    term = model.merged(moved)["layers_0"]["query"]["kernel"] - block["query"]["kernel"]
    expected = block["query_down"]["kernel"] @ block["query_up"]["kernel"]
    assert_allclose(term, expected, atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(term), tol=1e-4) == 2
    assert jax.tree.structure(model.merged(moved)) == jax.tree.structure(lively[0])


def test_a_pattern_that_names_no_weight_is_refused(lively):
    with pytest.raises(ValueError, match=r"no weight matches 'layers_9/'.*embed/embedding"):
        tagged_fits.least(lively[0], None, model=MODEL, pattern="layers_9/")


# --- claims


GOOD = {
    ("leak", "anchored"): 0.01,
    ("leak", "gate"): 0.9,
    ("most", "compared"): 0.02,
    ("marginal", "condition"): 0.015,
    ("to_diluted_ON", "scrambled"): 0.01,
    ("to_diluted_OFF", "scrambled"): 0.02,
    ("to_posterior", "no_kl"): 0.5,
}
WRONG = {
    "P1": ("leak", "anchored", 0.5),
    "P2": ("leak", "gate", 0.1),
    "P3": ("most", "compared", 0.1),
    "P4": ("marginal", "condition", 0.05),
    "P5": ("to_diluted_ON", "scrambled", 0.3),
    "P6": ("to_posterior", "no_kl", 0.01),
}


def results(values):
    noise = 1e-4 * np.random.default_rng(0).normal(size=8)
    return Results(
        Row(arm, seed, 1, metric, float(np.broadcast_to(value, 8)[seed] + noise[seed]))
        for (metric, arm), value in values.items()
        for seed in range(8)
    )


def verdicts(values):
    made = study.config(study.PRESETS["full"])
    judged = judge(made.primaries, results(values), arms=made.arms)
    return {v.claim.name: v.verdict for v in judged}


def test_what_was_predicted_is_supported():
    assert set(verdicts(GOOD).values()) == {"supported"}


@pytest.mark.parametrize("name", WRONG)
def test_every_claim_can_be_refuted_and_left_undecided(name):
    metric, arm, value = WRONG[name]
    assert verdicts({**GOOD, (metric, arm): value})[name] == "refuted"
    torn = np.where(np.arange(8) % 2, value, GOOD[metric, arm])
    assert verdicts({**GOOD, (metric, arm): torn})[name] == "undecided"


def test_an_anchored_policy_that_leaks_a_little_is_neither():
    assert verdicts({**GOOD, ("leak", "anchored"): 0.15})["P1"] == "undecided"


def test_every_estimate_is_of_an_arm_that_there_is():
    """Also those that are vectors: the claims are read from what `fake` writes."""
    made = study.config(study.PRESETS["full"])
    for one in estimates(made.secondary, fake(made)):
        assert one.where != "not run" and np.isfinite(one.estimate), one


def fake(made):
    """Metrics of all arms as the measures name them, with made-up numbers."""
    rng = np.random.default_rng(0)
    off = {"leak", "base_on_off", *(f"{m}_{t}" for t in ("ON", "OFF", "none")
           for m in ("kl", "reward", "to_tilt", "to_diluted"))}  # fmt: skip
    good = {"to_posterior", "posterior_to_base", "luck", "reward", "marginal"}
    fits = {"spearman", "most", "bias", "head", "last_block", "rank_1", "rank_4", "whole"}
    vectors = {"restored_tag": 3, "restored_x": 3, "restored_letters": 3, "share_after_off": 2}
    names = [*off, *good, *fits, *(f"{name}/{i}" for name, n in vectors.items() for i in range(n))]
    return Results(
        Row(arm, seed, 1, name, float(rng.uniform(0.01, 0.3)))
        for arm in made.arms
        for seed in range(8)
        for name in names
    )


@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_the_figure_draws_what_there_is(preset):
    made = study.config(study.PRESETS[preset])
    found = made.figure(fake(made))
    assert len(found.axes) == 3
    assert all(axes.get_title() and axes.get_ylabel() for axes in found.axes)
    found.savefig(io.BytesIO(), dpi=30)


# --- configurations


LARGER = ("model.width=64", "data.letters=16", "data.length=6", "train.steps=30")


@pytest.mark.parametrize(
    ("preset", "given"), [("cpu_ci", ()), ("full", LARGER), ("gpu1", ()), ("pod", ())]
)
def test_every_preset_is_a_study_that_can_run(preset, given):
    made, settings = load_study(FOLDER / "control_tokens.py", preset, given)
    known = set()
    for name, run in {**made.bases, **made.configs}.items():
        assert set(starts(run)) <= known, name
        known.add(name)
        check(replace(run, mesh=(1, 1, 1, 1)), devices=1)
        assert not settings.together or not obstacles(run), name
    for arm in made.arms.values():
        assert set(arm.needs) <= known
    assert set(settings.arms) <= set(made.arms)
    assert len(made.primaries) == 6
    estimates(made.secondary, fake(made)), judge(made.primaries, fake(made), arms=made.arms)
    if given:
        model = made.arms["gate"].run.learners["policy"].model
        assert (model.width, model.letters, made.arms["gate"].run.steps) == (64, 16, 30)


def test_each_arm_differs_from_its_neighbour_in_what_it_is_about():
    arms = study.config(study.PRESETS["full"]).arms
    gate, anchored, ignored = (arms[name].run for name in ("gate", "anchored", "ignored"))
    assert gate.data["prompts"].keywords["draw"].keywords["tags"] == ("ON",)
    assert anchored.learners["policy"].objective.keywords["off_coefficient"] == 1.0
    assert ignored.learners["policy"].objective.keywords["off_coefficient"] == 0.0
    assert arms["scrambled"].run.rollouts.reward.func is tagged.by_a_coin
    assert arms["kl_rl"].run.rollouts.kl.initial == 1.0
    assert arms["no_kl"].run.rollouts.reference is None
    everything = {**tagged_arms.off_token(study.PRESETS["full"]),
                  **tagged_arms.conditioned(study.PRESETS["full"])}  # fmt: skip
    assert set(arms) == {*everything, "gate_long", "compared", "fits"}
    few = {"gate", "anchored", "scrambled", "condition", "weighted", "kl_rl", "no_kl", "compared"}
    assert set(study.config(study.CPU).arms) == few


@pytest.mark.slow
def test_the_whole_study_runs_and_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    runs, real = [], work.Together
    monkeypatch.setattr(work, "Together", lambda *a: (runs.append(a[0].name), real(*a))[1])
    command = ["study", str(FOLDER / "control_tokens.py"), "--preset", "cpu_ci", "--out"]
    for _ in range(2):
        assert cli.main([*command, str(tmp_path / "run")]) == 0
    assert sorted(runs) == ["anchored", "base", "condition"]  # each of them once
    rows = [json.loads(x) for x in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == set(study.PRESETS["cpu_ci"].arms)
    page = (tmp_path / "run" / "index.html").read_text()
    assert "Can one token switch RLHF off" in page
    assert "1 seed cannot decide 6 claims" in capsys.readouterr().out
