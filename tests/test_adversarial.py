"""Real against generated: where discriminators, their rewards and energy models end."""

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

from rlhf_jax import adversarial, exact, rewards
from rlhf_jax.advantages import batch_mean
from rlhf_jax.aggregate import over_ends
from rlhf_jax.config import Derived, Learner, Rollouts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import discriminator, energy, energy_weights, reinforce
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL, from_model, max_entropy
from rlhf_jax.types import Contrast, Labeled, Scores, Sequences

FIRST, SECOND = np.array([0.55, 0.30, 0.10, 0.05]), np.array([0.10, 0.30, 0.05, 0.55])
BOTH, EITHER = exact.log_pool([FIRST, SECOND], [0.5, 0.5]), (FIRST + SECOND) / 2
BOS = 4


def against(real, generated, log_q=None):
    """Texts of one token after BOS, by id: real ones, then generated ones."""
    token = jnp.asarray([*real, *generated], jnp.int32)
    rows, zero = len(token), jnp.zeros((len(token),))
    tokens = jnp.stack([jnp.full_like(token, BOS), token], 1)
    generated = jnp.arange(rows) >= len(real)
    return Contrast(
        tokens=tokens,
        mask=jnp.broadcast_to(jnp.array([False, True]), tokens.shape),
        segments=jnp.ones_like(tokens),
        score=1.0 - generated.astype(jnp.float32),
        token_score=jnp.zeros(tokens.shape),
        log_q=zero if log_q is None else zero.at[len(real) :].set(jnp.asarray(log_q, jnp.float32)),
    )


def said(score, batch):
    """Scores of a model that gives token i the number score[i]."""
    return Scores(reward=jnp.where(batch.mask, jnp.asarray(score)[batch.tokens % 4], 0.0))


EVERY = against(range(4), range(4))  # each text once, real and generated


# --------------------------------------------------------------------------------- discriminators


def expected_loss(score, p, q, **options):
    """−E_p log D − E_q log(1 − D), with D = σ(score)."""
    terms = discriminator(said(score, EVERY), EVERY, **options)
    real = (terms["real"].loss * terms["real"].weight)[:4, 1]
    generated = (terms["generated"].loss * terms["generated"].weight)[4:, 1]
    return (p * real).sum() + (q * generated).sum()


def test_the_best_discriminator_is_p_over_p_plus_q_and_the_loss_2_log_2_where_they_agree():
    value_and_grad = jax.jit(jax.value_and_grad(expected_loss))
    best = jnp.log(jnp.asarray(FIRST / SECOND, jnp.float32))
    value, grad = value_and_grad(best, FIRST, SECOND)
    assert_allclose(grad, 0.0, atol=1e-7)
    assert_allclose(jax.nn.sigmoid(best), FIRST / (FIRST + SECOND), rtol=1e-6)
    middle = (FIRST + SECOND) / 2  # the value is 2 log 2 − 2 JSD (Goodfellow et al. 2014, thm. 1)
    jsd = (exact.kl(FIRST, middle) + exact.kl(SECOND, middle)) / 2
    assert_allclose(value, 2 * np.log(2) - 2 * jsd, rtol=1e-6)
    value, grad = value_and_grad(jnp.zeros(4), FIRST, FIRST)
    assert_allclose(value, 2 * np.log(2), rtol=1e-6)
    assert_allclose(grad, 0.0, atol=1e-7)


def test_smoothing_takes_its_share_from_real_texts_alone():
    share = 0.9 * FIRST / (FIRST + SECOND)
    best = jnp.asarray(np.log(share / (1 - share)), jnp.float32)
    grad = jax.grad(expected_loss)(best, FIRST, SECOND, smoothing=0.1)
    assert_allclose(grad, 0.0, atol=1e-7)
    with pytest.raises(ValueError, match="0 ≤ smoothing < 1"):
        expected_loss(best, FIRST, SECOND, smoothing=1.0)


def by_hand():
    """A real text of three tokens, a generated one of one; the score of every prefix."""
    mask = jnp.array([[0, 1, 1, 1], [0, 1, 0, 0]], bool)
    one = jnp.ones(mask.shape, jnp.int32)
    batch = Labeled(one, mask, one, jnp.array([1.0, 0.0]), jnp.zeros(mask.shape))
    return Scores(reward=jnp.array([[9.0, 1.0, -2.0, 3.0], [9.0, 0.5, 9.0, 9.0]])), batch


