"""Comparisons made while training: who is preferred, who is asked, and ensembles that disagree."""

from functools import partial

import host_scores
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import acquisition, labelling, masked, rewards
from rlhf_jax.labelling import choose, compare, half, joined, resampled
from rlhf_jax.objectives import reward_model
from rlhf_jax.rewards import RewardError, from_text
from rlhf_jax.testing import random_batch
from rlhf_jax.types import Pairs, Rollout, Scores

KEY = jax.random.key(0)
LIST = toys.Table(8, lm_head=False, value_head=True)  # a reward model: the last token's own number


def samples(ends, prompts=None, length=4):
    """Rows of a prompt token, 1 and a last token; `prompts` says which rows belong together."""
    b = len(ends)
    prompts = np.arange(b) // 2 if prompts is None else np.asarray(prompts)
    tokens = np.zeros((b, length + 1), np.int32)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 7, 1, ends
    inside = np.broadcast_to(np.arange(length + 1) < 3, tokens.shape)
    base = random_batch(Rollout)
    fields = {
        name: np.zeros((b, length + 1), np.float32) for name in ("logp", "behaviour_logp", "earned")
    }
    one = {"temperature": np.ones(b, np.float32), "ended": np.ones(b, bool)}
    one |= {"prompt_id": prompts.astype(np.int32), "sample_id": np.zeros(b, np.int32)}
    text = {"tokens": tokens, "mask": inside & (np.arange(length + 1) > 0), "segments": inside * 1}
    return jax.tree.map(jnp.asarray, base.replace(**fields, **one, **text))


def last_token(rollout, params):
    """What the oracle pays: a text is worth its last token."""
    return masked.at_last(masked.last(rollout.tokens, rollout.mask), rollout.mask)


ask = jax.jit(
    lambda rollout, key=KEY, params=None, oracle=last_token, **options: compare(
        rollout, params=params, key=key, oracle=oracle, **options
    ),
    static_argnames=("k", "temperature", "flip", "oracle", "acquire", "ask"),
)


def ends_of(pairs):
    return np.asarray(pairs.tokens[:, :, 2]).tolist()


def test_the_better_sample_of_a_prompt_comes_first_with_all_that_is_its_own():
    rollout = samples([2, 5, 6, 3])
    tokens, mask, segments = (np.array(x) for x in (rollout.tokens, rollout.mask, rollout.segments))
    tokens[1, 3], mask[1, 3], segments[1, 3] = 4, True, 1
    rollout = rollout.replace(tokens=tokens, mask=mask, segments=segments)
    pairs = ask(rollout)
    assert_array_equal(pairs.tokens[0], [[7, 1, 5, 4, 0], [7, 1, 2, 0, 0]])
    assert_array_equal(pairs.mask[0].sum(1), [3, 2])
    assert_array_equal(pairs.segments[0].sum(1), [4, 3])
    assert ends_of(pairs)[1] == [6, 3]


def test_samples_of_one_prompt_are_found_wherever_they_stand():
    assert ends_of(ask(samples([2, 6, 5, 3], prompts=[4, 9, 4, 9]))) == [[5, 2], [6, 3]]


def test_the_best_of_four_comes_first_and_the_others_keep_their_order():
    assert ends_of(ask(samples([2, 3, 6, 5], prompts=[0] * 4), k=4)) == [[6, 2, 3, 5]]


def test_four_samples_of_a_prompt_make_two_pairs():
    assert ends_of(ask(samples([2, 3, 6, 5], prompts=[0] * 4), k=2)) == [[3, 2], [6, 5]]


def test_a_group_of_two_prompts_has_no_weight():
    pairs = ask(samples([2, 3, 6, 5], prompts=[0, 0, 1, 2]))
    weight = jax.jit(lambda x: reward_model(Scores(reward=x.tokens * 1.0), x).weight)(pairs)
    assert_array_equal(weight, [1.0, 0.0])


def test_a_worth_that_is_not_finite_makes_no_label():
    nan = lambda rollout, params: jnp.where(rollout.tokens == 3, jnp.nan, 0.0)  # noqa: E731
    pairs = ask(samples([2, 3, 6, 5]), oracle=nan)
    assert_array_equal(np.asarray(pairs.mask).any((1, 2)), [False, True])


