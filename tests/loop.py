"""A whole run as one compiled program: sample, reward, collect, derive, update, in a scan.

What `train.py` does step by step with files, these tests do inside `jax.jit`, so that a proof by
training takes seconds. Prompts are one start token each.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import phases, step
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.types import Control, Prompts, Sequences


def prompts_of(rows, samples=1, bos=4):
    """`rows` prompts of one start token, `samples` in a row sharing a prompt_id."""
    row = jnp.arange(rows)
    tokens = jnp.full((rows, 1), bos, jnp.int32)
    return Prompts(tokens, jnp.ones_like(row), row // samples, row % samples)


def trained(
    learners,
    *,
    steps,
    key,
    rollouts=None,
    prompts=None,
    frozen=None,
    frozen_models=None,
    start=None,
    data=None,
    derived=None,
    sampling=None,
):
    """Learners' parameters after `steps` steps, and the metrics of every step.

    `learners`: {name: Learner}; `frozen`: weights by name, with `frozen_models`; `start`: weights
    to start from, by learner; `data`: {name: key -> batch}; `derived`: {name: Derived}.
    """
    frozen, frozen_models = frozen or {}, frozen_models or {}
    models = {name: one.model for name, one in learners.items()} | frozen_models
    sampling = Sampling() if sampling is None else sampling

    def one_step(carry, key):
        states, control = carry
        metrics, batches = {}, {}

        def params(names):
            return {n: frozen[n] if n in frozen else states[n].params for n in names}

        if rollouts is not None:
            given = prompts
            if rollouts.transform is not None:
                given = rollouts.transform(given, jax.random.fold_in(key, 1))
            environment = rollouts.environment
            rollout = generate(
                params([rollouts.policy])[rollouts.policy],
                given,
                jax.random.fold_in(key, 0),
                model=models[rollouts.policy],
                length=rollouts.length,
                sampling=sampling,
                environment=environment,
                context=None if environment is None else params(environment.context),
            )
            reward = rollouts.reward(rollout, params(models))
            said = step.opinions(rollout, params(models), spec=rollouts, models=models)
            batches["experience"], control, found = step.collect(
                rollout, reward, said, control, spec=rollouts
            )
            metrics |= found
        for i, (name, make) in enumerate((data or {}).items()):
            batches[name] = make(jax.random.fold_in(key, 100 + i))
        for i, (name, one) in enumerate((derived or {}).items()):
            batches[name] = one.make(
                *(batches[source] for source in one.of),
                params=params(one.models),
                key=jax.random.fold_in(key, 200 + i),
            )
        for i, (name, learner) in enumerate(learners.items()):
            states[name], found = step.update(
                states[name],
                params(learner.scores),
                batches[learner.batch],
                jax.random.fold_in(key, 300 + i),
                learner=learner,
                models=models,
            )
            metrics |= {f"{name}/{metric}": x for metric, x in found.items()}
        return (states, control), metrics

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})  # it runs for long
    def run(key):
        states = {}
        for i, (name, learner) in enumerate(learners.items()):
            states[name] = phases.init_learner(jax.random.fold_in(key, 400 + i), learner=learner)
            if start is not None and name in start:
                states[name] = states[name].replace(params=start[name])
        coefficient = rollouts.kl.initial if rollouts is not None else 0.0
        control = Control(jnp.float32(coefficient), jnp.float32(0), jnp.float32(1))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(steps))
        (states, _), metrics = jax.lax.scan(one_step, (states, control), keys)
        return {name: state.params for name, state in states.items()}, metrics

    return run(key)


def probabilities(model, params, tokens, given=1):
    """The probability of each of `tokens` [n, t] after its first `given` ones, in float64."""
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= given, tokens.shape)
    batch = Sequences(tokens, mask, jnp.ones_like(tokens))
    logp = jax.jit(lambda p: score({"self": p}, batch, models={"self": model}).logp)(params)
    return np.exp(np.asarray(logp, np.float64).sum(1))