def test_prefixes_are_summed_and_texts_averaged_so_that_long_texts_do_not_bias_it():
    scores, batch = by_hand()
    terms = discriminator(scores, batch)
    log_d = lambda s: -np.log1p(np.exp(-np.array(s)))  # noqa: E731
    assert_allclose(terms["real"].loss[0, 1:], -log_d([1.0, -2.0, 3.0]), rtol=1e-6)
    assert_allclose(terms["generated"].loss[1, 1], -log_d(-0.5), rtol=1e-6)
    for term in terms.values():
        assert_allclose(term.count.sum(), 1.0, rtol=1e-6)  # texts of the kind
    assert_array_equal(terms["real"].weight, [[0, 1, 1, 1], [0, 0, 0, 0]])
    assert_array_equal(terms["generated"].weight, [[0, 0, 0, 0], [0, 1, 0, 0]])
    assert_array_equal(terms["real"].metrics["accuracy"][0], [0, 1, 0, 1])


def test_over_ends_only_the_whole_text_is_judged():
    scores, batch = by_hand()
    terms = discriminator(scores, batch, aggregate=over_ends)
    assert_array_equal(terms["real"].weight, [[0, 0, 0, 1], [0, 0, 0, 0]])
    assert_array_equal(terms["generated"].weight, [[0, 0, 0, 0], [0, 1, 0, 0]])
    assert_allclose(terms["real"].loss[0, 3], np.log1p(np.exp(-3.0)), rtol=1e-6)


def test_real_and_generated_rows_are_put_below_each_other_and_labeled():
    text = jax.tree.map(jnp.asarray, toys.labeled(rows=3, t=5))
    own = jax.tree.map(jnp.asarray, toys.experience(rows=4, t=8))
    batch = adversarial.real_and_generated(text, own, params={}, key=jax.random.key(0))
    assert batch.tokens.shape == (7, 8)
    assert_array_equal(batch.score, [1, 1, 1, 0, 0, 0, 0])
    assert_array_equal(batch.tokens[:3], np.pad(text.tokens, ((0, 0), (0, 3))))
    assert_array_equal(batch.mask[:3], np.pad(text.mask, ((0, 0), (0, 3))))
    assert_array_equal(batch.tokens[3:], own.tokens)
    assert_array_equal(batch.segments[3:], own.segments)
    expected = np.where(own.mask, own.behaviour_logp, 0).sum(1)
    assert_allclose(batch.log_q, [0, 0, 0, *expected], rtol=1e-6)


# ----------------------------------------------------------------------------------------- rewards

TABLE = toys.Table(5, value_head=True)  # its score of a text is a number of the last token


def judge(score):
    """Weights of a discriminator that gives a text ending in token i the number score[i]."""
    return toys.markov(np.zeros((5, 5)), np.array([*score, 0.0]))


PAY = {"model": TABLE, "weights": {"first": 0.5, "second": 0.5}}


def rollout_of(tokens, mask):
    tokens = jnp.asarray(tokens, jnp.int32)
    rows, t = tokens.shape
    wide = toys.experience(rows, 8)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:, :t] if x.ndim > 1 else x), wide)
    return batch.replace(tokens=tokens, mask=jnp.asarray(mask, bool), segments=1 + 0 * tokens)


def test_perfect_discriminators_pay_every_text_of_the_log_pool_the_same():
    """Σ wᵢ logit Dᵢ = log Z there, a constant: no policy gradient; −log Z = .259986."""
    assert_allclose(BOTH, [0.304153, 0.389073, 0.091705, 0.215068], atol=1e-6)
    params = {"first": judge(np.log(FIRST / BOTH)), "second": judge(np.log(SECOND / BOTH))}
    rollout = rollout_of([[BOS, i] for i in range(4)], [[0, 1]] * 4)
    reward = adversarial.from_discriminators(rollout, params, **PAY)
    assert_allclose(reward[:, 1], -0.259986, atol=1e-6)
    assert_array_equal(reward[:, 0], 0.0)
    # of log D that is not so
    other = adversarial.from_discriminators(
        rollout, params, **PAY, transform=adversarial.log_probability
    )
    assert other[:, 1].std() > 0.01


def test_one_perfect_discriminator_of_the_pooled_data_pays_nothing_at_the_linear_pool():
    assert_allclose(EITHER, [0.325, 0.3, 0.075, 0.3], atol=1e-12)
    score = np.log(EITHER / exact.linear_pool([FIRST, SECOND], [0.5, 0.5]))
    rollout = rollout_of([[BOS, i] for i in range(4)], [[0, 1]] * 4)
    reward = adversarial.from_discriminators(
        rollout, {"pooled": judge(score)}, model=TABLE, weights={"pooled": 1.0}
    )
    assert_allclose(reward, 0.0, atol=1e-7)


