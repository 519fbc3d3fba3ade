"""No RL and no score: likelihood on the corpus, but for words that VADER's list calls negative.

    rlhf-jax train experiments/sentiment/unlikelihood.py --out runs/sentiment_unlikelihood

Token feedback: the list marks each word of a sentence, and a word below 0 is pushed down where it
stands (Welleck et al. 2020) while the others are learned as usual. The same prompts, sampling and
score as `ppo.py`.
Expect a score of 0.29 on held-out prompts (0.15 before) at 3.6 nats per sample.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import conditional
import quickstart_base as base
from measured import measured

from rlhf_jax.config import Config, From, Frozen, Pipeline
from rlhf_jax.data import snippets, streams
from rlhf_jax.objectives import unlikelihood


def train() -> Config:
    """`conditional.py` with marks on tokens in place of a token in front."""
    given = conditional.train()
    learner = replace(
        given.learners["policy"], objective=partial(unlikelihood, threshold=0.0), transform=None
    )
    text = partial(  # its marks are those of VADER's list
        streams.text,
        batch=256,
        length=base.LENGTH,
        tokenizer=base.TOKENIZER,
        source=partial(snippets.rows, split="base", parts=base.PARTS),
    )
    return replace(
        given,
        name="sentiment_unlikelihood",
        data={**given.data, "text": text},
        learners={"policy": learner},
        frozen={"reference": Frozen(From("policy"))},
        rollouts=replace(given.rollouts, transform=None),
    )


def config() -> Pipeline:
    """Training, then what it says."""
    run = train()
    last = partial(measured, run=run, stage="train", tags={"after": ()})
    return Pipeline(run.name, {"train": run, "measured": last})
