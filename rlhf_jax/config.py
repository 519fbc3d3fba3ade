"""An experiment is a Python value: frozen dataclasses holding numbers, functions and partials.

A module with `def config()` returns a `Config` (one run) or a `Pipeline` (stages, each starting
from an earlier one's weights). An ablation is `dataclasses.replace` over another's value.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf_jax.advantages import gae, whitened
from rlhf_jax.environment import Environment
from rlhf_jax.optimizer import adam
from rlhf_jax.rewards import KL
from rlhf_jax.rollout import Sampling
from rlhf_jax.sharding import mesh_shape

RESERVED = ("self", "rollout", "eval", "time", "speed")  # prefixes of metrics, and of logits


class ConfigError(ValueError):
    """A mistake in an experiment or an override; the message says what is valid."""


def always(step: int) -> bool:
    """Learn at every step."""
    return True


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
    path: str | None = None  # a run's directory, or a .safetensors file


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
    transform: Callable | None = None  # batch, key -> batch (conditioning, filtering)
    prepare: Callable | None = None  # scores, batch -> batch: statistics over the whole of it
    when: Callable[[int], bool] = always
    start: From | None = None  # None: fresh weights
    chunk: int = 2048  # tokens whose logits are in memory at once


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
    sampling: Sampling = Sampling()
    policy: str = "policy"
    reference: str | None = "reference"  # None: no KL
    value: str | None = "critic"  # who says V: a critic, the policy's own head, or nobody (0)
    kl: KL = KL()
    shaping: tuple[Callable, ...] = ()  # reward, rollout -> reward: length and EOS penalties
    normalise: int = 0  # reference samples whose mean and variance become 0 and 1; 0: off
    advantage: Callable = partial(whitened, advantage=partial(gae, trace=0.95))
    microbatches: int = 1  # parts of the rollout that are scored one after another
    show: int = 8  # samples written on fixed prompts at the start, every so often, and at the end
    show_every: int = 50


@dataclass(frozen=True)
class Derived:
    """A batch made from others of the same step: comparisons, real and generated texts, the best.

    `make(*batches, params, key) -> batch` is a pure function, compiled; one with an attribute
    `on_host = True` is called as it is.
    """

    make: Callable
    of: tuple[str, ...] = ("experience",)  # streams, "experience", or batches derived before
    models: tuple[str, ...] = ()  # whose weights `params` holds, by name


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
    mesh: tuple[int, int, int] = (-1, 1, 1)  # data, fsdp, tensor; -1: all devices that are left
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


def batch_size(config: Config, stream: str) -> int | None:
    """Rows that one batch of a stream has over all processes, if the stream says so."""
    fn = config.data[stream]
    return getattr(fn, "keywords", {}).get("batch")


def rollout_rows(config: Config) -> int | None:
    """Rows of one rollout: prompts times samples."""
    prompts = batch_size(config, config.rollouts.prompts)
    return None if prompts is None else prompts * config.rollouts.samples


def check(config: Config, *, devices: int) -> None:
    """Find mistakes before anything is compiled.

    Raises:
        ConfigError: saying what was wrong and what is valid.
    """
    try:
        mesh_shape(config.mesh, devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except TypeError as error:
        raise ConfigError(f"mesh={config.mesh}: three sizes, (data, fsdp, tensor)") from error
    _check_numbers(config)
    _check_calls(config, "")
    for name, frozen in config.frozen.items():
        if frozen.model is None and frozen.start.learner not in config.learners:
            raise ConfigError(
                f"frozen.{name}: no learner {frozen.start.learner!r} to take the model of; valid: "
                f"{', '.join(config.learners)}, or give model="
            )
    known = set(config.models)

    def exists(name, valid, where):
        if name not in valid:
            raise ConfigError(f"{where}: there is no {name!r}; valid: {', '.join(sorted(valid))}")

    streams = set(config.data) | ({"experience"} if config.rollouts is not None else set())
    for name, derived in config.derived.items():
        if name in streams or name == "experience":
            raise ConfigError(f"derived.{name}: there is a batch of that name already; rename it")
        for source in derived.of:
            exists(source, streams, f"derived.{name}.of")
        for model in derived.models:
            exists(model, known, f"derived.{name}.models")
        streams.add(name)
    for name in {*config.learners, *config.frozen} & set(RESERVED):
        raise ConfigError(f"no learner or frozen tree may be called {name!r}: metrics are")
    if both := set(config.learners) & set(config.frozen):
        raise ConfigError(f"{', '.join(both)}: both a learner and frozen; rename one")
    for name, learner in config.learners.items():
        exists(learner.batch, streams, f"learners.{name}.batch")
        for other in learner.scores:
            exists(other, known, f"learners.{name}.scores")
    for name, evaluation in config.evaluation.items():
        exists(evaluation.learner, set(config.learners), f"evaluation.{name}.learner")
        exists(evaluation.batch, set(config.data), f"evaluation.{name}.batch")
    if config.rollouts is not None:
        _check_rollouts(config, config.rollouts, exists)
    _check_tags(config)
    _check_batches(config, devices)


def _check_numbers(config):
    """Every number that has a least value, with its path."""
    least = {"steps": (config.steps, 0), "seed": (config.seed, 0)}
    least["max_skipped"] = (config.max_skipped, 1)
    for name in ("every", "keep"):
        least[f"checkpoint.{name}"] = (getattr(config.checkpoint, name), 1)
    for learner, spec in config.learners.items():
        for name in ("epochs", "minibatches", "microbatches", "chunk"):
            least[f"learners.{learner}.{name}"] = (getattr(spec, name), 1)
    for evaluation, spec in config.evaluation.items():
        for name in ("batches", "every"):
            least[f"evaluation.{evaluation}.{name}"] = (getattr(spec, name), 1)
    for stream in config.data:
        if batch_size(config, stream) is not None:
            least[f"data.{stream}.batch"] = (batch_size(config, stream), 1)
    if config.rollouts is not None:
        for name in ("length", "samples", "microbatches"):
            least[f"rollouts.{name}"] = (getattr(config.rollouts, name), 1)
        for name in ("normalise", "show", "show_every"):
            least[f"rollouts.{name}"] = (getattr(config.rollouts, name), 0)
        sampling = config.rollouts.sampling
        least["rollouts.sampling.top_k"] = (sampling.top_k, 0)
        if not sampling.temperature > 0:
            raise ConfigError(
                f"rollouts.sampling.temperature={sampling.temperature}: must be above 0; "
                "for greedy decoding set top_k=1"
            )
        if not 0 < sampling.top_p <= 1:
            raise ConfigError(f"rollouts.sampling.top_p={sampling.top_p}: needs 0 < top_p ≤ 1")
    for path, (value, bound) in least.items():
        if value < bound:
            raise ConfigError(f"{path}={value}: must be at least {bound}")


def _check_calls(value, path):
    """No partial may name an argument that its function does not have."""
    if isinstance(value, partial):
        try:
            inspect.signature(value.func).bind_partial(*value.args, **value.keywords)
        except TypeError as error:
            valid = ", ".join(inspect.signature(value.func).parameters)
            raise ConfigError(
                f"{path}: {value.func.__name__}() {error}; its arguments are {valid}"
            ) from error
        children = value.keywords
    elif isinstance(value, Mapping):
        children = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        children = {str(i): x for i, x in enumerate(value)} if isinstance(value, tuple) else {}
    for name, child in children.items():
        _check_calls(child, f"{path}.{name}" if path else name)


def _check_rollouts(config, spec, exists):
    exists(spec.prompts, set(config.data), "rollouts.prompts")
    exists(spec.policy, set(config.models), "rollouts.policy")  # frozen: a teacher's samples
    for role in ("reference", "value"):
        if getattr(spec, role) is not None:
            exists(getattr(spec, role), set(config.models), f"rollouts.{role}")
    if not config.models[spec.policy].lm_head:
        raise ConfigError(f"rollouts.policy: the model of {spec.policy!r} has no lm_head")
    if spec.value is not None and not config.models[spec.value].value_head:
        raise ConfigError(f"rollouts.value: the model of {spec.value!r} has no value_head")
    said = config.models[spec.policy].vocab
    for name, learner in config.learners.items():
        if learner.batch == "experience" and learner.model.vocab < said:
            raise ConfigError(
                f"learners.{name}: its vocabulary of {learner.model.vocab} is smaller than the "
                f"{said} tokens of {spec.policy!r}, from whose samples it learns"
            )
    prompt = getattr(config.data[spec.prompts], "keywords", {}).get("length", 1)
    context = config.models[spec.policy].context
    if spec.environment is not None:
        _check_environment(config, spec, exists)
    elif prompt + spec.length > context:
        raise ConfigError(
            f"prompts of up to {prompt} tokens and rollouts.length={spec.length} exceed the "
            f"model's context of {context} tokens; shorten one of them"
        )
    rows = rollout_rows(config)
    if rows is not None and rows % spec.microbatches:
        raise ConfigError(f"rollouts.microbatches={spec.microbatches} does not divide {rows} rows")


def _check_environment(config, spec, exists):
    """An environment's models exist, its rows fit, and nothing that it replaces is asked for."""
    environment = spec.environment
    for name in environment.context:
        exists(name, set(config.models), "rollouts.environment.context")
    if spec.transform is not None:
        raise ConfigError(
            "rollouts.transform: an environment makes the prompts, so nothing would come of it; "
            "put control tokens into the prompt that its reset returns"
        )
    row, context = environment.capacity(spec.length), config.models[spec.policy].context
    if row > context:
        raise ConfigError(
            f"rollouts.environment: prompts of up to {environment.prompt} tokens and "
            f"rollouts.length={spec.length} times 1 + {environment.forced} tokens make {row}, but "
            f"the model's context is {context}; shorten one of them"
        )


