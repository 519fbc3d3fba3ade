"""Where conditioning, filtering, weighted regression and the gate lead: by hand, and exactly.

The texts are those of the four-token chain. Expected losses are taken over all of them, with a
policy that has a logit for every token after every prefix, so that optima are exact.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import toy_chain
import toys
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit
from toy_chain import REWARD, START, TEXTS

from rlhf_jax import exact, masked, phases, train
from rlhf_jax.conditioning import batch_edges, called_good, chained, condition, tagged, untagged
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.data import streams
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.objectives import (
    above_value,
    combine,
    gated,
    mle,
    of_experience,
    quark,
    quark_vocab,
    reference_kl_vocab,
    reinforce,
    score_value,
    self_normalised,
    weighted_regression,
)
from rlhf_jax.optimizer import adam, sgd
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling
from rlhf_jax.selection import above, with_score
from rlhf_jax.types import Labeled, Scores

KEY = jax.random.key(0)
GOOD = expit(REWARD)  # how likely a person is to call the text good
BAD_TAG, GOOD_TAG = 5, 6


def labeled(tokens, score):
    """Texts after one given token, as a batch."""
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape)
    return Labeled(
        tokens,
        mask,
        jnp.ones_like(tokens),
        jnp.asarray(score, jnp.float32),
        jnp.zeros(tokens.shape, jnp.float32),
    )


def variation(p, q):
    return 0.5 * np.abs(p - q).sum()


# --- weighted regression by hand

TWO = labeled([[4, 0, 1], [4, 2, 3]], [1.0, -1.0])
LOGP = jnp.array([[0.0, -0.5, -2.0], [0.0, -1.0, -4.0]])


def test_the_weight_is_the_exponential_of_the_score_over_beta_up_to_the_cap():
    found = weighted_regression(Scores(logp=LOGP), TWO, beta=0.5)
    weight = np.exp([[2.0], [-2.0]])
    assert_allclose(found.loss, -weight * LOGP, rtol=1e-6)
    assert_array_equal(found.weight, TWO.mask)
    capped = weighted_regression(Scores(logp=LOGP), TWO, beta=0.5, cap=3.0)
    assert_allclose(capped.loss[:, 1:], [[1.5, 6.0], [np.exp(-2.0), 4 * np.exp(-2.0)]], rtol=1e-6)
    assert_array_equal(capped.metrics["capped"][:, 1], [1.0, 0.0])
    huge = weighted_regression(Scores(logp=LOGP), TWO, beta=1e-30)
    assert_allclose(huge.loss[:, 1:], [[10.0, 40.0], [0.0, 0.0]], rtol=1e-6)


def test_what_exceeds_the_value_counts_and_nothing_teaches_the_value_but_its_own_term():
    value = jnp.array([[9.0, 0.5, 1.0], [9.0, -1.0, 0.0]])
    both = partial(
        combine,
        policy=partial(weighted_regression, beta=1.0, advantage=above_value),
        value=partial(score_value, coefficient=0.5),
    )
    found = both(Scores(logp=LOGP, value=value), TWO)
    weight = np.exp([[0.5, 0.0], [0.0, -1.0]])
    assert_allclose(found["policy"].loss[:, 1:], -weight * LOGP[:, 1:], rtol=1e-6)
    assert_allclose(found["value"].loss[:, 1:], [[0.125, 0.0], [0.0, 0.5]], rtol=1e-6)
    assert found["value"].scale == 0.5

    def loss(value, name):
        return both(Scores(logp=LOGP, value=value), TWO)[name].loss.sum()

    assert not jax.grad(loss)(value, "policy").any()
    assert_allclose(jax.grad(loss)(value, "value")[:, 1:], [[-0.5, 0.0], [0.0, 1.0]], rtol=1e-6)


def test_experience_brings_its_own_advantage():
    batch = jax.tree.map(jnp.asarray, toys.experience(rows=4, t=6))
    found = weighted_regression(
        Scores(logp=batch.logp), batch, beta=2.0, advantage=of_experience, cap=1e9
    )
    expected = masked.select(-jnp.exp(batch.advantage / 2.0) * batch.logp, batch.mask)
    assert_allclose(found.loss, expected, rtol=1e-5)


def test_normalised_weights_have_mean_one_over_the_whole_batch():
    scores = Scores(logp=LOGP)
    batch = TWO.replace(score=jnp.array([300.0, 301.0]))
    found = weighted_regression(
        scores, self_normalised(scores, batch, beta=0.5), beta=0.5, cap=1e9
    ).metrics["weight"]
    assert_allclose(found[:, 1], 2 * np.exp([0.0, 2.0]) / (1 + np.exp(2.0)), rtol=1e-4)
    one = batch.replace(mask=batch.mask.at[1].set(False))  # the other says nothing
    assert_allclose(self_normalised(scores, one, beta=0.5).score, [0.0, 0.0], atol=1e-4)
    none = batch.replace(mask=jnp.zeros_like(batch.mask))
    assert_array_equal(self_normalised(scores, none, beta=0.5).score, [0.0, 0.0])
    samples = jax.tree.map(jnp.asarray, toys.experience(rows=4, t=6))
    ready = self_normalised(scores, samples, beta=0.5)
    weights = np.exp(np.asarray(ready.advantage / 0.5, np.float64))[np.asarray(samples.mask)]
    assert_allclose(weights.mean(), 1.0, rtol=1e-5)


def test_mistakes_are_named():
    scores = Scores(logp=LOGP)
    with pytest.raises(ValueError, match=r"beta=0.*selection\.best_share"):
        weighted_regression(scores, TWO, beta=0.0)
    with pytest.raises(ValueError, match="cap=0"):
        weighted_regression(scores, TWO, beta=1.0, cap=0.0)
    for fn in (score_value, partial(weighted_regression, beta=1.0, advantage=above_value)):
        with pytest.raises(ValueError, match=r"needs scores\.value"):
            fn(scores, TWO)
    batch = jax.tree.map(jnp.asarray, toys.experience(rows=4, t=6))
    gate = partial(gated, objective=reinforce, on_coefficient=1.0, off_coefficient=1.0)
    with pytest.raises(ValueError, match="gated needs vocab=reference_kl_vocab"):
        gate(Scores(logp=batch.logp), batch, on=1, off=2)
    with pytest.raises(ValueError, match="two different control tokens"):
        gate(Scores(extra={"reference_kl": batch.logp}), batch, on=1, off=1)
    with pytest.raises(ValueError, match='named "reference"'):
        quark_vocab({"self": jnp.zeros((1, 3))}, TWO)


# --- exact optima


def tables(q):
    """Logits of every token after every prefix, for the policy that says q."""
    logp = np.log(q.reshape(4, 4, 4))
    first, second = (np.logaddexp.reduce(logp.reshape(4**i, -1), axis=1) for i in (1, 2))
    return [jnp.asarray(x.reshape(-1, 4), jnp.float32) for x in (first, second, logp)]


def scores_of(policy, tokens):
    """What it says of the last three tokens of texts, with random values of each prefix."""
    prefix, logp, value = jnp.zeros(len(tokens), jnp.int32), [], []
    for i, logits in enumerate(policy):
        rows = jax.nn.log_softmax(logits)[prefix]
        noise = jnp.asarray(np.random.default_rng(i).normal(size=len(logits)), jnp.float32)
        token = tokens[:, i - 3]
        logp.append(jnp.take_along_axis(rows, token[:, None], axis=1)[:, 0])
        value.append(noise[prefix])
        prefix = 4 * prefix + token
    given = ((0, 0), (tokens.shape[1] - 3, 0))
    logp, value = (jnp.pad(jnp.stack(x, axis=1), given) for x in (logp, value))
    return Scores(logp=logp, value=value)


def steepness(objective, batch, share, q):
    """The largest derivative, at the policy q, of the loss that rows with these shares have."""

    def loss(policy):
        terms = objective(scores_of(policy, batch.tokens), batch)
        rows = masked.sum(terms.loss * terms.weight, terms.weight != 0, axis=1)
        return (rows * jnp.asarray(share, jnp.float32)).sum()

    return max(float(jnp.abs(x).max()) for x in jax.jit(jax.grad(loss))(tables(q)))


WELL_SPOKEN = labeled(TEXTS, np.log(GOOD))


@pytest.mark.parametrize("advantage", [None, above_value])
def test_weighted_regression_ends_at_the_posterior_with_and_without_a_critic(advantage):
    """Weights σ(r): the tilt by log σ(r), which is the chain given that a person said good."""
    options = {} if advantage is None else {"advantage": advantage}
    objective = partial(weighted_regression, beta=1.0, cap=1e9, **options)
    posterior = exact.conditioned(START, GOOD)
    assert_allclose(posterior, exact.tilted(START, np.log(GOOD), beta=1.0), rtol=1e-9)
    assert steepness(objective, WELL_SPOKEN, START, posterior) < 1e-6
    assert steepness(objective, WELL_SPOKEN, START, START) > 1e-3


def test_weighted_regression_ends_at_the_tilt_of_its_beta():
    objective = partial(weighted_regression, beta=0.5, cap=1e9)
    batch = labeled(TEXTS, REWARD)
    assert steepness(objective, batch, START, exact.tilted(START, REWARD, beta=0.5)) < 1e-5
    assert steepness(objective, batch, START, exact.tilted(START, REWARD, beta=0.6)) > 1e-2


def test_with_a_large_beta_it_is_likelihood():
    objective = partial(weighted_regression, beta=1e9)
    batch = labeled(TEXTS, REWARD)

    def gradient(fn):
        return jax.grad(lambda logp: fn(Scores(logp=logp), batch).loss.sum())(
            jnp.log(jnp.full((64, 4), 0.25))
        )

    assert_allclose(gradient(objective), gradient(mle), rtol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "distance", "entropy"), [(1.0, 1.12015, 3.08938), (1.5, 2.32107, 2.02170)]
)
def test_filtered_likelihood_ends_at_the_chain_given_a_good_text(threshold, distance, entropy):
    """It pays more KL, and keeps less entropy, than the tilt that earns the same."""
    filtered = exact.conditioned(START, threshold <= REWARD)
    assert_allclose(exact.kl(filtered, START), distance, atol=1e-5)
    assert_allclose(exact.entropy(filtered), entropy, atol=1e-5)
    batch = above(labeled(TEXTS, REWARD), threshold=threshold)
    near = 0.999999 * filtered + 0.000001 * START  # logits are finite
    assert steepness(mle, batch, START, near) < 1e-5
    assert steepness(mle, batch, START, START) > 1e-2
    low, high = 0.1, 10.0
    for _ in range(60):
        beta = np.sqrt(low * high)
        tilt = exact.tilted(START, REWARD, beta=beta)
        low, high = (beta, high) if tilt @ REWARD > filtered @ REWARD else (low, beta)
    assert exact.kl(tilt, START) < distance and exact.entropy(tilt) > entropy


# Every text with every answer of a person, and how likely that is.
ANSWERS = labeled(np.repeat(TEXTS, 2, axis=0), np.tile([1.0, 0.0], 64))
SHARE = np.repeat(START, 2) * np.stack([GOOD, 1 - GOOD], axis=1).reshape(-1)
speak = partial(condition, edges=(0.5,), tags=(BAD_TAG, GOOD_TAG))


@pytest.fixture(scope="module")
def spoken():
    """Those texts with their tags, and with all tags dropped."""
    return tuple(jax.jit(partial(speak, drop=x))(ANSWERS, KEY) for x in (0.0, 1.0))


def laws(spoken, share, drop):
    """What likelihood learns for each tag, and for none: the texts that stand behind it."""
    kept, plain = spoken
    tag = np.asarray(kept.tokens[:, 1])
    assert_array_equal(plain.tokens[:, 1:4], ANSWERS.tokens[:, 1:])
    parts = {GOOD_TAG: share * (tag == GOOD_TAG), BAD_TAG: share * (tag == BAD_TAG), None: share}
    found = {name: x.reshape(64, 2).sum(axis=1) for name, x in parts.items()}
    chance = {name: x.sum() * (drop if name is None else 1 - drop) for name, x in found.items()}
    return {name: x / x.sum() for name, x in found.items()}, chance


def test_conditioning_on_what_people_say_is_a_tilt_by_log_sigmoid_of_the_reward(spoken):
    law, chance = laws(spoken, SHARE, drop=0.1)
    good, bad = law[GOOD_TAG], law[BAD_TAG]
    assert_allclose(good, exact.tilted(START, np.log(GOOD), beta=1.0), rtol=1e-9)
    assert_allclose(chance[GOOD_TAG] / 0.9, 0.533980, atol=1e-6)
    assert_allclose([good @ REWARD, bad @ REWARD], [0.454339, -0.151699], atol=1e-6)
    mixture = sum(chance[name] * law[name] for name in law)
    assert_allclose(mixture, START, rtol=1e-9)
    assert_allclose(law[None], START, rtol=1e-9)
    which = np.asarray(spoken[0].tokens[:, 1]) == GOOD_TAG
    assert steepness(mle, spoken[0], SHARE * which, good) < 1e-6


@pytest.mark.parametrize(("rounds", "reward"), [(2, 0.698715), (4, 1.037346), (8, 1.355354)])
def test_rounds_that_each_learn_from_the_good_of_the_last_multiply(spoken, rounds, reward):
    q = START
    for _ in range(rounds):
        share = np.repeat(q, 2) * np.stack([GOOD, 1 - GOOD], axis=1).reshape(-1)
        q = laws(spoken, share, drop=0.0)[0][GOOD_TAG]
    assert_allclose(q @ REWARD, reward, atol=1e-6)


# --- quark


def test_quark_is_likelihood_and_the_kl_from_the_reference():
    logits = {
        "self": jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])),
        "reference": jnp.log(jnp.array([[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]])),
    }
    flat = jax.tree.map(lambda x: x[0, 1:] if x.ndim > 1 else x, TWO)
    kl = quark_vocab(logits, flat)["divergence"]
    assert_allclose(kl, [0.25 * np.log(0.5) + 0.5 * np.log(2.0), 0.0], atol=1e-6)
    gradient = jax.grad(
        lambda z: quark_vocab(logits | {"self": jax.nn.log_softmax(z)}, flat)["divergence"].sum()
    )(logits["self"])
    assert_allclose(gradient, jnp.exp(logits["self"]) - jnp.exp(logits["reference"]), atol=1e-6)
    extra = {"divergence": jnp.zeros((2, 3)).at[0, 1:].set(kl)}
    found = quark(Scores(logp=LOGP, extra=extra), TWO, coefficient=0.3)
    assert_allclose(found["likelihood"].loss[:, 1:], -LOGP[:, 1:])
    assert_allclose(found["kl"].loss, extra["divergence"])
    assert (found["likelihood"].scale, found["kl"].scale) == (1.0, 0.3)


# --- the gate

ON, OFF = 7, 8


def switched():
    """Four samples: on, off, no switch, and switched off after the second token it chose."""
    batch = jax.tree.map(jnp.asarray, toys.experience(rows=4, t=6))
    tokens = jnp.array(
        [[4, ON, 1, 2, 3, 0], [4, OFF, 1, 2, 3, 0], [4, 1, 1, 2, 3, 0], [4, ON, 1, 2, OFF, 0]]
    )
    mask = jnp.array([[0, 0, 1, 1, 1, 1]] * 3 + [[0, 0, 1, 1, 0, 1]], bool)
    return batch.replace(tokens=tokens, mask=mask, segments=jnp.ones_like(tokens))


def test_behind_the_off_token_there_is_no_advantage_and_an_anchor_of_its_own():
    batch, kl = switched(), jnp.asarray(np.random.default_rng(0).uniform(size=(4, 6)), jnp.float32)
    found = gated(
        Scores(logp=batch.logp, extra={"reference_kl": kl}),
        batch,
        objective=reinforce,
        on=ON,
        off=OFF,
        on_coefficient=0.1,
        off_coefficient=2.0,
    )
    closed = np.zeros((4, 6), bool)
    closed[1, 2:] = closed[3, 5] = True
    mask = np.asarray(batch.mask)
    plain = reinforce(Scores(logp=batch.logp), batch)
    assert_allclose(found["policy"].loss, np.where(closed, 0.0, plain.loss))
    assert_array_equal(found["policy"].weight, plain.weight)
    assert_array_equal(found["on"].weight, mask & ~closed)
    assert_array_equal(found["off"].weight, mask & closed)
    assert_allclose(found["off"].loss, np.where(mask, kl, 0.0))
    assert (found["on"].scale, found["off"].scale) == (0.1, 2.0)
    assert found["on"].count.sum() == found["off"].count.sum() == mask.sum()


def test_a_policy_that_says_the_off_token_itself_is_not_let_off():
    batch = switched()
    said = batch.replace(tokens=batch.tokens.at[0, 3].set(OFF))
    kl = {"reference_kl": jnp.zeros((4, 6))}
    gate = partial(gated, objective=reinforce, on=ON, off=OFF, on_coefficient=1.0,
                   off_coefficient=1.0)  # fmt: skip
    for name, term in gate(Scores(logp=batch.logp, extra=kl), said).items():
        expected = gate(Scores(logp=batch.logp, extra=kl), batch)[name]
        assert_array_equal(term.weight, expected.weight)
        assert_array_equal(term.loss, expected.loss)


@pytest.mark.parametrize("heeds", [True, False])
def test_the_gated_optimum_of_a_policy_that_heeds_the_switch_and_of_one_that_does_not(heeds):
    """One token, reward r. On: π₀ exp(r/β)/Z, off: π₀; deaf: π₀ exp((1 − f) r/β)/Z for both."""
    beta, f = 0.5, 0.3
    reference, reward = toy_chain.CHAIN[4], np.array([0.0, 0.5, 1.0, -0.3])
    strength = (1.0, 0.0) if heeds else (1 - f, 1 - f)
    optimum = np.stack([exact.tilted(reference, x * reward, beta=beta) for x in strength])
    share = np.stack([(1 - f) * optimum[0], f * optimum[1]])  # of the eight possible samples
    sampled = []
    for tag in (ON, OFF):
        texts = exact.enumerate_outputs(prompt=[4, tag], vocab=9, length=1, alphabet=range(4))
        sampled.append(exact.experience(texts, reward, logp=np.zeros((4, 3))))
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *sampled)
    batch = batch.replace(advantage=batch.reward)
    flat = jax.tree.map(lambda x: x[:, 2] if x.ndim > 1 else x, batch)
    ref = jnp.log(jnp.asarray(reference, jnp.float32))

    def loss(logits):
        logp = jax.nn.log_softmax(logits if heeds else jnp.tile(logits[:1], (2, 1)))
        logits = {"self": jnp.repeat(logp, 4, axis=0), "reference": jnp.tile(ref, (8, 1))}
        kl = reference_kl_vocab(logits, flat)["reference_kl"]
        here = jnp.zeros((8, 3))
        scores = Scores(
            logp=here.at[:, 2].set(logp.reshape(-1)),
            extra={"reference_kl": here.at[:, 2].set(kl)},
        )
        terms = gated(scores, batch, objective=reinforce, on=ON, off=OFF,
                      on_coefficient=beta, off_coefficient=beta)  # fmt: skip
        weight = jnp.asarray(share.reshape(-1), jnp.float32)  # samples come from the policy itself
        total = sum(term.scale * (term.loss * term.weight)[:, 2] for term in terms.values())
        return (total * weight).sum()

    assert jnp.abs(jax.grad(loss)(jnp.log(jnp.asarray(optimum, jnp.float32)))).max() < 1e-6
    assert jnp.abs(jax.grad(loss)(jnp.tile(ref, (2, 1)))).max() > 1e-2


# --- in a run

RUN_MODEL = Transformer(vocab=264, width=16, layers=1, heads=2, kv_heads=1, mlp=16, context=32)
RUN_TAGS = (260, 261)


def tagged_run():
    """Two steps of Quark on texts of bytes, paid by length, with a reference that skips tags."""
    halves = partial(condition, edges=partial(batch_edges, parts=2), tags=RUN_TAGS, drop=0.2)
    policy = Learner(
        RUN_MODEL,
        quark,
        batch="samples",
        optimizer=partial(sgd, learning_rate=0.1),
        transform=partial(chained, transforms=(partial(untagged, tags=RUN_TAGS), halves)),
        vocab=quark_vocab,
        scores=("reference",),
    )
    prompts = partial(
        streams.prompts,
        batch=8,
        length=4,
        words=(1, 1),
        truncate=True,
        tokenizer="bytes",
        source=["one", "two two", "three three"],
    )
    return Config(
        name="quark",
        steps=2,
        data={"prompts": prompts},
        learners={"policy": policy},
        frozen={"reference": Frozen(From("policy"), Untagged(RUN_MODEL, tags=RUN_TAGS))},
        rollouts=Rollouts(
            lambda rollout, params: masked.at_last(
                rollout.mask.sum(1).astype(jnp.float32), rollout.mask
            ),
            length=8,
            samples=2,
            transform=partial(tagged, tags=RUN_TAGS, probabilities=(0.25, 0.75)),
            value=None,
            kl=KL(0.0, adaptive=False),
            sampling=Sampling(stop=(2,), banned=(0, 1, *RUN_TAGS)),
            show=0,
        ),
        derived={"samples": Derived(with_score)},
    )


@pytest.mark.slow
def test_a_run_with_control_tokens_learns_the_same_on_any_mesh(tmp_path):
    alone, spread = (
        train.train(replace(tagged_run(), mesh=mesh), tmp_path / str(n), devices=jax.devices()[:n])
        for n, mesh in ((1, (1, 1, 1, 1)), (4, (2, 2, 1, 1)))
    )
    assert int(alone.learners["policy"].step) == 2
    fresh = RUN_MODEL.init(phases.phase_key(0, 0, "init/policy"))
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(),
        alone.learners["policy"].params,
        fresh,
    )
    assert max(jax.tree.leaves(moved)) > 1e-4
    for a, b in zip(*(jax.tree.leaves(x.learners["policy"].params) for x in (alone, spread)),
                    strict=True):  # fmt: skip
        assert_allclose(a, b, atol=1e-5)


# --- trained


class Tagged(toy_chain.FourTokens):
    """Reads the start and two tags as well, says four."""


MODEL = Tagged(vocab=7, width=32, layers=1, heads=4, kv_heads=2, mlp=64)


def drawn(key, rows=512):
    """Samples of the chain and what they earn.

    They are drawn systematically: as many of each as its probability wants, up to one.
    """
    upto = jnp.cumsum(jnp.asarray(START, jnp.float32))[:-1]
    at = (jnp.arange(rows) + jax.random.uniform(key)) / rows
    tokens = jnp.asarray(TEXTS)[jnp.searchsorted(upto, at)]
    return labeled(tokens, toy_chain.reward_of(tokens))


def trained(learner, text=None, *, steps=500, **options):
    optimizer = partial(adam, learning_rate=5e-3, final=0.0, steps=steps)
    params, _ = loop.trained(
        {"policy": replace(learner, optimizer=optimizer)},
        steps=steps,
        key=KEY,
        data={} if text is None else {"text": text},
        **options,
    )
    return params["policy"]


def said_after(params, *tags):
    """What the model says behind the start and these tags: the probabilities of the 64 texts."""
    given = np.broadcast_to([toy_chain.BOS, *tags], (64, 1 + len(tags)))
    tokens = np.concatenate([given, TEXTS[:, 1:]], axis=1)
    return loop.probabilities(MODEL, params, tokens, given=1 + len(tags))


def earned(rollout, params):
    """The reward of a text behind the start and a tag, on its last token."""
    total = toy_chain.reward_of(rollout.tokens[:, -4:].at[:, 0].set(toy_chain.BOS))
    return masked.at_last(total, rollout.mask)


FRESH = Rollouts(earned, length=3, reference=None, value=None, kl=KL(initial=0.0, adaptive=False))
TAGS = (BAD_TAG, GOOD_TAG)
ASKED = partial(tagged, tags=(GOOD_TAG,))


@pytest.fixture(scope="module")
def first_round():
    """A transformer that has learned from the chain's texts and what people said of them."""
    transform = partial(chained, transforms=(called_good, partial(speak, drop=0.1)))
    return trained(Learner(MODEL, mle, batch="text", transform=transform), drawn)


