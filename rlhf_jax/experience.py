"""Prompts → rollout → reward → experience, and what stops a run on the way.

The parts of one step of the loop that an objective of samples needs; `train` puts them in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax import feed, lanes, rewards, sharding
from rlhf_jax.config import Config
from rlhf_jax.feed import RunError
from rlhf_jax.hostpool import RewardError
from rlhf_jax.metrics import Meter
from rlhf_jax.phases import Phases, phase_key, weights_of
from rlhf_jax.pool import Kept
from rlhf_jax.types import Params, Prompts, Rollout, TrainState


@dataclass(frozen=True)
class Run:
    """What the loop holds besides the state."""

    config: Config
    phases: Phases
    frozen: Mapping[str, Params]
    streams: Mapping[str, Iterator]
    pools: Mapping[str, Kept]
    tokenizer: Any
    meter: Meter
    out: Path


def make_experience(run: Run, state: TrainState, step: int):
    """Prompts → rollout → reward → experience; the state with adapted control; and metrics."""
    config, spec, phases = run.config, run.config.rollouts, run.phases
    params, stream = weights_now(run, config.models, state), run.streams[spec.prompts]
    more = {"rollout/copy_bytes": float(phases.copied)} if phases.copied else {}

    def prompts_and_key(step):
        return next_batch(run, spec.prompts, stream), phase_key(config.seed, step, "rollout")

    with run.meter.phase("rollout"):
        copies = phases.written_with(params, spec.writers)
        if spec.ahead:
            more["rollout/staleness"] = 0.0 if state.pending is None else 1.0
            rollout = state.pending
            if rollout is None:
                rollout = sampled(run, copies, *prompts_and_key(step))
            following = sampled(run, copies, *prompts_and_key(step + 1))
            rollouts, state = iter([rollout]), state.replace(pending=following)
        else:
            rollouts = in_chunks(run, copies, *prompts_and_key(step))
        del copies  # as large as the weights: not there while they are scored
    found = []
    while True:  # while the host pays for one, others are sampled
        with run.meter.phase("rollout"):
            rollout = jax.block_until_ready(next(rollouts, None))
        if rollout is None:
            break
        with run.meter.phase("reward"):
            found.append((rollout, checked_reward(run, rollout, params)))
    with run.meter.phase("rollout") as count:
        # Copied, not added up on the device: that would wait for what is on its way.
        masks = [rollout.mask for rollout, _ in found]
        count(sum(int((np.asarray(x) if x.is_fully_addressable else x).sum()) for x in masks))
    with run.meter.phase("score", tokens=sum(rollout.tokens.size for rollout, _ in found)):
        found = [
            (*paid, lanes.start(phases.mesh, i, phases.score, paid[0], params))
            for i, paid in enumerate(found)
        ]
        whole = phases.join(found) if len(found) > 1 else found[0]
        experience, control, metrics = phases.collect(*whole, state.control)
        jax.block_until_ready(experience)
    return experience, state.replace(control=control), metrics | more


def in_chunks(run: Run, params: Mapping[str, Params], prompts: Prompts, key) -> Iterator[Rollout]:
    """Rollouts of the chunks of the prompts; behind each, as many as run at once are on their way.

    No more: what processes agree on about a reward waits behind all that was started.
    """
    n, mesh = run.config.rollouts.chunks, run.phases.mesh
    if n == 1:
        yield sampled(run, params, prompts, key)
        return
    cut, coming = run.phases.cut(prompts), deque()
    for i in range(n):
        chunk = jax.tree.map(lambda x, i=i: x[i], cut)
        coming.append(lanes.start(mesh, i, sampled, run, params, chunk, key))
        if len(coming) > lanes.count(mesh):
            yield coming.popleft()
    yield from coming


def sampled(run: Run, params: Mapping[str, Params], prompts: Prompts, key) -> Rollout:
    """A rollout of the policy, on its way.

    `params` are the writers' weights, as `Phases.written_with` hands them out.
    """
    spec = run.config.rollouts
    if spec.environment is None:
        return run.phases.generate(params[spec.policy], prompts, key, spec.sampling)
    context = {name: params[name] for name in spec.environment.context}
    return run.phases.generate(params[spec.policy], prompts, key, spec.sampling, context)


def checked_rollout(run: Run, rollout: Rollout) -> None:
    """An environment that broke its contract stops the run."""
    environment = run.config.rollouts.environment
    if environment is None:
        return
    seen, error = sharding.local(rollout), None
    if not np.isfinite(seen.earned).all():
        row = int(np.argmin(np.isfinite(seen.earned).all(1)))
        ids = seen.tokens[row][seen.segments[row] > 0].tolist()
        error = RunError(
            f"rollouts.environment: in row {row} it paid something that is not finite, began with "
            f"no token, wrote a token outside the model's vocabulary, or a count outside 0 to "
            f"{environment.forced}\n  {run.tokenizer.decode(ids)!r} (tokens {ids})"
        )
    agree(error, "its environment broke the contract")


def checked_reward(run: Run, rollout: Rollout, params: Mapping[str, Params]) -> jax.Array:
    """The reward of every row, after a look at both: nothing that is not finite is learned from.

    Each process looks at its own rows; a reward on the host is shown no others.
    """
    checked_rollout(run, rollout)
    pay, error = run.phases.reward, None
    on_host, seen = getattr(pay, "on_host", False), sharding.local(rollout)
    try:
        reward = pay(seen if on_host else rollout, params)
        rewards.check(sharding.local(reward), seen, decode=run.tokenizer.decode)
    except RewardError as found:
        error = found
    agree(error, "its reward is wrong")
    return run.phases.place(sharding.local(reward)) if on_host else reward


def agree(error: Exception | None, what: str) -> None:
    """Raise in every process if one has an error: the others would wait for it for ever."""
    wrong = np.array([error is not None])
    if jax.process_count() > 1:
        wrong = multihost_utils.process_allgather(wrong).reshape(-1)
    if error is not None:
        raise error
    if wrong.any():
        number = int(np.flatnonzero(wrong)[0])
        raise RunError(f"process {number} stopped: {what}; its own message says how")


def weights_now(run: Run, names: Iterable[str], state: TrainState) -> dict[str, Params]:
    """Current weights of learners and frozen trees, by name."""
    return weights_of(names, state, run.frozen, config=run.config)


def next_batch(run: Run, name: str, stream: Iterator):
    """The next batch of a stream, looked at and placed on the mesh."""
    return run.phases.place(feed.looked_at(run.config, name, next(stream)))
