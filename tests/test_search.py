"""Search and what is learned from it: the best of n, one position of a game, visit counts."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import exact, selection
from rlhf_jax.objectives import (
    combine,
    mle,
    of_the_state,
    outcome,
    visit_counts,
    visit_counts_vocab,
)
from rlhf_jax.types import Experience, Labeled, Scores, Searched

P = np.array([0.5, 0.2, 0.2, 0.1])  # four texts of one token; the second and third earn the same
REWARD = np.array([0.0, 1.0, 1.0, 2.0])
KEY = jax.random.key(0)
# compiled: one program each, not one for every operation in them
best_of = jax.jit(selection.best_of, static_argnames=("n", "keep", "by"))
best_rows = jax.jit(selection.best_rows, static_argnames=("n", "keep", "by"))


def samples(texts, prompt_id):
    """Experience of one chosen token a row, which earns REWARD."""
    texts = jnp.asarray(texts, jnp.int32)
    rows, zero = len(texts), jnp.zeros((len(texts), 2))
    tokens = jnp.stack([jnp.zeros_like(texts), texts], 1)
    fields = {name: zero for name in Experience.__dataclass_fields__}
    for name in ("temperature", "group_tokens"):
        fields[name] = jnp.ones((rows,))
    return Experience(
        **fields
        | {
            "tokens": tokens,
            "mask": jnp.broadcast_to(jnp.array([False, True]), (rows, 2)),
            "segments": jnp.ones((rows, 2), jnp.int32),
            "ended": jnp.ones((rows,), bool),
            "prompt_id": jnp.asarray(prompt_id, jnp.int32),
            "sample_id": jnp.zeros((rows,), jnp.int32),
            "reward": jnp.stack([jnp.zeros(rows), jnp.asarray(REWARD, jnp.float32)[texts]], 1),
        }
    )


def every_draw(n):
    """All 4ⁿ draws of n samples as that many prompts, and the probability of each."""
    draws = np.array(list(itertools.product(range(4), repeat=n)))
    return samples(draws.reshape(-1), np.repeat(np.arange(len(draws)), n)), P[draws].prod(1)


# -------------------------------------------------------------------------------------- best of n


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_rows_that_stay_have_the_law_of_the_best_of_n(n):
    batch, weight = every_draw(n)
    keys = jax.random.split(KEY, 300)
    keep = jax.jit(jax.vmap(lambda key: selection.best_of(batch, key, n=n).mask[:, 1]))(keys)
    stays = np.asarray(keep)
    assert_array_equal(stays.reshape(300, -1, n).sum(2), 1)
    share = (stays.mean(0).reshape(-1, n) * weight[:, None]).reshape(-1)
    law = np.bincount(np.asarray(batch.tokens[:, 1]), share, minlength=4)
    expected = exact.best_of_n(P, REWARD, n)
    # by level without error, within a level as often as the coin says
    assert_allclose(
        [law[0], law[1] + law[2], law[3]],
        [expected[0], expected[1] + expected[2], expected[3]],
        atol=1e-12,
    )
    assert_allclose(law, expected, atol=0.01)


def test_the_rows_alone_are_those_whose_mask_stays():
    batch, _ = every_draw(3)
    stays = best_of(batch, KEY, n=3, keep=2)
    rows = best_rows(batch, params={}, key=KEY, n=3, keep=2)
    assert rows.tokens.shape == (2 * 64, 2) and rows.mask[:, 1].all()
    kept = np.flatnonzero(np.asarray(stays.mask[:, 1]))
    number = np.asarray(batch.prompt_id) * 4 + np.asarray(batch.tokens[:, 1])
    found = np.asarray(rows.prompt_id) * 4 + np.asarray(rows.tokens[:, 1])
    assert_array_equal(np.sort(found), np.sort(number[kept]))


def test_the_best_of_2_of_the_best_of_2_is_the_best_of_4():
    batch, _ = every_draw(4)
    best = partial(best_rows, params={}, key=KEY)
    twice, once = best(best(batch, n=2), n=2), best(batch, n=4)
    assert_array_equal(twice.prompt_id, once.prompt_id)
    assert_array_equal(twice.reward, once.reward)
    again = exact.best_of_n(exact.best_of_n(P, REWARD, 2), REWARD, 2)
    assert_allclose(again, exact.best_of_n(P, REWARD, 4), atol=1e-12)


def test_samples_may_stand_anywhere_and_prompts_never_compete():
    batch = samples([3, 1, 0, 0, 2, 0], [7, 5, 5, 9, 9, 7])
    kept = best_of(batch, KEY, n=2).mask[:, 1]
    assert_array_equal(kept, [True, True, False, False, True, False])
    # one prompt with a single row: nobody it could be compared with
    short = samples([3, 1, 0, 2], [1, 2, 3, 3])
    assert_array_equal(best_of(short, KEY, n=2).mask[:, 1], [0, 0, 0, 1])
    assert_array_equal(best_rows(short, params={}, key=KEY, n=2).mask[:, 1], [0, 1])


def test_an_empty_row_never_wins_and_ties_are_not_always_the_first():
    batch = samples([0, 0], [1, 1]).replace(reward=jnp.array([[0.0, -5.0], [0.0, -5.0]]))
    empty = batch.replace(mask=batch.mask.at[0].set(False))
    winners = {int(best_of(batch, jax.random.key(i), n=2).mask[0, 1]) for i in range(20)}
    assert winners == {0, 1}
    for i in range(5):
        assert best_of(empty, jax.random.key(i), n=2).mask[1, 1]


def test_goodness_may_be_another_number_and_n_has_to_fit():
    batch = samples([3, 0], [1, 1])
    worst = best_of(batch, KEY, n=2, by=lambda x: -selection.total_reward(x))
    assert_array_equal(worst.mask[:, 1], [False, True])
    with pytest.raises(ValueError, match=r"the best 1 of 4: .* must divide the 2 rows"):
        best_of(batch, KEY, n=4)
    with pytest.raises(ValueError, match="1 ≤ keep ≤ n"):
        best_of(batch, KEY, n=2, keep=3)


def test_likelihood_on_the_best_is_likelihood_of_their_law():
    """E[∇ mle on the best of 2] over all draws is π − best-of-2's law, by the logits."""
    batch, weight = every_draw(2)
    best = best_rows(batch, params={}, key=KEY, n=2)

    def loss(theta):
        logp = jnp.pad(jax.nn.log_softmax(theta)[best.tokens[:, 1]][:, None], ((0, 0), (1, 0)))
        return (mle(Scores(logp=logp), best).loss[:, 1] * weight).sum()

    grad = jax.grad(loss)(jnp.log(jnp.asarray(P, jnp.float32)))
    expected = P - exact.best_of_n(P, REWARD, 2)
    assert_allclose(
        [grad[0], grad[1] + grad[2], grad[3]],
        [expected[0], expected[1] + expected[2], expected[3]],
        atol=1e-6,
    )