def share(worth, **options):
    """How often each member is preferred, in 40,000 answers."""
    found = jax.jit(partial(choose, **options))(jnp.tile(jnp.array([worth]), (40_000, 1)), KEY)
    return np.bincount(np.asarray(found), minlength=len(worth)) / 40_000


@pytest.mark.parametrize(
    ("worth", "options", "expected"),
    [
        ([0.0, 1.0], {"temperature": 0.5}, [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))]),
        ([0.0, 1.0, 2.0], {"temperature": 1.0}, np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()),
        ([0.0, 1.0], {"flip": 0.1}, [0.1, 0.9]),
        ([0.0, 1.0, 0.5], {"flip": 0.2}, [0.1, 0.8, 0.1]),
        ([1.0, 1.0, 0.0], {}, [0.5, 0.5, 0.0]),
    ],
    ids=["Bradley-Terry", "Plackett-Luce", "flipped", "flipped to either other", "ties"],
)
def test_answers_have_their_frequency(worth, options, expected):
    assert_allclose(share(worth, **options), expected, atol=0.01)


def test_the_key_decides_the_answers():
    rollout = samples([2, 3] * 32)
    one, same, other = (
        ends_of(ask(rollout, jax.random.key(i), temperature=1.0)) for i in (1, 1, 2)
    )
    assert one == same != other


def test_only_the_groups_that_are_worth_it_are_shown_to_the_oracle():
    shown = []

    def oracle(rollout, params):
        shown.append(rollout.tokens.shape[0])
        return last_token(rollout, params)

    def most_wanted(pairs, params):
        return jnp.array([3.0, 1.0, 2.0]) * (pairs.tokens[:, 0, 2] != params["never"])

    rollout = samples([2, 3, 6, 5, 4, 1])
    for never, expected in ((6, [[3, 2], [4, 1]]), (2, [[4, 1], [6, 5]])):
        pairs = ask(rollout, params={"never": never}, oracle=oracle, acquire=most_wanted, ask=2)
        assert ends_of(pairs) == expected
    assert set(shown) == {4}  # rows: of two groups


def decode(ids):
    return "".join(chr(ord("a") + i - 1) for i in ids)


def test_an_oracle_that_reads_texts_runs_on_the_host():
    oracle = from_text(host_scores.second_letter, decode=decode, prompt=False, workers=1)
    make = labelling.on_host(partial(compare, oracle=oracle))
    assert make.on_host
    assert ends_of(make(samples([2, 5, 6, 3]), params={}, key=KEY)) == [[5, 2], [6, 3]]
    with pytest.raises(ValueError, match=r"labelling\.on_host"):
        jax.jit(partial(compare, oracle=oracle))(samples([2, 5]), params={}, key=KEY)


def test_an_oracle_that_fails_shows_the_text():
    oracle = from_text(host_scores.fails_on_b, decode=decode, prompt=False, workers=1)
    with pytest.raises(RewardError, match="text: 'ab'"):
        labelling.on_host(partial(compare, oracle=oracle))(samples([2, 1]), params={}, key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3}, "k=3 do not divide 4 samples"),
        ({"k": 1}, "k is at least 2"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"ask": 1}, "acquire and ask go together"),
        ({"acquire": lambda pairs, params: None, "ask": 3}, "ask=3: of 2 groups"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare(samples([2, 5, 6, 3]), params={}, key=KEY, oracle=last_token, **options)


def test_fresh_comparisons_join_those_of_a_stream():
    wide, narrow = toys.pairs(n=2, t=7), ask(samples([2, 5]))
    both = joined(jax.tree.map(jnp.asarray, wide), narrow, params={}, key=KEY)
    assert_array_equal(both.tokens[:2], wide.tokens)
    assert_array_equal(both.tokens[2, :, :5], narrow.tokens[0])
    assert not np.asarray(both.mask)[2, :, 5:].any()
    assert not np.asarray(both.segments)[2, :, 5:].any()
    with pytest.raises(ValueError, match=r"\[2, 4\] members"):
        joined(narrow, ask(samples([1, 2, 3, 4], prompts=[0] * 4), k=4), params={}, key=KEY)


def test_a_resampled_batch_has_each_comparison_once_on_average():
    pairs = ask(samples(np.arange(400) % 7 + 1))
    tokens = np.array(pairs.tokens)
    tokens[:, :, 0] = np.arange(200)[:, None]
    draw = jax.jit(resampled)
    pairs = pairs.replace(tokens=tokens)
    found = [np.asarray(draw(pairs, jax.random.key(i)).tokens)[:, 0, 0] for i in range(2)]
    times = np.bincount(found[0], minlength=200)
    assert times.sum() == 200
    assert abs((times == 0).mean() - np.exp(-1)) < 0.08
    assert (found[0] != found[1]).any()


PAIRS = jax.tree.map(jnp.asarray, toys.pairs(n=400, t=9))


halved = jax.jit(half, static_argnames="share")


def kept(batch, member=0, key=KEY, **options):
    return np.asarray(halved(batch, key, member=member, **options).mask).any((1, 2))


def test_a_member_of_an_ensemble_keeps_the_same_half_of_the_data_whenever_it_comes():
    mine = kept(PAIRS)
    assert abs(mine.mean() - 0.5) < 0.1
    assert_array_equal(kept(PAIRS, key=jax.random.key(5)), mine)
    turned = jax.tree.map(
        lambda x: np.asarray(x)[::-1, ::-1], PAIRS
    )  # another order, the labels flipped
    assert_array_equal(kept(turned), mine[::-1])
    padded = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 0), (0, 3))), PAIRS)
    garbage = padded.replace(tokens=np.where(padded.segments > 0, padded.tokens, 5))
    assert_array_equal(kept(garbage), mine)


