"""A text's score paid token by token: what each token changed, adding up to the score."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import data_toys
import host_scores
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_rewards import decode, rollout

from rlhf_jax import experiment, hostpool
from rlhf_jax.data import snippets, tokenizers, vader
from rlhf_jax.rewards import RewardError, from_text

SHIPPED = "experiments/quickstart_base/tokenizer.json"
ROOT = Path(__file__).parent.parent
dense = partial(from_text, decode=decode, workers=2, dense=True)


def test_each_token_is_paid_what_it_changed_and_the_first_the_prompt_as_well():
    """The score is the number of letters, of which the prompt has one; EOS is none."""
    texts = rollout([4, 3, 2], [3, 2], [2], [])
    expected = [[0, 0, 2, 1, 0], [0, 0, 2, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    reward = dense(host_scores.length)(texts, {})
    assert reward.dtype == jnp.float32
    assert_array_equal(reward[:, :5], expected)
    alone = dense(host_scores.length, prompt=False)(texts, {})
    assert_array_equal(alone[:3, 2], [1, 1, 0])
    assert_array_equal(alone[:, 3:], reward[:, 3:])


def test_what_an_environment_adds_belongs_to_the_token_that_it_answers():
    """Tokens 1 and 2 of the response, and its last two, were not chosen by the policy."""
    holed = rollout([4, 3, 5, 6, 3, 4], holes=(1, 2, 4, 5))
    reward = dense(host_scores.length)(holed, {})
    assert_array_equal(reward[0], [0, 0, 1 + 3, 0, 0, 3, 0, 0, 0])
    whole = replace(dense(host_scores.length), dense=False)(holed, {})
    assert_array_equal(whole.sum(1), reward.sum(1))


def test_a_token_that_leaves_the_text_as_it_is_is_not_scored_again(monkeypatch):
    asked = []

    class Pool:
        def map(self, texts, *, timeout, names):
            asked.extend(zip(names, texts, strict=True))
            return [float(len(text)) for text in texts]

    monkeypatch.setattr(hostpool, "shared", lambda score, workers: Pool())
    reward = dense(host_scores.length)(rollout([4, 3, 2], [4, 2]), {})
    assert asked == [(0, "ab"), (0, "aba"), (1, "ab")]  # a row's texts are its own
    assert_array_equal(reward[:, 2:5], [[2, 1, 0], [2, 0, 0]])


def test_an_error_shows_the_row_and_the_text_so_far():
    with pytest.raises(RewardError, match=r"on row 1\n  text: 'aab'"):
        dense(host_scores.nan_on_b)(rollout([3, 3, 2], [3, 4, 3, 2]), {})


# --- VADER


def spoken(tokenizer, *texts, prompt=1):
    """Rows of these texts: BOS and `prompt` tokens are given, the policy said the rest and EOS."""
    rows = [tokenizer.encode(text) for text in texts]
    t = 2 + max(map(len, rows))
    tokens, mask = np.full((len(rows), t), tokenizer.pad, np.int32), np.zeros((len(rows), t), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids) + 2] = [tokenizer.bos, *ids, tokenizer.eos]
        mask[i, 1 + prompt : len(ids) + 2] = True
    first = mask | (np.arange(t) <= prompt)
    base = rollout(*[[3]] * len(rows))
    return base.replace(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), segments=jnp.asarray(first, jnp.int32)
    )


@pytest.mark.parametrize("name", ["bytes", SHIPPED])
def test_on_real_text_the_token_rewards_add_up_to_the_score(name):
    """Whatever is cut: words, and with bytes letters as well. Tolerance: 2^−23 per token."""
    data_toys.need_corpus()
    name = name if name == "bytes" else str(ROOT / name)
    tokenizer = tokenizers.load(name)
    some = [s.text for s in snippets.load() if len(s.text) < 90][::1500]
    texts = spoken(tokenizer, *some, "what a ❤️, café 😁!", prompt=2)
    pay = from_text(score=vader.vader_compound, tokenizer=name, workers=2)
    whole, parts = pay(texts, {}), replace(pay, dense=True)(texts, {})
    assert np.abs(whole.sum(1)).max() > 0.5
    assert (np.count_nonzero(parts, axis=1) > 1).any()
    gap = np.float64(parts).sum(1) - np.float64(whole).sum(1)
    assert (np.abs(gap) <= 2.0**-23 * texts.mask.sum(1)).all()
    assert_allclose(parts.sum(1), whole.sum(1), atol=1e-6)
    assert not parts[~np.asarray(texts.mask)].any()


def test_a_prefix_may_end_inside_a_word_or_a_letter():
    """hope|less: the hope is paid and taken back. A heart of four bytes is seen with its last."""
    data_toys.need_corpus()
    texts = spoken(tokenizers.load("bytes"), "a hopeless", "a 💘", prompt=2)
    reward = from_text(score=vader.vader_compound, tokenizer="bytes", workers=1, dense=True)(
        texts, {}
    )
    hope, hopeless, heart = map(vader.vader_compound, ("a hope", "a hopeless", "a 💘"))
    assert hope > 0.4 and hopeless < -0.4 and heart > 0.4
    expected = np.zeros(texts.mask.shape)
    expected[0, 3 + 3], expected[0, 3 + 4], expected[0, 3 + 7] = hope, -hope, hopeless
    expected[1, 3 + 3] = heart
    assert_allclose(reward, expected, atol=1e-7)


def test_the_experiment_is_ppo_but_for_when_the_score_is_paid():
    base, paid = (
        experiment.describe(experiment.load(ROOT / "experiments" / "sentiment" / name))
        for name in ("ppo.py", "dense.py")
    )
    changed = experiment.difference(base, paid)
    assert len(changed) == 2, changed
    assert any("rollouts.reward.dense" in line for line in changed)
