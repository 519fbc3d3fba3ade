"""Learning from marks on tokens: what each loss does to one bad token, and where it ends."""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct
from jaxtyping import Array, Int
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import masked
from rlhf_jax.config import Learner
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import (
    cringe,
    cringe_vocab,
    from_head,
    horizon_one,
    horizon_one_vocab,
    mle,
    reward_model,
    signed_likelihood,
    token_npo,
    token_reward_model,
    unlikelihood,
)
from rlhf_jax.optimizer import adam
from rlhf_jax.phases import init_learner
from rlhf_jax.score import score
from rlhf_jax.step import update
from rlhf_jax.types import Labeled, Pairs, Scores

LOGITS = np.array([1.0, 0.0, -1.0])  # of the tokens 0, 1 and 2; token 0 is the bad one
P = np.exp(LOGITS) / np.exp(LOGITS).sum()
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731


def marked(tokens, marks):
    """One text: a first token that is given, then `tokens` with `marks`."""
    tokens = jnp.array([[0, *tokens]])
    return Labeled(
        tokens=tokens,
        mask=jnp.arange(tokens.shape[1])[None] > 0,
        segments=jnp.ones_like(tokens),
        score=jnp.zeros((1,)),
        token_score=jnp.array([[0.0, *marks]]),
    )


BAD = marked([0], [-1.0])


@partial(jax.jit, static_argnums=(0, 1))
def answer(fn, vocab, logits, batch):
    logp = {k: jax.nn.log_softmax(jnp.pad(z, ((1, 0), (0, 0)))) for k, z in logits.items()}
    own = {k: Scores(jnp.take_along_axis(x, batch.tokens.T, 1).T) for k, x in logp.items()}
    scores = own.pop("self").replace(others=own)
    if vocab is not None:
        columns = batch.tokens.shape[1]
        flat = jax.tree.map(lambda x: jnp.broadcast_to(x, (1, columns))[0], batch)
        scores = scores.replace(extra={k: x[None] for k, x in vocab(logp, flat).items()})
    return fn(scores, batch)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_grad(fn, vocab, logits, batch):
    def total(z):
        found = answer(fn, vocab, logits | {"self": z}, batch)
        return (found.loss * found.weight).sum()

    return jax.value_and_grad(total)(logits["self"])


def terms(fn, logits, batch, vocab=None, **others):
    """The objective's answer where each model's logits [t − 1, v] are those given."""
    return answer(fn, vocab, {"self": jnp.asarray(logits), **others}, batch)


def loss_and_grad(fn, logits, batch, vocab=None, **others):
    """Σ loss · weight over the tokens, and its gradient by the learner's logits."""
    z = jnp.atleast_2d(jnp.asarray(logits, jnp.float32))
    return jax.tree.map(np.asarray, value_and_grad(fn, vocab, {"self": z, **others}, batch))


def likelihood_grad(token, p=P):
    """Of log p(token), by the logits."""
    return np.eye(len(p))[token] - p


MARKED = {
    "signed": (signed_likelihood, {}),
    "unlikelihood": (partial(unlikelihood, threshold=0.0), {}),
    "by degree": (partial(unlikelihood, threshold=None), {}),
    "npo": (partial(token_npo, threshold=0.0), {"reference": jnp.zeros((3, 3))}),
    "cringe": (partial(cringe, threshold=0.0), {"vocab": cringe_vocab}),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("signed", [0.334759, -0.244728, -0.090031]),
        ("unlikelihood", [0.665241, -0.486330, -0.178911]),
        ("by degree", [0.665241, -0.486330, -0.178911]),
        # against softmax(0, −1) over the other two: both are 1 and 2 below the bad token
        ("cringe", [0.771330, -0.534447, -0.236883]),
    ],
)
def test_the_gradient_of_one_bad_token_by_hand(name, expected):
    fn, arguments = MARKED[name]
    assert_allclose(loss_and_grad(fn, LOGITS, BAD, **arguments)[1][0], expected, atol=1e-6)


