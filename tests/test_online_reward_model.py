"""A reward model that learns from fresh comparisons in the loop of the policy that it pays."""

import json
from dataclasses import replace
from functools import partial

import host_scores
import jax
import numpy as np
import pytest
from loop import probabilities, prompts_of, trained
from numpy.testing import assert_allclose
from toy_chain import BETA, MODEL, REFERENCE, REWARD, START, TEXTS, reference_params, reward_of

from rlhf_jax import exact, masked, rewards
from rlhf_jax import train as loop
from rlhf_jax.advantages import gae, whitened
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Rollouts, every
from rlhf_jax.data import streams
from rlhf_jax.feed import RunError
from rlhf_jax.labelling import compare, joined, on_host, resampled
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives import combine, ppo, reward_model, value
from rlhf_jax.optimizer import adam, sgd
from rlhf_jax.rewards import KL, from_model, from_text
from rlhf_jax.sampling import Sampling

SMALL = Transformer(vocab=264, width=16, layers=1, heads=2, kv_heads=1, mlp=16, context=32)
SCALAR = replace(SMALL, lm_head=False, value_head=True)
ROWS = [
    {"text": text, "ratings": [score, score], "score": float(score)}
    for text, score in (("one", 3), ("two two", 1), ("three three", -2), ("four", -3))
]
DATA = {"tokenizer": "bytes", "source": ROWS}
SGD = partial(sgd, learning_rate=0.1)


def config(oracle, **changes):
    """Two steps; the reward model learns at the first, from a stream and fresh comparisons."""
    rollouts = Rollouts(
        partial(rewards.ensemble, model=SCALAR, learners=("reward_0", "reward_1"), pessimism=1.0),
        length=8,
        samples=2,
        value=None,
        kl=KL(0.1, adaptive=False),
        sampling=Sampling(stop=(2,), banned=(0, 1)),
        show=0,
    )
    learner = Learner(
        SCALAR,
        partial(reward_model, centre=0.1),
        batch="both",
        optimizer=SGD,
        when=partial(every, n=2),
        transform=resampled,
    )
    prompts = partial(streams.prompts, batch=4, length=4, words=(1, 1), truncate=True, **DATA)
    base = Config(
        name="online",
        steps=2,
        data={"prompts": prompts, "pairs": partial(streams.pairs, batch=2, length=10, **DATA)},
        learners={
            "policy": Learner(SMALL, ppo, optimizer=SGD),
            "reward_0": learner,
            "reward_1": learner,
        },
        frozen={"reference": Frozen(From("policy"))},
        rollouts=rollouts,
        derived={
            "fresh": Derived(oracle),
            "both": Derived(joined, of=("pairs", "fresh")),
        },
        mesh=(1, 1, 1, 1),
    )
    return replace(base, **changes)


def run(config, out):
    return loop.train(config, out, devices=jax.devices()[:1])


def test_people_are_asked_once_for_all_members_and_only_when_these_learn(tmp_path):
    asked = []

    def person(rollout, *, params, key):
        asked.append(rollout.tokens.shape[0])
        oracle = from_text(host_scores.length, tokenizer="bytes", workers=1)
        return compare(rollout, params=params, key=key, oracle=oracle)

    state = run(config(on_host(person)), tmp_path)
    assert asked == [8]
    assert {n: int(x.step) for n, x in state.learners.items()} == {
        "policy": 2,
        "reward_0": 1,
        "reward_1": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["reward_0/accuracy" in line for line in lines] == [True, False]


def paid(reward, **changes):
    """Nothing learns; what is paid is measured on samples of the starting policy."""
    made = config(None, steps=0, derived={}, **changes)
    learners = {"policy": made.learners["policy"]}
    return replace(
        made, learners=learners, rollouts=replace(made.rollouts, reward=reward, normalise=48)
    )


def length_reward(rollout, params):
    return masked.at_last(rollout.mask.sum(1) ** 1.5 + rollout.tokens[:, 5] % 7, rollout.mask)


def test_rewards_are_normalised_to_mean_0_and_variance_1_on_samples_of_the_start(tmp_path):
    """The gain and bias of Ziegler et al. 2019, §2.2: measured again, they are 1 and 0."""
    control = run(paid(length_reward), tmp_path / "raw").control
    assert abs(control.reward_mean) > 1 and abs(control.reward_std - 1) > 0.1

    def normalised(rollout, params):
        reward = length_reward(rollout, params)
        return rewards.normalise(reward, rollout.mask, control.reward_mean, control.reward_std)

    again = run(paid(normalised), tmp_path / "again").control
    assert_allclose([again.reward_mean, again.reward_std], [0.0, 1.0], atol=1e-5)


def test_a_reward_model_that_has_not_learned_cannot_be_normalised(tmp_path):
    with pytest.raises(RunError, match=r"0 on all of 48 samples .* cannot be normalised"):
        run(paid(lambda rollout, params: rollout.earned), tmp_path)


@pytest.mark.slow
def test_ppo_with_a_reward_model_that_learns_from_its_samples_ends_at_the_tilted_reference():
    """The oracle answers by Bradley and Terry: all that is known of the reward is in the labels."""
    steps = 500
    scalar = Transformer(
        vocab=5, width=32, layers=1, heads=4, kv_heads=2, mlp=64, lm_head=False, value_head=True
    )

    def oracle(rollout, params):
        return masked.at_last(reward_of(rollout.tokens), rollout.mask)

    parts = {"policy": ppo, "value": partial(value, clip=None, coefficient=0.3)}
    params, metrics = trained(
        {
            "policy": Learner(
                MODEL,
                partial(combine, **parts),
                optimizer=partial(adam, learning_rate=2e-3, final=0.02, steps=steps * 8),
                epochs=2,
                minibatches=4,
            ),
            "reward": Learner(
                scalar,
                partial(reward_model, centre=0.01),
                batch="comparisons",
                optimizer=partial(adam, learning_rate=3e-3, final=0.02, steps=steps),
            ),
        },
        steps=steps,
        key=jax.random.key(0),
        rollouts=Rollouts(
            partial(from_model, model=scalar, learner="reward"),
            length=3,
            samples=2,
            value="policy",
            kl=KL(BETA, adaptive=False),
            advantage=partial(whitened, advantage=partial(gae, trace=0.95)),
        ),
        prompts=prompts_of(512, samples=2),
        derived={"comparisons": Derived(partial(compare, oracle=oracle, temperature=1.0))},
        frozen={"reference": reference_params()},
        frozen_models={"reference": REFERENCE},
    )
    found = probabilities(MODEL, params["policy"], TEXTS)
    optimum = exact.tilted(START, REWARD, beta=BETA)
    assert exact.kl(optimum, START) > 1.0
    assert exact.kl(found / found.sum(), optimum) < 0.05
    # Its loss is what the labels' noise leaves: of a fair coin it would be log 2.
    worth = REWARD[:, None] - REWARD[None, :]
    noise = found @ (np.logaddexp(0, -worth) / (1 + np.exp(-worth)) * 2) @ found
    assert_allclose(metrics["reward/loss"][-100:].mean(), noise, atol=0.03)
