"""The phases of a run as jitted programs: `step.py` and `rollout.py` with shardings and donation.

This is the only place that calls `jax.jit` for training, so a plan, a benchmark and a test compile
exactly what the loop runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from rlhf_jax import environment, sharding, step
from rlhf_jax.config import Config, Learner, Rollouts
from rlhf_jax.models import weights
from rlhf_jax.parts import UNKNOWN, Lengths, parts, whole
from rlhf_jax.rollout import generate
from rlhf_jax.types import Control, LearnerState, Params, Prompts, Rollout, Sequences, TrainState


@dataclass(frozen=True)
class Phases:
    """Compiled programs, by the name of what they do."""

    init: Callable[[Array], TrainState]
    cut: Callable | None  # prompts -> chunks of them, in front
    join: Callable | None  # pytrees of chunks, one by one -> of all rows
    copy: Mapping[str, Callable]  # params of one who writes -> what rollouts read instead
    copied: int  # bytes that each device receives for all these copies
    generate: Callable | None  # params, prompts, key, sampling[, context] -> Rollout
    reward: Callable | None  # rollout, params -> [b, t]
    score: Callable | None  # rollout, params -> what models say about it
    collect: Callable | None  # rollout, reward, scores, control -> Experience, Control, metrics
    derive: Mapping[str, Callable]  # *batches, params, key -> batch
    update: Mapping[str, Callable]  # state, frozen, batch, key -> state, metrics
    evaluate: Mapping[str, Callable]  # params, frozen, batch -> metrics
    shardings: TrainState  # of what `init` makes
    mesh: Mesh

    def place(self, batch: Sequences | Prompts) -> Sequences | Prompts:
        """This process's rows of a host batch, as arrays split over the mesh."""
        rows = sharding.rows(self.mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def written_with(self, params: Mapping[str, Params], names: Iterable[str]) -> dict[str, Params]:
        """Weights as rollouts read them, by name: copies where they lie otherwise."""

        def one(name):
            own = params[name]
            return weights.merged(own, self.copy[name](own)) if name in self.copy else own

        return {name: one(name) for name in names}


TRANSFORM = 0x7461_6773  # folded into a rollout's key for the prompts' transform: no prompt_id


def phase_key(seed: int, step: int, phase: str) -> Array:
    """The key of one phase of one step.

    `fold_in`, not `split`: a resume needs only the step number, and a new phase moves no other's.
    """
    root = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(root, zlib.crc32(phase.encode()) & 0x7FFFFFFF)


def init_learner(key: Array, *, learner: Learner) -> LearnerState:
    """A learner with fresh weights."""
    params = learner.model.init(key)
    if learner.base is not None:
        params = weights.trained(params, learner.trains)
    return learner_state(params, learner=learner)


def learner_state(params: Params, *, learner: Learner) -> LearnerState:
    """Weights with empty moments and zero counters."""
    step, skipped, row = (
        jnp.zeros((), jnp.int32) for _ in range(3)
    )  # each its own buffer: donated
    return LearnerState(params, learner.optimizer().init(params), step, skipped, row)


def init(seed: int | Array, *, config: Config) -> TrainState:
    """The state before the first step, without loaded weights; pure, so `vmap`-able over seeds."""
    learners = {
        name: init_learner(phase_key(seed, 0, f"init/{name}"), learner=learner)
        for name, learner in config.learners.items()
    }
    kl = config.rollouts.kl.initial if config.rollouts is not None else 0.0
    control = Control(jnp.float32(kl), jnp.float32(0.0), jnp.float32(1.0))
    return TrainState(jnp.zeros((), jnp.int32), learners, control)


def build(config: Config, mesh: Mesh) -> Phases:
    """Everything a run compiles; nothing is traced before its first call.

    Raises:
        ValueError: if a parameter has no sharding rule or does not divide over the mesh, or an
            environment does not return what it should.
    """
    make = partial(init, config=config)
    places = sharding.shardings(jax.eval_shape(make, config.seed), mesh)
    rows, same = sharding.rows(mesh), sharding.replicated(mesh)
    models, spec = config.models, config.rollouts

    updates, evaluations = {}, {}
    for name, learner in config.learners.items():
        bound = {"learner": learner, "models": models}
        updates[name] = jax.jit(
            partial(step.update, **bound, lengths=lengths(learner, spec)),
            donate_argnums=0,
            out_shardings=(places.learners[name], same),
        )
        evaluations[name] = jax.jit(partial(step.evaluate, **bound), out_shardings=same)

    cut = join = sample = reward = score = collect = None
    copy, copied = copies(config, mesh)
    if spec is not None and spec.environment is not None:
        names = spec.environment.context
        init_of = {name: models[name].init for name in names}
        shapes = {name: jax.eval_shape(init_of[name], jax.random.key(0)) for name in names}
        environment.check(spec.environment, shapes)
    if spec is not None:
        cut = jax.jit(partial(parts, n=spec.chunks, group=spec.samples))
        join = jax.jit(partial(joined, group=spec.samples), out_shardings=rows)
        sample = jax.jit(partial(sampled, model=models[spec.policy], spec=spec), out_shardings=rows)
        reward = spec.reward
        if not getattr(reward, "on_host", False):
            reward = jax.jit(reward, out_shardings=rows)
        score = jax.jit(partial(step.opinions, spec=spec, models=models), out_shardings=rows)
        collect = jax.jit(partial(step.collect, spec=spec), out_shardings=(rows, same, same))
    derive = {
        name: one.make
        if getattr(one.make, "on_host", False)
        else jax.jit(one.make, out_shardings=rows)
        for name, one in config.derived.items()
    }
    return Phases(
        init=jax.jit(make, out_shardings=places),
        cut=cut,
        join=join,
        copy=copy,
        copied=copied,
        generate=sample,
        reward=reward,
        score=score,
        collect=collect,
        derive=derive,
        update=updates,
        evaluate=evaluations,
        shardings=places,
        mesh=mesh,
    )


def copies(config: Config, mesh: Mesh) -> tuple[dict[str, Callable], int]:
    """Of all who write in rollouts, by name, a program that copies weights, and the bytes received.

    Decoding reads all weights at every token, so they are collected once, in the dtype that is
    computed in, and only tensor divides them; one CPU finds panels beside them. Who has them so
    already is not copied.
    """
    found, total = {}, 0
    for name in config.rollouts.writers if config.rollouts is not None else ():
        model = config.models[name]
        shapes = jax.eval_shape(lambda model=model: model.init(jax.random.key(0)))
        change = partial(weights.in_dtype, dtype=getattr(model, "dtype", "float32"))
        small, places = jax.eval_shape(change, shapes), sharding.shardings(shapes, mesh)
        if sharding.one_cpu(mesh) and hasattr(model, "panels"):
            whole = small != shapes
            found[name] = jax.jit(partial(_with_panels, model=model, change=change, whole=whole))
            continue
        new = sharding.for_decoding(places)
        moved = sharding.received(small, places, new)
        if moved or small != shapes:
            copy = partial(_layer_by_layer, change=change, places=new)
            found[name], total = jax.jit(copy, out_shardings=new), total + moved
    return found, total


def _with_panels(params: Params, *, model: Any, change: Callable, whole: bool) -> Params:
    """A model's panels; the rest, too, where that changes."""
    small = change(params)
    return weights.merged(small, model.panels(small)) if whole else model.panels(small)


def _layer_by_layer(params: Params, *, change: Callable, places: Any) -> Params:
    """Stacked layers one after another: XLA keeps what it collects twice, now of one layer."""
    small = change(params)
    if "layers" not in small:
        return small
    layer = jax.tree.map(lambda x: NamedSharding(x.mesh, P(*x.spec[1:])), places["layers"])
    collect = partial(jax.tree.map, jax.lax.with_sharding_constraint)
    return {**small, "layers": jax.lax.map(lambda x: collect(x, layer), small["layers"])}


def lengths(learner: Learner, spec: Rollouts | None) -> Lengths:
    """What `step.update` may know of the lengths in what a learner learns from."""
    if spec is None or learner.batch != "experience":
        return UNKNOWN
    known = step.rollout_lengths(spec)
    # A transform may put any tokens into the mask.
    return known if learner.transform is None else Lengths(known.widths)


def sampled(
    params: Params, prompts: Prompts, key: Array, sampling, context=None, *, model, spec: Rollouts
) -> Rollout:
    """Prompts, transformed if the rollouts say so, and what the policy says to them."""
    # A transform may give each sample a prompt of its own.
    shared = 1 if spec.transform is not None else spec.samples
    if spec.transform is not None:
        prompts = spec.transform(prompts, jax.random.fold_in(key, TRANSFORM))
    return generate(
        params,
        prompts,
        key,
        model=model,
        length=spec.length,
        sampling=sampling,
        environment=spec.environment,
        context=context,
        slots=spec.slots,
        samples=shared,
        windows=spec.windows,
    )


def joined(chunks: Sequence[Any], *, group: int) -> Any:
    """Pytrees of chunks of the rows as one of all rows."""
    return whole(jax.tree.map(lambda *x: jnp.stack(x), *chunks), group=group)


def samples_of(prompts: Prompts, n: int) -> Prompts:
    """Each prompt n times in a row, its samples numbered; on the host."""
    repeated = jax.tree.map(lambda x: np.repeat(np.asarray(x), n, axis=0), prompts)
    number = np.tile(np.arange(n, dtype=np.int32), len(np.asarray(prompts.length)))
    return repeated.replace(sample_id=number)


def weights_of(
    names: Iterable[str], state: TrainState, frozen: Mapping[str, Any], *, config: Config
) -> dict[str, Params]:
    """Current weights of learners and frozen trees, by name; of a learner with a base, all."""

    def one(name):
        if name in frozen:
            return frozen[name]
        own, base = state.learners[name].params, config.learners[name].base
        return own if base is None else weights.merged(frozen[base], own)

    return {name: one(name) for name in names}