def test_npo_by_hand():
    """Token 1 is bad: its probability was .489, twice what it is now."""
    now, before = P[1], 2 * P[1]
    reference = np.log([[(1 - before) / 2, before, (1 - before) / 2]])
    fn = partial(token_npo, threshold=0.0, beta=2.0, alpha=3.0)
    value, grad = loss_and_grad(fn, LOGITS, marked([1], [-1.0]), reference=reference)
    assert_allclose(value, 3 * math.log(1 + 0.5**2), rtol=1e-5)
    weight = 3 * 2 * 0.5**2 / (1 + 0.5**2)
    assert_allclose(grad[0], weight * np.array([-P[0], 1 - now, -P[2]]), rtol=1e-5)


NPO_OF_ONE = partial(token_npo, threshold=0.0, beta=1.0)


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.3, 0.7, 0.99, 1 - 1e-4])
def test_what_pushes_down_the_logit_of_a_bad_token_of_probability(p):
    """Signed likelihood 1 − p: most where the token is gone. Unlikelihood p. NPO least at both."""
    logits, before = [math.log(p / (1 - p)), 0.0], 0.3
    reference = np.log([[before, 1 - before]])
    push = {name: loss_and_grad(MARKED[name][0], logits, BAD)[1][0, 0] for name in
            ("signed", "unlikelihood")}  # fmt: skip
    push["npo"] = loss_and_grad(NPO_OF_ONE, logits, BAD, reference=reference)[1][0, 0]
    ratio = p / before
    expected = {"signed": 1 - p, "unlikelihood": p, "npo": 2 * ratio * (1 - p) / (1 + ratio)}
    for name, found in push.items():  # float32 knows log p near 0 to 1e-7
        assert_allclose(found, expected[name], rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01])
def test_npo_becomes_signed_likelihood_as_beta_vanishes(beta):
    """Its gradient is 1 + tanh(β d / 2) times that, d = log π/π_ref: the gap shrinks with β."""
    reference = np.array([[-0.5, 0.7, 0.2]])
    _, signed = loss_and_grad(signed_likelihood, LOGITS, BAD)
    npo = partial(token_npo, threshold=0.0, beta=beta)
    value, grad = loss_and_grad(npo, LOGITS, BAD, reference=reference)
    d = np.log(P[0]) - (reference[0, 0] - np.log(np.exp(reference).sum()))
    assert_allclose(grad, (1 + np.tanh(beta * d / 2)) * signed, rtol=1e-5)
    assert abs(grad / signed - 1).max() <= beta * abs(d) / 2 + 1e-6
    assert_allclose(value - 2 / beta * math.log(2), d, atol=beta * d**2 / 4 + 1e-4 / beta**0.5)


GOOD = marked([0, 2, 1], [1.0, 0.0, 2.0])
ANY = np.random.default_rng(0).normal(size=(3, 3))


@pytest.mark.parametrize("name", [name for name in MARKED if name != "signed"])
def test_where_everything_is_good_it_is_likelihood(name):
    fn, arguments = MARKED[name]
    found, likelihood = terms(fn, ANY, GOOD, **arguments), terms(mle, ANY, GOOD)
    assert_array_equal(found.loss, likelihood.loss)
    assert_array_equal(found.weight, likelihood.weight)
    assert_array_equal(
        loss_and_grad(fn, ANY, GOOD, **arguments)[1], loss_and_grad(mle, ANY, GOOD)[1]
    )


def test_signed_likelihood_weighs_by_the_mark_and_leaves_the_unmarked_alone():
    batch = marked([0, 1, 2], [2.0, 0.0, -0.5])
    found = terms(signed_likelihood, np.stack([LOGITS] * 3), batch)
    assert_allclose(found.loss[0, 1:], [-2 * np.log(P[0]), 0, 0.5 * np.log(P[2])], rtol=1e-6)
    assert_array_equal(found.weight[0], [0, 1, 1, 1])
    assert_array_equal(found.metrics["good"][0], [0, 1, 0, 0])
    assert_array_equal(found.metrics["bad"][0], [0, 0, 0, 1])


@pytest.mark.parametrize("name", ["unlikelihood", "by degree", "npo", "cringe"])
def test_alpha_is_the_price_of_bad_tokens_only(name):
    fn, arguments = MARKED[name]
    batch = marked([0, 2, 1], [-1.0, 1.0, -1.0])
    once, thrice = (terms(f, ANY, batch, **arguments).loss for f in (fn, partial(fn, alpha=3.0)))
    assert_allclose(thrice, np.array([[1, 3, 1, 3]]) * once, rtol=1e-6)


