"""No RL: likelihood on texts that say in front how positive they are, and then asking for positive.

    rlhf-jax train experiments/sentiment/conditional.py --out runs/sentiment_conditional

Conditional training (Korbak et al. 2023): each sentence of the corpus gets a token by VADER's score
of it, good from 0.5 on and bad below, dropped from one text in ten; the base model is fine-tuned on
them, and samples follow the good token. The same prompts, sampling and score as `ppo.py`; the
reference does not see the tokens.
Expect little: in 400 updates a text's likelihood gains 0.05 nats by its token, and asking for good
gives a score of 0.20, asking for bad 0.18 (the base: 0.15). Nor was it learned by fresh weights in
720 updates (0.18 and 0.24), from 25,600 of the base model's own samples (0.16 and 0.20), or by
tokens whose embeddings start apart (0.19 and 0.18; both stand in one place otherwise, cosine 0.96):
a model of 1.2 M parameters seems too small, or these texts too few.
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
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL

THRESHOLD = 0.5


def scored(split: str):
    """Sentences whose score is VADER's."""
    rows = snippets.rows(split=split, parts=base.PARTS)
    return [{**row, "score": vader.vader_compound(row["text"])} for row in rows]


def train() -> Config:
    """`ppo.py` with likelihood in place of PPO, and a token in every prompt."""
    given = ppo.config()
    rate = partial(adam, learning_rate=1e-3, final=0.05, steps=given.steps * 4, warmup=20)
    texts = partial(
        streams.text, batch=256, length=base.LENGTH, tokenizer=base.TOKENIZER, marks=None
    )
    learner = Learner(
        base.MODEL,
        mle,
        batch="text",
        start=From(path=base.WEIGHTS),
        optimizer=partial(rate, weight_decay=0.3),
        minibatches=4,
        transform=partial(condition, edges=(THRESHOLD,), tags=(BAD, GOOD), drop=0.1),
    )
    rollouts = replace(
        given.rollouts,
        transform=partial(tagged, tags=(GOOD,)),
        value=None,
        normalise=0,
        kl=KL(initial=0.0, adaptive=False),
    )
    return replace(
        given,
        name="sentiment_conditional",
        data={**given.data, "text": partial(texts, source=partial(scored, "base"))},
        learners={"policy": learner},
        frozen={
            "reference": Frozen(From(path=base.WEIGHTS), Untagged(base.MODEL, tags=(GOOD, BAD)))
        },
        rollouts=rollouts,
    )


def config() -> Pipeline:
    """Training, then what it says when asked for good, for bad and for nothing."""
    run = train()
    asked = {"asked for good": (GOOD,), "asked for bad": (BAD,), "not asked": ()}
    last = partial(measured, run=run, stage="train", tags=asked)
    return Pipeline(run.name, {"train": run, "measured": last})
