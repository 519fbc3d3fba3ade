"""A trained policy brought back into its base by a few of the base's weights, or beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.config import Config, From, Frozen, Learner, Rollouts
from rlhf_jax.objectives import distill, distill_vocab
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.sharding import path_name
from rlhf_jax.study import Settings
from tasks import tagged
from tasks.tagged import Letters, sized
from tasks.tagged_arms import reinforced, run


def only(*, pattern: str, **options: Any) -> optax.GradientTransformation:
    """Adam for the weights whose path matches; the others stay as they are."""

    def label(params):
        def one(path, _):
            return "moves" if re.search(pattern, path_name(path)) else "stays"

        found = jax.tree_util.tree_map_with_path(one, params)
        if "moves" not in jax.tree.leaves(found):
            paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise ValueError(f"no weight matches {pattern!r}; there are {', '.join(paths)}")
        return found

    return optax.multi_transform({"moves": adam(**options), "stays": optax.set_to_zero()}, label)


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


def distilled(
    name: str, settings: Settings, *, teacher: str, base: str, pattern: str, rank: int | None = None
) -> Config:
    """The base brought to an arm's policy behind ON by those weights alone whose path matches."""
    model = sized(settings.model, settings.data)
    student = model
    if rank is not None:
        student = Adapted(**{f.name: getattr(model, f.name) for f in fields(Letters)}, rank=rank)
    learner = Learner(
        student,
        distill,
        optimizer=partial(only, pattern=pattern),
        vocab=partial(distill_vocab, beta=0.0),
        scores=("teacher",),
    )
    rollouts = Rollouts(
        partial(tagged.gold, task=settings.data),
        length=1,
        policy="teacher",
        reference=None,
        kl=KL(0.0, adaptive=False),
    )
    frozen = {"teacher": Frozen(From("policy", stage=teacher), model)}
    return run(
        name, settings, learner=learner, rollouts=rollouts, frozen=frozen, tags=("ON",), base=base
    )


def longer(settings: Settings) -> Settings:
    """The settings with longer texts of more prompts: many more states than a head has weights."""
    task = settings.data
    return replace(settings, data=replace(task, prompts=2 * task.prompts, length=task.length + 2))


def partial_fits(settings: Settings) -> dict[str, Config]:
    """RL behind ON on `longer` texts, and its policy by fewer of the base's weights.

    The best head needs no training: `tagged_measures.heads`.
    """
    long, last = longer(settings), settings.model.layers - 1
    fit = partial(distilled, settings=long, teacher="gate_long", base="base_long")
    return {
        "gate_long": reinforced("gate_long", long, tags=("ON",), base="base_long"),
        "last_block": fit("last_block", pattern=rf"layers_{last}/"),
        "adapter": fit("adapter", pattern=r"_(down|up)/", rank=2),
        "whole": fit("whole", pattern=r"."),
    }
