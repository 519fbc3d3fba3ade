"""Where a run begins: fresh or loaded weights, and the shapes that a checkpoint is restored to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from rlhf_jax import feed, sharding
from rlhf_jax.bucket import place
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.config import Config, ConfigError, From
from rlhf_jax.models import pretrained, weights
from rlhf_jax.phases import Phases, init, learner_state, phase_key
from rlhf_jax.types import LearnerState, Params, Rollout, TrainState

# Where the weights of a stage are: the directory of its run, or here, by learner.
Stage = os.PathLike | Mapping[str, Params]


def begin(config: Config, phases: Phases, stages: Mapping[str, Stage]):
    """The state before the first step, with the weights that learners and frozen trees start from.

    Weights that a start brings go straight to their places on the mesh; only what it lacks, such as
    a value head or terms of low rank, is made at random.

    Raises:
        ConfigError: if weights are missing or do not fit.
    """
    state, parts = _fresh(config, phases), phases.shardings
    blank = {name: x.params for name, x in abstract_state(config, phases).learners.items()}
    blank |= abstract_frozen(config, phases.mesh)

    def finish(name, params) -> LearnerState | Params:
        learner = config.learners.get(name)
        if learner is None:
            return _completed(params, config.models[name], jax.random.key(0))
        key = phase_key(config.seed, 0, f"init/{name}")
        make = partial(learner_state, learner=learner)
        make = jax.jit(make, out_shardings=parts.learners[name], donate_argnums=0)
        return make(_completed(params, learner.model, key))

    return filled(config, state, stages, blank=blank.__getitem__, finish=finish)


def _fresh(config: Config, phases: Phases) -> TrainState:
    """The state with those learners alone that start from nothing."""
    alone = {name: one for name, one in config.learners.items() if one.start is None}
    if len(alone) == len(config.learners):
        return phases.init(config.seed)
    parts = phases.shardings.replace(learners={n: phases.shardings.learners[n] for n in alone})
    make = partial(init, config=replace(config, learners=alone))
    return jax.jit(make, out_shardings=parts)(config.seed)


def _completed(params: Params, model: Any, key: jax.Array) -> Params:
    """The leaves that are shapes still, as the model makes them: the others cost nothing."""
    shapes = {n: x for n, x in weights.flat(params).items() if isinstance(x, jax.ShapeDtypeStruct)}
    if not shapes:
        return params

    def make(key):
        found = weights.flat(model.init(key))
        return {name: found[name] for name in shapes}

    parts = {name: x.sharding for name, x in shapes.items()}
    return weights.merged(params, weights.nested(jax.jit(make, out_shardings=parts)(key)))


def filled(
    config: Config,
    state: TrainState,
    stages: Mapping[str, Stage],
    *,
    blank: Callable[[str], Params],
    finish: Callable[[str, Params], LearnerState | Params],
    each: Callable[[Callable], Callable] = lambda fn: fn,
):
    """A state with the weights it starts from, and the frozen trees: (state, frozen).

    `blank(name)` is the tree to be filled, of arrays or of shapes with shardings; `finish(name,
    params)` makes a learner, or a frozen tree, of what is filled; `each` lifts a function of one
    tree to what trees are here, such as `jax.vmap` where seeds are stacked in front.
    """
    learners, done = dict(state.learners), set()

    def started(name, start, model, where):
        target = blank(name)
        origin = start.path or start.stage or start.learner
        try:
            source = _source(start, model, stages, learners)
            if isinstance(source, os.PathLike) and not hasattr(model, "part_of"):
                return _restored(target, source, start.learner, origin)
            if isinstance(source, os.PathLike):
                source = restore_params(source, start.learner)
            if hasattr(model, "part_of"):  # a probe reads some of the source's layers
                source = each(model.part_of)(source)
            return weights.fill(target, source, origin=origin)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error

    def learn(name, waiting=()):
        start = config.learners[name].start
        if start is None or name in done:
            return
        if name in waiting:
            raise ConfigError(f"learners.{name}.start: {' → '.join((*waiting, name))} is a circle")
        if start.path is None and start.stage is None and start.learner in config.learners:
            learn(start.learner, (*waiting, name))
        params = started(name, start, config.learners[name].model, f"learners.{name}.start")
        learners[name] = finish(name, params)
        done.add(name)

    for name in config.learners:
        learn(name)
    frozen = {
        name: finish(name, started(name, spec.start, config.models[name], f"frozen.{name}.start"))
        for name, spec in config.frozen.items()
    }
    return state.replace(learners=learners), frozen


def _restored(target: Params, run: os.PathLike, learner: str, origin: str) -> Params:
    """`target` with a run's weights, each read straight to its place."""

    def common(shapes):
        weights.check_fits(target, shapes, origin=origin)
        given = weights.flat(shapes)
        return weights.nested({n: x for n, x in weights.flat(target).items() if n in given})

    return weights.merged(target, restore_params(run, learner, target=common))


def _source(start: From, model, stages, learners) -> Params | os.PathLike:
    """Weights as a tree, or the directory of the run that has them."""
    if start.path is not None and pretrained.is_directory(start.path):
        return pretrained.load(start.path, model)
    if start.path is not None and str(start.path).endswith(".safetensors"):
        return weights.load(start.path)
    if start.path is not None:
        return place(start.path)
    given = learners
    if start.stage is not None:
        if start.stage not in stages:
            raise ValueError(
                f"no earlier stage {start.stage!r}; there are {sorted(stages) or 'none'}"
            )
        given = stages[start.stage]
        if not isinstance(given, Mapping):
            return given
    if start.learner not in given:
        raise ValueError(f"no learner {start.learner!r}; valid: {sorted(given)}")
    found = given[start.learner]
    return found.params if start.stage is None else found


def abstract_state(config: Config, phases: Phases) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, but for a pending rollout."""
    shapes = jax.eval_shape(phases.init, config.seed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, phases.shardings
    )


def abstract_rollout(config: Config, phases: Phases) -> Rollout:
    """The same for a rollout, whose prompts are as long as those of the first batch."""
    spec = config.rollouts
    stream = feed.opened(config, spec.prompts)
    prompts = phases.place(feed.looked_at(config, spec.prompts, next(stream)))
    context = ()
    if spec.environment is not None:
        names = spec.environment.context
        context = ({n: config.models[n].init(jax.random.key(0)) for n in names},)

    def sample(key):
        params = config.models[spec.policy].init(key)
        return phases.generate(params, prompts, key, spec.sampling, *context)

    shapes, rows = jax.eval_shape(sample, jax.random.key(0)), sharding.rows(phases.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes)


def abstract_frozen(config: Config, mesh) -> dict[str, Params]:
    """The same for the frozen trees."""
    found = {}
    for name in config.frozen:
        # The key inside: a mesh of devices that are not there holds no array.
        shapes = jax.eval_shape(lambda n=name: config.models[n].init(jax.random.key(0)))
        found[name] = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            sharding.shardings(shapes, mesh),
        )
    return found