def test_a_reward_is_a_weighted_sum_of_what_is_made_of_the_scores():
    params = {"first": judge([1.0, -2, 0, 3]), "second": judge([0.0, 1, -1, 2])}
    rollout = rollout_of([[BOS, 0, 1, 3, 2], [BOS, 2, 0, 1, 0]], [[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]])
    first = np.array([[0, 1, 0, 3, 0], [0, 0, 1, 0, 0]])
    second = np.array([[0, 0, 0, 2, -1], [0, 0, 0, 0, 0]])
    last = np.array([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]])
    pay = partial(
        adversarial.from_discriminators,
        rollout,
        params,
        model={"first": TABLE, "second": TABLE},
        weights={"first": 0.25, "second": 2.0},
    )
    assert_allclose(pay(), last * (0.25 * first + 2.0 * second), atol=1e-6)
    assert_allclose(pay(paid=rewards.each_prefix), 0.25 * first + 2.0 * second, atol=1e-6)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = 0.25 * sigmoid(first) + 2.0 * sigmoid(second)
    assert_allclose(pay(transform=adversarial.probability), last * expected, atol=1e-6)
    expected = 0.25 * np.log(sigmoid(first)) + 2.0 * np.log(sigmoid(second))
    assert_allclose(pay(transform=adversarial.log_probability), last * expected, atol=1e-6)
    with pytest.raises(ValueError, match="needs weights"):
        adversarial.from_discriminators(rollout, params, model=TABLE, weights={})


def test_gains_add_up_to_the_reward_at_the_end_and_step_over_holes():
    params = {"first": judge([1.0, -2, 0, 3]), "second": judge([0.0, 1, -1, 2])}
    rollout = rollout_of([[BOS, 0, 1, 3, 2], [BOS, 2, 0, 1, 0]], [[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]])
    gained = adversarial.from_discriminators(rollout, params, **PAY, paid=rewards.gains)
    end = adversarial.from_discriminators(rollout, params, **PAY)
    assert_allclose(gained.sum(1), end.sum(1), atol=1e-6)
    assert_allclose(gained, [[0, 0.5, 0, 2.0, -3.0], [0, 0, 0.5, 0, 0]], atol=1e-6)


# -------------------------------------------------------------------------------- energy of a text


@jax.jit
def energy_loss(score, batch):
    """What the trainer makes of it, in one optimiser step."""
    prepared = jax.lax.stop_gradient(energy_weights(said(score, batch), batch))
    terms = energy(said(score, batch), prepared)
    return sum((x.loss * x.weight).sum() / x.weight.sum() for x in terms.values())


def test_value_and_gradient_are_those_of_the_importance_sampled_likelihood():
    """−mean r + log mean exp(r − log q), differentiated by JAX without any weights prepared."""
    batch = against([0, 0, 3], [1, 3, 3, 2, 0], log_q=[-1.0, -2.0, -2.0, -0.5, -3.0])
    score = jnp.array([0.3, -1.0, 2.0, 0.7])

    def direct(score):
        r = score[batch.tokens[:, 1]]
        log_z = jax.nn.logsumexp(r[3:] - batch.log_q[3:]) - jnp.log(5.0)
        return -r[:3].mean() + log_z

    assert_allclose(energy_loss(score, batch), direct(score), rtol=1e-6)
    found, expected = jax.grad(energy_loss)(score, batch), jax.jit(jax.grad(direct))(score)
    assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected).max() > 0.1


def test_the_reward_ends_at_log_p_and_any_constant():
    """With every text drawn once from the uniform q, Ẑ is Z; the data are there as often as p."""
    counts = [11, 6, 2, 1]  # FIRST, times 20
    batch = against(np.repeat(np.arange(4), counts), range(4), log_q=[np.log(0.25)] * 4)
    grad = jax.jit(jax.grad(energy_loss))
    for constant in (0.0, 7.0, -100.0):
        end = jnp.asarray(np.log(FIRST) + constant, jnp.float32)
        assert_allclose(grad(end, batch), 0.0, atol=1e-5)
    assert_allclose(grad(jnp.zeros(4), batch), 0.25 - FIRST, atol=1e-6)
    # log Ẑ is the true one, however large
    found = energy_weights(said(np.log(FIRST) + 300.0, batch), batch)
    assert_allclose(found.log_z, 300.0, rtol=1e-6)


