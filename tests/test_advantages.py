from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from reference import gae_loop, import_rlax

from rlhf_jax.advantages import (
    centred,
    gae,
    group_relative,
    leave_one_out,
    reward_to_go,
    whitened,
)

EVERY = {
    "gae": gae,
    "reward_to_go": reward_to_go,
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "whitened gae": partial(whitened, advantage=gae),
    "centred reward_to_go": partial(centred, advantage=reward_to_go),
}
MASK = np.array(
    [
        [0, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 0, 1, 1, 0, 1],  # holes
        [0, 0, 0, 0, 0, 0, 0, 0],  # nothing was said
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 1, 1],
    ],
    bool,
)
RNG = np.random.default_rng(0)
REWARD = np.where(MASK, RNG.normal(size=MASK.shape), 0.0).astype(np.float32)
VALUE = RNG.normal(size=MASK.shape).astype(np.float32)
PROMPT = np.array([7, 3, 7, 3, 7])


def run(fn, reward=REWARD, value=VALUE, mask=MASK, prompt_id=PROMPT, **options):
    arrays = [jnp.asarray(x) for x in (reward, value, mask, prompt_id)]
    return [np.asarray(x) for x in jax.jit(partial(fn, **options))(*arrays)]


def expected_gae(discount, trace):
    rows = [gae_loop(r, v, m, discount, trace) for r, v, m in zip(REWARD, VALUE, MASK, strict=True)]
    return [np.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_gae_agrees_with_a_float64_loop_that_knows_no_holes(discount, trace):
    got = run(gae, discount=discount, trace=trace)
    for ours, loop in zip(got, expected_gae(discount, trace), strict=True):
        assert_allclose(ours, loop, rtol=1e-5, atol=1e-6)


def test_gae_agrees_with_rlax():
    rlax = import_rlax()
    everywhere = np.ones_like(MASK)
    reward = RNG.normal(size=MASK.shape).astype(np.float32)
    advantage, target = run(gae, reward=reward, mask=everywhere, discount=0.9, trace=0.8)
    for row in range(len(MASK)):
        theirs = rlax.truncated_generalized_advantage_estimation(
            jnp.asarray(reward[row]),
            jnp.full(MASK.shape[1], 0.9),
            0.8,
            jnp.append(jnp.asarray(VALUE[row]), 0.0),
        )
        assert_allclose(advantage[row], theirs, rtol=1e-5, atol=1e-6)
    assert_allclose(target, advantage + VALUE, rtol=1e-6)


def test_a_hole_in_the_mask_costs_no_time():
    together, apart = [0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]
    reward, value = np.zeros((2, 6), np.float32), np.zeros((2, 6), np.float32)
    mask = np.array([together, apart], bool)
    for i, name in enumerate((reward, value)):
        name[mask] = np.tile([1.0, 2.0, -3.0], 2) + i
    advantage, target = run(gae, reward, value, mask, np.arange(2), discount=0.9, trace=0.7)
    assert_allclose(advantage[0][mask[0]], advantage[1][mask[1]], rtol=1e-6)
    assert_allclose(target[0][mask[0]], target[1][mask[1]], rtol=1e-6)


def test_a_score_after_a_hole_reaches_the_tokens_before_it():
    mask = np.array([[False, True, False, False, True]])
    reward = np.array([[0, 0, 0, 0, 1.0]], np.float32)
    advantage, _ = run(gae, reward, np.zeros_like(reward), mask, np.zeros(1, int), trace=0.5)
    assert_array_equal(advantage, [[0, 0.5, 0, 0, 1.0]])


def test_the_value_after_the_end_is_0():
    mask = np.array([[False, True, False]])
    value = np.array([[9.0, 2.0, 100.0]], np.float32)
    advantage, target = run(gae, np.zeros_like(value), value, mask, np.zeros(1, int))
    assert_array_equal(advantage, [[0, -2.0, 0]])
    assert_array_equal(target, [[0, 0.0, 0]])


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_reward_to_go_is_the_discounted_sum_of_what_follows(discount):
    advantage, target = run(reward_to_go, discount=discount)
    for row in range(len(MASK)):
        kept = np.flatnonzero(MASK[row])
        r = REWARD[row, kept].astype(np.float64)
        go = [sum(discount**k * x for k, x in enumerate(r[i:])) for i in range(len(r))]
        assert_allclose(target[row, kept], go, rtol=1e-5, atol=1e-6)
        assert_allclose(advantage[row, kept], go - VALUE[row, kept], rtol=1e-5, atol=1e-6)


def test_group_relative_by_hand():
    # prompt 7: rows 0 and 4, for row 2 said nothing; prompt 3: rows 1 and 3
    total = REWARD.sum(1)
    advantage, target = run(group_relative, epsilon=0.5)
    for a, b in ((0, 4), (1, 3)):
        half = (total[a] - total[b]) / 2
        for row, sign in ((a, 1), (b, -1)):
            expected = sign * half / (abs(half) + 0.5)
            assert_allclose(advantage[row][MASK[row]], expected, rtol=1e-5)
    assert_allclose(target, run(reward_to_go, value=np.zeros_like(VALUE))[1], rtol=1e-6)


def test_groups_are_found_by_prompt_in_any_order():
    mask = np.ones((6, 2), bool)
    reward = np.zeros((6, 2), np.float32)
    reward[:, 1] = [1.0, 10.0, 2.0, 20.0, 6.0, 60.0]
    prompt = np.array([5, 8, 5, 8, 5, 8])
    advantage, _ = run(leave_one_out, reward, np.zeros_like(reward), mask, prompt)
    assert_allclose(advantage[:, 0], [-3.0, -30.0, -1.5, -15.0, 4.5, 45.0], rtol=1e-6)
    relative, _ = run(group_relative, reward, np.zeros_like(reward), mask, prompt, epsilon=0.0)
    three = np.array([1.0, 2.0, 6.0])
    assert_allclose(relative[::2, 0], (three - three.mean()) / three.std(), rtol=1e-5)
    assert_allclose(relative[1::2, 0], relative[::2, 0], rtol=1e-5)


def test_a_prompt_whose_samples_earn_the_same_teaches_exactly_nothing():
    prompt = np.repeat(np.arange(5), 7)
    mask = np.ones((35, 1), bool)
    # seven times 0.1, divided by seven, is not 0.1 in float32
    reward = np.repeat(np.float32([0.1, 0.3, 0.7, 0.9, 1.0]), 7)[:, None]
    for fn in (group_relative, leave_one_out):
        assert_array_equal(run(fn, reward, reward, mask, prompt)[0], 0.0)


def test_a_sample_without_siblings_teaches_nothing():
    mask = np.ones((2, 2), bool)
    for fn in (group_relative, leave_one_out):
        assert_array_equal(run(fn, REWARD[:2, :2], VALUE[:2, :2], mask, np.arange(2))[0], 0.0)


def test_whitening_changes_the_advantage_and_not_the_target():
    plain, plain_target = run(gae, trace=0.5)
    white, target = run(whitened, advantage=partial(gae, trace=0.5))
    kept = plain[MASK]
    assert_allclose(white[MASK], (kept - kept.mean()) / kept.std(), rtol=1e-4, atol=1e-5)
    assert_array_equal(target, plain_target)
    spread, _ = run(whitened, advantage=partial(gae, trace=0.5), shift_mean=False)
    assert_allclose(spread[MASK], kept / kept.std(), atol=0.5)
    assert_allclose(spread[MASK].mean(), kept.mean(), rtol=1e-4)


def test_centring_takes_off_the_mean_of_those_who_said_something_at_that_position():
    plain, plain_target = run(reward_to_go)
    found, target = run(centred, advantage=reward_to_go)
    for t in range(MASK.shape[1]):
        kept = plain[MASK[:, t], t]
        assert_allclose(found[MASK[:, t], t], kept - kept.mean() if len(kept) else [], atol=1e-6)
    assert_array_equal(target, plain_target)


@pytest.mark.parametrize("name", EVERY)
def test_zero_outside_the_mask_and_masked_nan_touches_nothing_in(name):
    clean = run(EVERY[name])
    spoilt = run(
        EVERY[name],
        reward=np.where(MASK, REWARD, np.nan),
        value=np.where(MASK, VALUE, np.nan),
    )
    for one, other in zip(clean, spoilt, strict=True):
        assert one.dtype == np.float32
        assert_array_equal(one, other)
        assert_array_equal(one[~MASK], 0.0)


@pytest.mark.parametrize("name", EVERY)
def test_row_order_and_padding_do_not_matter_to(name):
    clean = run(EVERY[name])
    order = np.array([3, 0, 4, 2, 1])
    wide = [np.pad(x[order], ((0, 0), (0, 3))) for x in (REWARD, VALUE, MASK)]
    for one, other in zip(clean, run(EVERY[name], *wide, PROMPT[order]), strict=True):
        assert_allclose(other[:, : MASK.shape[1]], one[order], rtol=1e-5, atol=1e-6)
        assert_array_equal(other[:, MASK.shape[1] :], 0.0)


def test_every_advantage_takes_the_same_arguments():
    arguments = {"reward": REWARD, "value": VALUE, "mask": MASK, "prompt_id": PROMPT}
    arguments = {name: jnp.asarray(x) for name, x in arguments.items()}
    for fn in EVERY.values():
        advantage, target = fn(**arguments)
        assert advantage.shape == target.shape == MASK.shape
