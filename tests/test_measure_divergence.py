"""Entropy and KL from samples: exact on the chain of four tokens, where all texts are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose
from toy_chain import BETA, BOS, CHAIN, OUTPUTS, REFERENCE, REWARD, START, reference_params

from rlhf_jax import exact, measure, ratios
from rlhf_jax.measure.divergence import by_position, k3, per_text, per_token
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Prompts

STEPS = OUTPUTS.mask[0].sum()  # tokens of a text


def policy_params(seed=3):
    """Another chain over the same tokens."""
    noise = np.random.default_rng(seed).standard_normal(CHAIN.shape)
    return toys.markov(np.log(CHAIN) + noise, np.zeros(5))


P = exact.probabilities(policy_params(), OUTPUTS, model=REFERENCE)
MODELS = {"model": REFERENCE, "reference": reference_params()}


def every_text(temperature=1.0):
    """What the policy and the chain say of each text that there is."""
    batch = OUTPUTS.batch(temperature)
    return measure.score_samples(policy_params(), batch, **MODELS)


def drawn(p, n, seed=0):
    """n texts of the distribution p, as a batch, and which they are."""
    index = np.random.default_rng(seed).choice(len(p), n, p=p)
    return jax.tree.map(lambda x: x[index], OUTPUTS.batch()), index


sample = jax.jit(partial(generate, model=REFERENCE, length=int(STEPS)))


def rollout_of(params, rows=64, per_prompt=1, sampling=None):
    ids, samples = np.divmod(np.arange(rows, dtype=np.int32), per_prompt)
    prompts = Prompts(np.full((rows, 1), BOS, np.int32), np.ones(rows, np.int32), ids, samples)
    sampling = Sampling() if sampling is None else sampling
    return sample(params, prompts, jax.random.key(0), sampling=sampling)


def close(found, expected, atol=1e-5):
    assert_allclose(found, expected, atol=atol, rtol=0)


# ---- exact expectations: over every text, with its probability


def test_every_estimator_of_entropy_has_the_exact_one_as_its_mean():
    own = measure.score_samples(reference_params(), OUTPUTS.batch(), model=REFERENCE)
    assert own.kl is None and own.ref_logp is None
    for x in (own.entropy, -own.logp):
        close(START @ x.sum(axis=1), 3.610435)
    assert (own.entropy[~OUTPUTS.mask] == 0).all()


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.15), (0.6, 0.35)])
def test_every_estimator_of_kl_has_the_exact_one_as_its_mean_and_the_exact_sum_varies_least(
    temperature, share
):
    found = every_text(temperature)
    p, q = (exact.token_temperature(x, OUTPUTS, temperature) for x in (P, START))
    estimators = {
        "exact": found.kl,
        "k1": found.logp - found.ref_logp,
        "k3": k3(found.logp, found.ref_logp),
    }
    variance = {}
    for name, x in estimators.items():
        close(p @ x, np.pad(exact.kl_by_position(p, q, OUTPUTS)[1:], (1, 0)))
        close(p @ x.sum(axis=1), exact.kl(p, q))
        variance[name] = p @ (x.sum(axis=1) - exact.kl(p, q)) ** 2
    assert variance["exact"] < share * variance["k1"]
    assert variance["exact"] < variance["k3"]


def test_the_estimators_of_one_token_have_the_known_moments():
    logits, ref = np.array([0.3, -0.2, 0.5]), np.array([0.0, 0.4, -0.1])
    logp, ref_logp = (x - np.log(np.exp(x).sum()) for x in (logits, ref))
    p = np.exp(logp)
    for one, variance in ((logp - ref_logp, 0.208572), (k3(logp, ref_logp), 0.013562)):
        close([p @ one, p @ (one - p @ one) ** 2], [0.119788, variance], 1e-6)
    close(k3(logp, ref_logp), ratios.k3(jnp.float32(logp), jnp.float32(ref_logp)), 1e-6)
    assert k3(np.zeros(1), np.full(1, -1e4)) == pytest.approx(ratios.LIMIT, abs=1.1)
    one = exact.enumerate_outputs(prompt=[0], vocab=3, length=1)
    table = partial(toys.markov, values=np.zeros(3))
    found = measure.score_samples(
        table(np.tile(logits, (3, 1))),
        one.batch(),
        model=toys.Table(3),
        reference=table(np.tile(ref, (3, 1))),
    )
    close(found.kl[:, 1], np.full(3, 0.119788), 1e-6)


def test_the_reference_may_keep_a_temperature_of_its_own():
    found = measure.score_samples(
        policy_params(), OUTPUTS.batch(1.7), **MODELS, reference_temperature=1.0
    )
    p = exact.token_temperature(P, OUTPUTS, 1.7)
    close(p @ found.kl.sum(axis=1), exact.kl(p, START))
    close(np.exp(found.ref_logp.sum(axis=1)), START)


def test_banned_tokens_are_said_by_neither_model():
    few = exact.enumerate_outputs(prompt=[BOS], vocab=4, length=3, alphabet=[0, 2])
    p, q = (
        exact.probabilities(x, few, model=REFERENCE) for x in (policy_params(), reference_params())
    )
    found = measure.score_samples(policy_params(), few.batch(), **MODELS, banned=[1, 3])
    close(np.exp(found.logp.sum(axis=1)), p)
    close(p @ found.kl.sum(axis=1), exact.kl(p, q))
    close(p @ found.entropy.sum(axis=1), exact.entropy(p))


def test_rows_come_in_parts_that_change_nothing():
    whole = every_text()
    parts = measure.score_samples(policy_params(), OUTPUTS.batch(), **MODELS, rows=50)
    for one, other in zip(whole, parts, strict=True):
        assert one.shape == other.shape == OUTPUTS.mask.shape
        close(one, other, 1e-6)


# ---- from samples


def test_samples_find_what_is_true_within_their_errors():
    batch, _ = drawn(P, 3000)
    found = measure.sampled_divergence(policy_params(), batch, **MODELS)
    entropy, kl = exact.entropy(P), exact.kl(P, START)
    truth = {"entropy": entropy, "entropy_sampled": entropy, "token_entropy": entropy / STEPS}
    truth |= dict.fromkeys(("kl", "kl_k1", "kl_k3"), kl)
    for name, expected in truth.items():
        value, error, n = getattr(found, name)
        assert abs(value - expected) < 4 * error and n == 3000, name
    positions = exact.kl_by_position(P, START, OUTPUTS)[1:]
    value, error, n = found.kl_by_position
    assert (np.abs(value - positions) <= 4 * error + 1e-6).all() and n.tolist() == [3000] * STEPS
    close(value.sum(), found.kl.value)
    assert found.kl.error < 0.4 * found.kl_k1.error and found.kl.error < found.kl_k3.error
    assert found.entropy.error < 0.7 * found.entropy_sampled.error


def test_the_forward_kl_is_that_of_the_exchanged_models_on_the_references_samples():
    batch, _ = drawn(START, 3000)
    found = measure.sampled_divergence(
        reference_params(), batch, model=REFERENCE, reference=policy_params()
    )
    assert abs(found.kl.value - exact.kl(START, P)) < 4 * found.kl.error < 0.1


def test_a_rollout_carries_its_temperature_and_its_prompts():
    rollout = rollout_of(policy_params(), rows=600, per_prompt=3, sampling=Sampling(1.7))
    found = measure.sampled_divergence(policy_params(), rollout, **MODELS)
    p, q = (exact.token_temperature(x, OUTPUTS, 1.7) for x in (P, START))
    assert found.kl.n == 200  # of 600 rows, three by three
    assert abs(found.kl.value - exact.kl(p, q)) < 4 * found.kl.error
    alone = measure.sampled_divergence(policy_params(), rollout, model=REFERENCE)
    assert alone.kl is None and alone.entropy == found.entropy
    one_prompt = rollout.replace(prompt_id=jnp.zeros(600, jnp.int32))
    assert measure.sampled_divergence(policy_params(), one_prompt, model=REFERENCE).entropy.n == 600


def test_samples_of_something_else_are_refused():
    refused = partial(measure.sampled_divergence, model=REFERENCE)
    with pytest.raises(ValueError, match=r"did not draw these samples.*nats a token"):
        refused(policy_params(), rollout_of(reference_params()))
    filtered = rollout_of(policy_params(), sampling=Sampling(top_k=2))
    with pytest.raises(ValueError, match="without top-k and top-p"):
        refused(policy_params(), filtered)
    banned = rollout_of(policy_params(), sampling=Sampling(banned=(1,)))
    with pytest.raises(ValueError, match=r"name the ids that were banned \(here \[\]\)"):
        refused(policy_params(), banned)
    assert refused(policy_params(), banned, banned=[1]).entropy.n == 64


def test_models_that_say_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="says 4 tokens and its reference 5"):
        measure.score_samples(
            policy_params(),
            OUTPUTS.batch(),
            model=REFERENCE,
            reference=toys.markov(np.zeros((5, 5))),
        )


# ---- averages


X = np.array([[9.0, 1, 2, np.nan], [9, 4, np.nan, 9], [np.nan, 9, 9, 9]])
MASK = np.array([[False, True, True, False], [False, True, False, False], [False] * 4])


def test_averages_by_hand_touch_the_mask_alone():
    sums = np.array([3.0, 4, 0])
    close([*per_text(X, MASK)], [7 / 3, sums.std(ddof=1) / 3**0.5, 3], 1e-12)
    value, error, n = per_token(X, MASK)
    left = sums - 7 / 3 * np.array([2, 1, 0])
    close([value, error, n], [7 / 3, np.sqrt(3 / 2 * (left**2).sum()) / 3, 3], 1e-12)
    value, error, n = by_position(X, MASK)
    close(value, [2.5, 2], 1e-12)
    close([error[0], *n], [np.std([1, 4], ddof=1) / 2**0.5, 2, 1], 1e-12)
    assert np.isnan(error[1])
    with pytest.raises(ValueError, match="no text has a token"):
        by_position(X, MASK & False)
    with pytest.raises(ValueError, match="nothing to average"):
        per_token(X, MASK & False)


def test_samples_of_one_prompt_are_one_draw():
    x = np.array([[1.0], [1], [5], [5], [0], [0]])
    group = np.array([7, 7, 2, 2, 3, 3])
    found = per_text(x, x >= 0, group)
    close([*found], [2, np.std([1, 5, 0], ddof=1) / 3**0.5, 3], 1e-12)
    assert found.error > per_text(x, x >= 0).error
    value, _, n = by_position(x, x >= 0, group)
    close([*value, *n], [2, 3], 1e-12)


def test_the_error_of_a_mean_over_tokens_is_its_spread():
    rng = np.random.default_rng(0)

    def sample():
        length = rng.integers(1, 9, 80)
        level = (
            rng.standard_normal((80, 1)) + 0.3 * length[:, None]
        )  # texts differ, long ones are high
        mask = np.arange(8) < length[:, None]
        return per_token(level + rng.standard_normal((80, 8)), mask)[:2]

    value, error = np.array([sample() for _ in range(800)]).T
    assert_allclose(np.sqrt((error**2).mean()), value.std(), rtol=0.1)


# ---- between the levels of a reward and within


def laws():
    """Distributions over texts, and how much of their KL lies within a level of the reward."""
    yield exact.tilted(START, REWARD, beta=BETA), 0.0
    yield exact.sequence_temperature(START, 0.5), 0.150898
    yield exact.horizon_optimum(START, REWARD, OUTPUTS, beta=BETA, horizon=1), 0.213620


@pytest.mark.parametrize("law", range(3))
def test_the_chain_rule_is_found_from_samples(law):
    p, inside = list(laws())[law]
    between, within = exact.kl_between_and_within(p, START, REWARD)
    close(within, inside, 1e-6)
    with np.errstate(divide="ignore"):
        kl = np.log(p) - np.log(START)  # k1 of each text
    rng, found = np.random.default_rng(law), []
    for _ in range(1500):
        mine, theirs = rng.choice(64, 500, p=p), rng.choice(64, 1000, p=START)
        parts = measure.sampled_kl_between_and_within(
            kl[mine], REWARD[mine], REWARD[theirs], least=20
        )
        found.append([x[:2] for x in parts])
    value, error = np.moveaxis(np.array(found), 2, 0)
    spread = value.std(axis=0)
    assert (np.abs(value.mean(axis=0) - [between, within]) < 4 * spread / 1500**0.5).all()
    assert_allclose(np.sqrt((error**2).mean(axis=0)), spread, rtol=0.1)


def test_coarser_bins_find_less_between_and_more_within():
    p, _ = next(laws())
    rng = np.random.default_rng(0)
    mine, theirs = rng.choice(64, 4000, p=p), rng.choice(64, 4000, p=START)
    kl = np.log(p[mine] / START[mine])
    parts = [
        measure.sampled_kl_between_and_within(kl, REWARD[mine], REWARD[theirs], least=x)
        for x in (30, 1000, 4000)
    ]
    between, within = np.array([[float(x) for x in one] for one in parts]).T
    assert (np.diff(between) < 0).all() and (np.diff(within) > 0).all()
    close(between[-1], 0)  # one bin
    few = np.array([0.0] * 40 + [1.0] * 5)  # not enough for a bin of their own
    assert measure.sampled_kl_between_and_within(np.ones(9), np.ones(9), few)[0].value == 0
    close(between + within, kl.mean())
    level = (REWARD >= 1).astype(float)  # 2 bins: what they find is exact for the coarser statistic
    expected, _ = exact.kl_between_and_within(p, START, level)
    found, _ = measure.sampled_kl_between_and_within(kl, level[mine], level[theirs])
    assert abs(found.value - expected) < 4 * found.error


def test_bins_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="least=30 texts in a bin, but the reference has 3"):
        measure.sampled_kl_between_and_within(np.ones(2), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"kl \[3\] must be \[2\]"):
        measure.sampled_kl_between_and_within(np.ones(3), np.ones(2), np.ones(99))
