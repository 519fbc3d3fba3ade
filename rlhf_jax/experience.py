"""Prompts → rollout → reward → experience, and what stops a run on the way.

The parts of one step of the loop that an objective of samples needs; `train` puts them in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax import feed, rewards, sharding
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

    with run.meter.phase("rollout") as count:
        if spec.ahead:
            more["rollout/staleness"] = 0.0 if state.pending is None else 1.0
            copies = phases.written_with(params, spec.writers)
            rollout, reward = state.pending, None
            if rollout is None:
                rollout = sampled(run, copies, *prompts_and_key(step))
            following = sampled(run, copies, *prompts_and_key(step + 1))
            del copies  # as large as the weights: not there while they are scored
            state = state.replace(pending=following)  # on its way: the host goes on
        else:
            rollout, reward = paid(run, params, *prompts_and_key(step))
        # Copied, not added up on the device: that would wait for what is on its way.
        here = rollout.mask.is_fully_addressable
        count(int((np.asarray(rollout.mask) if here else rollout.mask).sum()))
    with run.meter.phase("reward"):
        if reward is None:
            reward = checked_reward(run, rollout, params)
    with run.meter.phase("score", tokens=rollout.tokens.size):
        experience, control, metrics = phases.collect(rollout, reward, params, state.control)
        jax.block_until_ready(experience)
    return experience, state.replace(control=control), metrics | more


def paid(run: Run, params: Mapping[str, Params], prompts: Prompts, key):
    """A rollout, and its reward if it is made in chunks: of one while the next is sampled."""
    n = run.config.rollouts.chunks
    copies = run.phases.written_with(params, run.config.rollouts.writers)
    if n == 1:
        return sampled(run, copies, prompts, key), None
    cut, found = run.phases.cut(prompts), []
    following = sampled(run, copies, jax.tree.map(lambda x: x[0], cut), key)
    for i in range(1, n + 1):
        rollout = following  # on its way, like what the device does behind it
        if i < n:
            following = sampled(run, copies, jax.tree.map(lambda x, i=i: x[i], cut), key)
        found.append((rollout, checked_reward(run, rollout, params)))
    return run.phases.join(found)


def sampled(run: Run, params: Mapping[str, Params], prompts: Prompts, key) -> Rollout:
    """A rollout of the policy; an environment that broke its contract stops the run.

    `params` are the writers' weights, as `Phases.written_with` hands them out.
    """
    spec = run.config.rollouts
    environment = spec.environment
    if environment is None:
        return run.phases.generate(params[spec.policy], prompts, key, spec.sampling)
    context = {name: params[name] for name in environment.context}
    rollout = run.phases.generate(params[spec.policy], prompts, key, spec.sampling, context)
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
    return rollout


def checked_reward(run: Run, rollout: Rollout, params: Mapping[str, Params]) -> jax.Array:
    """The reward of every row, after a look at it: nothing that is not finite is learned from.

    Each process looks at its own rows; a reward on the host is shown no others.
    """
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
