"""What the arms of `world_prior.py` are measured by: which worlds a model's texts come from.

The observer is the exact filter of the process, whoever wrote the texts. Everything is measured on
texts as long as a policy writes; the dear measures at an arm's start and end only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import measure
from rlhf_jax.study import Trained
from rlhf_jax.types import Params
from tasks import prior
from tasks.prior import Prior

LEAD = 8  # tokens of the wanted world in front of an interruption


def policy(
    trained: Trained,
    *,
    sizes: Any,
    beta: float | None = None,
    target: str | None = None,
    first: bool = False,
) -> dict[str, Any]:
    """An arm at one of its steps: `texts_of` its weights, and at the end all else.

    With a `target`, a base, also how far the arm is from that; `first`: all else at its start, too.
    """
    model = trained.config.learners["policy"].model
    params, base = trained.weights["policy"], trained.before["base"]["policy"]
    found = texts_of(params, base, model=model, sizes=sizes, seed=trained.seed)
    if target is not None:
        found |= away(trained.before[target]["policy"], params, model=model, sizes=sizes)
    if trained.step == trained.config.steps or (first and trained.step == 0):
        found |= habits(params, base, model=model, sizes=sizes, seed=trained.seed, beta=beta)
    if beta:
        found |= {
            f"best_{name}": x for name, x in prior.tilted(_levels(sizes.task), beta=beta).items()
        }
    return found


def pretrained(
    seed: int, before: Mapping[str, Mapping[str, Params]], *, model: Any, sizes: Any, source: str
) -> dict[str, Any]:
    """The same of a model that was pretrained on something else: nothing is left to train."""
    params, base = before[source]["policy"], before["base"]["policy"]
    found = texts_of(params, base, model=model, sizes=sizes, seed=seed)
    return found | habits(params, base, model=model, sizes=sizes, seed=seed)


def texts_of(params: Params, base: Params, *, model: Any, sizes: Any, seed: int) -> dict[str, Any]:
    """Of texts that a model writes: what they earn, which worlds they are of, KL to the base.

    `reward`, `share` [worlds], `world_entropy` H(W); given the text before, `in_block`, the entropy
    of a token in the most likely world's block, and `rate`, that of any token: all but the first
    from the model's own distributions, nats per token. `entropy` and `kl`, nats per text; `kl` is
    `kl_levels`, of how much of the wanted world a text has, to the process, and the rest,
    `kl_within`, which holds the base's own error too and may lie below 0 by that.
    """
    task: Prior = sizes.task
    rollout, says = _written(params, base, sizes.samples, seed, 1.0, model=model, task=task)
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    next_token = measure.model_predictions(params, tokens, model=model)
    worlds = measure.world_decomposition(tokens, mask, task.worlds, next_token=next_token)
    count = (task.worlds.says(tokens, task.wanted) & mask).sum(axis=1)
    between = prior.kl_of_levels(count, _levels(task))
    return {
        "reward": count.mean() / task.length,
        "share": worlds.share.value,
        "world_entropy": float(worlds.world_entropy),
        "in_block": float(worlds.in_block_next),
        "rate": float(worlds.rate),
        "entropy": float(says.entropy),
        "kl": float(says.kl),
        "kl_levels": between,
        "kl_within": float(says.kl) - between,
    }


def away(target: Params, params: Params, *, model: Any, sizes: Any) -> dict[str, float]:
    """`gap`: KL of what `target` says of the worlds to what `params` say, nats per token.

    On fresh texts of the target's process; of the surface tokens' distribution, where no digit is
    due: SEG, CHAT, CODE and their answers are measured by themselves.
    """
    task: Prior = sizes.task
    tokens, surface = _fresh(task, sizes.samples), task.worlds.surface
    p, q = (
        measure.model_predictions(x, tokens, model=model)[:, 1:, :surface] for x in (target, params)
    )
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    asked = np.isin(tokens[:, :-1], (task.worlds.chat_id, task.worlds.code_id), invert=True)
    return {"gap": float((p * np.log(p / q)).sum(axis=-1)[asked].mean())}


def habits(
    params: Params, base: Params, *, model: Any, sizes: Any, seed: int, beta: float | None = None
) -> dict[str, Any]:
    """What a model does when it is interrupted, asked for a number, or heated."""
    task: Prior = sizes.task
    believed = _believed(params, seed, model=model, sizes=sizes)
    found = {
        "believed_prior": np.asarray(believed.worlds.prior),
        "believed_switch": believed.worlds.switch,
        "believed_noise": believed.worlds.noise,
        "believed_residual": float(believed.residual.kl),
    }
    for length in sizes.injected:
        found |= _interrupted(
            params, believed, length, model=model, sizes=sizes, seed=seed, beta=beta
        )
    for name, sign in (("chat", task.worlds.chat_id), ("code", task.worlds.code_id)):
        found |= _asked(params, sign, name, model=model, sizes=sizes, seed=seed)
    return found | _heated(params, base, model=model, sizes=sizes, seed=seed)


def _interrupted(params, believed, length, *, model, sizes, seed, beta) -> dict[str, Any]:
    """The wanted world's text, `length` tokens of another, and then? Measured and predicted.

    Predicted by the filter of the process, by that of the worlds which the model believes in,
    refitted to what it says on its own texts, and for RL by the optimum.
    """
    task: Prior = sizes.task
    key = jax.random.fold_in(jax.random.key(seed), 11)
    prompts = measure.inject(
        key, task.worlds, sizes.samples, attractor=task.wanted, other=0, length=length, lead=LEAD
    )
    lags = task.length - LEAD - length  # as long as the texts it knows
    rollout, _ = measure.sampled_at(
        params, prompts, jax.random.fold_in(key, 1), 1.0, model=model, length=lags
    )
    said = np.asarray(rollout.tokens)[:, prompts.tokens.shape[1] :]
    attracted = partial(measure.predicted_attraction, np.asarray(prompts.tokens), lags=lags)
    found = {"": measure.attraction(said, task.worlds, attractor=task.wanted)}
    found["process_"] = attracted(task.worlds, attractor=task.wanted)
    found["refit_"] = attracted(believed.worlds, attractor=task.wanted)
    numbers = {}
    for name, x in found.items():
        numbers |= {f"{name}returned_{length}": np.asarray(x.share.value)}
        numbers |= {f"{name}hazard_{length}": float(x.early), f"{name}median_{length}": x.median}
        numbers |= {f"{name}segment_{length}": float(x.segment)}
    if beta:
        best = prior.tilted_share(np.asarray(prompts.tokens), task, beta=beta, lags=lags)
        numbers[f"best_returned_{length}"] = best
    return numbers


def _believed(params, seed, *, model, sizes):
    """The worlds that explain best what a model says on its own texts."""
    task: Prior = sizes.task
    rollout, _ = _written(params, None, sizes.samples, seed + 1000, 1.0, model=model, task=task)
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    says = measure.model_predictions(params, tokens, model=model)
    return measure.refit(says, tokens, mask, task.worlds)


def _asked(params, sign, name, *, model, sizes, seed) -> dict[str, float]:
    """Behind a context: KL(uniform digits‖model), nats; that among digits; what is no digit."""
    task: Prior = sizes.task
    worlds = task.worlds
    key = jax.random.fold_in(jax.random.key(seed), 12)
    prompts = measure.inject(
        key, worlds, sizes.samples, attractor=task.wanted, other=None, length=0, lead=LEAD
    )
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, 1)), constant_values=sign)
    prompts = prompts.replace(tokens=tokens, length=prompts.length + 1)
    digits = range(worlds.surface, worlds.chat_id)
    p = measure.next_token_probabilities(params, prompts, model=model, outcomes=digits)
    each = [measure.calibration(row) for row in p]
    among, invalid = np.mean([x.kl for x in each]), np.array([x.invalid for x in each])
    return {
        f"{name}_kl": float(among - np.log1p(-invalid).mean()),
        f"{name}_kl_among": float(among),
        f"{name}_invalid": float(invalid.mean()),
    }


def _heated(params, base, *, model, sizes, seed) -> dict[str, Any]:
    """Curves over temperatures, and what is there at T*, where the entropy is the base's again.

    If it never is: at the coldest or the hottest, whichever is closer.
    """
    task: Prior = sizes.task
    _, plain = _written(base, None, sizes.samples, seed, 1.0, model=model, task=task)

    def at(temperature):
        rollout, says = _written(
            params, base, sizes.samples, seed, temperature, model=model, task=task
        )
        tokens = np.asarray(rollout.tokens)
        share = measure.world_decomposition(tokens, np.asarray(rollout.mask), task.worlds).share
        hit = np.asarray(task.worlds.says(tokens[:, 1:], task.wanted))
        return {
            "entropy": float(says.entropy),
            "share": share.value[task.wanted],
            "reward": hit.mean(),
            "kl": float(says.kl),
        }

    curves = measure.sweep(at, sizes.temperatures)
    found = {f"heated_{name}": x for name, x in curves.items() if name != "temperature"}
    heat, target = np.log(curves["temperature"]), float(plain.entropy)
    star = np.interp(target, curves["entropy"], heat)
    there = {
        f"star_{x}": float(np.interp(star, heat, curves[x])) for x in ("share", "reward", "kl")
    }
    return found | there | {"star_temperature": float(np.exp(star))}


def _written(params, base, rows, seed, temperature, *, model, task: Prior):
    """Texts of a model at a temperature, their entropy and KL to the base at temperature 1."""
    prompts = prior.start(jax.random.key(0), rows, worlds=task.worlds)
    key = jax.random.fold_in(jax.random.key(seed), 10)
    return measure.sampled_at(
        params, prompts, key, temperature, model=model, length=task.length, reference=base
    )


@cache
def _levels(task: Prior) -> np.ndarray:
    return prior.levels(task.worlds, length=task.length, world=task.wanted)


@cache
def _fresh(task: Prior, rows: int) -> np.ndarray:
    """Texts of the reweighted process."""
    draw = partial(prior.texts, rows=rows, worlds=task.reweighted, length=task.length)
    return np.asarray(jax.jit(draw)(jax.random.key(7)).tokens)
