"""The loop: the only file that sequences side effects, in the order in which they happen.

One step: prompts → generate → reward → collect → update of every learner whose turn it is →
metrics → checkpoint. Offline learners enter at update with batches of their own stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rlhf_jax import feed, lanes, sharding
from rlhf_jax.bucket import Mirror
from rlhf_jax.check import check
from rlhf_jax.checkpoint import Checkpoints, Preemption, Stopped
from rlhf_jax.config import Config, ConfigError
from rlhf_jax.data import tokenizers
from rlhf_jax.experience import (
    Run,
    checked_reward,
    make_experience,
    next_batch,
    sampled,
    weights_now,
)
from rlhf_jax.feed import RunError
from rlhf_jax.metrics import Meter
from rlhf_jax.phases import Phases, build, phase_key
from rlhf_jax.pool import Kept
from rlhf_jax.start import abstract_frozen, abstract_rollout, abstract_state, begin
from rlhf_jax.step import Misfit
from rlhf_jax.types import Params, TrainState


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    stages: Mapping[str, Path] | None = None,
    stage: str = "",
    devices: Sequence[jax.Device] | None = None,
    phases: Phases | None = None,
) -> TrainState:
    """Run all steps, from the last checkpoint in `out` if resuming; return the last state.

    `stages` maps earlier stages of a pipeline to their directories; `devices` None means all.
    `phases` of a run that differs in its seed or number of steps only spare compiling again.

    Raises:
        ConfigError: for an experiment that cannot run. RunError: for one that cannot go on.
        Stopped: after SIGTERM or Ctrl-C, once everything is saved.
    """
    phases = prepared(config, devices) if phases is None else phases
    mesh, keep = phases.mesh, config.checkpoint.keep
    with (
        Preemption() as preemption,
        jax.set_mesh(mesh),
        Mirror(out) as mirror,
        Checkpoints(out / "checkpoints", keep=keep) as checkpoints,
    ):
        streams = feed.opened_all(config)
        latest = checkpoints.latest() if resume else None
        if latest is None:
            if resume:
                print(f"no complete checkpoint in {out}: starting at step 0", flush=True)
            state, frozen = begin(config, phases, stages or {})
            checkpoints.save_frozen(frozen)
        else:
            target = abstract_state(config, phases)
            if config.rollouts is not None and config.rollouts.ahead:
                target = target.replace(pending=abstract_rollout(config, phases))
            state = checkpoints.restore(latest, target, streams)
            frozen = checkpoints.restore_frozen(abstract_frozen(config, mesh))
        start = int(state.step)
        if start >= config.steps and latest is not None:
            print(f"already at step {start} of {config.steps}: nothing to do", flush=True)
        tokenizer = tokenizers.load(config.tokenizer)
        here = mirror.here
        with Meter(here, name=stage or config.name, start=start, total=config.steps) as meter:
            pools = {
                name: Kept(here / "pools" / name, derived.pool, start)
                for name, derived in config.derived.items()
                if derived.pool is not None
            }
            run = Run(config, phases, frozen, streams, pools, tokenizer, meter, here)
            if latest is None:
                state = measure_reward(run, state)
                show_samples(run, state, 0)
            for step in range(start, config.steps):
                state = one_step(run, state, step)
                done = step + 1
                last = done == config.steps
                stop = preemption.requested(done)
                if last or _due(done, config.rollouts and config.rollouts.show_every):
                    show_samples(run, state, done)
                if stop or last or _due(done, config.checkpoint.every):
                    meter.flush()  # no checkpoint is newer than the log that leads to it
                    mirror.send()
                    checkpoints.save(done, state, streams)
                if stop and not last:
                    checkpoints.wait()
                    raise Stopped(f"stopped as asked; step {done} is saved in {out}")
    return state


def prepared(config: Config, devices: Sequence[jax.Device] | None = None) -> Phases:
    """The programs of a run on its mesh, after all that can be seen before anything is compiled.

    Raises:
        ConfigError: for an experiment that cannot run.
    """
    devices = jax.devices() if devices is None else devices
    check(config, devices=len(devices))
    try:
        mesh = sharding.make_mesh(config.mesh, devices)
        with jax.set_mesh(mesh):
            return build(config, mesh)
    except ValueError as error:  # slices that do not fit; a weight without a sharding rule
        raise ConfigError(str(error)) from error


def _due(done: int, every: int | None) -> bool:
    return bool(every) and done % every == 0


def one_step(run: Run, state: TrainState, step: int) -> TrainState:
    """Rollout and experience if there are rollouts, then every learner, then evaluation."""
    config, metrics, batches = run.config, {}, {}
    learners = dict(state.learners)

    def batch_of(name):  # learners of one stream see the same batch
        if name not in batches and name in config.derived:
            made = config.derived[name]
            sources = [batch_of(source) for source in made.of]
            params = weights_now(run, made.models, state.replace(learners=learners))
            batches[name] = derive(run, name, sources, params, step)
        elif name not in batches:
            batches[name] = next_batch(run, name, run.streams[name])
        return batches[name]

    if config.rollouts is not None:
        batches["experience"], state, found = make_experience(run, state, step)
        metrics |= found
    due = [name for name, learner in config.learners.items() if learner.when(step)]
    for names in turns(config, due, run.phases.mesh):
        mine = {name: batch_of(config.learners[name].batch) for name in names}
        tokens = sum(x.tokens.size * config.learners[name].epochs for name, x in mine.items())
        with run.meter.phase(f"update/{'+'.join(names)}", tokens=tokens):
            for lane, (name, batch) in enumerate(mine.items()):
                now = state.replace(learners=learners)
                learners[name], found = update(run, now, name, batch, step, lane)
                metrics |= {f"{name}/{metric}": x for metric, x in found.items()}
            jax.block_until_ready([learners[name] for name in names])
        for name, batch in mine.items():
            stop_if_stuck(run, learners[name], name, batch, step)
    state = state.replace(step=state.step + 1, learners=learners)
    metrics |= evaluate(run, state, step)
    run.meter.write(step, metrics)
    return state


def turns(config: Config, names: Sequence[str], mesh: Mesh) -> list[Sequence[str]]:
    """Learners that update at once, turn after turn: one a turn, or on one CPU all of them.

    All only if none reads what another one learns, so that the order does not matter.
    """

    def read_by(batch):
        made = config.derived.get(batch)
        return {*made.models, *(n for one in made.of for n in read_by(one))} if made else set()

    def alone(name):
        learner = config.learners[name]
        return not ({*learner.others, *read_by(learner.batch)} - {name}) & set(names)

    at_once = lanes.count(mesh) > 1 and all(map(alone, names))
    return [names] if at_once and names else [[name] for name in names]


def update(run: Run, state: TrainState, name: str, batch, step: int, lane: int = 0):
    """A learner's new state and its metrics, on their way."""
    learner, phases = run.config.learners[name], run.phases
    others = weights_now(run, learner.others, state)
    given = state.learners[name], others, batch, phase_key(run.config.seed, step, f"update/{name}")
    try:
        return lanes.start(phases.mesh, lane, phases.update[name], *given)
    except Misfit as error:
        raise RunError(f"learners.{name}, which learns from {learner.batch!r}: {error}") from error


