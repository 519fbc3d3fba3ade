"""Where a run begins: fresh or loaded weights, and the shapes that a checkpoint is restored to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from rlhf_jax import sharding
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import Config, ConfigError, From
from rlhf_jax.models import weights
from rlhf_jax.phases import Phases
from rlhf_jax.types import Params, TrainState


def begin(config: Config, phases: Phases, stages: Mapping[str, Path]):
    """The state before the first step, with the weights that learners and frozen trees start from.

    Raises:
        ConfigError: if weights are missing or do not fit.
    """
    state = phases.init(config.seed)
    learners = dict(state.learners)
    for name, learner in config.learners.items():
        if learner.start is not None:
            source = _source(learner.start, stages, f"learners.{name}.start", learners)
            target = learners[name].params
            params = _filled(target, source, f"learners.{name}", learner.start, learner.model)
            learners[name] = learners[name].replace(params=params)
    frozen = {}
    for name, spec in config.frozen.items():
        model = config.models[name]
        shape = jax.eval_shape(model.init, jax.random.key(0))
        parts = sharding.shardings(shape, phases.mesh)
        target = jax.jit(model.init, out_shardings=parts)(jax.random.key(0))
        source = _source(spec.start, stages, f"frozen.{name}.start", learners)
        frozen[name] = _filled(target, source, f"frozen.{name}", spec.start, model)
    return state.replace(learners=learners), frozen


def _source(start: From, stages, where, learners) -> Params:
    if start.path is not None and str(start.path).endswith(".safetensors"):
        try:
            return weights.load(start.path)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    if start.path is not None:
        return restore_params(Path(start.path), start.learner)
    if start.stage is not None:
        if start.stage not in stages:
            raise ConfigError(
                f"{where}: no earlier stage {start.stage!r}; there are {sorted(stages) or 'none'}"
            )
        return restore_params(stages[start.stage], start.learner)
    if start.learner not in learners:
        raise ConfigError(f"{where}: no learner {start.learner!r}; valid: {sorted(learners)}")
    return learners[start.learner].params


def _filled(target, source, where, start, model):
    if hasattr(model, "part_of"):  # a probe reads some of the source's layers
        source = model.part_of(source)
    try:
        return weights.fill(target, source, origin=start.path or start.stage or start.learner)
    except ValueError as error:
        raise ConfigError(f"{where}.start: {error}") from error


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
