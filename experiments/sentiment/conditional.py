"""No RL: likelihood on texts that say in front how positive they are, and then asking for positive.

    rlhf-jax train experiments/sentiment/conditional.py --out runs/sentiment_conditional

Conditional training (Korbak et al. 2023): each sentence of the corpus gets a token by VADER's score
of it, good from 0.5 on and bad below, dropped from one text in ten; the base model is fine-tuned on
them, and samples follow the good token. The same prompts, sampling and score as `ppo.py`; the
reference does not see the tokens.
Expect little: in 400 updates a text's likelihood gains 0.05 nats by its token, and asking for good
gives a score of 0.20, asking for bad 0.18 (the base: 0.15).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ppo
import quickstart_base as base
from measured import BAD, GOOD, measured

from rlhf_jax.conditioning import condition, tagged
from rlhf_jax.config import Config, From, Frozen, Learner, Pipeline
from rlhf_jax.data import snippets, streams, vader
from rlhf_jax.models.untagged import Untagged
from rlhf_jax.objectives import mle
from rlhf_jax.rewards import KL

THRESHOLD = 0.5  # of VADER's score: three sentences in ten
STEPS, UPDATES = 90, 8  # of 64 texts


def scored():
    """Sentences of the splits that training may see, with VADER's score in place of people's."""
    splits = (snippets.rows(split=split, parts=base.PARTS) for split in ("base", "reward"))
    return [{**row, "score": vader.vader_compound(row["text"])} for rows in splits for row in rows]


def train() -> Config:
    """Fresh weights, the base model's recipe, a token in front of nine texts in ten."""
    given, recipe = ppo.config(), base.config().stages["sft"].learners["policy"].optimizer
    learner = Learner(
        base.MODEL,
        mle,
        batch="text",
        optimizer=partial(recipe.func, **{**recipe.keywords, "steps": STEPS * UPDATES}),
        minibatches=UPDATES,
        transform=partial(condition, edges=(THRESHOLD,), tags=(BAD, GOOD), drop=0.1),
    )
    text = partial(
        streams.text,
        batch=64 * UPDATES,
        length=base.LENGTH,
        tokenizer=base.TOKENIZER,
        source=scored,
        marks=None,
    )
    prompts = given.data["prompts"]
    return replace(
        given,
        name="sentiment_conditional",
        steps=STEPS,
        data={
            "prompts": partial(prompts.func, **{**prompts.keywords, "batch": 64}),
            "text": text,
        },
        learners={"policy": learner},
        frozen={
            "reference": Frozen(From(path=base.WEIGHTS), Untagged(base.MODEL, tags=(GOOD, BAD)))
        },
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