@pytest.mark.slow
def test_a_transformer_learns_what_people_call_good_and_bad_and_stays_what_it_was(first_round):
    """Behind each tag the posterior, without one the chain, within a total variation of .03."""
    good, bad, plain = (said_after(first_round, *tags) for tags in ((GOOD_TAG,), (BAD_TAG,), ()))
    for found, expected in (
        (good, exact.conditioned(START, GOOD)),
        (bad, exact.conditioned(START, 1 - GOOD)),
        (plain, START),
        (0.533980 * good + 0.466020 * bad, START),
    ):
        distance = variation(found, expected)
        print(f"total variation {distance:.4f}")
        assert distance <= 0.03
    assert variation(good, bad) > 0.1


@pytest.mark.slow
def test_a_second_round_from_samples_under_the_good_tag_multiplies_the_posterior(first_round):
    """The first round's policy samples, frozen: π₀ σ(r)², E[r] = .6987 within .03."""
    tag = partial(speak, drop=0.0)
    transforms = (partial(untagged, tags=TAGS), called_good, tag)
    found = said_after(
        trained(
            Learner(MODEL, mle, batch="samples", transform=partial(chained, transforms=transforms)),
            start={"policy": first_round},
            rollouts=replace(FRESH, policy="sampler", transform=ASKED),
            prompts=loop.prompts_of(512),
            derived={"samples": Derived(with_score)},
            frozen={"sampler": first_round},
            frozen_models={"sampler": MODEL},
        ),
        GOOD_TAG,
    )
    expected = exact.tilted(START, 2 * np.log(GOOD), beta=1.0)
    print(f"E[r] {found @ REWARD:.4f}, total variation {variation(found, expected):.4f}")
    assert_allclose(expected @ REWARD, 0.698715, atol=1e-6)
    assert_allclose(found @ REWARD, 0.698715, atol=0.03)
    assert variation(found, expected) <= 0.04


