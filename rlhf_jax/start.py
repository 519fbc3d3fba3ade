"""Where a run begins: fresh or loaded weights, and the shapes that a checkpoint is restored to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import sharding
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import Config, ConfigError, From
from rlhf_jax.models import pretrained, weights
from rlhf_jax.phases import Phases
from rlhf_jax.types import Params, TrainState

# Where the weights of a stage are: the directory of its run, or here, by learner.
Stage = Path | Mapping[str, Params]


def begin(config: Config, phases: Phases, stages: Mapping[str, Stage]):
    """The state before the first step, with the weights that learners and frozen trees start from.

    Raises:
        ConfigError: if weights are missing or do not fit.
    """

    def fresh(model):
        shape = jax.eval_shape(model.init, jax.random.key(0))
        parts = sharding.shardings(shape, phases.mesh)
        return jax.jit(model.init, out_shardings=parts)(jax.random.key(0))

    return filled(config, phases.init(config.seed), stages, fresh=fresh)


def filled(
    config: Config,
    state: TrainState,
    stages: Mapping[str, Stage],
    *,
    fresh: Callable[[Any], Params],
    each: Callable[[Callable], Callable] = lambda fn: fn,
):
    """A fresh state with the weights it starts from, and the frozen trees: (state, frozen).

    `fresh(model)` makes a tree for a frozen model to be filled; `each` lifts a function of one tree
    to what trees are here, such as `jax.vmap` where seeds are stacked in front.
    """
    learners = dict(state.learners)

    def started(target, start, model, where):
        source = _source(start, stages, f"{where}.start", learners, model)
        if hasattr(model, "part_of"):  # a probe reads some of the source's layers
            source = each(model.part_of)(source)
        try:
            return weights.fill(target, source, origin=start.path or start.stage or start.learner)
        except ValueError as error:
            raise ConfigError(f"{where}.start: {error}") from error

    for name, learner in config.learners.items():
        if learner.start is not None:
            params = learners[name].params
            params = started(params, learner.start, learner.model, f"learners.{name}")
            learners[name] = learners[name].replace(params=params)
    frozen = {
        name: started(fresh(model), spec.start, model, f"frozen.{name}")
        for name, spec in config.frozen.items()
        for model in [config.models[name]]
    }
    return state.replace(learners=learners), frozen


def _source(start: From, stages, where, learners, model) -> Params:
    if start.path is not None and pretrained.is_directory(start.path):
        try:
            return pretrained.load(start.path, model)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    if start.path is not None and str(start.path).endswith(".safetensors"):
        try:
            return weights.load(start.path)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    if start.path is not None:
        return restore_params(Path(start.path), start.learner)
    given = learners
    if start.stage is not None:
        if start.stage not in stages:
            raise ConfigError(
                f"{where}: no earlier stage {start.stage!r}; there are {sorted(stages) or 'none'}"
            )
        given = stages[start.stage]
        if not isinstance(given, Mapping):
            return restore_params(given, start.learner)
    if start.learner not in given:
        raise ConfigError(f"{where}: no learner {start.learner!r}; valid: {sorted(given)}")
    found = given[start.learner]
    return found.params if start.stage is None else found


def abstract_state(config: Config, phases: Phases) -> TrainState:
    """Shapes, dtypes and shardings of the whole state."""
    shapes = jax.eval_shape(phases.init, config.seed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, phases.shardings
    )


def abstract_frozen(config: Config, mesh) -> dict[str, Params]:
    """The same for the frozen trees."""
    found = {}
    for name in config.frozen:
        shapes = jax.eval_shape(config.models[name].init, jax.random.key(0))
        found[name] = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.shardings(shapes, mesh),
        )
    return found
