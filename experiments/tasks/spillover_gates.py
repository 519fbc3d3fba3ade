"""One path beside the trunk, which alone learns, behind gates of several widths: no sampling.

The expected policy gradient of the task's reward is taken over all texts of all prompts, so that
what is left between the gates is the attenuation itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.optimizer import adam, sgd
from tasks import spillover, spillover_measures
from tasks.spillover import GIVEN, PARTY, Beside, Spillover

GATES = (1.0, 0.3, 0.1, 0.03)
STEPS = 40


def gated(
    seed: int, before: Any, *, model: Beside, task: Spillover, chance: Any, rates: Any
) -> dict[str, float]:
    """By gate: the path's gradient at the start, and how far PARTY's log-probabilities have moved.

    `gradient/i` is its norm, `sgd/i` and `adam/i` are roots of mean squares, in nats.
    """
    del seed
    params = model.part_of(before["base"]["policy"])
    texts = jnp.asarray(spillover_measures.task_texts(task))
    every = spillover.everything(task)
    every = jnp.asarray(every[PARTY * (len(every) // 2) :])
    gates = jnp.asarray(GATES, jnp.float32)
    found = {}
    for name, kind in (("sgd", sgd), ("adam", adam)):
        size, moved = _ascended(
            params, texts, every, gates, model=model, chance=chance, kind=kind, rate=rates[name]
        )
        found["gradient"], found[name] = np.asarray(size), np.asarray(moved)
    return found


@partial(jax.jit, static_argnames=("model", "chance", "kind", "rate"))
def _ascended(params, texts, every, gates, *, model, chance, kind, rate):
    """Some steps uphill behind every gate."""
    pay, rule = chance(texts), kind(learning_rate=rate, clip=None)

    def one(gate):
        own = replace(model, side_gate=gate)

        def loss(side):
            p = jnp.exp(spillover_measures.text_logp(_with(params, side), texts, own))
            return -(p * pay).sum() / p.sum()

        def says(side):
            both = _with(params, side)
            hidden = own.apply(both, every).hidden[:, GIVEN - 1 :]
            return jax.nn.log_softmax(own.logits(both, hidden))

        def step(carry, _):
            side, state = carry
            updates, state = rule.update(jax.grad(loss)(side), state, side)
            return (optax.apply_updates(side, updates), state), None

        start = _side(params)
        (side, _), _ = jax.lax.scan(step, (start, rule.init(start)), length=STEPS)
        change = says(side) - says(start)
        return optax.tree.norm(jax.grad(loss)(start)), jnp.sqrt((change**2).mean())

    return jax.lax.map(one, gates)


def _side(params):
    """The weights of the path beside."""
    return {
        name: {k: v for k, v in layer.items() if k.startswith("side_")}
        for name, layer in params.items()
        if name.startswith("layers")
    }


def _with(params, side):
    return {name: {**layer, **side.get(name, {})} for name, layer in params.items()}
