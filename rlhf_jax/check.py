"""Mistakes in an experiment, found before anything is compiled."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from rlhf_jax.check_mesh import check_rows, check_sizes, checked_mesh
from rlhf_jax.check_models import check_directories
from rlhf_jax.config import RESERVED, Config, ConfigError, batch_size, rollout_rows
from rlhf_jax.models import weights
from rlhf_jax.objectives.presets import Variant


def check(config: Config, *, devices: int, slices: int = 1) -> None:
    """Find mistakes before anything is compiled; `slices`: of these devices.

    Raises:
        ConfigError: saying what was wrong and what is valid.
    """
    mesh = checked_mesh(config, devices, slices)
    _check_numbers(config)
    _check_calls(config, "")
    for name, frozen in config.frozen.items():
        if frozen.model is None and frozen.start.learner not in config.learners:
            raise ConfigError(
                f"frozen.{name}: no learner {frozen.start.learner!r} to take the model of; valid: "
                f"{', '.join(config.learners)}, or give model="
            )
    check_directories(config)
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
        for bound in ("rows", "size") if derived.pool is not None else ():
            if getattr(derived.pool, bound) < 1:
                raise ConfigError(f"derived.{name}.pool.{bound}: must be at least 1")
        streams.add(name)
    for name in {*config.learners, *config.frozen} & set(RESERVED):
        raise ConfigError(f"no learner or frozen tree may be called {name!r}: metrics are")
    if both := set(config.learners) & set(config.frozen):
        raise ConfigError(f"{', '.join(both)}: both a learner and frozen; rename one")
    for name, learner in config.learners.items():
        if not callable(learner.objective):
            hint = ""
            if isinstance(learner.objective, Variant):
                hint = (
                    "; a preset's is PRESET.objective, beside Rollouts(advantage=PRESET.advantage, "
                    "samples=…, value=None, kl=KL(0.0, adaptive=False))"
                )
            raise ConfigError(f"learners.{name}.objective is not a function{hint}")
        exists(learner.batch, streams, f"learners.{name}.batch")
        for other in learner.scores:
            exists(other, known, f"learners.{name}.scores")
        if learner.base is not None:
            exists(learner.base, set(config.frozen), f"learners.{name}.base")
            _check_base(config, name, learner)
    for name, evaluation in config.evaluation.items():
        exists(evaluation.learner, set(config.learners), f"evaluation.{name}.learner")
        exists(evaluation.batch, set(config.data), f"evaluation.{name}.batch")
    if config.rollouts is not None:
        _check_rollouts(config, config.rollouts, exists)
    _check_tags(config)
    check_sizes(config, mesh)
    check_rows(config, mesh)


def _check_base(config, name, learner):
    """What a learner does not train must stand in its base, and some of it must be trained."""
    own, base = (
        {
            path: x.shape
            for path, x in weights.flat(jax.eval_shape(model.init, jax.random.key(0))).items()
        }
        for model in (learner.model, config.models[learner.base])
    )
    try:
        trained = {path for path in own if re.search(learner.trains, path)}
    except re.error as error:
        raise ConfigError(
            f"learners.{name}.trains={learner.trains!r} is no regular expression: {error}"
        ) from error
    if not trained:
        raise ConfigError(
            f"learners.{name}.trains={learner.trains!r} finds none of the model's weights: "
            f"{', '.join(own)}; terms of low rank need a model with lora=Lora(...)"
        )
    if wrong := [p for p in own if p not in trained and own[p] != base.get(p)]:
        raise ConfigError(
            f"learners.{name}: these weights are not trained, and frozen.{learner.base} has them "
            f"not, or of another shape: {', '.join(wrong[:8])}"
        )


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
        for name in ("length", "samples", "chunks", "microbatches", "windows"):
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
    if spec.ahead and spec.chunks > 1:
        raise ConfigError(
            f"rollouts.ahead=True samples the next step's prompts at once; rollouts.chunks="
            f"{spec.chunks} would cut this step's: set one of the two"
        )
    exists(spec.prompts, set(config.data), "rollouts.prompts")
    exists(spec.policy, set(config.models), "rollouts.policy")  # frozen: a teacher's samples
    if spec.value is not None and spec.value not in config.models:
        valid = ", ".join(sorted(config.models))
        raise ConfigError(
            f"rollouts.value: there is no {spec.value!r}; valid: {valid}, "
            "or None for no critic (then with advantage=leave_one_out, group_relative, …)"
        )
    if spec.reference is not None:
        exists(spec.reference, set(config.models), "rollouts.reference")
    if not config.models[spec.policy].lm_head:
        raise ConfigError(f"rollouts.policy: the model of {spec.policy!r} has no lm_head")
    if spec.value is not None and not config.models[spec.value].value_head:
        raise ConfigError(f"rollouts.value: the model of {spec.value!r} has no value_head")
    if spec.kl.exact and spec.reference is None:
        raise ConfigError("rollouts.kl.exact: of which reference? Name one in rollouts.reference")
    if spec.kl.exact and getattr(config.learners.get(spec.policy), "vocab", True) is None:
        raise ConfigError(
            f"rollouts.kl.exact: a token's own share of the KL must be a loss; add "
            f"objectives.reference_kl to learners.{spec.policy}, with vocab=reference_kl_vocab"
        )
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
    if rows is not None and rows % spec.chunks == 0 and rows // spec.chunks % spec.microbatches:
        each = f"{rows // spec.chunks} rows" + " of a chunk" * (spec.chunks > 1)
        raise ConfigError(f"rollouts.microbatches={spec.microbatches} does not divide {each}")
    if not spec.rescore and spec.kl.exact:
        raise ConfigError(
            "rollouts.rescore=False leaves no logits for an exact KL: set rollouts.rescore=True or "
            "KL(exact=False)"
        )
    if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in spec.widths):
        raise ConfigError(
            f"rollouts.widths={spec.widths}: numbers of tokens, prompt and response together, "
            "such as (48, 64)"
        )


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
