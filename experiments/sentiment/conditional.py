"""No policy gradient: likelihood on own samples behind a token for how good they are, and asking.

    rlhf-jax train experiments/sentiment/conditional.py --out runs/sentiment_conditional

Conditional training (Korbak et al. 2023) on what the base model itself says: each of its samples
gets the token that VADER's score deserves, good from 0.5 on and bad below, none in one text in ten,
and the likelihood of that text behind that token is raised. Where it is learned, asking for good is
asking for the base model's good samples (its posterior), which RL with a KL penalty ends at, too.
The same prompts, sampling and score as `ppo.py`, four times as many samples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ppo
import quickstart_base as base
from measured import BAD, GOOD, measured

from rlhf_jax.conditioning import condition
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Pipeline
from rlhf_jax.objectives import mle
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.selection import with_score

THRESHOLD = 0.5  # of VADER's score: two of ten of the base's samples
ROWS, UPDATES = 256, 2  # samples of a step, and updates from them


def train() -> Config:
    """`ppo.py` with likelihood behind tokens in place of PPO, and no KL to pay."""
    given = ppo.config()
    learner = Learner(
        base.MODEL,
        mle,
        batch="samples",
        start=From(path=base.WEIGHTS),
        optimizer=partial(adam, learning_rate=1e-3, final=0.0, steps=given.steps * UPDATES),
        minibatches=UPDATES,
        transform=partial(condition, edges=(THRESHOLD,), tags=(BAD, GOOD), drop=0.1),
    )
    prompts = given.data["prompts"]
    return replace(
        given,
        name="sentiment_conditional",
        data={"prompts": partial(prompts.func, **{**prompts.keywords, "batch": ROWS})},
        learners={"policy": learner},
        frozen={"base": Frozen(From("policy"))},
        derived={"samples": Derived(with_score)},
        rollouts=replace(
            given.rollouts,
            policy="base",
            reference=None,
            value=None,
            normalise=0,
            kl=KL(initial=0.0, adaptive=False),
        ),
    )


def config() -> Pipeline:
    """Training, then what it says when asked for good, for bad and for nothing."""
    run = train()
    asked = {"asked for good": (GOOD,), "asked for bad": (BAD,), "not asked": ()}
    last = partial(measured, run=run, stage="train", tags=asked)
    return Pipeline(run.name, {"train": run, "measured": last})