def derive(run: Run, name: str, sources: list, params: Mapping[str, Params], step: int):
    """A batch made from others of this step, on the mesh."""
    key = phase_key(run.config.seed, step, f"derive/{name}")
    with run.meter.phase(f"derive/{name}"):
        batch = run.phases.derive[name](*sources, params=params, key=key)
        if name in run.pools:
            batch = run.pools[name].add_and_draw(step, batch, key)
        batch = jax.device_put(batch, sharding.rows(run.phases.mesh))
        jax.block_until_ready(batch)
    return batch


def stop_if_stuck(run: Run, learner, name: str, batch, step: int) -> None:
    """Stop after too many non-finite updates in a row, with the batch kept for a look at it."""
    row = int(learner.skipped_row)
    if row < run.config.max_skipped:
        return
    process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run.out / f"nonfinite_{name}_step{step}{process}.npz"
    leaves = {
        sharding.path_name(where): x
        for where, x in jax.tree_util.tree_flatten_with_path(sharding.local(batch))[0]
    }
    np.savez(path, **leaves)
    raise RunError(
        f"{row} updates in a row of {name!r} were not finite (step {step}); its weights are those "
        f"before them. The batch is in {path}. Lower the learning rate, or look for inf and nan in "
        "the batch; max_skipped sets how many are allowed"
    )


