"""All seeds of a run in one compiled program: the loop of `train.py` without its files.

One step is `train.one_step` with the same keys and the same order, inside `jax.jit`; a program
takes any number of steps and carries one state per seed, the seed axis leading. So seed i of this
is, but for rounding, what `rlhf-jax train --set seed=i` gives. On several devices the seeds are
spread over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import environment, phases, step
from rlhf_jax.config import Config, ConfigError, always
from rlhf_jax.data.drawn import drawn, drawn_key
from rlhf_jax.feed import RunError, looked_at
from rlhf_jax.phases import phase_key, weights_of
from rlhf_jax.start import Stage, filled
from rlhf_jax.types import Params, Prompts, TrainState

ROOM = 128  # steps that one call of the program may take


def obstacles(config: Config) -> list[str]:
    """What of a run cannot stand inside one program, in words; nothing: it can."""
    found = []
    for name in sorted(_streams(config)):
        stream = config.data[name]
        if not (isinstance(stream, partial) and stream.func is drawn):
            found.append(f"data.{name} is read on the host (partial(drawn, draw=...) is not)")
    spec = config.rollouts
    if spec is not None and getattr(spec.reward, "on_host", False):
        found.append("rollouts.reward runs on the host")
    if spec is not None and spec.normalise:
        found.append("rollouts.normalise measures rewards before the first step")
    if spec is not None and spec.ahead:
        found.append("rollouts.ahead keeps a rollout from step to step")
    for name, derived in config.derived.items():
        if getattr(derived.make, "on_host", False):
            found.append(f"derived.{name} runs on the host")
        if derived.pool is not None:
            found.append(f"derived.{name} keeps a pool of batches")
    if config.evaluation:
        found.append("evaluation (a study's measure takes its place)")
    return found


class Together:
    """One run with a state per seed. `advance` takes steps; `state` is where it stands."""

    def __init__(self, config: Config, seeds: Sequence[int], stages: Mapping[str, Stage]):
        """Start every seed; `stages` holds the weights of bases, seeds stacked in front.

        Raises:
            ConfigError: if the run cannot stand in one program, or its weights do not fit.
        """
        if wrong := obstacles(config):
            raise ConfigError(
                f"{config.name!r} cannot train all seeds in one program: {'; '.join(wrong)}. Set "
                "together=false to train them one after another"
            )
        if config.rollouts is not None and config.rollouts.environment is not None:
            _check_environment(config)
        for name in _streams(config):
            _look(config, name)
        self.config, self.count = config, len(seeds)
        self.done = 0
        self._place = _placement(len(seeds))
        self.seeds = self._place(jnp.asarray(seeds, jnp.uint32))
        start = jax.vmap(partial(phases.init, config=config))
        # Run once: what compiles fastest is best.
        state = jax.jit(start, compiler_options={"xla_backend_optimization_level": 0})(self.seeds)

        state = self._place(state)

        def blank(name):  # heads that a frozen tree's source lacks are 0
            if name in state.learners:
                return state.learners[name].params
            shapes = jax.eval_shape(config.models[name].init, jax.random.key(0))
            zeros = jax.tree.map(lambda x: np.zeros((self.count, *x.shape), x.dtype), shapes)
            return self._place(jax.tree.map(jnp.asarray, zeros))

        def finish(name, params):
            learner = state.learners.get(name)
            return params if learner is None else learner.replace(params=params)

        self.state, self.frozen = filled(
            config, state, stages, blank=blank, finish=finish, each=jax.vmap
        )
        program = jax.vmap(partial(_steps, config=config), in_axes=(0, 0, 0, None, None, None))
        self._program = jax.jit(program, donate_argnums=0)

    def advance(self, steps: int) -> dict[str, np.ndarray]:
        """Take at most `steps` and at most 128 steps; returns their metrics, [seeds, steps taken].

        Raises:
            RunError: if updates or rewards of a seed are not finite.
        """
        steps = min(steps, ROOM)
        due, places = _schedule(self.config, self.done, steps)
        span = jnp.asarray([self.done, steps], jnp.int32)
        self.state, metrics = self._program(self.state, self.frozen, self.seeds, span, due, places)
        metrics = {name: np.asarray(x)[:, :steps] for name, x in metrics.items()}
        self.done += steps
        self._check(metrics)
        return metrics

    def weights(self) -> dict[str, Params]:
        """The learners' weights, seeds stacked in front; copies, which training leaves alone."""
        params = {name: learner.params for name, learner in self.state.learners.items()}
        return jax.tree.map(jnp.copy, params)

    def _check(self, metrics) -> None:
        for name, learner in self.state.learners.items():
            row = np.asarray(learner.skipped_row)
            if row.max() >= self.config.max_skipped:
                seed = int(np.asarray(self.seeds)[row.argmax()])
                raise RunError(
                    f"{self.config.name}: {row.max()} updates in a row of {name!r} were not finite "
                    f"(seed {seed}, before step {self.done}). Lower the learning rate, or look for "
                    "inf and nan in the batch: rlhf-jax train keeps the batch of such an update"
                )
        wrong = {
            "are not finite": ~np.isfinite(metrics.get("rollout/reward", np.zeros((1, 1)))),
            "are not 0 outside the mask": metrics.pop("rollout/stray", np.zeros((1, 1))) != 0,
        }
        for what, found in wrong.items():
            if found.any():
                seed, at = np.argwhere(found)[0]
                raise RunError(
                    f"{self.config.name}: rewards of step {self.done - found.shape[1] + at} {what} "
                    f"(seed {int(np.asarray(self.seeds)[seed])}); look at rollouts.reward"
                )


