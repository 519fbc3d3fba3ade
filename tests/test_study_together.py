"""All seeds in one program are what the loop makes of each seed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pst
import pytest
import toy_chain
import toys
from numpy.testing import assert_allclose

from rlhf_jax import masked
from rlhf_jax.config import Config, ConfigError, Derived, From, Frozen, Learner, Rollouts, every
from rlhf_jax.data.drawn import drawn, one_prompt
from rlhf_jax.feed import RunError
from rlhf_jax.objectives import mle, ppo, value
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.selection import with_score
from rlhf_jax.study.together import Together, obstacles
from rlhf_jax.train import train

RATE = partial(adam, learning_rate=3e-3)
MODEL = toys.Table(5, value_head=True)
START = partial(one_prompt, tokens=(toy_chain.BOS,))


def reward(rollout, params):
    return masked.at_last(toy_chain.reward_of(rollout.tokens).astype(jnp.float32), rollout.mask)


def run(**changes):
    """Everything a run can have that one program allows: two learners, one of them now and then."""
    critic = replace(MODEL, lm_head=False)
    config = Config(
        name="toy",
        steps=5,
        data={"prompts": partial(drawn, draw=START, batch=8)},
        learners={
            "policy": Learner(MODEL, ppo, optimizer=RATE, minibatches=2, epochs=2),
            "critic": Learner(critic, value, optimizer=RATE, when=partial(every, n=2)),
            "echo": Learner(MODEL, mle, batch="scored", optimizer=RATE),
        },
        derived={"scored": Derived(with_score)},
        frozen={"reference": Frozen(From("policy"))},
        rollouts=Rollouts(reward, length=3, samples=2, kl=KL(0.2, adaptive=True), show=0),
    )
    return replace(config, **changes)


def small(**rollouts):
    """The policy alone, no critic."""
    spec = replace(run().rollouts, value=None, **rollouts)
    return run(rollouts=spec, learners={"policy": Learner(MODEL, ppo, optimizer=RATE)}, derived={})


def test_each_seed_is_the_run_of_that_seed(tmp_path):
    config, seeds = run(), [0, 3]
    together = Together(config, seeds, {})
    curves = [together.advance(2), together.advance(3)]
    assert curves[1]["rollout/reward"].shape == (2, 3)
    assert np.isnan(np.concatenate([x["critic/loss"] for x in curves], axis=1)[:, 1::2]).all()
    for place, seed in enumerate(seeds):
        alone = train(
            replace(config, seed=seed, mesh=(1, 1, 1, 1)),
            tmp_path / str(seed),
            devices=jax.devices()[:1],
        )
        mine = jax.tree.map(lambda x, i=place: x[i], together.state)
        # The same numbers up to the order of sums.
        jax.tree.map(partial(assert_allclose, atol=1e-5), mine.learners, alone.learners)
        assert_allclose(mine.control.kl_coefficient, alone.control.kl_coefficient, rtol=1e-5)
    assert together.done == int(together.state.step[0]) == 5


def test_seeds_differ_and_start_from_their_own_base():
    base = {"policy": jax.vmap(MODEL.init)(jax.random.split(jax.random.key(1), 8))}
    learners = {"policy": replace(small().learners["policy"], start=From(stage="base"))}
    config = replace(small(), learners=learners)
    together = Together(config, range(8), {"base": base})  # a seed on each of eight devices
    jax.tree.map(partial(assert_allclose, rtol=0), together.weights()["policy"], base["policy"])
    jax.tree.map(partial(assert_allclose, rtol=0), together.frozen["reference"], base["policy"])
    before = together.weights()["policy"]["head"]["kernel"]
    together.advance(1)
    after = together.weights()["policy"]["head"]["kernel"]
    assert len(after.sharding.device_set) == 8
    change = np.abs(np.asarray(after - before)).reshape(8, -1).sum(1)
    assert len(np.unique(change)) == 8
    with pytest.raises(ConfigError, match=r"no learner 'policy'; valid: \['critic'\]"):
        Together(config, [0], {"base": {"critic": {}}})


def test_what_cannot_stand_in_one_program_is_named():
    assert obstacles(run()) == []
    host = run(data={"prompts": partial(lambda **_: None, batch=8)})
    assert "data.prompts is read on the host" in obstacles(host)[0]
    with pytest.raises(ConfigError, match="together=false"):
        Together(host, [0], {})


def test_rewards_that_are_not_numbers_stop_the_run():
    def broken(rollout, params):
        return jnp.where(rollout.mask, jnp.nan, 0.0)

    together = Together(small(reward=broken), [4, 5], {})
    with pytest.raises(RunError, match=r"rewards of step 0 are not finite \(seed 4\)"):
        together.advance(1)


def test_a_drawn_stream_gives_the_same_batch_in_slices():
    whole = drawn(seed=1, shard=(0, 1), batch=8, draw=pst.draw)
    parts = [iter(drawn(seed=1, shard=(i, 2), batch=8, draw=pst.draw)) for i in range(2)]
    for batch, *halves in zip(*[iter(whole)], *parts, strict=False):
        both = np.concatenate([half.tokens for half in halves])
        assert_allclose(batch.tokens, both)
        break
    first = next(iter(whole))
    iterator = iter(whole)
    next(iterator)
    state = iterator.get_state()
    second = next(iterator)
    iterator.set_state(state)
    assert_allclose(next(iterator).tokens, second.tokens)
    assert (first.tokens != second.tokens).any()
    other = next(iter(drawn(seed=1, shard=(0, 1), batch=8, draw=pst.draw, salt=1)))
    assert (first.tokens != other.tokens).any()
