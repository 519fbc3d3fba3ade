"""Sampling: what is drawn, what is recorded of it, and what cannot change it."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling, filtered, log_probabilities
from rlhf_jax.score import score
from rlhf_jax.types import Prompts

LENGTH = 8
NEVER = -1  # as a stop or banned id: no such token, so nothing stops, nothing is banned


def sampling(temperature=1.0, top_k=0, top_p=1.0, stop=(NEVER, NEVER), banned=(NEVER, NEVER)):
    return Sampling(temperature, top_k, top_p, stop, banned)


def prompts_of(rows=16, seed=0, first=0):
    """Prompts of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 5, rows).astype(np.int32)
    length[:2] = 1, 4
    tokens = np.where(np.arange(4) < length[:, None], rng.integers(1, 32, (rows, 4)), 0)
    prompt_id, sample_id = np.divmod(first + np.arange(rows, dtype=np.int32), 2)
    return Prompts(tokens.astype(np.int32), length, prompt_id, sample_id)


@pytest.fixture(scope="module")
def sample(model):
    """The one compiled sampler of these tests: tracing it twice is an error."""

    @chex.assert_max_traces(n=1)
    def once(params, prompts, key, sampling):
        return generate(params, prompts, key, model=model, length=LENGTH, sampling=sampling)

    compiled = jax.jit(once)

    def run(params, prompts, seed, sampling):
        return jax.device_get(compiled(params, prompts, jax.random.key(seed), sampling))

    return run


@pytest.fixture(scope="module")
def rescore(model):
    """The trainer's logp, and its whole distribution at every place, at the rollout's heat."""

    def scored(params, rollout):
        hidden = model.apply(params, rollout.tokens, segments=rollout.segments).hidden
        before = model.logits(params, hidden[:, :-1])
        b, t, v = before.shape
        every = log_probabilities(before.reshape(-1, v), jnp.repeat(rollout.temperature, t))
        own = score({"self": params}, rollout, models={"self": model}).logp
        return own, jnp.pad(every.reshape(b, t, v), ((0, 0), (1, 0), (0, 0)))

    return jax.jit(scored)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_sampler_and_the_trainer_agree_on_logp(sample, rescore, params, temperature, top_p):
    rollout = sample(params, prompts_of(), 0, sampling(temperature, top_p=top_p, stop=(5, 9)))
    logp, _ = rescore(params, rollout)
    assert_allclose(rollout.logp, logp, atol=1e-4)
    assert rollout.mask.sum() > 60 and (rollout.logp[rollout.mask] < 0).all()
    assert (rollout.temperature == np.float32(temperature)).all()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_float64_samples_and_scores_alike(model, params, scan):
    """With JAX_ENABLE_X64 a loop's counter has 64 bits, and an index of a cache 32."""
    double = replace(model, dtype="float64", scan=scan)
    own = toys.stacked(params, model.layers) if scan else params
    with jax.enable_x64(True):
        key, given = jax.random.key(3), sampling()
        found = generate(own, prompts_of(), key, model=double, length=LENGTH, sampling=given)
        hidden = double.apply(own, found.tokens, segments=found.segments).hidden
        logp = jax.nn.log_softmax(double.logits(own, hidden[:, :-1]))
        logp = jnp.take_along_axis(logp, found.tokens[:, 1:, None], axis=-1)[..., 0]
    assert hidden.dtype == jnp.float64 and found.mask.sum() > 50
    assert_allclose(found.logp[:, 1:], np.where(found.mask[:, 1:], logp, 0), atol=1e-6)


def test_behaviour_logp_is_the_filter_applied_to_the_trainers_distribution(sample, rescore, params):
    """Except at tokens within 1e-4 of the cut, where rounding decides; these are few."""
    cut, tokens = 0, 0
    refilter = jax.jit(filtered)
    for seed, settings in enumerate(
        [
            sampling(0.7, top_p=0.9),
            sampling(1.0, top_p=0.6, banned=(3, 4)),
            sampling(1.3, top_k=5),
            sampling(1.0, top_k=9, top_p=0.8),
        ]
    ):
        rollout = sample(params, prompts_of(seed=seed), seed, settings)
        _, every = (np.asarray(x) for x in rescore(params, rollout))
        at = np.nonzero(rollout.mask)
        again = np.asarray(refilter(every[at], settings))
        again = np.take_along_axis(again, rollout.tokens[at][:, None], axis=1)[:, 0]
        near = close_to_the_cut(every[at], settings, 1e-4)
        off = np.abs(again - rollout.behaviour_logp[at]) > 1e-4
        assert not (off & ~near).any(), f"{(off & ~near).sum()} differ far from the cut: {settings}"
        assert (again[~near] >= rollout.logp[at][~near] - 1e-4).all()
        cut, tokens = cut + near.sum(), tokens + len(near)
    assert cut <= 0.02 * tokens, f"{cut} of {tokens} tokens were within 1e-4 of the cut"


