"""A small study of two horizons on the four-token chain, for tests of how studies are run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import toy_chain
import toys
from matplotlib.figure import Figure

from rlhf_jax import advantages, exact, masked
from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.data.drawn import drawn, one_prompt, whole_texts
from rlhf_jax.objectives import mle, reinforce
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.study import Arm, Claim, Settings, Study, Train

BETA = 0.5
START = partial(one_prompt, tokens=(toy_chain.BOS,))


class Four(toys.Table):
    """Reads five tokens, says four."""

    def logits(self, params, hidden):
        return super().logits(params, hidden)[..., :4]


@dataclass(frozen=True)
class Chain:
    """The task has one size; `late` breaks it: credit falls on the token so many places later."""

    base_steps: int = 100
    late: int = 0


PRESETS = {
    "cpu_ci": Settings(Four(5), Chain(20), Train(steps=4, rows=16, rate=2e-2), seeds=1),
    "cpu": Settings(Four(5), Chain(), Train(steps=40, rows=64, rate=2e-2)),
}


def texts(key, rows):
    """Texts of the chain."""
    index = jax.random.categorical(key, jnp.log(jnp.asarray(toy_chain.START)), shape=(rows,))
    return whole_texts(jnp.asarray(toy_chain.TEXTS, jnp.int32)[index])


def reward(rollout, params):
    """What a text earns, on its last token."""
    return masked.at_last(toy_chain.reward_of(rollout.tokens).astype(jnp.float32), rollout.mask)


def credited_late(scores, batch, *, late):
    """REINFORCE with a mistake of some places."""
    moved = jnp.where(
        jnp.roll(batch.mask, late, axis=1), jnp.roll(batch.advantage, late, axis=1), 0
    )
    return reinforce(scores, batch.replace(advantage=moved))


def config(settings: Settings = PRESETS["cpu"]) -> Study:
    """Credit that reaches all tokens, and credit that reaches one."""
    model, sizes = settings.model, settings.train
    base = Config(
        name="base",
        steps=settings.data.base_steps,
        data={"text": partial(drawn, draw=texts, batch=sizes.rows)},
        learners={
            "policy": Learner(model, mle, batch="text", optimizer=partial(adam, learning_rate=5e-2))
        },
        mesh=settings.mesh,
    )
    full = Config(
        name="full",
        steps=sizes.steps,
        data={"prompts": partial(drawn, draw=START, batch=sizes.rows)},
        learners={
            "policy": Learner(
                model,
                partial(credited_late, late=settings.data.late),
                optimizer=partial(adam, learning_rate=sizes.rate),
                start=From(stage="base"),
            )
        },
        frozen={"reference": Frozen(From("policy", stage="base"), model)},
        rollouts=Rollouts(
            reward,
            length=3,
            value=None,
            kl=KL(BETA, adaptive=False),
            advantage=partial(advantages.batch_mean, own=False),
            show=0,
        ),
        mesh=settings.mesh,
    )
    horizon = partial(advantages.credit_horizon, horizon=1)
    one = replace(full, name="one", rollouts=replace(full.rollouts, advantage=horizon))
    return Study(
        name="tiny",
        question="Does credit that reaches one token only leave the others as they were?",
        bases={"base": base},
        arms={
            "full": Arm(full, "credit for all that follows", at=(0,)),
            "one": Arm(one, "credit for the next token only"),
        },
        primaries=(
            Claim(
                "P1",
                "with full credit the first tokens move",
                lambda r: r.vector("kl", "full")[:, 0],
                supported=(0.005, np.inf),
                unit="nats",
            ),
        ),
        secondary=(
            Claim(
                "S1",
                "with credit for one token they do not",
                lambda r: r.vector("kl", "one")[:, 0],
                supported=(-np.inf, 0.005),
                unit="nats",
            ),
        ),
        measure=measure,
        figure=figure,
        caption="How far each token's distribution moved from the base.",
        seeds=settings.seeds,
        together=settings.together,
        larger="--preset cpu",
    )


def measure(trained):
    """Exact answers on all 64 texts."""
    model = trained.config.learners["policy"].model

    def law(params):
        return exact.probabilities(params, toy_chain.OUTPUTS, model=model)

    p, start = law(trained.weights["policy"]), law(trained.before["base"]["policy"])
    found = exact.kl_by_position(p, start, toy_chain.OUTPUTS)[1:]
    return {"kl": found, "reward": p @ toy_chain.REWARD}


def figure(results):
    """Bars of KL by position."""
    found = Figure(figsize=(5, 3), layout="constrained")
    axes = found.subplots()
    for i, arm in enumerate(results.arms):
        axes.bar(np.arange(3) + 0.4 * i, results.vector("kl", arm).mean(0), 0.4, label=arm)
    axes.set(xlabel="token", ylabel="KL to the base, nats")
    axes.legend()
    return found