def test_samples_of_the_energy_model_itself_weigh_the_same():
    batch = against([0], [0, 1, 2, 3, 0], log_q=np.log(FIRST[[0, 1, 2, 3, 0]]))
    found = energy_weights(said(np.log(FIRST) + 2.0, batch), batch)
    assert_allclose(found.importance, [0, 1, 1, 1, 1, 1], atol=1e-5)
    assert_allclose(found.log_z, 2.0, rtol=1e-6)


def test_without_samples_or_without_data_energy_is_finite():
    for batch in (against([0, 1], []), against([], [0, 1])):
        found = energy_weights(said(np.zeros(4), batch), batch)
        assert np.isfinite(found.importance).all() and np.isfinite(found.log_z).all()
    with pytest.raises(ValueError, match=r"needs scores\.reward"):
        energy(Scores(), energy_weights(said(np.zeros(4), EVERY), EVERY))
    with pytest.raises(ValueError, match="prepare=energy_weights"):
        energy(said(np.zeros(4), EVERY), EVERY)
    with pytest.raises(ValueError, match=r"needs scores\.reward"):
        discriminator(Scores(), EVERY)


# ------------------------------------------------------------------------------ proofs by training

ROWS = 256
JUDGE = Transformer(
    vocab=5, width=16, layers=1, heads=2, kv_heads=1, mlp=32, lm_head=False, value_head=True
)
POLICY = replace(toy_chain.MODEL, value_head=False)
TEXTS = exact.enumerate_outputs(prompt=[BOS], vocab=4, length=1)


def data_of(p):
    """key -> texts of one token, drawn from p."""

    def draw(key):
        token = jax.random.choice(key, 4, (ROWS,), p=jnp.asarray(p))
        tokens = jnp.stack([jnp.full((ROWS,), BOS), token], 1).astype(jnp.int32)
        return Sequences(tokens, tokens != BOS, jnp.ones_like(tokens))

    return draw


def policy_after(data, reward, objective, steps=600, shaping=(), prepare=None):
    """The law of a policy that learns from `reward` beside one judge for each stream of `data`.

    Five runs of the first two tests below ended between 2e-4 and 2.7e-3 nats from their pools.
    """
    often = 4  # a judge that lags behind makes the two of them circle
    rates = {"learning_rate": 1e-3, "steps": steps}, {"learning_rate": 1e-2, "steps": steps * often}
    slow, fast = (partial(adam, final=0.02, **rate) for rate in rates)
    learners = {"policy": Learner(POLICY, reinforce, optimizer=slow)}
    for name in data:
        learners[name] = Learner(
            JUDGE, objective, f"{name}_or_not", optimizer=fast, epochs=often, prepare=prepare
        )
    params, _ = loop.trained(
        learners,
        steps=steps,
        key=jax.random.key(0),
        rollouts=Rollouts(
            reward, 1, reference=None, value=None, kl=KL(0.0, adaptive=False),
            advantage=batch_mean, shaping=shaping,
        ),
        prompts=loop.prompts_of(ROWS),
        data={name: data_of(p) for name, p in data.items()},
        derived={
            f"{name}_or_not": Derived(adversarial.real_and_generated, of=(name, "experience"))
            for name in data
        },
    )  # fmt: skip
    return exact.probabilities(params["policy"], TEXTS, model=POLICY)


@pytest.mark.slow
def test_two_discriminators_lead_to_what_both_data_sets_say():
    reward = partial(
        adversarial.from_discriminators, model=JUDGE, weights={"first": 0.5, "second": 0.5}
    )
    found = policy_after({"first": FIRST, "second": SECOND}, reward, discriminator)
    assert exact.kl(found, BOTH) <= 0.005
    assert exact.kl(found, EITHER) > 0.02


@pytest.mark.slow
def test_one_discriminator_of_pooled_data_leads_to_what_either_says():
    reward = partial(adversarial.from_discriminators, model=JUDGE, weights={"pooled": 1.0})
    found = policy_after({"pooled": EITHER}, reward, discriminator)
    assert exact.kl(found, EITHER) <= 0.005
    assert exact.kl(found, BOTH) > 0.02


@pytest.mark.slow
def test_a_policy_that_follows_the_reward_of_an_energy_model_with_its_entropy_says_the_data():
    found = policy_after(
        {"data": FIRST},
        partial(from_model, model=JUDGE, learner="data"),
        energy,
        shaping=(partial(max_entropy, temperature=1.0),),
        prepare=energy_weights,
    )
    assert exact.kl(found, FIRST) <= 0.005