def close_to_the_cut(logp, settings, width):
    """Rows [n] whose top-k or top-p decision could flip by a change of `width`."""
    order = np.array(logp, np.float64)
    for token in settings.banned:
        if token >= 0:
            order[:, token] = -np.inf
    order = -np.sort(-order, axis=1)
    k = settings.top_k or order.shape[1]
    near = np.zeros(len(order), bool)
    if k < order.shape[1]:
        near |= np.abs(order[:, k - 1] - order[:, k]) < width
    p = np.exp(order[:, :k])
    before = np.cumsum(p / p.sum(1, keepdims=True), axis=1)
    if settings.top_p < 1:
        near |= (np.abs(before - settings.top_p) < width).any(1)
    return near


def test_a_sample_depends_on_its_prompt_and_its_name_not_on_batch_or_place(sample, model, params):
    settings = sampling(0.9, top_p=0.95, stop=(5, 9))
    whole = sample(params, prompts_of(), 0, settings)

    def rows(tree, order):
        return jax.tree.map(lambda x: np.asarray(x)[order], tree)

    order = np.random.default_rng(0).permutation(16)
    shuffled = sample(params, rows(prompts_of(), order), 0, settings)
    assert_array_equal(shuffled.tokens, whole.tokens[order])
    assert_array_equal(shuffled.mask, whole.mask[order])

    strangers = jax.tree.map(
        lambda a, b: np.concatenate([a[8:], b[8:]]), prompts_of(), prompts_of(seed=5, first=40)
    )
    assert_array_equal(sample(params, strangers, 0, settings).tokens[:8], whole.tokens[8:])

    half = jax.jit(partial(generate, model=model, length=LENGTH))
    for part in (np.arange(8), np.arange(8, 16)):
        found = half(params, rows(prompts_of(), part), jax.random.key(0), sampling=settings)
        assert_array_equal(found.tokens, whole.tokens[part])
        assert_allclose(found.logp, whole.logp[part], atol=1e-5)


def test_samples_of_one_prompt_differ_and_so_do_phases_but_a_key_repeats(sample, params):
    same = jax.tree.map(lambda x: np.repeat(x[1:2], 16, axis=0), prompts_of())
    same = same.replace(sample_id=np.arange(16, dtype=np.int32))
    first = sample(params, same, 0, sampling())
    assert len({tuple(row) for row in first.tokens}) == 16
    again, other = (sample(params, same, seed, sampling()) for seed in (0, 1))
    jax.tree.map(assert_array_equal, again, first)
    assert (other.tokens != first.tokens).any(axis=1).all()


def test_banned_tokens_are_never_drawn_and_their_mass_goes_to_the_others(sample, params):
    free = sample(params, prompts_of(), 3, sampling(2.0))
    common = [i for i, _ in Counter(free.tokens[free.mask].tolist()).most_common(2)]
    for settings in (
        sampling(2.0, banned=tuple(common)),
        sampling(2.0, banned=tuple(common), top_k=4),
    ):
        rollout = sample(params, prompts_of(), 3, settings)
        assert not np.isin(rollout.tokens[rollout.mask], common).any()
        assert (rollout.behaviour_logp[rollout.mask] > rollout.logp[rollout.mask]).all()


def test_settings_take_effect_without_compiling_again(sample, params):
    """`sample` allows one trace."""

    def entropy(settings):
        return -sample(params, prompts_of(), 4, settings).logp.sum()

    assert entropy(sampling(0.3)) < entropy(sampling(1.0)) < entropy(sampling(3.0))
    greedy = sample(params, prompts_of(), 4, sampling(5.0, top_k=1))
    assert_array_equal(greedy.behaviour_logp, 0.0)
    assert_array_equal(
        greedy.tokens, sample(params, prompts_of(), 9, sampling(1.0, top_p=1e-6)).tokens
    )
    assert_array_equal(greedy.tokens, sample(params, prompts_of(), 9, sampling(top_p=0.0)).tokens)
    free = sample(params, prompts_of(), 4, sampling())
    assert not free.ended.any() and free.mask.sum() == 16 * LENGTH
    assert_allclose(free.behaviour_logp, free.logp, atol=1e-6)
    common = Counter(free.tokens[free.mask].tolist()).most_common(1)[0][0]
    stopped = sample(params, prompts_of(), 4, sampling(stop=(NEVER, common)))
    assert_array_equal(stopped.ended, ((free.tokens == common) & free.mask).any(1))


# --- the loop, on a chain of which every next token is known: 1 2 3 4 …


TABLE = toys.Table(12)


@partial(jax.jit, static_argnames=("model", "length"))
def _count_up(prompts, stop, pad, *, model, length):
    key, settings = jax.random.key(0), Sampling(stop=stop)
    return generate(
        toys.chain(12), prompts, key, model=model, length=length, sampling=settings, pad=pad
    )