def test_a_token_can_be_bad_by_degree():
    by_degree = partial(unlikelihood, threshold=None, alpha=2.0)
    found = terms(by_degree, np.stack([LOGITS] * 3), marked([0, 0, 0], [-0.25, -7.0, 0.5]))
    likelihood, rest = -np.log(P[0]), -2 * np.log(1 - P[0])
    expected = [0.75 * likelihood + 0.25 * rest, rest, likelihood]
    assert_allclose(found.loss[0, 1:], expected, rtol=1e-6)
    assert_allclose(found.metrics["good"][0, 1:], [0.75, 0.0, 1.0])


# --- CRINGE


BEST_THREE = partial(cringe_vocab, top_k=3)


@pytest.mark.parametrize("bad", range(6))
def test_cringe_has_the_expected_gradient_of_drawing_the_other_token(bad):
    """Whether the bad token is among the best or not: drawn are the 3 best of the other five."""
    z = np.random.default_rng(3).normal(size=6)
    others = sorted(set(range(6)) - {bad}, key=lambda a: -z[a])[:3]
    w = np.exp(z[others]) / np.exp(z[others]).sum()
    expected = np.zeros(6)
    for a, weight in zip(others, w, strict=True):
        expected[bad] += weight * sigmoid(z[bad] - z[a])
        expected[a] -= weight * sigmoid(z[bad] - z[a])
    value, grad = loss_and_grad(MARKED["cringe"][0], z, marked([bad], [-1.0]), vocab=BEST_THREE)
    assert_allclose(value, (w * softplus(z[bad] - z[others])).sum(), rtol=1e-5)
    assert_allclose(grad[0], expected, atol=1e-6)


def test_on_two_tokens_cringe_is_unlikelihood():
    logits = [0.3, -0.4]
    found = loss_and_grad(*_of("cringe", logits), vocab=cringe_vocab)
    for got, expected in zip(found, loss_and_grad(*_of("unlikelihood", logits)), strict=True):
        assert_allclose(got, expected, rtol=1e-5)


def _of(name, logits):
    return MARKED[name][0], logits, BAD


def test_a_token_that_cannot_be_said_is_nobody_to_lose_against():
    value, grad = loss_and_grad(*_of("cringe", [1.0, 0.0, -np.inf]), vocab=cringe_vocab)
    assert_allclose(value, softplus(1.0), rtol=1e-6)
    assert_allclose(grad[0], [sigmoid(1), -sigmoid(1), 0.0], atol=1e-6)


# --- horizon one

TARGET = [0.422319, 0.422319, 0.155362]  # softmax of (1, 0, −1) + (−1, 0, 0)


def descend(loss, logits, steps, rate):
    grad = jax.grad(loss)
    return jax.jit(lambda z: jax.lax.fori_loop(0, steps, lambda _, z: z - rate * grad(z), z))(
        jnp.asarray(logits, jnp.float32)
    )


@pytest.mark.parametrize("start", [LOGITS, [-2.0, 1.0, 1.0]])
def test_horizon_one_ends_at_the_reference_tilted_by_the_mark(start):
    arguments = {"vocab": horizon_one_vocab, "reference": LOGITS[None]}
    fn = partial(horizon_one, kl_coefficient=1.0)
    end = descend(lambda z: terms(fn, z, BAD, **arguments).loss.sum(), [start], 300, 1.0)
    assert_allclose(jax.nn.softmax(end)[0], TARGET, atol=1e-5)


def test_the_loss_of_horizon_one_by_hand():
    batch = marked([0, 1], [-1.0, 0.0])
    reference = np.zeros((2, 3))
    fn = partial(horizon_one, kl_coefficient=0.5)
    found = terms(fn, [LOGITS, LOGITS], batch, vocab=horizon_one_vocab, reference=reference)
    kl = (P * np.log(3 * P)).sum()
    assert_allclose(found.loss[0, 1:], [P[0] + 0.5 * kl, 0.5 * kl], rtol=1e-5)
    assert_allclose(found.metrics["expected_reward"][0, 1:], [-P[0], 0.0], rtol=1e-6)
    assert_allclose(found.metrics["kl"][0, 1:], [kl, kl], rtol=1e-5)


RNG = np.random.default_rng(5)
REWARD, REFERENCE = RNG.normal(size=(3, 5)), RNG.normal(size=(3, 5))
SAID = marked([4, 1, 0], [0.0, 0.0, 0.0])
BETA = 0.5


