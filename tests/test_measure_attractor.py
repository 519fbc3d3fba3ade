"""The attractor test: how texts go on after an injection, and what a perfect model would do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from rlhf_jax.measure import (
    Worlds,
    attraction,
    filter_predictions,
    forecast,
    inject,
    predicted_attraction,
    return_lags,
)
from rlhf_jax.study.statistics import kaplan_meier

CORE = Worlds()
LIKELY = Worlds(prior=(0.03, 0.03, 0.04, 0.9))  # the attractor's world is what is expected anyway
NEAR = Worlds(prior=(0.4, 0.28, 0.2, 0.1, 0.02), borrowed=((8, 9, 10, 12),))
LAGS = [0, 8, 16, 32]


def prompt(length, other=0, worlds=CORE):
    """Eight tokens of world 3, then `length` of another: the filter sees blocks, not tokens."""
    words = [12, 13, 14, 15] * 2 + [worlds.blocks[other][i % 4] for i in range(length)]
    return np.array([[worlds.bos, *words]])


@pytest.mark.parametrize(
    ("worlds", "length", "expected"),
    [
        (CORE, 1, (0.5258, 0.3825, 0.2874, 0.1825)),
        (CORE, 2, (0.0350, 0.0569, 0.0714, 0.0874)),
        (CORE, 4, (0.0052, 0.0371, 0.0583, 0.0816)),
        (LIKELY, 4, (0.0466, 0.3338, 0.5244, 0.7347)),
    ],
)
def test_the_world_comes_back_as_the_filter_says(worlds, length, expected):
    found = forecast(prompt(length), worlds)[0, LAGS, 3]
    assert_allclose(found, expected, atol=5e-5)
    # By hand: Bayes' rule in odds of e^3.610918 a token, a switch of .05 between any two tokens.
    prior, ratio = np.array(worlds.prior), 37.0
    ahead = prior
    for world in [3] * 8 + [0] * length:
        after = ahead * np.where(np.arange(4) == world, ratio, 1.0)
        ahead = 0.95 * after / after.sum() + 0.05 * prior
    by_hand = prior[3] + 0.95 ** np.array(LAGS) * (ahead[3] - prior[3])
    assert_allclose(found, by_hand, rtol=1e-12)


def test_the_share_of_tokens_is_nine_tenths_of_the_worlds_probability_and_a_fortieth():
    prompts = np.concatenate([prompt(4), prompt(4, other=2)])
    found = predicted_attraction(prompts, CORE, attractor=3, lags=20)
    world = forecast(prompts, CORE, lags=19)[..., 3].mean(axis=0)
    assert_allclose(found.share.value, 0.9 * world + 0.025, rtol=1e-12)


def continuations_of(prompts, worlds, length):
    """Every continuation and its probability by the chain rule of next-token predictions, [m]."""
    every = np.array(list(itertools.product(range(worlds.bos), repeat=length)))
    total = np.zeros(len(every))
    for row in prompts:
        tokens = np.concatenate([np.tile(row, (len(every), 1)), every], axis=1)
        p = np.ones(len(every))
        for start in range(0, len(every), 4096):
            part = tokens[start : start + 4096]
            ahead = filter_predictions(part, worlds)[:, len(row) :]
            taken = np.take_along_axis(ahead, part[:, len(row) :, None], axis=2)[..., 0]
            p[start : start + 4096] = taken.prod(axis=1)
        total += p / len(prompts)
    return every, total


def test_the_prediction_is_the_sum_over_all_continuations():
    worlds = Worlds(
        prior=(0.6, 0.4), block=1, noise=0.2, switch=0.1, segment=0.15, chat=0.2, code=0.05,
        answered=0.6, digits=1,
    )  # fmt: skip
    length, bos = 6, worlds.bos
    prompts = np.array(
        [[bos, 1, 1, 0], [bos, 1, 0, worlds.chat_id], [bos, 1, 1, worlds.segment_id]]
    )
    every, p = continuations_of(prompts, worlds, length)
    assert_allclose(p.sum(), 1)
    found = predicted_attraction(prompts, worlds, attractor=1, lags=length, early=(1, 4), within=3)
    lag, returned = return_lags(every, worlds, attractor=1)
    left = np.array([p[~returned | (lag > k)].sum() for k in range(length)])
    risk = np.concatenate([[1.0], left[:-1]])
    assert_allclose(found.survival, left, rtol=1e-12)
    assert_allclose(found.hazard.value, 1 - left / risk, atol=1e-12)
    assert_allclose(found.early.value, (risk - left)[1:5].sum() / risk[1:5].sum(), rtol=1e-12)
    assert_allclose(found.share.value, p @ (every == 1), rtol=1e-12)
    assert_allclose(found.segment.value, p[(every == worlds.segment_id)[:, :3].any(axis=1)].sum())
    assert found.segment.error == 0 and (found.hazard.error == 0).all()


# Ten lags of tokens of the attractor's block (12 … 15) and others; when is each row back?
EXAMPLES = [
    ([12, 13, 14, 0, 0, 0, 0, 0, 0, 0], 2),  # the earliest possible: three at once
    ([12, 13, 0, 14, 0, 0, 0, 0, 0, 0], 3),  # one of four may be another
    ([12, 0, 0, 13, 14, 0, 15, 0, 0, 0], 6),
    ([12, 13, 0, 0, 14, 15, 0, 0, 12, 13], 10),  # never three of four: not seen before lag 10
    ([0] * 10, 10),
    ([0, 0, 0, 0, 0, 0, 28, 15, 15, 15], 9),
]


def test_a_text_is_back_at_the_first_lag_with_three_of_the_last_four_tokens():
    tokens, expected = np.array([x for x, _ in EXAMPLES]), [lag for _, lag in EXAMPLES]
    lag, returned = return_lags(tokens, CORE, attractor=3)
    assert lag.tolist() == expected
    assert returned.tolist() == [x < 10 for x in expected]


def test_returns_shares_and_segments_of_a_worked_example():
    tokens = np.array([x for x, _ in EXAMPLES])
    tokens[4, 3] = CORE.segment_id
    found = attraction(tokens, CORE, attractor=3)
    assert_allclose(found.share.value[:4], [4 / 6, 3 / 6, 1 / 6, 2 / 6])
    assert_allclose(found.share.error[0], np.sqrt(4 / 6 * 2 / 6 / 6))
    assert found.hazard.n.tolist() == [6, 6, 6, 5, 4, 4, 4, 3, 3, 3]
    expected = np.zeros(10)
    expected[[2, 3, 6, 9]] = [1 / 6, 1 / 5, 1 / 4, 1 / 3]
    assert_allclose(found.hazard.value, expected)
    assert_allclose(found.early.value, 3 / (6 + 6 + 5 + 4 + 4 + 4 + 3 + 3))  # lags 1 … 8
    assert found.median == 6  # of six, three are back
    assert_allclose(found.segment.value, 1 / 6)  # row 4; the SEG of row 5 comes too late


def test_survival_is_kaplan_meiers_where_texts_end_early():
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((200, 16)) < 0.3, 12, 0)
    ends = rng.integers(4, 17, 200)
    mask = np.arange(16) < ends[:, None]
    tokens[~mask] = 12  # behind the end, of no consequence
    found = attraction(tokens, CORE, attractor=3, mask=mask)
    lag, returned = return_lags(tokens, CORE, attractor=3, mask=mask)
    assert 0 < returned.sum() < 200 and (lag[~returned] == ends[~returned]).all()
    # A text that ended unreturned was last at risk a lag before the first unseen one.
    survival = kaplan_meier(lag - ~returned, returned)
    assert_allclose(found.survival[survival.times.astype(int)], survival.survival, rtol=1e-12)
    assert found.median == survival.median
    assert (found.share.n == mask.sum(axis=0)).all()


def test_samples_of_the_process_return_as_predicted():
    worlds, n, lags = replace(CORE, switch=0.15, segment=0.05), 2000, 12
    start = np.repeat(prompt(1, worlds=worlds), n, axis=0)
    rng, ahead = np.random.default_rng(1), forecast(start[:1], worlds, lags=0)[0, 0]
    world = rng.choice(4, n, p=ahead)
    rows = np.zeros((n, lags), int)
    for t in range(lags):
        if t:
            anew = (rng.random(n) < worlds.switch) | (rows[:, t - 1] == worlds.segment_id)
            world = np.where(anew, rng.choice(4, n, p=worlds.prior), world)
        own = rng.random(n) > worlds.noise
        word = np.where(own, 4 * world + rng.integers(0, 4, n), rng.integers(0, 16, n))
        rows[:, t] = np.where(rng.random(n) < worlds.segment, worlds.segment_id, word)
    found = attraction(rows, worlds, attractor=3)
    exact = predicted_attraction(start[:1], worlds, attractor=3, lags=lags)
    assert (np.abs(found.share.value - exact.share.value) < 4 * found.share.error).all()
    assert abs(found.early.value - exact.early.value) < 4 * found.early.error
    assert abs(found.segment.value - exact.segment.value) < 4 * found.segment.error
    assert_allclose(exact.segment.value, 1 - 0.95**4)
    assert np.abs(found.survival - exact.survival).max() < 4 * 0.5 / np.sqrt(n)
    assert found.median == exact.median


def test_prompts_are_the_attractors_text_and_then_the_injected_one():
    found = inject(
        jax.random.key(0), CORE, 300, attractor=3, other=1, length=4, lead=5, before=(33, 34)
    )
    tokens = np.asarray(found.tokens)
    assert tokens.shape == (300, 1 + 2 + 5 + 4)
    assert (tokens[:, :3] == [CORE.bos, 33, 34]).all()
    assert set(tokens[:, 3:8].ravel()) == {12, 13, 14, 15}
    assert set(tokens[:, 8:].ravel()) == {4, 5, 6, 7}
    assert (np.asarray(found.length) == 12).all()
    assert np.asarray(found.prompt_id).tolist() == list(range(300))
    count = np.bincount(tokens[:, 8:].ravel())[4:8]
    assert scipy.stats.chisquare(count).pvalue > 1e-3


def test_noise_is_uniform_a_near_world_shares_tokens_and_nothing_may_be_injected():
    key = jax.random.key(1)
    noise = np.asarray(inject(key, CORE, 400, attractor=3, other=None, length=8).tokens)[:, 9:]
    assert scipy.stats.chisquare(np.bincount(noise.ravel(), minlength=16)).pvalue > 1e-3
    near = np.asarray(inject(key, NEAR, 50, attractor=3, other=4, length=8).tokens)[:, 9:]
    assert set(near.ravel()) == {8, 9, 10, 12}
    drawn = inject(key, CORE, 400, attractor=3, other=0, length=8, noisy=True).tokens
    lead, injected = np.asarray(drawn)[:, 1:9] // 4, np.asarray(drawn)[:, 9:] // 4
    assert_allclose([(lead == 3).mean(), (injected == 0).mean()], 0.925, atol=0.02)
    assert inject(key, CORE, 2, attractor=3, other=0, length=0).tokens.shape == (2, 9)


def test_a_near_world_holds_the_text_less_far_from_the_attractor():
    near, far = (np.array([prompt(2, other, NEAR)[0]]) for other in (4, 0))
    near[0, -2:] = [12, 8]  # of the near world's block, one of them the attractor's own
    assert forecast(near, NEAR)[0, 0, 3] > forecast(far, NEAR)[0, 0, 3]


def test_what_does_not_fit_is_said():
    key, tokens = jax.random.key(0), np.zeros((2, 5), int)
    with pytest.raises(ValueError, match="worlds are 0 … 3"):
        inject(key, CORE, 2, attractor=4, other=0, length=1)
    with pytest.raises(ValueError, match="0 or more"):
        inject(key, CORE, 2, attractor=3, other=0, length=-1)
    with pytest.raises(ValueError, match="without holes"):
        attraction(tokens, CORE, attractor=3, mask=np.array([[1, 0, 1, 1, 1]] * 2, bool))
    with pytest.raises(ValueError, match="both"):
        attraction(tokens[0], CORE, attractor=3)
    with pytest.raises(ValueError, match="first and the last lag"):
        attraction(tokens, CORE, attractor=3, early=(5, 2))
