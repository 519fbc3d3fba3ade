"""What the loop is fed: streams opened, and every batch looked at before it reaches the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.config import Config
from rlhf_jax.phases import samples_of
from rlhf_jax.types import Pairs, Prompts


class RunError(RuntimeError):
    """A run that cannot go on; the message says why, where things were kept and what to do."""


def opened(config: Config, name: str, seed: int | None = None) -> Iterator:
    """An iterator over this process's share of a stream; None is the run's own seed."""
    seed = config.seed if seed is None else seed
    shard = sharding.row_share(jax.sharding.get_mesh())
    return iter(config.data[name](seed=seed, shard=shard))


def opened_all(config: Config) -> dict[str, Iterator]:
    """An iterator for every stream that a learner, a derived batch or the rollouts read."""
    used = {learner.batch for learner in config.learners.values()}
    for name in reversed(list(config.derived)):  # later ones may be made of earlier ones
        used |= set(config.derived[name].of) if name in used else set()
    used -= {"experience", *config.derived}
    if config.rollouts is not None:
        used.add(config.rollouts.prompts)
    return {name: opened(config, name) for name in sorted(used)}


def looked_at(config: Config, name: str, batch: Any) -> Any:
    """A host batch as it is to be used: prompts as often as each is sampled, texts as they are.

    Raises:
        RunError: if no model could learn from it, saying why.
    """
    if isinstance(batch, Prompts):
        if config.rollouts is None or name != config.rollouts.prompts:
            raise RunError(
                f"data {name!r} makes Prompts, which only the rollouts read (rollouts.prompts); a "
                "learner needs texts or pairs: streams.text, streams.pairs"
            )
        return _prompts(config, name, batch)
    mask, tokens = np.asarray(batch.mask), np.asarray(batch.tokens)
    if mask[..., 0].any():
        raise RunError(
            f"data {name!r}: the mask is true at index 0, where nothing predicts the token; start "
            "texts with BOS and leave it out of the mask"
        )
    if isinstance(batch, Pairs) and tokens.ndim != 3:
        raise RunError(f"data {name!r}: pairs are [n, k, t], got {tokens.shape}")
    for learner in config.learners:
        _check_vocabulary(config, name, tokens, learner)
    return batch


def _prompts(config, name, prompts):
    spec = config.rollouts
    context = config.models[spec.policy].context
    width = prompts.tokens.shape[1]
    if spec.transform is not None:
        width = jax.eval_shape(spec.transform, prompts, jax.random.key(0)).tokens.shape[1]
    longest = width + spec.length
    if spec.environment is None and longest > context:
        raise RunError(
            f"prompts of up to {width} tokens and responses of up to "
            f"{spec.length} make {longest}, but the model's context is {context}; shorten "
            "one of them, or use a model with a longer context"
        )
    _check_vocabulary(config, name, prompts.tokens, spec.policy)
    return samples_of(prompts, spec.samples)


def _check_vocabulary(config, name, tokens, model):
    largest, vocab = int(np.max(tokens)), config.models[model].vocab
    if largest >= vocab:
        raise RunError(
            f"data {name!r} holds token {largest}, but the model of {model!r} has a "
            f"vocabulary of {vocab}; the tokenizer {config.tokenizer!r} does not fit it"
        )