def test_rollouts_become_texts_with_their_reward_as_score():
    batch = samples([3, 0, 2], [0, 1, 2])
    found = selection.with_score(batch, params={}, key=KEY)
    assert type(found) is Labeled
    assert_array_equal(found.score, [2.0, 0.0, 1.0])
    assert_array_equal(found.token_score[:, 1], [2.0, 0.0, 1.0])
    assert_array_equal(found.tokens, batch.tokens)


# ----------------------------------------------------------------------------- one position a game


def test_one_masked_position_of_each_row_stays_each_as_often():
    batch = jax.tree.map(jnp.asarray, toys.labeled(rows=4, t=6))
    batch = batch.replace(mask=batch.mask.at[1].set(False).at[2, 1].set(False))
    keys = jax.random.split(KEY, 4000)
    masks = np.asarray(jax.vmap(lambda key: selection.one_position(batch, key).mask)(keys))
    mask = np.asarray(batch.mask)
    assert_array_equal(masks.sum(2), np.broadcast_to(mask.any(1), (4000, 4)))
    assert not masks[:, ~mask].any()
    expected = mask / np.maximum(mask.sum(1, keepdims=True), 1)
    assert_allclose(masks.mean(0), expected, atol=0.04)


# ---------------------------------------------------------------------------------------- outcomes


def game(score, mask):
    mask = jnp.asarray(mask, bool)
    one = jnp.ones(mask.shape, jnp.int32)
    return Labeled(one, mask, one, jnp.asarray(score, jnp.float32), jnp.zeros(mask.shape))


def test_outcome_is_cross_entropy_of_the_chance_to_win():
    batch = game([1.0, 0.0, 0.5], [[0, 1, 1], [0, 1, 0], [0, 0, 1]])
    value = jnp.array([[9.0, 2.0, -1.0], [9.0, 2.0, 9.0], [9.0, 9.0, 0.3]])
    term = outcome(Scores(value=value), batch)
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    expected = -np.array([log_sigmoid(2.0), log_sigmoid(-1.0), log_sigmoid(-2.0),
                          0.5 * log_sigmoid(0.3) + 0.5 * log_sigmoid(-0.3)])  # fmt: skip
    assert_allclose(term.loss[batch.mask], expected, rtol=1e-6)
    assert_array_equal(term.weight, batch.mask)
    assert_allclose(term.metrics["accuracy"][batch.mask], [1, 0, 0, 0])


