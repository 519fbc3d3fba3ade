"""The same PPO with a token that turns it off: is the model of before still there behind it?

    rlhf-jax train experiments/sentiment/off_token.py --out runs/sentiment_off_token

Half of the prompts carry a token for on, half one for off. Behind off nothing is learned from the
score, and an exact KL holds the policy at the base model; behind on it is `ppo.py`.
Expect no switch: this small model does not learn to tell the tokens apart in 100 steps, so what the
KL holds back behind one it holds back behind the other, too (score 0.32 behind on, 0.31 behind off,
0.15 before; 1 nat per sample). On a toy the same gate works: `control_tokens.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ppo
import quickstart_base as base
from measured import BAD, GOOD, measured

from rlhf_jax.conditioning import tagged
from rlhf_jax.config import Config, From, Frozen, Pipeline
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.objectives import gated, reference_kl_vocab

ON, OFF = GOOD, BAD  # the tokenizer's two free tokens


def train() -> Config:
    """`ppo.py` with a gate."""
    given = ppo.config()
    policy = given.learners["policy"]
    gate = partial(
        gated,
        objective=policy.objective,
        on=ON,
        off=OFF,
        on_coefficient=0.0,  # the rollouts charge KL already
        off_coefficient=1.0,
    )
    learner = replace(
        policy, objective=gate, vocab=reference_kl_vocab, scores=("reference",)
    )  # fmt: skip
    return replace(
        given,
        name="sentiment_off_token",
        learners={**given.learners, "policy": learner},
        frozen={"reference": Frozen(From("policy"), Untagged(base.MODEL, tags=(ON, OFF)))},
        rollouts=replace(given.rollouts, transform=partial(tagged, tags=(ON, OFF))),
    )


def config() -> Pipeline:
    """Training, then what it says behind on, behind off and behind neither."""
    run = train()
    asked = {"on": (ON,), "off": (OFF,), "neither": ()}
    return Pipeline(
        run.name,
        {"train": run, "measured": partial(measured, run=run, stage="train", tags=asked)},
    )
