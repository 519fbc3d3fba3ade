from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jaxtyping import Array, Float
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.conditioning import condition, tagged
from rlhf_jax.objectives import mle
from rlhf_jax.types import Labeled, Prompts, Scores

GOOD, BAD = 90, 91
BATCH = Labeled(
    tokens=jnp.array([[1, 11, 12, 2], [1, 21, 2, 0], [1, 31, 2, 0]]),
    mask=jnp.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]], bool),
    segments=jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]),
    score=jnp.array([0.5, -0.5, 0.0]),
    token_score=jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 4.0, 5.0, 0.0], [0.0, 6.0, 7.0, 0.0]]),
)
tag = partial(condition, threshold=0.0, good=GOOD, bad=BAD)


def test_the_control_token_stands_after_bos_and_everything_else_moves_right():
    out = jax.jit(partial(tag, drop=0.0))(BATCH, jax.random.key(0))
    assert_array_equal(out.tokens, [[1, GOOD, 11, 12, 2], [1, BAD, 21, 2, 0], [1, GOOD, 31, 2, 0]])
    assert_array_equal(out.mask, [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    assert_array_equal(out.segments, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    assert_array_equal(out.token_score[0], [0, 0, 1, 2, 3])
    assert_array_equal(out.score, BATCH.score)


def test_the_mask_never_covers_the_control_token():
    out = tag(BATCH, jax.random.key(0), drop=0.0)
    assert not out.mask[:, :2].any()
    assert_array_equal(out.mask.sum(1), BATCH.mask.sum(1))


def test_a_dropped_row_is_the_old_row_and_one_more_column_of_padding():
    out = tag(BATCH, jax.random.key(0), drop=1.0)
    assert_array_equal(out.tokens[:, :-1], BATCH.tokens)
    assert_array_equal(out.mask[:, :-1], BATCH.mask)
    assert_array_equal(out.token_score[:, :-1], BATCH.token_score)
    assert not out.mask[:, -1].any()
    assert not out.segments[:, -1].any()


def test_rows_are_dropped_independently_at_the_stated_rate_and_by_the_key_alone():
    n = 4000
    many = jax.tree.map(lambda x: jnp.repeat(x[:1], n, axis=0), BATCH)
    out = tag(many, jax.random.key(1), drop=0.25)
    dropped = np.asarray(out.segments[:, -1] == 0)
    assert_allclose(dropped.mean(), 0.25, atol=0.03)
    assert_array_equal(np.asarray(out.tokens[:, 1]) == GOOD, ~dropped)
    assert_array_equal(tag(many, jax.random.key(1), drop=0.25).tokens, out.tokens)
    assert (tag(many, jax.random.key(2), drop=0.25).tokens != out.tokens).any()


def test_extra_per_token_fields_of_a_subclass_move_with_their_tokens():
    @struct.dataclass
    class Marked(Labeled):
        mark: Float[Array, "b t"]
        gate: Float[Array, "b"]

    fields = {name: getattr(BATCH, name) for name in Labeled.__dataclass_fields__}
    batch = Marked(**fields, mark=BATCH.token_score * 2, gate=BATCH.score)
    out = tag(batch, jax.random.key(0), drop=0.0)
    assert isinstance(out, Marked)
    assert_array_equal(out.mark, 2 * out.token_score)
    assert_array_equal(out.gate, BATCH.score)


def test_a_row_without_text_stays_without():
    empty = jax.tree.map(jnp.zeros_like, BATCH)
    out = tag(empty, jax.random.key(0), drop=0.0)
    assert not out.segments.any()
    assert not out.mask.any()


def test_likelihood_under_the_transform_counts_the_same_tokens():
    out = tag(BATCH, jax.random.key(0), drop=0.0)
    before = mle(Scores(logp=-BATCH.tokens.astype(jnp.float32)), BATCH)
    after = mle(Scores(logp=-out.tokens.astype(jnp.float32)), out)
    assert (before.loss * before.weight).sum() == (after.loss * after.weight).sum()
    assert before.weight.sum() == after.weight.sum()


@pytest.mark.parametrize("which", [GOOD, jnp.array([GOOD, BAD])])
def test_prompts_are_tagged_for_generation(which):
    prompts = Prompts(
        tokens=jnp.array([[1, 5, 6], [1, 0, 0]]),
        length=jnp.array([3, 1]),
        prompt_id=jnp.array([4, 5]),
        sample_id=jnp.array([0, 0]),
    )
    out = tagged(prompts, which)
    second = GOOD if isinstance(which, int) else BAD
    assert_array_equal(out.tokens, [[1, GOOD, 5, 6], [1, second, 0, 0]])
    assert_array_equal(out.length, [4, 2])
    assert_array_equal(out.prompt_id, prompts.prompt_id)
