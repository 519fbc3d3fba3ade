"""A student learns what a teacher says: its samples, its distribution, on whose texts."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import loop
import numpy as np
import pytest
import toy_chain
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import exact, selection
from rlhf_jax import train as training
from rlhf_jax.check import check
from rlhf_jax.config import ConfigError, Derived, From, Frozen, Learner, Rollouts
from rlhf_jax.experiment import load
from rlhf_jax.objectives import distill, distill_vocab, mle
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.types import Labeled, Scores, Sequences

SMOKE = Path(__file__).parent.parent / "experiments" / "smoke.py"
RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 50, 6))


def states(n):
    """n states of a text, all in use."""
    one = jnp.ones((n,), jnp.int32)
    return Sequences(tokens=one, mask=one > 0, segments=one)


def divergence(student, teacher, **options):
    logits = {"self": jnp.asarray(student), "teacher": jnp.asarray(teacher)}
    return distill_vocab(logits, states(len(student)), **options)["divergence"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


# ---------------------------------------------------------------------------------- the divergence


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_divergence_is_the_generalised_jensen_shannon(beta):
    p, q = softmax(TEACHER / 2.0), softmax(STUDENT / 2.0)
    m = beta * p + (1 - beta) * q
    expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
    assert_allclose(divergence(STUDENT, TEACHER, beta=beta, temperature=2.0), expected, atol=1e-6)


def test_beta_0_is_forward_and_beta_1_reverse_kl():
    p, q = softmax(TEACHER), softmax(STUDENT)
    assert_allclose(divergence(STUDENT, TEACHER, beta=0.0), kl(p, q), atol=1e-5)
    assert_allclose(divergence(STUDENT, TEACHER, beta=1.0), kl(q, p), atol=1e-5)


def test_both_are_limits_of_the_divergence_over_its_smaller_weight():
    student, teacher = STUDENT[:3], TEACHER[:3]
    for beta, limit in ((0.001, 0.0), (0.999, 1.0)):
        scaled = divergence(student, teacher, beta=beta) / min(beta, 1 - beta)
        assert_allclose(scaled, divergence(student, teacher, beta=limit), rtol=0.01)


def test_at_one_half_teacher_and_student_may_be_exchanged_and_log_2_is_the_most():
    there, back = divergence(STUDENT, TEACHER), divergence(TEACHER, STUDENT)
    assert_allclose(there, back, atol=1e-6)
    one, other = 50.0 * np.eye(6)[None, 0], 50.0 * np.eye(6)[None, 1]
    assert_allclose(divergence(one, other), np.log(2), atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_gradient_is_zero_where_the_student_is_the_teacher_and_only_there(beta):
    grad = jax.grad(lambda x, y: divergence(x, y, beta=beta).sum())
    same = grad(jnp.asarray(TEACHER) + 3.0, jnp.asarray(TEACHER))  # logits that say the same
    assert_allclose(same, 0.0, atol=1e-6)
    apart = np.abs(grad(jnp.asarray(STUDENT), jnp.asarray(TEACHER))).max(-1)
    assert apart.min() > 1e-3


def test_the_gradient_of_forward_kl_is_student_minus_teacher():
    grad = jax.grad(lambda x: divergence(x, TEACHER, beta=0.0).sum())(jnp.asarray(STUDENT))
    assert_allclose(grad, softmax(STUDENT) - softmax(TEACHER), atol=1e-6)


def test_no_gradient_reaches_the_teacher_and_its_mistakes_are_named():
    logits = {"self": jnp.zeros((2, 5)), "reference": jnp.zeros((2, 5))}
    with pytest.raises(ValueError, match=r'"teacher" in the learner\'s scores.*\'reference\''):
        distill_vocab(logits, states(2))
    with pytest.raises(ValueError, match="6 and 5 tokens; they need one vocabulary"):
        distill_vocab(logits | {"teacher": jnp.zeros((2, 6))}, states(2))
    with pytest.raises(ValueError, match="0 ≤ beta ≤ 1"):
        distill_vocab(logits | {"teacher": jnp.zeros((2, 5))}, states(2), beta=1.5)
    with pytest.raises(ValueError, match="vocab=distill_vocab"):
        distill(Scores(logp=jnp.zeros((1, 2))), jax.tree.map(lambda x: x[None], states(2)))


# ------------------------------------------------------------------------------- data and own texts


def labeled_and_experience(rows=64):
    text = jax.tree.map(jnp.asarray, toys.labeled(rows=rows, t=5))
    return text, jax.tree.map(jnp.asarray, toys.experience(rows=rows, t=8))


def test_a_mixture_takes_whole_rows_from_either_batch_in_their_place():
    text, own = labeled_and_experience()
    mixed = selection.mixture(text, own, params={}, key=jax.random.key(0), fraction=0.5)
    assert type(mixed) is Sequences
    wide = np.pad(text.tokens, ((0, 0), (0, 3)))
    from_text = (np.asarray(mixed.tokens) == wide).all(1)
    from_own = (np.asarray(mixed.tokens) == np.asarray(own.tokens)).all(1)
    assert (from_text ^ from_own).all()
    assert 16 < from_own.sum() < 48
    expected = np.where(from_own[:, None], own.mask, np.pad(text.mask, ((0, 0), (0, 3))))
    assert_array_equal(mixed.mask, expected)


def test_a_fraction_of_0_or_1_is_one_of_the_batches_and_common_fields_stay():
    text, own = labeled_and_experience(8)
    for fraction, expected in ((0.0, text), (1.0, text.replace(score=text.score + 1))):
        found = selection.mixture(
            text,
            text.replace(score=text.score + 1),
            params={},
            key=jax.random.key(1),
            fraction=fraction,
        )
        assert type(found) is Labeled
        jax.tree.map(assert_array_equal, found, expected)
    only = selection.mixture(text, own, params={}, key=jax.random.key(1), fraction=1.0)
    assert_array_equal(only.tokens, own.tokens)


def test_a_mixture_of_batches_that_do_not_fit_says_so():
    text, own = labeled_and_experience(8)
    mix = partial(selection.mixture, params={}, key=jax.random.key(1))
    with pytest.raises(ValueError, match="equal size, not 8 and 4 rows"):
        mix(text, jax.tree.map(lambda x: x[:4], own), fraction=0.5)
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        mix(text, own, fraction=1.5)
    with pytest.raises(ValueError, match="groups"):
        mix(toys.pairs(n=8), own, fraction=0.5)


# ---------------------------------------------------------------------- samples of a frozen teacher


def taught(**changes):
    """A student that learns by likelihood from samples of a frozen tree."""
    smoke = load(SMOKE)
    small = smoke.learners["policy"].model
    student = Learner(small, mle, batch="experience", optimizer=smoke.learners["policy"].optimizer)
    rollouts = replace(
        smoke.rollouts,
        reward=lambda rollout, params: jnp.zeros(rollout.tokens.shape, jnp.float32),
        policy="teacher",
        reference=None,
        value=None,
        length=4,
        show=0,
    )
    return replace(
        smoke,
        steps=1,
        learners={"student": student},
        frozen={"teacher": Frozen(From("student"), **changes)},
        rollouts=rollouts,
        data={"prompts": smoke.data["prompts"]},
        evaluation={},
        mesh=(1, 1, 1, 1),
    )


def test_a_frozen_teacher_may_sample_in_a_run(tmp_path):
    state = training.train(taught(), tmp_path, devices=jax.devices()[:1])
    assert int(state.learners["student"].step) == 1


def test_a_teacher_with_more_tokens_than_its_student_is_refused():
    config = taught(model=replace(load(SMOKE).learners["policy"].model, vocab=300))
    with pytest.raises(ConfigError, match="264 is smaller than the 300 tokens of 'teacher'"):
        check(config, devices=1)
    config = replace(config, rollouts=replace(config.rollouts, policy="teecher"))
    with pytest.raises(ConfigError, match="there is no 'teecher'; valid: student, teacher"):
        check(config, devices=1)


def nothing(rollout, params):
    """No reward."""
    return jnp.zeros(rollout.tokens.shape, jnp.float32)


def earned(rollout, params):
    """The reward of the chain's texts, on their last tokens."""
    pay = toy_chain.token_reward_of(rollout.tokens).astype(jnp.float32)
    return jnp.pad(pay, ((0, 0), (1, 0)))


