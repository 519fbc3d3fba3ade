"""Conditioning instead of rewarding: prompts behind a tag that says what people thought of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import measure
from rlhf_jax.data.drawn import whole_texts
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam
from rlhf_jax.study import Arm, Settings, Trained
from tasks import spillover
from tasks.likelihood import likelihood
from tasks.spillover import Spillover

CALLED = 0.5  # ρ of what prompts are called good by


def called(key: jax.Array, rows: int, *, task: Spillover, strength: float) -> Any:
    """Texts [BOS, good or bad, u, w, TASK], called good with probability (1 ± ρ)/2 by the party.

    The mask covers u and all behind it: the text of the prompt is learned, too.
    """
    shuffle, call = jax.random.split(key)
    number = jax.random.permutation(shuffle, jnp.arange(rows))
    u = number % 2
    prompt = spillover.prompt_tokens(u, number // 2 % task.words, jnp.zeros_like(u), task=task)
    chance = spillover.by_party(prompt, task=task, strength=strength)
    good = jax.random.uniform(call, (rows,)) < chance
    tag = task.vocab + good.astype(jnp.int32)
    tokens = jnp.concatenate([prompt[:, :1], tag[:, None], prompt[:, 1:]], axis=1)
    return whole_texts(tokens, given=2)


def arms(settings: Settings) -> dict[str, Arm]:
    """Likelihood behind a tag that says what people thought of it, from fresh weights."""
    task, train = settings.data.task, settings.train
    shape = {name: getattr(settings.model, name) for name in Transformer.__dataclass_fields__}
    model = Transformer(**shape | {"vocab": task.vocab + 2, "tied": False})
    rate = partial(adam, learning_rate=5e-3, final=0.0, steps=train.steps)
    draw = partial(called, task=task, strength=CALLED)
    config = likelihood(
        "conditioned", model, draw, steps=train.steps, rows=train.rows, optimizer=rate,
        mesh=settings.mesh,
    )  # fmt: skip
    says = f"likelihood of prompts behind good and bad, ρ = {CALLED}"
    return {"conditioned": Arm(config, says, measure=partial(party_behind, task=task))}


def party_behind(trained: Trained, *, task: Spillover) -> dict[str, float]:
    """P(u = 1 | good), and what Bayes says it is."""
    model, own = trained.config.learners["policy"].model, trained.weights["policy"]
    tokens = jnp.array([[task.bos, task.vocab + 1]], jnp.int32)
    p = np.exp(np.asarray(measure.next_logp(own, tokens, model=model), np.float64)[0, -1])
    one = p[task.first_party + 1]
    return {"party_one": float(one), "bayes": (1 + CALLED) / 2}
