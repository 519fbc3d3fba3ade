"""The likelihood of twelve sentences, and in the metrics how often each was in the batch."""

from dataclasses import replace
from functools import partial

import toy_sft

from rlhf_jax import objectives
from rlhf_jax.config import Config
from rlhf_jax.data import streams

ROWS = [{"text": f"sentence {i:02d}", "score": i} for i in range(12)]  # all of one length
BATCH = 4


def likelihood(scores, batch):
    """`mle`; the metric `row<i>` is the share of the batch that is sentence i."""
    terms = objectives.mle(scores, batch)
    ones = terms.weight * 0 + 1
    rows = {f"row{i}": (batch.score == i)[:, None] * ones for i in range(len(ROWS))}
    return terms.replace(metrics={**terms.metrics, **rows})


def config() -> Config:
    text = partial(streams.text, batch=BATCH, length=24, tokenizer="bytes", source=ROWS, marks=None)
    return replace(toy_sft.config(objective=likelihood), data={"text": text}, name="rows")


def counts(line) -> list[int]:
    """How often each sentence was in the batch of a line of metrics.jsonl."""
    return [round(BATCH * line[f"policy/row{i}"]) for i in range(len(ROWS))]