CHAIN = {"frozen": {"chain": toy_chain.reference_params()}}
CHAIN_MODEL = {"chain": toy_chain.REFERENCE}


def text_probabilities(params, model=toy_chain.MODEL):
    return exact.probabilities(params, toy_chain.OUTPUTS, model=model)


@pytest.mark.slow
def test_the_best_of_4_distilled_earns_what_the_best_of_4_earns():
    """E[r] = 1.0459 within .03, from samples of the chain that the student never sees others of."""
    steps = 400
    optimizer = partial(adam, learning_rate=3e-3, final=0.02, steps=steps)
    student = Learner(toy_chain.MODEL, mle, batch="best", optimizer=optimizer)
    params, _ = loop.trained(
        {"student": student},
        steps=steps,
        key=jax.random.key(0),
        rollouts=Rollouts(earned, 3, policy="chain", reference=None, value=None, kl=KL(0.0)),
        prompts=loop.prompts_of(1024, samples=4),
        derived={"best": Derived(partial(selection.best_rows, n=4))},
        frozen=CHAIN["frozen"],
        frozen_models=CHAIN_MODEL,
    )
    found = text_probabilities(params["student"])
    optimum = exact.best_of_n(toy_chain.START, toy_chain.REWARD, 4)
    assert_allclose((optimum * toy_chain.REWARD).sum(), 1.045928, atol=1e-6)
    assert_allclose((found * toy_chain.REWARD).sum(), 1.045928, atol=0.03)
    assert exact.kl(optimum, found) < 0.01


@pytest.mark.slow
def test_a_student_that_is_corrected_on_its_own_texts_becomes_the_teacher():
    """Reverse KL over the vocabulary, on-policy: KL(student‖teacher) ≤ .005 nats per text."""
    steps = 300
    optimizer = partial(adam, learning_rate=3e-3, final=0.02, steps=steps)
    student = Learner(
        toy_chain.MODEL,
        distill,
        optimizer=optimizer,
        vocab=partial(distill_vocab, beta=1.0, teacher="chain"),
        scores=("chain",),
    )
    params, metrics = loop.trained(
        {"student": student},
        steps=steps,
        key=jax.random.key(0),
        rollouts=Rollouts(nothing, 3, policy="student", reference=None, value=None, kl=KL(0.0)),
        prompts=loop.prompts_of(256),
        frozen=CHAIN["frozen"],
        frozen_models=CHAIN_MODEL,
    )
    found = text_probabilities(params["student"])
    assert exact.kl(found, toy_chain.START) <= 0.005
    assert metrics["student/divergence"][-1] < 0.01 < metrics["student/divergence"][0]
