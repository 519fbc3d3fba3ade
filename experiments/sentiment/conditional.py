"""No policy gradient: likelihood on own samples behind a token for how good they are, and asking.

    rlhf-jax train experiments/sentiment/conditional.py --out runs/sentiment_conditional

Conditional training (Korbak et al. 2023) on what the policy itself says, as in Quark (Lu et al.
2022, without its KL): the policy is asked for good, what it says gets the token that VADER's score
deserves, good from 0.5 on and bad below, and the likelihood of that text behind that token is
raised; one text in ten has no token. The same prompts, sampling and score as `ppo.py`, four times
as many samples; the reference does not see the tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ppo
import quickstart_base as base
from measured import BAD, GOOD, measured

from rlhf_jax.conditioning import chained, condition, tagged, untagged
from rlhf_jax.config import Config, Derived, From, Frozen, Learner, Pipeline
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.objectives import mle
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.selection import with_score

THRESHOLD = 0.5  # of VADER's score: two of ten of the base's samples
ROWS, UPDATES = 256, 4  # samples of a step, and updates from them


def train() -> Config:
    """`ppo.py` with likelihood behind tokens in place of PPO, and no KL to pay."""
    given = ppo.config()
    tags = (BAD, GOOD)
    relabelled = partial(
        chained,
        transforms=(
            partial(untagged, tags=tags),
            partial(condition, edges=(THRESHOLD,), tags=tags, drop=0.1),
        ),
    )
    learner = Learner(
        base.MODEL,
        mle,
        batch="samples",
        start=From(path=base.WEIGHTS),
        optimizer=partial(adam, learning_rate=5e-4, final=0.0, steps=given.steps * UPDATES),
        minibatches=UPDATES,
        transform=relabelled,
    )
    prompts = given.data["prompts"]
    return replace(
        given,
        name="sentiment_conditional",
        data={"prompts": partial(prompts.func, **{**prompts.keywords, "batch": ROWS})},
        learners={"policy": learner},
        frozen={"reference": Frozen(From("policy"), Untagged(base.MODEL, tags=tags))},
        derived={"samples": Derived(with_score)},
        rollouts=replace(
            given.rollouts,
            transform=partial(tagged, tags=(GOOD,)),
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