@pytest.mark.slow
def test_a_transformer_that_weighs_texts_by_their_reward_learns_the_same_posterior():
    """Reward-weighted regression with R = log σ(r) and β = 1, within a total variation of .03."""

    def scored(key):
        batch = drawn(key)
        return batch.replace(score=jax.nn.log_sigmoid(batch.score))

    learner = Learner(MODEL, partial(weighted_regression, beta=1.0), batch="text")
    found = said_after(trained(learner, scored))
    distance = variation(found, exact.conditioned(START, GOOD))
    print(f"total variation {distance:.4f}")
    assert distance <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("coefficient", "least", "most"), [(0.05, 1.4, 2.1), (30.0, 0.12, 0.24)])
def test_quark_explores_under_its_best_tag_and_the_kl_holds_it_where_it_was(
    coefficient, least, most
):
    """Fresh samples in two halves; the reference, 0.17 a text, never learned the tags it skips."""
    halves = partial(condition, edges=partial(batch_edges, parts=2), tags=TAGS, drop=0.0)
    transforms = (partial(untagged, tags=TAGS), halves)
    learner = Learner(
        MODEL,
        partial(quark, coefficient=coefficient),
        batch="samples",
        transform=partial(chained, transforms=transforms),
        vocab=quark_vocab,
        scores=("reference",),
    )
    params = trained(
        learner,
        steps=300,
        rollouts=replace(FRESH, transform=ASKED),
        prompts=loop.prompts_of(256),
        derived={"samples": Derived(with_score)},
        frozen={"reference": toy_chain.reference_params()},
        frozen_models={"reference": Untagged(toy_chain.REFERENCE, tags=TAGS)},
    )
    good, bad = (said_after(params, tag) for tag in (GOOD_TAG, BAD_TAG))
    distance = variation(good, START)
    print(f"E[r|good] {good @ REWARD:.3f}, bad {bad @ REWARD:.3f}, variation {distance:.3f}")
    assert least < good @ REWARD < most
    if coefficient > 1:
        assert distance <= 0.05