def _placement(seeds: int) -> Callable[[Any], Any]:
    """Seeds over the devices if they divide evenly, else all on the first."""
    devices = jax.local_devices()
    if len(devices) == 1 or seeds % len(devices):
        # Committed there from the start: what a program returns is, and it compiles only once.
        return lambda tree: jax.device_put(tree, devices[0])
    mesh = jax.make_mesh((len(devices),), ("seed",), axis_types=(AxisType.Auto,), devices=devices)
    split = NamedSharding(mesh, P("seed"))
    return lambda tree: jax.device_put(tree, split)


def _steps(state, frozen, seed, span, due, places, *, config):
    """Some steps of one seed: `span` is the first and how many. Metrics are [ROOM]."""

    def one(state, i):
        at = {name: x[i] for name, x in places.items()}
        return _one_step(
            state, frozen, seed, span[0] + i, {n: x[i] for n, x in due.items()}, at, config=config
        )

    shapes = jax.eval_shape(lambda: one(state, 0)[1])
    room = {name: jnp.full((ROOM, *x.shape), jnp.nan, jnp.float32) for name, x in shapes.items()}

    def body(i, carry):
        state, metrics = carry
        state, found = one(state, i)
        put = {name: metrics[name].at[i].set(x.astype(jnp.float32)) for name, x in found.items()}
        return state, put

    # A loop of any length: the program is compiled once for all of them.
    return jax.lax.fori_loop(0, span[1], body, (state, room))