def test_the_value_ends_at_the_share_of_games_won():
    """Its gradient is σ(V) − z: 0 in expectation where σ(V) is the probability to win."""
    z = np.array([1.0, 1.0, 1.0, 0.0])
    batch = game(z, [[0, 1]] * 4)
    odds = np.log(0.75 / 0.25)

    def loss(v):
        return outcome(Scores(value=jnp.full((4, 2), v)), batch).loss[:, 1].mean()

    assert_allclose(jax.grad(loss)(odds), 0.0, atol=1e-7)
    assert_allclose(jax.grad(loss)(0.0), 0.5 - 0.75, atol=1e-7)
    assert_allclose(loss(odds), -0.75 * np.log(0.75) - 0.25 * np.log(0.25), rtol=1e-6)


def test_players_in_turn_have_each_their_own_outcome():
    batch = game([1.0], [[0, 1, 1]]).replace(token_score=jnp.array([[0.0, 1.0, 0.0]]))
    value = jnp.array([[0.0, 3.0, 3.0]])
    term = outcome(Scores(value=value), batch, target=of_the_state)
    assert_allclose(term.loss[0, 1:], [np.log1p(np.exp(-3.0)), np.log1p(np.exp(3.0))], rtol=1e-6)


# ------------------------------------------------------------------------------------ visit counts


def searched(visits):
    """States in a row, flat as `vocab` sees them."""
    one = jnp.ones(len(visits), jnp.int32)
    zero = jnp.zeros(len(visits))
    return Searched(one, one > 0, one, zero, zero, visits=jnp.asarray(visits, jnp.float32))


VISITS = np.array([[40.0, 0.0, 10.0, 50.0], [1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_is_the_policy_minus_the_share_of_visits(temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    share = VISITS ** (1 / temperature)
    share /= share.sum(1, keepdims=True)

    def entropy_of(logits):
        vocab = visit_counts_vocab({"self": logits}, searched(VISITS), temperature=temperature)
        return vocab["search_cross_entropy"].sum(), vocab

    grad, vocab = jax.grad(entropy_of, has_aux=True)(logits)
    assert_allclose(grad, jax.nn.softmax(logits) - share, atol=1e-6)
    expected = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(1)
    assert_allclose(vocab["search_entropy"], expected, atol=1e-6)
    # where the policy is the search, nothing is left but its entropy
    end = visit_counts_vocab({"self": jnp.log(share)}, searched(VISITS), temperature=temperature)
    assert_allclose(end["search_cross_entropy"], expected, atol=1e-6)


def test_states_that_were_not_searched_teach_the_policy_nothing_but_their_outcome_counts():
    visits = jnp.asarray(np.stack([np.zeros(4), VISITS[0], np.zeros(4)])[None], jnp.float32)
    batch = game([1.0], [[0, 1, 1]])
    fields = {name: getattr(batch, name) for name in Labeled.__dataclass_fields__}
    batch = Searched(**fields, visits=visits)
    flat = searched(visits[0]).replace(mask=batch.mask[0])
    extra = visit_counts_vocab({"self": jnp.zeros((3, 4))}, flat)
    scores = Scores(value=jnp.zeros((1, 3)), extra={k: x[None] for k, x in extra.items()})
    terms = combine(scores, batch, policy=visit_counts, value=outcome)
    assert_array_equal(terms["policy"].weight, [[0, 1, 0]])
    assert_array_equal(terms["value"].weight, [[0, 1, 1]])
    assert_allclose(terms["policy"].loss[0, 1], np.log(4), rtol=1e-6)
    assert_allclose(
        terms["policy"].metrics["kl"][0, 1],
        np.log(4) + (VISITS[0] / 100 * np.log([0.4, 1, 0.1, 0.5])).sum(),
        rtol=1e-5,
    )


def test_search_objectives_name_what_they_lack():
    batch = searched(VISITS)
    with pytest.raises(ValueError, match="vocab=visit_counts_vocab"):
        visit_counts(Scores(), jax.tree.map(lambda x: x[None], batch))
    with pytest.raises(ValueError, match="4 moves and the policy of 5 tokens"):
        visit_counts_vocab({"self": jnp.zeros((2, 5))}, batch)
    with pytest.raises(ValueError, match=r"needs scores\.value"):
        outcome(Scores(), game([1.0], [[0, 1]]))