def given_reward(logits, batch, *, reward=REWARD):
    """r(s, v) as a table; its first row belongs to the token that is given."""
    return jnp.concatenate([jnp.zeros((1, 5)), jnp.asarray(reward, jnp.float32)])


FREE = {
    "vocab": partial(horizon_one_vocab, reward=given_reward),
    "reference": REFERENCE,
}
FREE_LOSS = partial(horizon_one, kl_coefficient=BETA)


def test_every_state_of_horizon_one_has_its_own_tilted_optimum():
    """softmax(log π_ref + r/β) has gradient 0 and the loss −β log Σ π_ref exp(r/β)."""
    log_start = REFERENCE - np.log(np.exp(REFERENCE).sum(1, keepdims=True))
    best = log_start + REWARD / BETA
    value, grad = loss_and_grad(FREE_LOSS, best, SAID, **FREE)
    assert_allclose(grad, np.zeros((3, 5)), atol=1e-6)
    assert_allclose(value, -BETA * np.log(np.exp(best).sum(1)).sum(), rtol=1e-5)
    elsewhere, _ = loss_and_grad(FREE_LOSS, best + 0.1 * REWARD[::-1], SAID, **FREE)
    assert elsewhere > value


def test_horizon_one_has_the_expected_gradient_of_its_sampled_form():
    """Σ_v π(v) (r − β log π/π_ref)(v) ∇ log π(v): REINFORCE with discount 0, by enumeration."""
    z = np.random.default_rng(6).normal(size=(3, 5))
    p, start = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (z, REFERENCE))
    earned = REWARD - BETA * np.log(p / start)
    sampled = np.zeros((3, 5))
    for state, token in itertools.product(range(3), range(5)):
        chance, score_ = p[state, token], likelihood_grad(token, p[state])
        sampled[state] -= chance * earned[state, token] * score_
    assert_allclose(loss_and_grad(FREE_LOSS, z, SAID, **FREE)[1], sampled, atol=1e-6)


def test_a_constant_of_the_state_in_the_reward_of_a_head_changes_no_gradient():
    z = np.random.default_rng(7).normal(size=(3, 5))
    head = {"vocab": partial(horizon_one_vocab, reward=from_head), "reference": REFERENCE}
    expected = loss_and_grad(FREE_LOSS, z, SAID, **FREE)
    for shift in (0.0, np.array([[1.0], [-2.0], [0.5]])):
        value, grad = loss_and_grad(FREE_LOSS, z, SAID, **head, token_reward=REWARD + shift)
        assert_allclose(grad, expected[1], atol=1e-6)
        # The head arrives normalised: each state's loss is higher by log Σ exp(r).
        assert_allclose(value - expected[0], np.log(np.exp(REWARD).sum(1)).sum(), rtol=1e-5)


# --- reward models of tokens

of_tokens = jax.jit(token_reward_model, static_argnames="threshold")
of_segments = jax.jit(partial(reward_model, reduce=masked.sum), static_argnames="error")


def rated(marks, rewards):
    batch = marked([0] * len(marks), marks)
    return Scores(reward=jnp.array([[99.0, *rewards]])), batch


def test_a_token_reward_model_is_a_classifier_of_marked_tokens():
    found = of_tokens(*rated([1.0, -1.0, 0.0, -2.0], [2.0, -1.0, 5.0, 0.5]))
    assert_allclose(found.loss[0, [1, 2, 4]], softplus(np.array([-2.0, -1.0, 0.5])), rtol=1e-6)
    assert_array_equal(found.weight[0], [0, 1, 1, 0, 1])
    assert_array_equal(found.metrics["accuracy"][0, [1, 2, 4]], [1, 1, 0])
    assert_array_equal(found.metrics["good"][0, [1, 2, 4]], [1, 0, 0])


def test_marks_on_another_scale_have_their_own_threshold():
    scores, batch = rated([0.9, 0.2, 0.5], [1.0, 1.0, 1.0])
    found = of_tokens(scores, batch, threshold=0.5)
    assert_allclose(found.loss[0, 1:3], [softplus(-1.0), softplus(1.0)], rtol=1e-6)
    assert_array_equal(found.weight[0], [0, 1, 1, 0])


