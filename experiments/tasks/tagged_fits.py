"""A trained policy brought back to its base by fewer weights: how much of it can they say?

Every fit starts from the base, whose other weights stay frozen, and minimises KL(policy‖fit) behind
ON over all texts by a quasi-Newton method: nothing is sampled, no rate is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize

from rlhf_jax import measure
from rlhf_jax.config import Config
from rlhf_jax.sharding import path_name
from rlhf_jax.study import Settings
from rlhf_jax.types import Params
from tasks import tagged_exact as exact
from tasks.tagged import Letters, Tagged
from tasks.tagged_arms import reinforced

RANKS = (1, 4)
AFTER = 2  # tokens of [BOS, ON, x] behind which no letter is said
MOST = 4096  # beginnings that are fitted; of more, as many are drawn


@dataclass(frozen=True)
class Adapted(Letters):
    """Letters with a low-rank term beside every matrix of its blocks (Hu et al. 2021, eq. 3)."""

    rank: int = 4

    def part_of(self, source):
        """The weights of a model without such terms, and terms that are 0 so far."""
        source, key = dict(source), jax.random.key(0)
        for name in [name for name in source if name.startswith("layers")]:
            block = dict(source[name])
            for i, (matrix, leaf) in enumerate(source[name].items()):
                if "kernel" not in leaf:
                    continue
                *stack, rows, columns = leaf["kernel"].shape
                first = jax.random.normal(jax.random.fold_in(key, i), (*stack, rows, self.rank))
                block[f"{matrix}_down"] = {"kernel": first / jnp.sqrt(rows)}
                block[f"{matrix}_up"] = {"kernel": jnp.zeros((*stack, self.rank, columns))}
            source[name] = block
        return source

    def init(self, key):
        """Fresh weights, and terms that are 0."""
        return self.part_of(super().init(key))

    def apply(self, params, tokens, **hooks):
        """What the matrices with their terms say."""
        return super().apply(self.merged(params), tokens, **hooks)

    def merged(self, params):
        """The weights of a model without terms that says the same."""
        params = dict(params)
        for name in [name for name in params if name.startswith("layers")]:
            block = {k: v for k, v in params[name].items() if not k.endswith(("_down", "_up"))}
            for matrix, leaf in block.items():
                if "kernel" in leaf:
                    down, up = (params[name][f"{matrix}_{end}"]["kernel"] for end in ("down", "up"))
                    block[matrix] = {"kernel": leaf["kernel"] + down @ up}
            params[name] = block
        return params


def longer(settings: Settings) -> Settings:
    """The settings with longer texts of more prompts: many more states than a head has weights."""
    task = settings.data
    return replace(settings, data=replace(task, prompts=2 * task.prompts, length=task.length + 2))


def gate_long(settings: Settings) -> Config:
    """RL behind ON on `longer` texts: the policy that is fitted."""
    return reinforced("gate_long", longer(settings), tags=("ON",), base="base_long")


# ---- what is fitted to


class Beginnings(NamedTuple):
    """Texts without their last letter, and what a policy says behind each of their letters."""

    tokens: Int[Array, "m t"]  # [BOS, ON, x, y₁ …]
    target: Float[Array, "m t v"]  # its distribution of the letter behind x, y₁ …
    weight: Float[Array, "m"]  # how often it says that beginning; the sum over all is 1


def beginnings(policy: Params, *, model: Letters, task: Tagged) -> Beginnings:
    """All that a policy may have said before a text's last letter, behind ON.

    Every row has the weight of its whole length at all places: summed over the rows that begin
    alike, this is the probability of any shorter beginning.
    """
    texts = exact.support(task)
    p = exact.law(policy, model=model, task=task, tag="ON")
    rows, weights = [], []
    for x, (letters, own) in enumerate(zip(texts.letters[:, :, :-1], p, strict=True)):
        distinct, index = np.unique(letters, axis=0, return_inverse=True)
        head = np.tile([task.bos, task.tag("ON"), task.letters + x], (len(distinct), 1))
        rows.append(np.concatenate([head, distinct], axis=1))
        weights.append(np.bincount(index.ravel(), own) / task.prompts)
    tokens, weight = np.concatenate(rows).astype(np.int32), np.concatenate(weights)
    if len(tokens) > MOST:
        chosen = np.random.default_rng(0).choice(len(tokens), MOST, p=weight / weight.sum())
        tokens, weight = tokens[chosen], np.full(MOST, 1 / MOST)
    target = jnp.exp(measure.next_logp(policy, jnp.asarray(tokens), model=model)[:, AFTER:])
    return Beginnings(jnp.asarray(tokens), target, jnp.asarray(weight, jnp.float32))


# ---- fits


@partial(jax.jit, static_argnames="model")
def loss_and_slope(moving, staying, of: Beginnings, *, model):
    """KL(target‖model), nats per text, and its gradient by the weights that move."""

    def loss(moving):
        params = jax.tree.map(
            lambda a, b: b if a is None else a, moving, staying, is_leaf=lambda x: x is None
        )
        hidden = model.apply(params, of.tokens).hidden[:, AFTER:]
        logp = jax.nn.log_softmax(model.logits(params, hidden).astype(jnp.float32))
        own = jnp.where(of.target > 0, jnp.log(jnp.maximum(of.target, 1e-38)), 0.0)
        return (of.weight * (of.target * (own - logp)).sum((1, 2))).sum()

    return jax.value_and_grad(loss)(moving)


def least(
    params: Params, of: Beginnings, *, model: Letters, pattern: str, steps: int = 300
) -> float:
    """KL that is left if the weights whose path matches move and all others stay: by L-BFGS.

    Not convex, so an upper bound; from the base on, with at most `steps` iterations.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    moves = [re.search(pattern, name) is not None for name in names]
    if not any(moves):
        raise ValueError(f"no weight matches {pattern!r}; there are {', '.join(names)}")
    both = [(x, None) if m else (None, x) for m, (_, x) in zip(moves, leaves, strict=True)]
    moving, staying = (jax.tree.unflatten(tree, side) for side in zip(*both, strict=True))
    start, shaped = ravel_pytree(moving)

    def loss(flat):
        value, slope = loss_and_slope(
            shaped(jnp.asarray(flat, start.dtype)), staying, of, model=model
        )
        return float(value), np.asarray(ravel_pytree(slope)[0], np.float64)

    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 1e-8, "gtol": 1e-7}
    found = minimize(
        loss, np.asarray(start, np.float64), jac=True, method="L-BFGS-B", options=options
    )
    return float(found.fun)