def test_the_halves_of_two_members_are_independent():
    both = kept(PAIRS) & kept(PAIRS, member=1)
    assert abs(both.mean() - 0.25) < 0.08
    assert abs(kept(PAIRS, share=0.9).mean() - 0.9) < 0.05
    with pytest.raises(ValueError, match="share=0"):
        half(PAIRS, KEY, member=0, share=0.0)


def test_texts_that_differ_in_the_order_of_their_tokens_are_told_apart():
    tokens = np.array([[[1, 2, 3], [0, 0, 0]], [[1, 3, 2], [0, 0, 0]]] * 1, np.int32)
    batch = Pairs(jnp.asarray(tokens), jnp.ones((2, 2, 3), bool), jnp.ones((2, 2, 3), jnp.int32))
    found = np.array([kept(batch, member=i) for i in range(40)])
    assert (found[:, 0] != found[:, 1]).any()


# Three reward models that know what a last token is worth, each in its own way.
NAMES = ("reward_0", "reward_1", "reward_2")
OPINIONS = {
    name: toys.markov(np.eye(8), np.arange(8) * slope)
    for name, slope in zip(NAMES, (1, 2, 6), strict=True)
}
SPREAD = np.sqrt(14 / 3)


@pytest.mark.parametrize(("pessimism", "expected"), [(0.0, 3.0), (0.5, 3.0 - 0.5 * SPREAD)])
def test_an_ensemble_pays_its_mean_less_its_doubt(pessimism, expected):
    rollout = samples([1, 2])
    fn = partial(rewards.ensemble, model=LIST, learners=NAMES, pessimism=pessimism)
    reward = jax.jit(fn)(rollout, OPINIONS)
    assert_allclose(reward[:, 2], [expected, 2 * expected], rtol=1e-6)
    assert_array_equal(reward[:, [0, 1, 3, 4]], 0.0)
    rewards.check(reward, rollout)
    doubt = jax.jit(partial(rewards.disagreement, model=LIST, learners=NAMES))(rollout, OPINIONS)
    assert_allclose(doubt[:, 2], SPREAD * np.array([1, 2]), rtol=1e-6)


def test_one_member_is_a_reward_model():
    rollout = samples([1, 2])
    alone = rewards.ensemble(rollout, OPINIONS, model=LIST, learners=("reward_2",), pessimism=3.0)
    assert_allclose(alone, rewards.from_model(rollout, OPINIONS, model=LIST, learner="reward_2"))


def test_an_ensemble_asks_about_the_pair_that_it_disagrees_on():
    acquire = partial(
        labelling.ensemble_scores, model=LIST, learners=NAMES, measure=acquisition.variance
    )
    asked = partial(ask, params=OPINIONS, acquire=acquire, ask=1)
    rollout = samples([5, 5, 1, 2, 3, 3])
    assert ends_of(asked(rollout)) == [[2, 1]]
    mask = np.array(rollout.mask)
    mask[2] = False  # an empty member is not worth a question
    assert ends_of(asked(rollout.replace(mask=mask))) != [[2, 1]]