def control_tokens(value: Any) -> set[int]:
    """Ids that a function puts into texts: the argument `tags` of its partials, however deep."""
    if isinstance(value, partial):
        own = {int(tag) for tag in value.keywords.get("tags", ())}
        inner = [*value.args, *value.keywords.values()]
    else:
        own, inner = set(), value if isinstance(value, tuple | list) else ()
    return own.union(*map(control_tokens, inner))


def _check_tags(config):
    """Control tokens are in the vocabulary, and the policy that has them may not say them."""
    spec, models = config.rollouts, config.models
    found = {
        f"learners.{name}.transform": (control_tokens(learner.transform), models[name])
        for name, learner in config.learners.items()
    }
    if spec is not None:
        found["rollouts.transform"] = (control_tokens(spec.transform), models[spec.policy])
        if spec.environment is not None:
            parts = (spec.environment.reset, spec.environment.step)
            found["rollouts.environment"] = (control_tokens(parts), models[spec.policy])
    for where, (tags, model) in found.items():
        if outside := sorted(tag for tag in tags if not 0 <= tag < model.vocab):
            raise ConfigError(
                f"{where}: the control tokens {outside} are not in the model's vocabulary, ids 0 "
                f"to {model.vocab - 1}; use free ones, or a model with a larger vocab"
            )
    if spec is None:
        return
    banned = tuple(int(i) for i in spec.sampling.banned)
    for where, (tags, _) in found.items():
        said = sorted(tag for tag in tags - {*banned} if tag < models[spec.policy].vocab)
        if said:
            raise ConfigError(
                f"{where}: the policy could say the control tokens {said} itself; ban them with "
                f"rollouts.sampling=Sampling(banned={(*banned, *said)})"
            )