def fits(
    seed: int,
    before: Mapping[str, Mapping[str, Params]],
    *,
    task: Tagged,
    model: Letters,
    steps: int = 300,
) -> dict[str, Any]:
    """What of an RL policy behind ON each part of its base cannot say: shares of its KL.

    A bias of the logits and another output matrix on the base's features are convex problems; the
    last block, terms of a low rank beside every matrix, and all weights are not. All weights can
    say it: what they leave is what the search leaves.
    """
    del seed
    policy, base = before["gate_long"]["policy"], before["base_long"]["policy"]
    of = beginnings(policy, model=model, task=task)
    whole = float(loss_and_slope(base, jax.tree.map(lambda x: None, base), of, model=model)[0])
    left = heads(base, of, model=model)
    shares = {"last_block": rf"layers_{model.layers - 1}/", "whole": "."}
    left |= {
        name: least(base, of, model=model, pattern=p, steps=steps) for name, p in shares.items()
    }
    shape = {f.name: getattr(model, f.name) for f in fields(Letters)}
    for rank in RANKS:
        wide = Adapted(**shape, rank=rank)
        left[f"rank_{rank}"] = least(
            wide.part_of(base), of, model=wide, pattern=r"_(down|up)/", steps=steps
        )
    states = task.prompts * sum(task.letters**t for t in range(task.length))
    found = {name: x / whole for name, x in left.items()}
    return found | {"kl": whole, "states_by_feature": states / model.width}


def heads(base, of, *, model):
    """The best bias of the logits, and the best output matrix, in float64."""

    def flat(x):
        return np.asarray(x, np.float64)[:, AFTER:].reshape(-1, x.shape[-1])

    offset = flat(measure.next_logp(base, of.tokens, model=model))
    hidden = flat(model.apply(base, of.tokens).hidden)
    target = np.asarray(of.target, np.float64).reshape(offset.shape)
    weight = np.repeat(np.asarray(of.weight, np.float64), of.target.shape[1])
    sides = {"bias": np.ones((len(hidden), 1)), "head": hidden}
    return {name: exact.fitted(x, offset, target, weight) for name, x in sides.items()}