def compared(*groups):
    """Groups of texts, each a list of its tokens' rewards; 99 stands where nobody may look."""
    n, k, t = len(groups), len(groups[0]), 5
    mask, reward = np.zeros((n, k, t), bool), np.full((n, k, t), 99.0, np.float32)
    for i, j in itertools.product(range(n), range(k)):
        end = 1 + len(groups[i][j])
        mask[i, j, 1:end], reward[i, j, 1:end] = True, groups[i][j]
    zero = jnp.zeros(mask.shape, jnp.int32)
    return Scores(reward=jnp.asarray(reward)), Pairs(zero, jnp.asarray(mask), zero + 1)


def test_comparisons_are_of_sums_of_token_rewards():
    found = of_segments(*compared([[1.0, 2.0], [0.5]], [[1.0, -2.0], [1.0, 1.0, -1.0]]))
    assert_allclose(found.loss, softplus(np.array([-2.5, 2.0])), rtol=1e-6)
    assert_allclose(found.metrics["margin"], [2.5, -2.0])
    assert_allclose(found.metrics["accuracy"], [1.0, 0.0])
    assert_allclose(found.metrics["score"], [1.75, 0.0])


def test_every_token_of_a_text_gets_the_same_gradient_of_a_comparison():
    scores, batch = compared([[1.0, 2.0], [0.5]])
    grad = jax.grad(lambda r: of_segments(Scores(reward=r), batch).loss.sum())(scores.reward)
    wrong = sigmoid(-2.5)
    expected = np.array([[[-wrong], [wrong]]]) * np.asarray(batch.mask)
    assert_allclose(grad, expected, rtol=1e-5)


def test_a_person_who_errs_10_percent_of_the_time_bounds_the_loss():
    rewards = compared(*[[[margin], [0.0]] for margin in (2.5, -2.0, -80.0)])
    found = of_segments(*rewards, error=0.1)
    expected = -np.log(0.9 * sigmoid(np.array([2.5, -2.0, -80.0])) + 0.05)
    assert_allclose(found.loss, expected, rtol=1e-6)
    of_three = of_segments(*compared([[0.0], [1.0], [-1.0]]), error=0.1)
    assert_allclose(of_three.loss, -np.log(0.9 * P[1] + 0.1 / 3), rtol=1e-6)


def test_on_texts_of_one_token_a_token_reward_model_is_bradley_terry():
    scores, batch = compared([[1.0], [0.5], [-0.2]], [[-1.0], [2.0], [0.0]], [[3.0], [], [1.0]])
    found, expected = of_segments(scores, batch), jax.jit(reward_model)(scores, batch)
    assert_allclose(found.loss[:2], expected.loss[:2], rtol=1e-6)
    assert_array_equal(found.weight, [1.0, 1.0, 0.0])
    assert_array_equal(expected.weight, found.weight)


# --- a whole transformer


@struct.dataclass
class Following(Labeled):
    """Each token's reward may depend on the one before."""

    before: Int[Array, "b t"]


def twos_without_repeats(logits, batch):
    """r(s, v): 1 for saying 2, −½ for repeating the token before."""
    vocabulary = jnp.arange(4)[None]
    return 1.0 * (vocabulary == 2) - 0.5 * (vocabulary == batch.before[:, None])


class FourTokens(Transformer):
    """Reads five tokens, says four: the start is never drawn."""

    def logits(self, params, hidden):
        return super().logits(params, hidden)[..., :4]


CHAIN = np.cos(1.7 * np.arange(5)[:, None] + 0.9 * np.arange(4))  # logits of what follows i
TEXTS = np.array(list(itertools.product([4], range(4), range(4), range(4))))


def chain_probabilities(logits):
    """Of every text, token by token [64, 3], in a Markov chain."""
    table = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return table[TEXTS[:, :-1], TEXTS[:, 1:]]