def _one_step(state: TrainState, frozen, seed, number, due, places, *, config: Config):
    """`train.one_step`, pure: rollout and experience, then every learner whose turn it is."""
    metrics, batches, learners = {}, {}, dict(state.learners)

    def now():
        return state.replace(learners=learners)

    def batch_of(name):
        if name not in batches and name in config.derived:
            made = config.derived[name]
            batches[name] = made.make(
                *(batch_of(source) for source in made.of),
                params=weights_of(made.models, now(), frozen, config=config),
                key=phase_key(seed, number, f"derive/{name}"),
            )
        elif name not in batches:
            batches[name] = _drawn(config, name, seed, places[name])
        return batches[name]

    if config.rollouts is not None:
        spec = config.rollouts
        params = weights_of(config.models, state, frozen, config=config)
        world = spec.environment
        rollout = phases.sampled(
            params[spec.policy],
            batch_of(spec.prompts),
            phase_key(seed, number, "rollout"),
            spec.sampling,
            None if world is None else {name: params[name] for name in world.context},
            model=config.models[spec.policy],
            spec=spec,
        )
        reward = spec.reward(rollout, params)
        said = step.opinions(rollout, params, spec=spec, models=config.models)
        batches["experience"], control, found = step.collect(
            rollout, reward, said, state.control, spec=spec
        )
        state = state.replace(control=control)
        metrics |= found | {"rollout/stray": jnp.where(rollout.mask, 0.0, jnp.abs(reward)).max()}
    for name, learner in config.learners.items():
        batch = batch_of(learner.batch)
        learn = partial(
            step.update,
            frozen=weights_of(learner.others, now(), frozen, config=config),
            batch=batch,
            key=phase_key(seed, number, f"update/{name}"),
            learner=learner,
            models=config.models,
            lengths=phases.lengths(learner, config.rollouts),
        )
        if learner.when is always:
            learners[name], found = learn(learners[name])
        else:
            learners[name], found = jax.lax.cond(
                due[name], learn, partial(_kept, learn), learners[name]
            )
        metrics |= {f"{name}/{metric}": x for metric, x in found.items()}
    return state.replace(step=state.step + 1, learners=learners), metrics


def _kept(learn, state):
    """A learner whose turn it is not: itself, and metrics that say so."""
    _, shapes = jax.eval_shape(learn, state)
    return state, {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in shapes.items()}


def _drawn(config: Config, name: str, seed, place):
    """Batch `place` of a stream, prompts as often as each is sampled."""
    given = config.data[name].keywords
    key = drawn_key(seed, place, given.get("salt", 0))
    batch = given["draw"](key, given["batch"])
    if not isinstance(batch, Prompts):
        return batch
    n = config.rollouts.samples
    repeated = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), n, axis=0), batch)
    return repeated.replace(sample_id=jnp.tile(jnp.arange(n), batch.length.shape[0]))


def _streams(config: Config) -> set[str]:
    """The streams that a run reads."""
    names = {learner.batch for learner in config.learners.values()}
    if config.rollouts is not None:
        names.add(config.rollouts.prompts)
    return _sources(config, names)


def _sources(config, names) -> set[str]:
    """The streams that batches of these names are made of."""
    found = set(names)
    for name in reversed(list(config.derived)):
        found |= set(config.derived[name].of) if name in found else set()
    return found - {"experience", *config.derived}


def _schedule(config: Config, first: int, steps: int):
    """Of each step: whose turn it is, and how often each stream was read before."""
    due = {name: np.zeros(ROOM, bool) for name in config.learners}
    places = {name: np.zeros(ROOM, np.int32) for name in _streams(config)}
    count = dict.fromkeys(places, 0)
    changing = any(learner.when is not always for learner in config.learners.values())
    for number in range(0 if changing else first, first + steps):
        turn = [name for name, learner in config.learners.items() if learner.when(number)]
        if number >= first:
            for name in turn:
                due[name][number - first] = True
            for name in places:
                places[name][number - first] = count[name] if changing else number
        read = {config.learners[name].batch for name in turn}
        if config.rollouts is not None:
            read.add(config.rollouts.prompts)
        for name in _sources(config, read):
            count[name] += 1
    return due, places


def _look(config: Config, name: str) -> None:
    """The first batch of a stream, as `train` looks at it."""
    given = config.data[name].keywords
    draw = jax.jit(partial(given["draw"], rows=given["batch"]))
    batch = jax.device_get(draw(drawn_key(config.seed, 0, given.get("salt", 0))))
    looked_at(config, name, batch)


def _check_environment(config: Config) -> None:
    world = config.rollouts.environment
    shapes = {
        name: jax.eval_shape(config.models[name].init, jax.random.key(0)) for name in world.context
    }
    environment.check(world, shapes)
