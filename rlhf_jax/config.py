"""An experiment is a Python value: frozen dataclasses holding numbers, functions and partials.

A module with `def config()` returns a `Config` (one run) or a `Pipeline` (stages, each starting
from an earlier one's weights). An ablation is `dataclasses.replace` over another's value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.environment import Environment
from rlhf_jax.optimizer import adam
from rlhf_jax.pool import Pool
from rlhf_jax.rewards import KL
from rlhf_jax.sampling import Sampling

RESERVED = ("self", "rollout", "eval", "time", "speed")  # prefixes of metrics, and of logits


class ConfigError(ValueError):
    """A mistake in an experiment or an override; the message says what is valid."""


def always(step: int) -> bool:
    """Learn at every step."""
    return True


def never(step: int) -> bool:
    """Learn at no step: weights over a `base` that are only read."""
    return False


def every(step: int, *, n: int, offset: int = 0) -> bool:
    """Learn at every n-th step."""
    return step % n == offset % n


@dataclass(frozen=True)
class From:
    """Weights to start from: a learner of this run, of an earlier stage, or of a path.

    Heads that the target has and the source lacks start fresh (a critic from a policy); every other
    weight must be there with its shape.
    """

    learner: str = "policy"
    stage: str | None = None  # an earlier stage of the pipeline
    path: str | None = None  # a run's directory, one of Hugging Face, or a .safetensors file


@dataclass(frozen=True)
class Learner:
    """A parameter tree with its objective and optimiser: what it learns from, whom it scores."""

    model: Any
    objective: Callable
    batch: str = "experience"  # a stream of `Config.data`, or what the rollouts make
    optimizer: Callable = partial(adam, learning_rate=1e-3)
    vocab: Callable | None = None
    scores: tuple[str, ...] = ()  # other models the objective compares with
    epochs: int = 1
    minibatches: int = 1  # optimiser steps per epoch
    microbatches: int = 1  # parts of a minibatch that are in memory one after another
    transform: Callable | None = None  # batch, key -> batch (conditioning, selection)
    prepare: Callable | None = None  # scores, batch -> batch: statistics over the whole of it
    when: Callable[[int], bool] = always
    start: From | None = None  # None: fresh weights
    base: str | None = None  # a frozen tree with the weights that it does not train; None: none
    trains: str = "lora_|value_head"  # with a base: regular expression of the paths it trains
    chunk: int = 2048  # tokens whose logits a device has in memory at once

    @property
    def others(self) -> tuple[str, ...]:
        """Trees that its update needs besides its own."""
        return tuple(dict.fromkeys((*self.scores, *([self.base] if self.base else ()))))


@dataclass(frozen=True)
class Frozen:
    """Weights that never change: a reference, a teacher, a reward model."""

    start: From
    model: Any = None  # None: the model of the learner it copies


@dataclass(frozen=True)
class Rollouts:
    """From prompts to experience."""

    reward: Callable  # rollout, params -> [b, t]
    length: int  # longest response, in tokens of the policy
    prompts: str = "prompts"  # a stream of `Config.data`
    transform: Callable | None = None  # prompts, key -> prompts (control tokens)
    environment: Environment | None = None  # makes the prompts, and answers what the policy says
    samples: int = 1  # per prompt
    ahead: bool = False  # sample the next step's before this step's update: one step off-policy
    chunks: int = 1  # of the prompts: others are sampled while the host pays for one; see lanes.py
    slots: int | None = None  # texts written at a time: when one ends, the next begins; None: all
    windows: int = 1  # sizes of the cache, each with a loop of its own; slots of each size
    sampling: Sampling = Sampling()
    policy: str = "policy"
    reference: str | None = "reference"  # None: no KL
    value: str | None = "critic"  # who says V: a critic, the policy's own head, or nobody (0)
    kl: KL = KL()
    shaping: tuple[Callable, ...] = ()  # reward, rollout -> reward: length and EOS penalties
    normalise: int = 0  # reference samples whose mean and variance become 0 and 1; 0: off
    advantage: Callable = partial(whitened, advantage=partial(gae, trace=0.95))
    rescore: bool = True  # the trainer's log-probabilities are the old ones; False: the sampler's
    microbatches: int = 1  # parts of a chunk that are scored one after another
    widths: tuple[int, ...] = ()  # besides the longest: micro-batches are no wider than they need
    show: int = 8  # samples written on fixed prompts at the start, every so often, and at the end
    show_every: int = 50

    @property
    def writers(self) -> tuple[str, ...]:
        """The models that write: the policy, and those whom the environment asks."""
        others = self.environment.context if self.environment is not None else ()
        return tuple(dict.fromkeys((self.policy, *others)))


@dataclass(frozen=True)
class Derived:
    """A batch made from others of the same step: comparisons, real and generated texts, the best.

    `make(*batches, params, key) -> batch` is a pure function, compiled; one with an attribute
    `on_host = True` is called as it is.
    """

    make: Callable
    of: tuple[str, ...] = ("experience",)  # streams, "experience", or batches derived before
    models: tuple[str, ...] = ()  # whose weights `params` holds, by name
    pool: Pool | None = None  # learn from all that was ever made, not from this step's alone


@dataclass(frozen=True)
class Evaluation:
    """A learner's objective on data it does not learn from."""

    learner: str
    batch: str  # a stream of `Config.data`
    batches: int = 8
    every: int = 50  # and after the last step


