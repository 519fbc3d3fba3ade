"""Hidden worlds: the process, its exact filter, what of it a model's texts show, and a refit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.measure import (
    Worlds,
    beliefs,
    beliefs_in_jax,
    filter_predictions,
    filter_residual,
    model_predictions,
    refit,
    tokens_to_confidence,
    world_decomposition,
)

CORE = Worlds()
# Two worlds of two tokens, a third that borrows one from each; two digits, all signs.
TINY = Worlds(
    prior=(0.5, 0.3, 0.2),
    block=2,
    noise=0.2,
    switch=0.15,
    segment=0.1,
    chat=0.08,
    code=0.04,
    answered=0.7,
    digits=2,
    borrowed=((1, 2),),
)


@pytest.fixture(scope="module")
def texts():
    """2048 texts of 32 tokens of the core process."""
    batch = jax.jit(partial(CORE.draw, rows=2048, length=32))(jax.random.key(0))
    return np.asarray(batch.tokens), np.asarray(batch.mask)


def by_hidden_paths(tokens, worlds):
    """before, after and log p of one text after BOS: the sum over all paths of hidden worlds."""
    prior, many = np.array(worlds.prior), len(worlds.prior)

    def emitted(world, token, last):
        ordinary = {worlds.segment_id: worlds.segment, worlds.chat_id: worlds.chat}
        ordinary[worlds.code_id] = worlds.code
        spoken = 1 - worlds.segment - worlds.chat - worlds.code
        for word in range(worlds.surface):
            own = (word in worlds.blocks[world]) / len(worlds.blocks[world])
            ordinary[word] = spoken * ((1 - worlds.noise) * own + worlds.noise / worlds.surface)
        answer = worlds.answered if last in (worlds.chat_id, worlds.code_id) else 0.0
        digit = worlds.surface <= token < worlds.chat_id
        return (1 - answer) * ordinary.get(token, 0.0) + answer * digit / worlds.digits

    def moved(world, new, last):
        if last in (worlds.bos, worlds.segment_id):
            return prior[new]
        return (1 - worlds.switch) * (world == new) + worlds.switch * prior[new]

    joint, prefix = {(): 1.0}, 1.0  # of a path and the tokens so far
    before, after, logp = [], [], []
    for last, token in itertools.pairwise([worlds.bos, *tokens]):
        ahead = {
            (*path, new): p * moved(path[-1] if path else 0, new, last)
            for path, p in joint.items()
            for new in range(many)
        }
        joint = {path: p * emitted(path[-1], token, last) for path, p in ahead.items()}
        total = sum(joint.values())
        of_world = [sum(p for path, p in ahead.items() if path[-1] == w) for w in range(many)]
        before.append(np.array(of_world) / prefix)
        of_world = [sum(p for path, p in joint.items() if path[-1] == w) for w in range(many)]
        after.append(np.array(of_world) / total)
        logp.append(np.log(total / prefix))
        prefix = total
    return np.array(before), np.array(after), np.array(logp)


def test_the_numbers_of_the_default_process():
    odds = np.log(CORE.emission[0, 0] / CORE.emission[1, 0])
    assert_allclose(CORE.world_entropy, 1.279854, atol=5e-7)
    assert_allclose(CORE.token_entropy, 1.735075, atol=5e-7)
    assert_allclose(odds, 3.610918, atol=5e-7)
    assert_allclose(CORE.return_time(3), 200)
    assert_allclose(replace(CORE, prior=(0, 0, 0, 1)).return_time(3), 20)
    ids = (CORE.surface, CORE.chat_id, CORE.code_id, CORE.segment_id, CORE.bos, CORE.vocab)
    assert ids == (16, 26, 27, 28, 29, 30)


@pytest.mark.parametrize("segment", [0.0, 0.02])
def test_the_return_time_solves_the_chains_equations(segment):
    worlds = replace(CORE, segment=segment)
    prior, others = np.array(worlds.prior), [0, 1, 2]
    # A step redraws the world where it switches, or where a SEG ended the one before.
    moves = (1 - worlds.switch) * np.eye(4) + worlds.switch * prior
    moves = (1 - segment) * moves + segment * prior
    waits = np.linalg.solve(np.eye(3) - moves[np.ix_(others, others)], np.ones(3))
    assert_allclose(waits, worlds.return_time(3))


def test_the_filter_is_the_sum_over_hidden_paths():
    rng = np.random.default_rng(0)
    rows = [filtered_text(rng, 5) for _ in range(40)]
    found = beliefs(np.array([[TINY.bos, *row] for row in rows]), TINY)
    for i, row in enumerate(rows):
        before, after, logp = by_hidden_paths(row, TINY)
        assert_allclose(found.before[i, 1:], before, atol=1e-12)
        assert_allclose(found.after[i, 1:], after, atol=1e-12)
        assert_allclose(found.logp[i, 1:], logp, atol=1e-12)


def filtered_text(rng, length):
    """A random text that the process could say: digits only where one may be due."""
    text = [TINY.bos]
    for _ in range(length):
        asked = text[-1] in (TINY.chat_id, TINY.code_id)
        digits = range(TINY.surface, TINY.chat_id)
        allowed = [v for v in range(TINY.bos) if asked or v not in digits]
        text.append(int(rng.choice(allowed)))
    return text[1:]


def test_predictions_are_distributions_and_give_each_token_its_likelihood():
    every = np.array(list(itertools.product(range(TINY.bos), repeat=3)))
    tokens = np.pad(every, ((0, 0), (1, 0)), constant_values=TINY.bos)
    found, p = beliefs(tokens, TINY), filter_predictions(tokens, TINY)
    assert_allclose(p.sum(axis=2), 1, rtol=1e-12)
    taken = np.take_along_axis(p, tokens[..., None], axis=2)[..., 0]
    assert_allclose(np.exp(found.logp[:, 1:]), taken[:, 1:], atol=1e-12)
    assert_allclose(np.exp(found.logp.sum(axis=1)).sum(), 1, rtol=1e-12)


def test_drawn_texts_have_the_frequencies_of_the_filter():
    n, length = 60_000, 3
    drawn, world = jax.jit(partial(TINY.sample, rows=n, length=length))(jax.random.key(1))
    drawn, world = np.asarray(drawn), np.asarray(world)
    every = np.array(list(itertools.product(range(TINY.bos), repeat=length)))
    tokens = np.pad(every, ((0, 0), (1, 0)), constant_values=TINY.bos)
    found = beliefs(tokens, TINY)
    p = np.exp(found.logp.sum(axis=1))
    place = np.ravel_multi_index(drawn[:, 1:].T, (TINY.bos,) * length)
    count = np.bincount(place, minlength=len(p))
    assert count[p == 0].sum() == 0
    z = (count - n * p)[p > 0] / np.sqrt(n * p)[p > 0]
    assert np.abs(z[(n * p)[p > 0] > 20]).max() < 4.5
    assert_allclose((z**2).mean(), 1, atol=0.2)
    # The worlds that were hidden are as probable as the posterior says.
    for at in range(1, length + 1):
        believed = found.after[place, at]
        gap = (world[:, at, None] == np.arange(3)) - believed
        assert (np.abs(gap.mean(axis=0)) < 4.5 * gap.std(axis=0) / np.sqrt(n)).all()
        sure = believed.max(axis=1) > 0.8
        assert_allclose(gap[sure].mean(axis=0), 0, atol=0.015)


def test_rows_start_with_bos_outside_the_mask_and_the_score_is_the_share_of_a_world():
    draw = jax.jit(jax.vmap(partial(TINY.draw, rows=6, length=9, rewarded=2)))
    batch = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 3)))
    assert batch.tokens.shape == (3, 6, 10)
    assert (batch.tokens[..., 0] == TINY.bos).all() and (batch.tokens[..., 1:] < TINY.bos).all()
    assert (batch.mask == (np.arange(10) > 0)).all()
    assert len(np.unique(batch.tokens.reshape(18, 10), axis=0)) == 18
    marks = np.isin(batch.tokens, [1, 2])
    assert_allclose(batch.token_score, marks)
    assert_allclose(batch.score, marks.mean(axis=2) * 10 / 9, rtol=1e-6)


def exact_cross_entropy(most):
    """H(Y_t | Y_<t), t = 1 … most, of the core process, and a lower bound of all later ones.

    Within a block all tokens are alike, so 4^t texts of blocks are enough. Conditional entropies
    fall with t, and knowing the first world bounds them from below (Cover & Thomas, 4.5.1).
    """
    prior, mixing = np.array(CORE.prior), np.full((4, 4), CORE.noise / 4)
    mixing += (1 - CORE.noise) * np.eye(4)
    found, least = [], 0.0
    for start in [None, *range(4)]:
        joint, past = (prior if start is None else np.eye(4)[start])[None], 0.0
        for t in range(most):
            if t:
                joint = 0.95 * joint + 0.05 * prior * joint.sum(axis=1, keepdims=True)
            joint = (joint[:, None] * mixing.T).reshape(-1, 4)
            p = joint.sum(axis=1)
            now = -(p * np.log(p)).sum()
            if start is None:
                found.append(now - past + np.log(4))
            elif t == most - 1:
                least += prior[start] * (now - past + np.log(4))
            past = now
    return np.array(found), least


def test_the_cross_entropy_of_the_filter_is_the_entropy_of_the_process(texts):
    exact, least = exact_cross_entropy(8)
    assert 0 < exact[-1] - least < 1e-3
    tokens, _ = texts
    p = filter_predictions(tokens, CORE)[:, 1:]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=2)
    error = entropy.std(axis=0) / np.sqrt(len(p))
    assert (np.abs(entropy.mean(axis=0)[:8] - exact) < 4 * error[:8] + 1e-12).all()
    per_text = -beliefs(tokens, CORE).logp[:, 1:].mean(axis=1)
    for length, rounded in ((32, 1.931), (64, 1.9163)):
        low, high = [(exact.sum() + (length - 8) * x) / length for x in (least, exact[-1])]
        assert low - 1e-4 < rounded < high + 1e-4
        if length == 32:
            assert low - 4 * per_text.std() / np.sqrt(2048) < per_text.mean()
            assert per_text.mean() < high + 4 * per_text.std() / np.sqrt(2048)


def test_the_filter_in_jax_is_the_filter():
    rows = [filtered_text(np.random.default_rng(i), 20) for i in range(32)]
    tokens = np.pad(rows, ((0, 0), (1, 0)), constant_values=TINY.bos)
    before, after = jax.jit(partial(beliefs_in_jax, worlds=TINY))(jnp.asarray(tokens))
    exact = beliefs(tokens, TINY)
    assert_allclose(before, exact.before, atol=2e-6)
    assert_allclose(after, exact.after, atol=2e-6)


def test_control_tokens_and_impossible_ones_tell_nothing_and_bos_starts_anew():
    silent = replace(TINY, chat=0.0, code=0.0, segment=0.0, switch=0.0)
    control, digit = silent.vocab + 3, silent.surface
    found = beliefs(np.array([[silent.bos, control, 0, digit, 0, silent.bos, 3]]), silent)
    assert_allclose(found.after[0, 1], silent.prior)
    assert_allclose(found.after[0, 3], found.after[0, 2])
    assert found.logp[0, 1] == -np.inf and found.logp[0, 3] == -np.inf
    assert found.logp[0, 0] == 0 and found.logp[0, 5] == 0
    assert_allclose(found.before[0, 6], silent.prior)
    certain = replace(silent, prior=(1.0, 0.0, 0.0), noise=0.0)
    found = beliefs(np.array([[certain.bos, 3, 0]]), certain)
    assert found.logp[0, 1] == -np.inf
    assert_allclose(found.after[0], [[1, 0, 0]] * 3)


def test_the_decomposition_finds_the_generator(texts):
    tokens, mask = texts
    found = world_decomposition(tokens, mask, CORE)
    expected = {
        "world_entropy": CORE.world_entropy,
        "given_world": CORE.token_entropy,
        "in_block": np.log(4),
        "information": 2.687481 - CORE.token_entropy,
    }
    for name, value in expected.items():
        estimate = getattr(found, name)
        assert abs(estimate.value - value) < 4 * estimate.error + 1e-4, name  # plug-in: n = 65536
        assert estimate.n == 2048
    assert (np.abs(found.share.value - CORE.prior) < 4 * found.share.error).all()
    assert_allclose(found.token_entropy.value, found.information.value + found.given_world.value)


def test_a_perfect_models_distributions_leave_nothing_to_chance_but_the_world(texts):
    tokens, mask = texts
    found = world_decomposition(tokens, mask, CORE, next_token=filter_predictions(tokens, CORE))
    assert_allclose(found.given_world.value, CORE.token_entropy, rtol=1e-12)
    assert_allclose(found.in_block_next.value, np.log(4), rtol=1e-12)
    assert abs(found.rate.value - 1.9312) < 4 * found.rate.error
    assert_allclose(found.text_information.value, found.rate.value - CORE.token_entropy, rtol=1e-9)
    counted = world_decomposition(tokens, mask, CORE)
    assert found.world_entropy.error < counted.world_entropy.error
    assert abs(found.world_entropy.value - CORE.world_entropy) < 4 * found.world_entropy.error


def test_the_errors_are_the_spread_between_samples():
    draw = jax.jit(jax.vmap(partial(CORE.draw, rows=128, length=16)))
    drawn = draw(jax.random.split(jax.random.key(4), 100))
    tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.mask)
    found = [world_decomposition(*x, CORE) for x in zip(tokens, mask, strict=True)]
    for name in ("world_entropy", "given_world", "information", "confidence"):
        values = [getattr(x, name).value for x in found]
        said = np.mean([getattr(x, name).error for x in found])
        assert_allclose(said, np.std(values, ddof=1), rtol=0.25)


def test_in_block_entropy_tells_who_says_only_some_tokens_or_says_them_in_a_fixed_order():
    rows = np.tile([12, 13, 14, 15], (8, 4))
    cycle = np.pad(rows, ((0, 0), (1, 0)), constant_values=CORE.bos)
    mask = np.arange(17) > 0
    mask = np.tile(mask, (8, 1))
    certain = np.eye(CORE.vocab)[cycle]
    found = world_decomposition(cycle, mask, CORE, next_token=certain)
    assert_allclose(found.in_block.value, np.log(4))
    assert_allclose(found.in_block_next.value, 0, atol=1e-12)
    assert_allclose(found.rate.value, 0, atol=1e-12)
    half = np.where(cycle == 14, 12, np.where(cycle == 15, 13, cycle))
    found = world_decomposition(half, mask, CORE)
    assert_allclose(found.in_block.value, np.log(2))
    assert found.world_entropy.value < 0.12  # 16 tokens of one world each
    assert_allclose(found.confidence.value, 2)  # .80 after one token of the rarest world, then .99
    assert found.confidence.error == 0


def test_what_is_outside_the_mask_informs_but_does_not_count(texts):
    tokens, mask = texts[0][:64], texts[1][:64].copy()
    mask[:, :10] = False
    behind = np.concatenate([tokens, np.full((64, 5), 15)], axis=1)
    padded = np.pad(mask, ((0, 0), (0, 5)))
    a, b = (world_decomposition(*x, CORE) for x in ((tokens, mask), (behind, padded)))
    assert a.world_entropy == b.world_entropy and a.confidence == b.confidence
    alone = world_decomposition(tokens[:, 10:], mask[:, 10:], CORE)
    assert a.confidence.value < alone.confidence.value


def test_texts_that_never_become_sure_are_censored_at_their_length():
    posterior = np.array([[[0.5, 0.5]] * 4, [[0.5, 0.5], [0.6, 0.4], [0.05, 0.95], [0.5, 0.5]]])
    mask = np.array([[False, True, True, True]] * 2)
    tokens, reached = tokens_to_confidence(posterior, mask)
    assert tokens.tolist() == [3, 2] and reached.tolist() == [False, True]


SHIFTED = Worlds(prior=(0.03, 0.03, 0.04, 0.9), noise=0.05, switch=0.08)


def test_a_refit_recovers_the_worlds_behind_a_perfect_model(texts):
    tokens, mask = texts[0][:64], texts[1][:64]
    found = refit(filter_predictions(tokens, SHIFTED), tokens, mask, CORE)
    assert_allclose(found.worlds.prior, SHIFTED.prior, atol=1e-3)
    assert_allclose((found.worlds.switch, found.worlds.noise), (0.08, 0.05), atol=1e-3)
    assert abs(found.residual.kl.value) < 1e-8 and found.start.kl.value > 0.1
    assert found.residual.outside == 0 and np.isnan(found.residual.by_position[0])
    assert_allclose(found.residual.by_position[1:], 0, atol=1e-7)


def test_a_refit_recovers_signs_and_worlds_that_borrow():
    start = replace(
        TINY, prior=(1 / 3, 1 / 3, 1 / 3), noise=0.5, switch=0.5, segment=0.0, answered=1.0
    )
    rows = [filtered_text(np.random.default_rng(i), 16) for i in range(64)]
    tokens = np.pad(rows, ((0, 0), (1, 0)), constant_values=TINY.bos)
    found = refit(filter_predictions(tokens, TINY), tokens, tokens != TINY.bos, start).worlds
    assert_allclose(found.prior, TINY.prior, atol=1e-3)
    for name in ("noise", "switch", "segment", "chat", "code", "answered"):
        assert_allclose(getattr(found, name), getattr(TINY, name), atol=1e-3, err_msg=name)


def test_a_model_that_is_no_filter_leaves_a_residual(texts):
    tokens, mask = texts[0][:64], texts[1][:64]
    half = (filter_predictions(tokens, CORE) + filter_predictions(tokens, SHIFTED)) / 2
    found = refit(half, tokens, mask, CORE)
    least = found.residual.kl.value
    assert 1e-3 < least < found.start.kl.value
    # A better fit than any of the two it is made of, and than its neighbours.
    near = {"noise": found.worlds.noise * 1.1, "switch": found.worlds.switch * 1.1}
    for other in (CORE, SHIFTED, *(replace(found.worlds, **{k: v}) for k, v in near.items())):
        assert filter_residual(half, tokens, mask, other).kl.value > least
    lost = 0.9 * half
    lost[..., CORE.bos] += 0.1
    found, whole = (filter_residual(x, tokens, mask, CORE) for x in (lost, half))
    assert_allclose(found.outside, 0.1)
    assert_allclose(found.kl, whole.kl)


def test_a_models_predictions_stand_at_the_token_they_speak_of(model, params):
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (4, 7), 0, model.vocab))
    p = model_predictions(params, tokens, model=model, rows=2)
    assert_allclose(p[:, 1:].sum(axis=2), 1, rtol=1e-12)
    assert (p[:, 0] == 0).all()
    cold = model_predictions(params, tokens, model=model, rows=2, temperature=0.5)
    assert_allclose(cold[:, 1:], (p**2 / (p**2).sum(2, keepdims=True, initial=1e-300))[:, 1:])
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % model.vocab
    other = model_predictions(params, changed, model=model, rows=2)
    same = np.isclose(p, other, atol=1e-6).all(axis=(0, 2))
    assert same.tolist() == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prior": (0.5, 0.4)}, "sum to 1"),
        ({"noise": 1.5}, "probabilities"),
        ({"segment": 0.6, "chat": 0.4}, "leave room"),
        ({"borrowed": ((0,), (1,), (2,), (3,))}, "needs tokens of its own"),
        ({"borrowed": ((99,),)}, "surface tokens 0 … 11"),
        ({"digits": 0, "chat": 0.1}, "answered=0"),
    ],
)
def test_worlds_that_cannot_be_say_why(wrong, said):
    with pytest.raises(ValueError, match=said):
        Worlds(**wrong)


def test_measures_say_what_does_not_fit(texts):
    tokens, mask = texts[0][:4], texts[1][:4]
    with pytest.raises(ValueError, match="no masked token"):
        world_decomposition(tokens, np.zeros_like(mask), CORE)
    with pytest.raises(ValueError, match="are both"):
        world_decomposition(tokens, mask[:, 1:], CORE)
    with pytest.raises(ValueError, match="next_token is"):
        world_decomposition(tokens, mask, CORE, next_token=np.ones((4, 3, 30)))
    p = filter_predictions(tokens, CORE)
    with pytest.raises(ValueError, match="sum to 1"):
        refit(np.log(p + 1e-9), tokens, mask, CORE)
    with pytest.raises(ValueError, match="v ≥ 30"):
        refit(p[..., :20], tokens, mask, CORE)
    with pytest.raises(ValueError, match="no masked token"):
        refit(p, tokens, np.zeros_like(mask), CORE)