def _check_batches(config, devices):
    """Every minibatch must split evenly over micro-batches and over the devices that share rows."""
    sizes = {"experience": rollout_rows(config)} if config.rollouts is not None else {}
    sizes |= {name: batch_size(config, name) for name in config.data}
    data, fsdp, _ = mesh_shape(config.mesh, devices)
    for name, learner in config.learners.items():
        size = sizes.get(learner.batch)  # what is derived is known once it is made
        parts = learner.minibatches * learner.microbatches * data * fsdp
        if size is not None and size % parts:
            up = -(-size // parts) * parts
            raise ConfigError(
                f"learners.{name}: {size} rows of {learner.batch!r} do not divide into "
                f"{learner.minibatches} minibatches × {learner.microbatches} micro-batches × "
                f"{data * fsdp} devices; use a multiple of {parts}, such as {up}"
            )
    for name, evaluation in config.evaluation.items():
        size, micro = sizes[evaluation.batch], config.learners[evaluation.learner].microbatches
        parts = micro * data * fsdp
        if size is not None and size % parts:
            raise ConfigError(
                f"evaluation.{name}: {size} rows of {evaluation.batch!r} do not divide into "
                f"{micro} micro-batches × {data * fsdp} devices; use a multiple of {parts}, "
                f"such as {-(-size // parts) * parts}"
            )


def batch_plan(config: Config, *, devices: int) -> dict[str, Any]:
    """What one step does, in numbers: rows, minibatches, optimiser steps, tokens, devices."""
    plan: dict[str, Any] = {"devices": devices, "mesh (data, fsdp, tensor)": list(config.mesh)}
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