@pytest.mark.slow  # 10 s
def test_a_transformer_trained_by_horizon_one_reaches_the_tilted_chain():
    """π_ref is a Markov chain and r(s, v) a function of two tokens, so π_ref exp(r/β)/Z is one."""
    reward = 1.0 * (np.arange(4) == 2) - 0.5 * (np.arange(5)[:, None] == np.arange(4))
    best, start = chain_probabilities(CHAIN + reward / BETA), chain_probabilities(CHAIN)
    by_position = (best.prod(1)[:, None] * np.log(best / start)).sum(0)
    assert_allclose(by_position, [0.428291, 0.391905, 0.302386], atol=1e-6)

    model = FourTokens(vocab=5, width=32, layers=1, heads=4, kv_heads=2, mlp=64)
    learner = Learner(
        model,
        partial(horizon_one, kl_coefficient=BETA),
        vocab=partial(horizon_one_vocab, reward=twos_without_repeats),
        scores=("reference",),
        optimizer=partial(adam, learning_rate=5e-3, final=0.0, steps=300),
    )
    tokens = jnp.asarray(TEXTS, jnp.int32)
    zero = jnp.zeros(tokens.shape, jnp.float32)
    batch = Following(
        tokens, tokens != 4, jnp.ones_like(tokens), zero[:, 0], zero, before=jnp.roll(tokens, 1, 1)
    )
    models = {"reference": toys.Table(5)}
    frozen = {"reference": toys.markov(CHAIN)}

    @jax.jit
    def train(key):
        def one(state, key):
            return update(state, frozen, batch, key, learner=learner, models=models)

        state, metrics = jax.lax.scan(
            one, init_learner(key, learner=learner), jax.random.split(key, 300)
        )
        said = score({"self": state.params}, batch, models={"self": model})
        return said.logp[:, 1:], metrics["loss"]

    logp, loss = train(jax.random.key(0))
    kl = (best * (np.log(best) - np.asarray(logp, np.float64)) * 4).sum(0) / 64  # per state
    assert kl.max() < 1e-3
    # Every state counts the same in these texts: −β log Σ π_ref exp(r/β), averaged over them.
    log_chain = CHAIN - np.log(np.exp(CHAIN).sum(1, keepdims=True))
    lowest = -BETA * np.log(np.exp(log_chain + reward / BETA).sum(1))[TEXTS[:, :-1]].mean()
    assert_allclose(loss[-1], lowest, atol=1e-3)


def test_no_vocabulary_function_makes_an_array_of_all_tokens_by_vocabulary():
    rows, columns, size = 8, 64, 4096
    model = Transformer(vocab=size, width=16, layers=1, heads=2, kv_heads=2, mlp=16)
    batch = jax.tree.map(jnp.asarray, toys.labeled(rows, columns))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def vocab(logits, part):
        return cringe_vocab(logits, part) | horizon_one_vocab(logits, part)

    def loss(params, reference, batch):
        weights = {"self": params, "reference": reference}
        found = score(weights, batch, models=dict.fromkeys(weights, model), vocab=vocab,
                      chunk=rows * 4)  # fmt: skip
        return cringe(found, batch, threshold=0.0).loss.sum() + (
            horizon_one(found, batch, kl_coefficient=0.1).loss.sum()
        )

    program = jax.jit(jax.grad(loss)).lower(params, params, batch).compile()
    shapes = re.findall(r"\b[fs](?:32|16)\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)
    assert largest <= rows * columns * size // 8


# --- mistakes


def test_mistakes_are_named():
    scores = Scores(logp=jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=re.escape('needs scores=("reference",)')):
        token_npo(scores, BAD, threshold=0.0)
    with pytest.raises(ValueError, match="its limit at 0 is signed_likelihood"):
        token_npo(scores, BAD, threshold=0.0, beta=0.0)
    with pytest.raises(ValueError, match="cringe needs vocab=cringe_vocab"):
        cringe(scores, BAD, threshold=0.0)
    with pytest.raises(ValueError, match="top_k=0"):
        cringe_vocab({"self": jnp.zeros((1, 3))}, BAD, top_k=0)
    with pytest.raises(ValueError, match="needs vocab=horizon_one_vocab"):
        horizon_one(scores, BAD, kl_coefficient=1.0)
    with pytest.raises(ValueError, match=r"named \"token_reward\".*it has \['reference'\]"):
        from_head({"self": jnp.zeros((1, 3)), "reference": jnp.zeros((1, 3))}, BAD)
    with pytest.raises(ValueError, match=r"token_reward_model needs scores\.reward"):
        token_reward_model(scores, BAD)
    _, pairs = compared([[1.0], [0.5]])
    with pytest.raises(ValueError, match="error=1"):
        reward_model(Scores(reward=jnp.zeros(pairs.mask.shape)), pairs, error=1.0)
