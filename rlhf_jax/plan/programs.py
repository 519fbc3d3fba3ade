"""The programs of a run with the shapes of their arguments: what a plan compiles.

They are those of `phases.build`, so exactly what the loop runs. No weight is made: every argument
is a shape with a sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import feed, sharding
from rlhf_jax.config import Config
from rlhf_jax.models.weights import flat, merged, nested
from rlhf_jax.phases import Phases, weights_of
from rlhf_jax.start import abstract_frozen, abstract_state
from rlhf_jax.types import TrainState


@dataclass(frozen=True)
class Program:
    """One phase, and what it is called with."""

    name: str  # of the loop's phase: rollout, reward, score, update/policy
    fn: Callable  # jitted
    arguments: tuple
    keywords: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, int] = field(default_factory=dict)  # how often a step reads all weights
    steps: int = 1  # micro-batches one after another
    times: int = 1  # that an iteration calls it
    updates: int = 0  # optimiser steps


@dataclass(frozen=True)
class Run:
    """Everything that is in memory between phases, and the phases."""

    state: TrainState
    frozen: Mapping[str, Any]
    batches: Mapping[str, Any]  # by name; "rollout" and "reward" are those before "experience"
    programs: Sequence[Program]
    left_out: Sequence[str]  # what is not compiled, and why


def programs(config: Config, phases: Phases, host: Mapping[str, Any]) -> Run:
    """All phases of one iteration, in their order.

    `host` are first batches of the streams, looked at; of one process, so whole.
    """
    mesh, spec = phases.mesh, config.rollouts
    with jax.set_mesh(mesh):
        state, frozen = abstract_state(config, phases), abstract_frozen(config, mesh)
        weights = weights_of(config.models, state, frozen, config=config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        batches = {name: _rows(batch, phases) for name, batch in host.items()}
        found, left_out = [], []
        if spec is not None:
            prompts = batches.pop(spec.prompts)
            if spec.chunks > 1:
                prompts = jax.tree.map(lambda x: _first(x, spec.chunks), prompts)
            own = {name: weights[name] for name in spec.writers}
            for name in phases.copy:
                found.append(Program(f"copy/{name}", phases.copy[name], (weights[name],)))
                own[name] = _copied(phases.copy[name], weights[name], mesh)
            context = ()
            if spec.environment is not None:
                context = ({name: own[name] for name in spec.environment.context},)
            given, times = (own[spec.policy], prompts, key, spec.sampling, *context), spec.chunks
            reads = {"models": {spec.policy: 1}, "times": times}
            found.append(Program("rollout", phases.generate, given, **reads))
            rollout = _rows(jax.eval_shape(phases.generate, *given), phases)
            given = (rollout, weights)
            if not getattr(spec.reward, "on_host", False):
                found.append(Program("reward", phases.reward, given, times=times))
            else:
                left_out.append("the reward, which the host computes")
            scorers = {spec.policy if spec.rescore else None, spec.reference, spec.value} - {None}
            reads = {"models": dict.fromkeys(scorers, 1), "steps": spec.microbatches}
            found.append(Program("score", phases.score, given, **reads, times=times))
            said = _rows(jax.eval_shape(phases.score, *given), phases)
            rollout, said = jax.tree.map(lambda x: _first(x, 1 / times), (rollout, said))
            reward = _rows(jax.ShapeDtypeStruct(rollout.tokens.shape, jnp.float32), phases)
            given = (rollout, reward, said, state.control)
            found.append(Program("collect", phases.collect, given))
            batches["rollout"], batches["reward"] = rollout, reward
            batches["experience"] = _rows(jax.eval_shape(phases.collect, *given)[0], phases)
        for name, one in config.derived.items():
            if getattr(one.make, "on_host", False) or not set(one.of) <= set(batches):
                left_out.append(f"derived.{name}, which the host makes")
                continue
            params = {model: weights[model] for model in one.models}
            given = tuple(batches[source] for source in one.of)
            named = {"params": params, "key": key}
            found.append(Program(f"derive/{name}", phases.derive[name], given, named))
            made = _rows(jax.eval_shape(phases.derive[name], *given, **named), phases)
            if one.pool is not None:
                made = jax.tree.map(lambda x, n=one.pool.rows: _first(x, x.shape[0] / n), made)
            batches[name] = made
        for name, learner in config.learners.items():
            if learner.batch not in batches:
                left_out.append(f"update/{name}: its batch {learner.batch!r} is made by the host")
                continue
            others = {other: weights[other] for other in learner.others}
            given = (state.learners[name], others, batches[learner.batch], key)
            own = 3 if getattr(learner.model, "remat", "none") != "none" else 2
            updates = learner.epochs * learner.minibatches
            reads = {"models": {name: own, **dict.fromkeys(learner.scores, 1)}}
            reads |= {"steps": updates * learner.microbatches, "updates": updates}
            found.append(Program(f"update/{name}", phases.update[name], given, **reads))
    return Run(state, frozen, batches, found, left_out)


def host_batches(config: Config) -> dict[str, Any]:
    """The first batch of every stream that the loop reads, on this one process's host."""
    streams = feed.opened_all(config)
    return {name: feed.looked_at(config, name, next(it)) for name, it in streams.items()}


def sizes(config: Config, host: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and tokens of every batch that is known before anything has run."""
    found = {
        name: (math.prod(batch.tokens.shape[:-1]), batch.tokens.shape[-1])
        for name, batch in host.items()
    }
    spec = config.rollouts
    if spec is not None:
        rows, prompt = found.pop(spec.prompts)
        whole = prompt + spec.length
        if spec.environment is not None:
            whole = spec.environment.capacity(spec.length)
        found["experience"] = (rows, whole)
    return found


def device_bytes(tree: Any) -> int:
    """Bytes that each device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        if x.sharding is not None
        else math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )


def _copied(copy: Callable, params: Any, mesh: Mesh) -> Any:
    """A writer's weights as rollouts read them."""
    places = flat(sharding.for_decoding(jax.tree.map(lambda x: x.sharding, params)))
    made = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=places.get(name, sharding.replicated(mesh))
        )
        for name, x in flat(jax.eval_shape(copy, params)).items()
    }
    return merged(params, nested(made))


def _rows(tree: Any, phases: Phases) -> Any:
    """Shapes of a batch, its rows split over the mesh."""
    rows = sharding.rows(phases.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def _first(x: jax.ShapeDtypeStruct, parts: float) -> jax.ShapeDtypeStruct:
    """One of so many equal parts of an array's rows."""
    return jax.ShapeDtypeStruct(
        (round(x.shape[0] / parts), *x.shape[1:]), x.dtype, sharding=x.sharding
    )