def count_up(prompts, stop=(), pad=0, model=TABLE):
    stop = (*stop, NEVER, NEVER)[:2]
    return jax.device_get(_count_up(prompts, stop, pad, model=model, length=5))


def prompts_ending_in(*last, width=3):
    """Prompts of 1, 2, … tokens whose last token is given."""
    rows = [[0] * min(i, width - 1) + [token] for i, token in enumerate(last)]
    length = np.array([len(row) for row in rows], np.int32)
    tokens = np.array([row + [11] * (width - len(row)) for row in rows], np.int32)
    index = np.arange(len(rows), dtype=np.int32)
    return Prompts(tokens, length, index, np.zeros_like(index))


def test_responses_follow_their_prompts_keep_their_eos_and_are_padded_on_the_right():
    rollout = count_up(prompts_ending_in(1, 4, 5), stop=(7,), pad=9)
    assert_array_equal(
        rollout.tokens,
        [[1, 2, 3, 4, 5, 6, 9, 9], [0, 4, 5, 6, 7, 9, 9, 9], [0, 0, 5, 6, 7, 9, 9, 9]],
    )
    assert_array_equal(
        rollout.mask.astype(int),
        [[0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]],
    )
    assert_array_equal(
        rollout.segments,
        [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
    )
    assert_array_equal(rollout.ended, [False, True, True])
    assert_array_equal(rollout.logp[~rollout.mask], 0.0)
    assert_allclose(rollout.logp[rollout.mask], 0.0, atol=1e-6)


def test_an_eos_as_the_first_token_is_a_response_of_one_token():
    rollout = count_up(prompts_ending_in(6, 6, 6), stop=(7,))
    assert_array_equal(rollout.mask.sum(1), [1, 1, 1])
    assert_array_equal(rollout.tokens[rollout.mask], [7, 7, 7])
    assert rollout.ended.all()


def test_without_a_stop_id_every_row_runs_to_the_limit():
    rollout = count_up(prompts_ending_in(1, 2, 9))
    assert not rollout.ended.any()
    assert_array_equal(rollout.mask.sum(1), [5, 5, 5])


def test_padding_with_the_eos_id_loses_no_eos_and_invents_none():
    rollout = count_up(prompts_ending_in(1, 5, 8), stop=(7,), pad=7)
    assert_array_equal(rollout.mask.sum(1), [5, 2, 5])
    assert_array_equal(rollout.ended, [False, True, False])
    assert_array_equal(rollout.tokens[1], [0, 5, 6, 7, 7, 7, 7, 7])
    assert_array_equal(rollout.segments[1], [1, 1, 1, 1, 0, 0, 0, 0])


def test_any_of_several_stop_ids_ends_a_row():
    rollout = count_up(prompts_ending_in(1, 3, 8), stop=(3, 6))
    assert_array_equal(rollout.mask.sum(1), [2, 3, 5])
    assert_array_equal(rollout.ended, [True, True, False])


def test_a_stop_id_in_the_prompt_stops_nothing():
    rollout = count_up(prompts_ending_in(7, 1, 7), stop=(7, 0))
    assert_array_equal(rollout.mask.sum(1), [5, 5, 5])


@dataclass(frozen=True)
class Counting(toys.Table):
    """Tells how many times it is run."""

    calls = []  # noqa: RUF012  (one list for all)

    def apply(self, params, tokens, **rest):
        jax.debug.callback(lambda: self.calls.append(tokens.shape))
        return super().apply(params, tokens, **rest)


@pytest.mark.parametrize(("stop", "steps"), [((7,), 3), ((), 4)])
def test_decoding_stops_when_every_row_has_ended(stop, steps):
    Counting.calls.clear()
    rollout = count_up(prompts_ending_in(3, 6, 4), stop=stop, model=Counting(12))
    jax.effects_barrier()
    assert Counting.calls[0] == (3, 3)  # the prompts, at once
    assert len(Counting.calls) - 1 == steps == rollout.mask.sum(1).max() - 1


def test_no_two_names_share_a_sample():
    """Nor does swapping prompt and sample number, or the order of rows."""
    names = np.array([(3, 1), (1, 3), (3, 0), (0, 3), (4, 1), (0, 0)], np.int32)
    run = jax.jit(partial(generate, model=TABLE, length=20, sampling=Sampling()))

    def samples(names):
        prompts = prompts_ending_in(*([0] * 6), width=1)
        prompts = prompts.replace(prompt_id=names[:, 0], sample_id=names[:, 1])
        flat = toys.markov(np.zeros((12, 12)))
        return np.asarray(run(flat, prompts, jax.random.key(0)).tokens)

    tokens = samples(names)
    assert len({tuple(row) for row in tokens.tolist()}) == len(names)
    assert_array_equal(samples(names[::-1])[::-1], tokens)
