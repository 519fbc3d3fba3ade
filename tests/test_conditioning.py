"""Conditioning, returns to go and filtering, as transforms of batches and of prompts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct
from jaxtyping import Array, Float
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import masked, returns_to_go, selection
from rlhf_jax.conditioning import (
    after_start,
    batch_edges,
    before_response,
    called_good,
    chained,
    condition,
    quantile_edges,
    tagged,
    untagged,
)
from rlhf_jax.environment import Environment
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.objectives import mle
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.types import Labeled, Prompts, Scores, Sequences

GOOD, BAD = 90, 91
BATCH = Labeled(
    tokens=jnp.array([[1, 11, 12, 2], [1, 21, 2, 0], [1, 31, 2, 0]]),
    mask=jnp.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]], bool),
    segments=jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]),
    score=jnp.array([0.5, -0.5, 0.0]),
    token_score=jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 4.0, 5.0, 0.0], [0.0, 6.0, 7.0, 0.0]]),
)
KEY = jax.random.key(0)


def compiled(fn):
    """`fn(batch, key, **settings)` as one program, which compiles faster than its operations."""

    def call(batch, key=KEY, **settings):
        return jax.jit(partial(fn, **settings))(batch, key)

    return call


conditioned = compiled(condition)
tag = partial(conditioned, edges=(0.0,), tags=(BAD, GOOD))


def repeated(batch, n):
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), batch)


def same(got, expected):
    jax.tree.map(assert_array_equal, got, expected)


# --- control tokens in texts


def test_the_control_token_stands_after_bos_and_everything_else_moves_right():
    out = tag(BATCH, drop=0.0)
    assert_array_equal(out.tokens, [[1, GOOD, 11, 12, 2], [1, BAD, 21, 2, 0], [1, GOOD, 31, 2, 0]])
    assert_array_equal(out.mask, [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    assert_array_equal(out.segments, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    assert_array_equal(out.token_score[0], [0, 0, 1, 2, 3])
    assert_array_equal(out.score, BATCH.score)


def test_the_control_token_may_stand_right_before_the_response():
    out = tag(BATCH, KEY, drop=0.0, place=before_response)
    assert_array_equal(out.tokens, [[1, GOOD, 11, 12, 2], [1, BAD, 21, 2, 0], [1, 31, GOOD, 2, 0]])
    assert_array_equal(out.mask[2], [0, 0, 0, 1, 0])


def test_each_bin_has_its_token_and_an_edge_belongs_to_the_bin_above():
    out = conditioned(BATCH, KEY, edges=(-0.2, 0.5), tags=(7, 8, 9), drop=0.0)
    assert_array_equal(out.tokens[:, 1], [9, 7, 8])


def test_the_mask_covers_the_control_token_only_if_it_is_to_be_learned():
    out = tag(BATCH, KEY, drop=0.0)
    assert not out.mask[:, :2].any()
    assert_array_equal(out.mask.sum(1), BATCH.mask.sum(1))
    unlearned = BATCH.replace(mask=BATCH.mask.at[2].set(False))
    learned = tag(unlearned, KEY, drop=0.0, learn_tag=True)
    assert_array_equal(learned.mask, [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert not tag(BATCH, KEY, drop=1.0, learn_tag=True).mask[:, -1].any()


def test_a_dropped_row_is_the_old_row_and_one_more_column_of_padding():
    out = tag(BATCH, KEY, drop=1.0)
    same(jax.tree.map(lambda x: x[:, :4], out.replace(score=BATCH.tokens)),
         BATCH.replace(score=BATCH.tokens))  # fmt: skip
    assert not out.mask[:, -1].any()
    assert not out.segments[:, -1].any()


def test_rows_are_dropped_independently_at_the_stated_rate_and_by_the_key_alone():
    many = repeated(jax.tree.map(lambda x: x[:1], BATCH), 4000)
    out = tag(many, jax.random.key(1), drop=0.25)
    dropped = np.asarray(out.segments[:, -1] == 0)
    assert_allclose(dropped.mean(), 0.25, atol=0.03)
    assert_array_equal(np.asarray(out.tokens[:, 1]) == GOOD, ~dropped)
    assert_array_equal(tag(many, jax.random.key(1), drop=0.25).tokens, out.tokens)
    assert (tag(many, jax.random.key(2), drop=0.25).tokens != out.tokens).any()


@struct.dataclass
class Marked(Labeled):
    mark: Float[Array, "b t"]
    wide: Float[Array, "b t two"]
    gate: Float[Array, "b"]


MARKED = Marked(
    **vars(BATCH),
    mark=BATCH.token_score * 2,
    wide=jnp.stack([BATCH.token_score, -BATCH.token_score], axis=-1),
    gate=BATCH.score,
)


def test_extra_per_token_fields_of_a_subclass_move_with_their_tokens():
    out = tag(MARKED, KEY, drop=0.0)
    assert isinstance(out, Marked)
    assert_array_equal(out.mark, 2 * out.token_score)
    assert_array_equal(out.wide[..., 1], -out.token_score)
    assert_array_equal(out.gate, BATCH.score)


def test_a_row_without_text_stays_without():
    empty = jax.tree.map(jnp.zeros_like, BATCH)
    out = tag(empty, KEY, drop=0.0, learn_tag=True)
    assert not out.tokens.any()
    assert not out.segments.any()
    assert not out.mask.any()


def test_taking_the_control_tokens_out_again_gives_the_old_texts():
    packed = MARKED.replace(segments=MARKED.segments.at[0].set(jnp.array([1, 1, 2, 2])))
    for transform in (
        partial(tag, drop=0.5),
        partial(tag, drop=0.0, place=before_response),
        partial(returns_to_go.returns_to_go, edges=(4.0,), tags=(BAD, GOOD)),
    ):
        there = transform(packed, KEY)
        assert (there.tokens >= 90).any()
        back = jax.jit(partial(untagged, tags=(GOOD, BAD)))(there)
        added = back.tokens.shape[1] - 4
        wider = jax.tree.map(
            lambda x, n=added: jnp.pad(x, ((0, 0), (0, n), (0, 0))[: x.ndim]) if x.ndim > 1 else x,
            packed,
        )
        same(back, wider)


def test_padding_that_looks_like_a_control_token_stays_padding():
    odd = BATCH.replace(tokens=BATCH.tokens.at[1, 3].set(GOOD))
    same(untagged(odd, tags=(GOOD, BAD)), odd)


def test_transforms_one_after_another_have_keys_of_their_own():
    many = repeated(BATCH, 500)
    half = partial(condition, edges=(0.0,), tags=(BAD, GOOD), drop=0.5)
    twice = compiled(chained)(many, transforms=(half, half))
    both = np.asarray(twice.segments > 0).sum(1) - np.asarray(many.segments > 0).sum(1)
    assert_allclose(np.bincount(both) / 1500, [0.25, 0.5, 0.25], atol=0.05)
    retagged = (
        partial(untagged, tags=(BAD, GOOD)),
        partial(condition, edges=(0.0,), tags=(BAD, GOOD), drop=0.0),
    )
    stale = conditioned(BATCH, KEY, edges=(0.0,), tags=(GOOD, BAD), drop=0.0)
    assert_array_equal(
        compiled(chained)(stale, transforms=retagged).tokens[:, :-1],
        tag(BATCH, KEY, drop=0.0).tokens,
    )


def test_a_person_calls_a_text_good_as_often_as_the_sigmoid_of_its_score_says():
    many = repeated(BATCH, 3000)
    word = np.asarray(compiled(called_good)(many).score).reshape(3, 3000)
    assert_allclose(word.mean(1), 1 / (1 + np.exp([-0.5, 0.5, 0.0])), atol=0.03)
    assert set(np.unique(word)) == {0.0, 1.0}


def test_likelihood_under_the_transform_counts_the_same_tokens():
    out = tag(BATCH, KEY, drop=0.0)
    before = mle(Scores(logp=-BATCH.tokens.astype(jnp.float32)), BATCH)
    after = mle(Scores(logp=-out.tokens.astype(jnp.float32)), out)
    assert (before.loss * before.weight).sum() == (after.loss * after.weight).sum()
    assert before.weight.sum() == after.weight.sum()


def test_edges_and_tags_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"2 edges .* 3 bins, but there are 2 tags; give 1 edges"):
        condition(BATCH, KEY, edges=(0.0, 1.0), tags=(1, 2))
    with pytest.raises(ValueError, match="must ascend"):
        condition(BATCH, KEY, edges=(1.0, 0.0), tags=(1, 2, 3))
    with pytest.raises(ValueError, match="there are 3 tags"):
        condition(BATCH, KEY, edges=partial(batch_edges, parts=2), tags=(1, 2, 3))


# --- quantiles


def parts_of(scores, parts):
    edges = np.asarray(quantile_edges(np.asarray(scores), parts=parts))
    return [int(n) for n in np.bincount((scores[:, None] >= edges).sum(1), minlength=parts)]


def test_quantiles_of_different_scores_are_equally_large():
    scores = np.random.default_rng(0).normal(size=120).astype(np.float32)
    assert parts_of(scores, 4) == [30, 30, 30, 30]
    assert_allclose(quantile_edges(np.arange(8), parts=4), [2, 4, 6])


@pytest.mark.parametrize(
    ("scores", "parts", "sizes"),
    [
        ([0, 0, 0, 1], 2, [3, 1]),  # the only boundary
        ([0, 1, 1, 1], 2, [1, 3]),
        ([0] * 9 + [1], 5, [9, 0, 0, 0, 1]),  # the best stay apart from the worst
        ([0] + [1] * 9, 5, [1, 0, 0, 0, 9]),
        ([0, 0, 1, 1, 2, 2], 3, [2, 2, 2]),
        ([3, 3, 3], 2, [0, 3]),  # all equal: the last part
    ],
)
def test_equal_scores_are_never_parted(scores, parts, sizes):
    assert parts_of(np.asarray(scores, np.float32), parts) == sizes


def test_the_quantiles_of_a_batch_are_those_of_its_texts():
    batch = repeated(BATCH, 2).replace(score=jnp.array([5.0, 1.0, 0.0, 4.0, 2.0, 8.0]))
    batch = batch.replace(mask=batch.mask.at[2].set(False))  # the 0 is nobody's
    edges = jax.jit(partial(batch_edges, parts=2))(batch)
    assert_allclose(edges, quantile_edges(jnp.array([5.0, 1.0, 4.0, 2.0, 8.0]), parts=2))
    out = conditioned(
        batch, KEY, edges=partial(batch_edges, parts=5), tags=(3, 4, 5, 6, 7), drop=0.0
    )
    assert_array_equal(out.tokens[jnp.array([0, 1, 3, 4, 5]), 1], [6, 3, 5, 4, 7])
    with pytest.raises(ValueError, match="parts=1"):
        quantile_edges(jnp.ones(3), parts=1)


# --- control tokens in prompts

draw = compiled(tagged)
PROMPTS = Prompts(
    tokens=jnp.array([[1, 5, 6], [1, 0, 0]]),
    length=jnp.array([3, 1]),
    prompt_id=jnp.array([4, 5]),
    sample_id=jnp.array([0, 0]),
)


def test_prompts_are_tagged_for_generation():
    out = draw(PROMPTS, KEY, tags=(GOOD,))
    assert_array_equal(out.tokens, [[1, GOOD, 5, 6], [1, GOOD, 0, 0]])
    assert_array_equal(out.length, [4, 2])
    assert_array_equal(out.prompt_id, PROMPTS.prompt_id)
    out = draw(PROMPTS, KEY, tags=(GOOD,), place=before_response)
    assert_array_equal(out.tokens, [[1, 5, 6, GOOD], [1, GOOD, 0, 0]])
    out = draw(PROMPTS, KEY, tags=(GOOD,), drop=1.0)
    assert_array_equal(out.tokens[:, :3], PROMPTS.tokens)
    assert_array_equal(out.length, PROMPTS.length)


def test_a_sample_draws_its_tag_by_its_name_and_by_the_shares():
    n = 3000
    prompts = Prompts(
        jnp.ones((n, 1), jnp.int32), jnp.ones(n, jnp.int32), jnp.arange(n) // 3, jnp.arange(n) % 3
    )
    some = partial(draw, tags=(7, 8, 9), probabilities=(0.2, 0.0, 0.8), drop=0.1)
    out = some(prompts, KEY)
    found = np.bincount(np.asarray(out.tokens[:, 1]), minlength=10) / n
    assert_allclose(found[[0, 7, 8, 9]], [0.1, 0.18, 0.0, 0.72], atol=0.03)
    assert_array_equal(out.length == 2, out.tokens[:, 1] > 0)
    siblings = np.asarray(out.tokens[:, 1]).reshape(-1, 3)
    assert_allclose(
        (siblings[:, 0] == siblings[:, 1]).mean(), 0.1**2 + 0.18**2 + 0.72**2, atol=0.05
    )
    order = np.random.default_rng(0).permutation(n)
    shuffled = some(jax.tree.map(lambda x: x[order], prompts), KEY)
    assert_array_equal(shuffled.tokens, out.tokens[order])
    assert (some(prompts, jax.random.key(1)).tokens != out.tokens).any()
    even = draw(prompts, KEY, tags=(7, 8))
    assert_allclose((even.tokens[:, 1] == 7).mean(), 0.5, atol=0.03)


def test_shares_that_do_not_add_up_are_refused():
    for wrong in ((0.5,), (0.5, 0.4), (1.5, -0.5)):
        with pytest.raises(ValueError, match="one per tag, which add up to 1"):
            draw(PROMPTS, KEY, tags=(7, 8), probabilities=wrong)


# --- a model that cannot see them


def test_an_untagged_model_says_of_tagged_texts_what_it_says_of_plain_ones(model, params):
    texts = toys.labeled(rows=6, t=9)
    texts = jax.tree.map(jnp.asarray, texts).replace(tokens=jnp.minimum(texts.tokens, 28))
    packed = texts.segments.at[0].set(jnp.array([1, 1, 1, 2, 2, 2, 2, 3, 3]))
    starts = jnp.concatenate([jnp.ones((6, 1), bool), packed[:, 1:] != packed[:, :-1]], axis=1)
    texts = texts.replace(segments=packed, mask=texts.mask & ~starts)
    blind = Untagged(model, tags=(30, 31))

    @jax.jit
    def compare(texts):
        rtg = partial(returns_to_go.returns_to_go, edges=(0.0,), tags=(30, 31), every=2)
        batch = rtg(condition(texts, KEY, edges=(0.0,), tags=(30, 31), drop=0.3), KEY)
        plain, found, seen = (
            score({"self": params}, what, models={"self": one})
            for what, one in ((texts, model), (batch, blind), (batch, model))
        )
        names = {name: getattr(found, name) for name in ("logp", "entropy", "value")}
        return plain, untagged(batch_with(batch, names), tags=(30, 31)), found, seen

    plain, back, found, seen = compare(texts)
    for name in ("logp", "entropy", "value"):
        assert_allclose(getattr(back, name)[:, :9], getattr(plain, name), atol=1e-5, err_msg=name)
    assert np.abs(np.asarray(seen.logp - found.logp)).max() > 1e-2


def batch_with(batch, fields):
    """The batch with fields that move with its tokens."""

    @struct.dataclass
    class With(Sequences):
        logp: Array
        entropy: Array
        value: Array

    return With(batch.tokens, batch.mask, batch.segments, **fields)


def test_an_untagged_model_does_not_generate(model, params):
    blind = Untagged(model, tags=(30,))
    assert (blind.vocab, blind.context, blind.lm_head, blind.value_head) == (32, 1024, True, True)
    with pytest.raises(ValueError, match="reads whole texts and cannot generate"):
        blind.apply(params, jnp.ones((1, 1), jnp.int32), cache=model.empty_cache(1, 4))


# --- returns to go

LOW, MIDDLE, HIGH = 80, 81, 82
EDGES = (4.0, 6.0)
go = partial(compiled(returns_to_go.returns_to_go), edges=EDGES, tags=(LOW, MIDDLE, HIGH))


def test_before_every_masked_token_stands_what_is_still_to_be_earned():
    out = go(BATCH)
    # 1 + 2 + 3, 2 + 3, 3; 4 + 5, 5; 7 alone, since 6 was earned by a given token
    assert_array_equal(
        out.tokens,
        [
            [1, HIGH, 11, MIDDLE, 12, LOW, 2],
            [1, HIGH, 21, MIDDLE, 2, 0, 0],
            [1, 31, HIGH, 2, 0, 0, 0],
        ],
    )
    assert_array_equal(out.mask[0], [0, 0, 1, 0, 1, 0, 1])
    assert_array_equal(out.mask[2], [0, 0, 0, 1, 0, 0, 0])
    assert_array_equal(out.token_score[0], [0, 0, 1, 0, 2, 0, 3])
    assert_array_equal(out.segments[1], [1, 1, 1, 1, 1, 0, 0])


def test_what_was_not_chosen_earns_nothing():
    hole = jax.tree.map(lambda x: x[:1], BATCH)
    hole = hole.replace(mask=hole.mask.at[0, 2].set(False))  # its 2 is not the policy's
    assert_array_equal(go(hole).tokens, [[1, MIDDLE, 11, 12, LOW, 2, 0]])


def test_every_second_token_or_the_first_only():
    out = go(BATCH, KEY, every=2)
    assert_array_equal(out.tokens[0], [1, HIGH, 11, 12, LOW, 2])
    assert_array_equal(out.tokens[1], [1, HIGH, 21, 2, 0, 0])
    out = go(BATCH, KEY, every=None)
    assert_array_equal(out.tokens, [[1, HIGH, 11, 12, 2], [1, HIGH, 21, 2, 0], [1, 31, HIGH, 2, 0]])


def test_a_score_of_the_whole_text_is_earned_at_its_end():
    scored = BATCH.replace(score=jnp.array([7.0, 5.0, 0.0]))
    out = go(scored, KEY, reward=returns_to_go.at_the_end)
    assert_array_equal(out.tokens[:2, [1, 3]], [[HIGH, HIGH], [MIDDLE, MIDDLE]])
    assert out.tokens[2, 2] == LOW


def test_dropped_rows_have_no_returns_at_all():
    out = go(repeated(BATCH, 400), KEY, drop=0.5)
    tags = np.asarray((out.tokens >= 80).sum(1)).reshape(3, 400)
    assert_array_equal(np.sort(np.unique(tags[0])), [0, 3])
    assert_allclose((tags == 0).mean(), 0.5, atol=0.05)
    with pytest.raises(ValueError, match="every=0"):
        go(BATCH, KEY, every=0)


def twos():
    """Pays 1 for each 2, and puts a 3 behind every 1."""

    def reset(key, context):
        return jnp.int32(0), jnp.array([4, -1])

    def step(state, token, context):
        return state, jnp.array([3]), (token == 1).astype(jnp.int32), token == 2, False

    return Environment(reset, step, forced=1, prompt=2)


@pytest.mark.parametrize("every", [1, 2])
def test_sampling_on_request_writes_what_the_transform_would_have_written(every):
    model, n, length = toys.Table(9), 32, 5
    params = toys.markov(jnp.log(jnp.array([[0, 1, 1, 0, 0, 0, 0, 0, 0]] * 9) + 1e-9))
    asked = returns_to_go.on_request(
        twos(), request=3.0, edges=(0.5, 1.5, 2.5), tags=(5, 6, 7, 8), every=every
    )
    prompts = Prompts(
        jnp.zeros((n, 1), jnp.int32), jnp.ones(n, jnp.int32), jnp.arange(n), jnp.zeros(n, jnp.int32)
    )
    out = jax.jit(
        partial(generate, model=model, length=length, sampling=Sampling(), environment=asked)
    )(params, prompts, KEY)
    left = 3
    for row, mask in zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True):
        said, expected, left = row[mask], [4, 8], 3
        for i, token in enumerate(said, 1):
            left -= token == 2
            expected += (
                [int(token)] + [3] * int(token == 1) + [5 + max(int(left), 0)] * int(i % every == 0)
            )
        assert_array_equal(row[: len(expected)], expected)
    exact = np.asarray(out.earned.sum(1)) == 3  # those that earned just what was asked for
    assert exact.any()
    texts = Labeled(out.tokens, out.mask, out.segments, out.earned.sum(1), out.earned)
    plain = compiled(untagged)(texts, tags=(5, 6, 7, 8))
    again = compiled(returns_to_go.returns_to_go)(
        plain, edges=(0.5, 1.5, 2.5), tags=(5, 6, 7, 8), every=every
    )
    for row in np.flatnonzero(exact):
        end = int(np.asarray(out.mask[row]).nonzero()[0][-1]) + 1
        assert_array_equal(again.tokens[row, :end], out.tokens[row, :end])


def test_a_request_that_has_no_tag_is_refused():
    with pytest.raises(ValueError, match="2 tags need 1 edges"):
        returns_to_go.on_request(twos(), request=1.0, edges=(), tags=(5, 6))
    with pytest.raises(ValueError, match="every=0"):
        returns_to_go.on_request(twos(), request=1.0, edges=(0.0,), tags=(5, 6), every=0)


# --- filtering


def test_only_texts_that_score_enough_are_learned_from():
    out = compiled(selection.above)(BATCH, threshold=0.0)
    assert_array_equal(out.mask.any(1), [True, False, True])
    same(out.replace(mask=BATCH.mask), BATCH)


@pytest.mark.parametrize(
    ("scores", "share", "kept"),
    [
        ([0, 1, 2, 3, 4, 5], 0.5, [0, 0, 0, 1, 1, 1]),
        ([5, 4, 3, 2, 1, 0], 1 / 3, [1, 1, 0, 0, 0, 0]),
        ([0, 1, 1, 1, 1, 1], 0.5, [0, 1, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 1], 0.5, [0, 0, 0, 0, 0, 1]),
        ([2, 2, 2, 2, 2, 2], 0.5, [1, 1, 1, 1, 1, 1]),
        ([0, 1, 2, 3, 4, 5], 1.0, [1, 1, 1, 1, 1, 1]),
        ([0, 0, 1, 1, 2, 2], 0.9, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_best_share_is_kept_and_equals_together(scores, share, kept):
    batch = repeated(BATCH, 2).replace(score=jnp.array(scores, jnp.float32))
    assert_array_equal(compiled(selection.best_share)(batch, share=share).mask.any(1), kept)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="share=0"):
        selection.best_share(BATCH, KEY, share=0.0)


def test_prompts_whose_samples_all_earned_the_same_are_left_out():
    batch = jax.tree.map(jnp.asarray, toys.experience(rows=8, t=6))
    earned = jnp.array([1.0, 2.0, 0.7, 0.7, 3.0, 1.0, 5.0, 9.0])
    mask = batch.mask.at[7].set(False)  # a sibling that says nothing makes no difference
    batch = batch.replace(
        mask=mask,
        reward=jnp.where(mask, earned[:, None] / mask.sum(1, keepdims=True).clip(1), jnp.nan),
        prompt_id=jnp.array([3, 3, 1, 1, 3, 3, 2, 2]),
    )
    informative = compiled(selection.informative)
    out = informative(batch, tolerance=1e-5)
    assert_array_equal(out.mask.any(1), [1, 1, 0, 0, 1, 1, 0, 0])
    wide = informative(batch, tolerance=2.5)
    assert not wide.mask.any()
    exact = batch.replace(reward=masked.at_last(earned, mask))
    assert_array_equal(informative(exact).mask.any(1), [1, 1, 0, 0, 1, 1, 0, 0])


def test_the_place_of_a_tag_is_known_for_prompts_and_for_texts():
    assert_array_equal(after_start(PROMPTS), [0, 0])
    assert_array_equal(before_response(PROMPTS), [2, 0])
    assert_array_equal(before_response(BATCH), [0, 0, 1])