def evaluate(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Losses on data that is not learned from: `eval/<name>/…`, means over a fixed set."""
    metrics = {}
    for name, spec in run.config.evaluation.items():
        if not (_due(step + 1, spec.every) or step + 1 == run.config.steps or step == 0):
            continue
        learner = run.config.learners[spec.learner]
        others = weights_now(run, learner.others, state)
        stream = feed.opened(run.config, spec.batch)  # afresh: the same batches every time
        found = []
        for _ in range(spec.batches):
            batch = next_batch(run, spec.batch, stream)
            params = state.learners[spec.learner].params
            found.append(jax.device_get(run.phases.evaluate[spec.learner](params, others, batch)))
        metrics |= {
            f"eval/{name}/{metric}": np.mean([one[metric] for one in found]) for metric in found[0]
        }
    return metrics


def measure_reward(run: Run, state: TrainState) -> TrainState:
    """Mean and deviation of the reward over samples of the policy as it starts."""
    spec = run.config.rollouts
    if spec is None or not spec.normalise:
        return state
    params = weights_now(run, run.config.models, state)
    stream = feed.opened(run.config, spec.prompts, seed=run.config.seed + 1)
    copies, scores = run.phases.written_with(params, spec.writers), []
    while len(scores) < spec.normalise:
        prompts = next_batch(run, spec.prompts, stream)
        key = phase_key(run.config.seed, len(scores), "measure")
        rollout = sampled(run, copies, prompts, key)
        reward = multihost_utils.process_allgather(checked_reward(run, rollout, params), tiled=True)
        scores += reward.astype(np.float64).sum(-1).tolist()
    std = float(np.std(scores))
    if not std > 0:
        raise RunError(
            f"the reward is {scores[0]:g} on all of {len(scores)} samples of the starting policy, "
            "so it cannot be normalised: is the reward function right? rollouts.normalise=0 "
            "leaves rewards as they are"
        )
    control = state.control.replace(
        reward_mean=jnp.float32(np.mean(scores)), reward_std=jnp.float32(std)
    )
    return state.replace(control=jax.device_put(control, run.phases.shardings.control))


def show_samples(run: Run, state: TrainState, step: int) -> None:
    """Write what the policy says to the same prompts with the same random numbers."""
    spec = run.config.rollouts
    if spec is None or not spec.show:
        return
    params = weights_now(run, run.config.models, state)
    stream = feed.opened(run.config, spec.prompts, seed=run.config.seed + 2)
    prompts = next_batch(run, spec.prompts, stream)
    key = phase_key(run.config.seed, 0, "show")
    rollout = sampled(run, run.phases.written_with(params, spec.writers), prompts, key)
    # The same rows on any number of processes, though the first one may hold fewer.
    paid = checked_reward(run, rollout, params), rollout
    reward, seen = multihost_utils.process_allgather(paid, tiled=True)
    reward, tokens, mask, used = reward.sum(-1), seen.tokens, seen.mask, seen.segments > 0
    said = np.cumsum(mask, axis=1) > 0  # from the first word of the policy, the environment's too
    rows = []
    for i in range(min(spec.show * spec.samples, len(tokens)))[:: spec.samples]:
        rows.append(
            {
                "prompt": run.tokenizer.decode(tokens[i][used[i] & ~said[i]].tolist()),
                "response": run.tokenizer.decode(tokens[i][used[i] & said[i]].tolist()),
                "reward": float(reward[i]),
            }
        )
    run.meter.samples(step, rows)