@dataclass(frozen=True)
class Checkpointing:
    """When to save and what to keep."""

    every: int = 100  # steps; also after the last one and on SIGTERM
    keep: int = 2


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str
    steps: int
    learners: Mapping[str, Learner]
    data: Mapping[str, Callable]  # (seed, shard) -> grain IterDataset of batches
    tokenizer: str = "bytes"  # a tokenizer.json, or "bytes"
    seed: int = 0
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    rollouts: Rollouts | None = None
    derived: Mapping[str, Derived] = field(default_factory=dict)
    evaluation: Mapping[str, Evaluation] = field(default_factory=dict)
    # data, fsdp, tensor, sequence; -1: all devices that are left
    mesh: tuple[int, int, int, int] = (-1, 1, 1, 1)
    checkpoint: Checkpointing = Checkpointing()
    max_skipped: int = 5  # non-finite updates in a row after which the run stops

    @property
    def models(self) -> dict[str, Any]:
        """The model of every learner and frozen tree, by name."""
        found = {name: learner.model for name, learner in self.learners.items()}
        for name, frozen in self.frozen.items():
            model = frozen.model
            found[name] = model if model is not None else self.learners[frozen.start.learner].model
        return found


@dataclass(frozen=True)
class Pipeline:
    """Stages in order: runs, or functions of the pipeline's directory that write a result."""

    name: str
    stages: Mapping[str, Config | Callable]


def runs_of(value: Config | Pipeline) -> dict[str, Config]:
    """The runs of an experiment by name: itself, or a pipeline's stages that are runs."""
    stages = {value.name: value} if isinstance(value, Config) else value.stages
    return {name: stage for name, stage in stages.items() if isinstance(stage, Config)}


def batch_size(config: Config, stream: str) -> int | None:
    """Rows that one batch of a stream has over all processes, if the stream says so."""
    fn = config.data[stream]
    return getattr(fn, "keywords", {}).get("batch")


def rollout_rows(config: Config) -> int | None:
    """Rows of one rollout: prompts times samples."""
    prompts = batch_size(config, config.rollouts.prompts)
    return None if prompts is None else prompts * config.rollouts.samples


def batch_plan(config: Config, *, devices: int) -> dict[str, Any]:
    """What one step does, in numbers: rows, minibatches, optimiser steps, tokens, devices."""
    plan: dict[str, Any] = {
        "devices": devices,
        "mesh (data, fsdp, tensor, sequence)": list(config.mesh),
    }
    if config.rollouts is not None:
        spec, rows = config.rollouts, rollout_rows(config)
        plan["rollout"] = {
            "prompts": batch_size(config, spec.prompts),
            "samples per prompt": spec.samples,
            "rows": rows,
            "response tokens at most": None if rows is None else rows * spec.length,
        }
    for name, learner in config.learners.items():
        if learner.batch == "experience":
            rows = rollout_rows(config)
        else:
            rows = batch_size(config, learner.batch) if learner.batch in config.data else None
        parts = learner.minibatches * learner.microbatches
        plan[name] = {
            "learns from": learner.batch,
            "rows per step": rows,
            "epochs": learner.epochs,
            "minibatches": learner.minibatches,
            "rows per minibatch": None if rows is None else rows // learner.minibatches,
            "micro-batches": learner.microbatches,
            "rows per micro-batch": None if rows is None else rows // parts,
            "optimiser steps per step": learner.epochs * learner.minibatches,
        }
    return plan
