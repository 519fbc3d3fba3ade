"""What the arms of `token_feedback.py` are paid for, and the likelihood beside DPO."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Terms
from tasks import facts
from tasks.facts import COUNTRY


def preferred(scores, batch):
    """−log π of the preferred text, in nats per token."""
    first = batch.mask & (jnp.arange(batch.tokens.shape[1]) == 0)[None, :, None]
    return Terms(-masked.select(scores.logp, first), weight=first.astype(jnp.float32))


def by_scorer(rollout, params, *, model):
    """A reward of the country alone: the mark that the token reward model expects, 2 σ(s) − 1."""
    hidden = model.apply(params["scorer"], rollout.tokens, segments=rollout.segments).hidden
    mark = jnp.tanh(0.5 * model.value(params["scorer"], hidden))
    return masked.select(mark, rollout.mask & _at_country(rollout))


def by_table(rollout, params, *, task, count):
    """A reward of the country alone: the mean mark that this city and country got; 0 if none."""
    tokens, marks = facts.labels(facts.annotator(params["reference"]), count, task=task)
    table = facts.mean_marks(tokens, marks, task=task)
    mark = jnp.take(table, rollout.tokens[:, 1], axis=0)  # [rows, v]
    mark = jnp.take_along_axis(mark, rollout.tokens, axis=1)
    return masked.select(mark, rollout.mask & _at_country(rollout))


def _at_country(rollout):
    return jnp.arange(rollout.tokens.shape[1])[None] == COUNTRY
