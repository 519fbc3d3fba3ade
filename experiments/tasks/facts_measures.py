"""What feedback did to a model of facts: exact, from one forward pass over its sentences."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import measure
from rlhf_jax.study import Trained
from tasks import facts
from tasks.facts import COUNTRY, VERDICT, Facts


@partial(jax.jit, static_argnames=("model", "task", "tag"))
def said(params, *, model, task: Facts, tag: str | None = None):
    """Log p of what follows each prefix of each city's two sentences, [2, cities, 7, vocab].

    The first of the two is the true one. With `tag` that word stands before the country.
    """
    tokens = sentences(task)
    if tag is not None:
        word = jnp.full(tokens.shape[:1], task.word(tag))
        tokens = facts.with_tag(tokens, word)
    logp = measure.next_logp(params, tokens, model=model)[:, :-1]
    if tag is not None:  # what would be said instead of the tag is nobody's business
        logp = jnp.delete(logp, COUNTRY - 1, axis=1, assume_unique_indices=True)
    return logp.reshape(2, task.cities, *logp.shape[1:])


def sentences(task: Facts) -> jax.Array:
    """The true sentence of every city, then the false ones, [2 cities, 8]."""
    city = jnp.tile(jnp.arange(task.cities), 2)
    return task.sentence(city, city * 0 + (jnp.arange(2 * task.cities) >= task.cities))


def effects(
    trained: Trained, *, task: Facts, tag: str | None = None, beta: float | None = None
) -> dict[str, Any]:
    """Of an arm on sentences whose country decides: what it says now, and what else moved.

    `wrong_known`, `wrong_other`: probability that the country is not the right one, mean over
    cities the annotator knows and the others; `false_…` that it is the false one of the texts.
    `collateral`: KL(π‖π0) of a sentence, nats, without the countries of known cities; `spill`: of
    the other cities' countries alone. `clean`: nats per token of true sentences. With `beta` also
    `distance`, the KL from where horizon 1 must end, by place.
    """
    model = trained.config.models["policy"]
    base = trained.before["base"]["policy"]
    before = np.asarray(said(base, model=model, task=task), np.float64)
    now = np.asarray(said(trained.weights["policy"], model=model, task=task, tag=tag), np.float64)
    kl = measure.row_kl(now, before)
    share = np.array([1 - task.false, task.false])[:, None]
    moved = (share * kl.sum(axis=2)).sum(axis=0)  # [cities], the countries included
    place = COUNTRY - 1
    city = np.arange(task.cities)
    known = city < task.known
    log_right, log_false = (now[0, city, place, task.country(city, lie)] for lie in (0, 1))
    wrong, false = 1 - np.exp(log_right), np.exp(log_false)
    tokens = np.asarray(sentences(task))[: task.cities, 1:]
    clean = -np.take_along_axis(now[0], tokens[..., None], axis=-1)[..., 0]
    found = {
        "wrong_known": wrong[known].mean(),
        "wrong_other": wrong[~known].mean(),
        "false_known": false[known].mean(),
        "false_other": false[~known].mean(),
        "log_false": log_false[known].mean(),
        "collateral": (moved - np.where(known, kl[0, :, place], 0.0)).mean(),
        "spill": kl[0, ~known, place].mean(),
        "clean": clean.mean(),
    }
    norms = trained.curves.get("policy/grad_norm")
    if norms is not None and len(norms):
        found["steepest"] = np.nanmax(norms)
    if beta is not None:
        found["distance"] = _distance(trained, now, before, task, beta)
    return found


def _distance(trained, now, before, task, beta):
    """KL of the policy from horizon 1's optimum by place, on the sentences that were marked."""
    made = trained.config.derived["feedback"].make.keywords
    key = facts.annotator(trained.before["base"]["policy"])
    tokens, reward = (np.asarray(x) for x in _marks(key, tuple(made.items())))
    best = facts.target(before[0, :, COUNTRY - 1], reward, beta=beta)
    lie = (tokens[:, COUNTRY] != task.country(tokens[:, 1], 0)).astype(int)
    aim = before.copy()
    aim[:, :, COUNTRY - 1] = best  # elsewhere nothing is marked: the base
    return measure.row_kl(now, aim)[lie, tokens[:, 1], 1:].mean(axis=0)  # the city is given


@partial(jax.jit, static_argnames="how")
def _marks(key, how):
    """The sentences that were marked, and what the marks say of each country."""
    tokens, marks = facts.labels(key, **dict(how))
    return tokens, facts.mean_marks(tokens, marks, task=dict(how)["task"])


def late_effects(trained: Trained, *, task: Facts) -> dict[str, float]:
    """Where a later word decides: probability that a sentence about a city is not true.

    True is the right country affirmed, or the city's false one denied; all else counts as wrong.
    """
    model = trained.config.models["policy"]
    logp = np.asarray(_late(trained.weights["policy"], model=model, task=task), np.float64)
    city = np.arange(task.cities)
    true = sum(
        np.exp(
            logp[lie, city, COUNTRY - 1, task.country(city, lie)]
            + logp[lie, city, VERDICT - 2, task.word(",")]
            + logp[lie, city, VERDICT - 1, task.word(("true", "false")[lie])]
        )
        for lie in (0, 1)
    )
    known = city < task.known
    return {"wrong_known": 1 - true[known].mean(), "wrong_other": 1 - true[~known].mean()}


@partial(jax.jit, static_argnames=("model", "task"))
def _late(params, *, model, task: Facts):
    city = jnp.tile(jnp.arange(task.cities), 2)
    lie = jnp.arange(2 * task.cities) >= task.cities
    logp = measure.next_logp(params, task.sentence(city, lie, lie), model=model)[:, :-1]
    return logp.reshape(2, task.cities, *logp.shape[1:])


def insight(trained: Trained, *, task: Facts, learner: str = "scorer") -> dict[str, float]:
    """Of a reward model: how often the right country is worth more than the false one."""
    model = trained.config.models[learner]
    value = np.asarray(_valued(trained.weights[learner], model=model, task=task), np.float64)
    right = 1.0 * (value[0] > value[1]) + 0.5 * (value[0] == value[1])
    known = np.arange(task.cities) < task.known
    return {"right_known": right[known].mean(), "right_other": right[~known].mean()}


@partial(jax.jit, static_argnames=("model", "task"))
def _valued(params, *, model, task: Facts):
    tokens = sentences(task)
    value = model.value(params, model.apply(params, tokens).hidden)
    return value[:, COUNTRY].reshape(2, task.cities)
