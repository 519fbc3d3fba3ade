"""A finished run's weights at work: texts for prompts, losses on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax import step as steps
from rlhf_jax.checkpoint import opened_params, restore_frozen, restore_params
from rlhf_jax.config import Config, ConfigError, Learner
from rlhf_jax.data import chat as chats
from rlhf_jax.data import tokenizers
from rlhf_jax.models import exporting, pretrained, weights
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.types import Params, Prompts


def learner_params(config: Config, directory: Path, name: str, at: int | None = None) -> Params:
    """One learner's weights from a run's checkpoint, with those of its base.

    Raises:
        ConfigError: if there is no such learner.
    """
    base = _known(config, name).base
    own = restore_params(directory, name, step=at, target=here)
    if base is None:
        return own
    return weights.merged(restore_frozen(directory, base, target=here), own)


def _known(config: Config, name: str) -> Learner:
    if name not in config.learners:
        raise ConfigError(f"no learner {name!r}; valid: {', '.join(config.learners)}")
    return config.learners[name]


def here(shapes: Params) -> Params:
    """These shapes, whole on the first device."""
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), shapes)


def sample_texts(
    config: Config,
    directory: Path,
    *,
    prompts: Sequence[str],
    learner: str = "policy",
    count: int = 1,
    length: int = 40,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: int | None = None,
) -> list[str]:
    """`count` texts for each prompt, prompt included; sampled as the run does unless told not to.

    Raises:
        ConfigError: for numbers that make no sense, or a prompt that does not fit the context.
    """
    if config.rollouts is not None and config.rollouts.environment is not None:
        raise ConfigError(
            f"{config.name!r} writes its texts together with an environment, which makes the "
            "prompts; samples of them are in the run's samples.jsonl"
        )
    tokenizer = tokenizers.load(config.tokenizer)
    if config.rollouts is not None:
        sampling = config.rollouts.sampling
    else:
        sampling = Sampling(stop=tokenizer.stops, banned=tokenizer.never)
    params = learner_params(config, directory, learner, step)
    model = config.learners[learner].model
    if not model.lm_head:
        raise ConfigError(f"learner {learner!r} has no language model head to sample from")
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in prompts]
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    said = _said(model, params, ids, tokenizer, sampling, given, count, length, seed)
    return [tokenizer.decode(row) for row in said]


def sample_model(
    path: str | Path,
    *,
    prompts: Sequence[str],
    chat: bool = False,
    count: int = 1,
    length: int = 40,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """`count` texts for each prompt from a directory of Hugging Face, prompt included.

    With `chat` a prompt is what a user says, put in the model's own template, and what comes back
    is the answer alone.

    Raises:
        ConfigError: for a directory that is not whole, or numbers that make no sense.
    """
    try:
        model = pretrained.model(path, scan=True)
        lazy = pretrained.load(path, model)
        tokenizer = tokenizers.load(path)
        talk = chats.load(path) if chat else None
        fit = {"vocab": model.vocab, "model": str(path)}
        tokenizers.check_fits(tokenizer if talk is None else talk, path, **fit)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not model.lm_head:
        raise ConfigError(f"{path} is a reward model: it scores texts and writes none")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = weights.fill(here(shapes), lazy, origin=str(path))
    if talk is None:
        ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in prompts]
    else:
        ids = [talk.encode([{"role": "user", "content": x}], ask=True).ids for x in prompts]
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = Sampling(stop=tokenizer.stops, banned=tokenizer.never)
    said = _said(model, params, ids, tokenizer, sampling, given, count, length, seed)
    skip = [len(one) if chat else 0 for one in ids for _ in range(count)]
    return [tokenizer.decode(row[n:]) for row, n in zip(said, skip, strict=True)]


def _said(model, params, ids, tokenizer, sampling, given, count, length, seed) -> list[list[int]]:
    """Tokens of `count` texts for each prompt, prompt included."""
    sampling = sampling.replace(**{name: x for name, x in given.items() if x is not None})
    if not sampling.temperature > 0:
        raise ConfigError(
            f"temperature {sampling.temperature}: must be above 0; for greedy use top_k 1"
        )
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0 or count < 1 or length < 1:
        raise ConfigError("needs 0 < top_p ≤ 1, top_k ≥ 0, count ≥ 1 and length ≥ 1")
    if (largest := max(max(i, default=0) for i in ids)) >= model.vocab:
        raise ConfigError(
            f"the tokenizer does not fit the model: a prompt holds token {largest}, and the "
            f"embedding has {model.vocab} rows"
        )
    longest = max(len(i) for i in ids)
    if longest + length > model.context:
        raise ConfigError(
            f"a prompt of {longest} tokens and {length} more exceed the context {model.context}"
        )
    tokens = np.full((len(ids), longest), tokenizer.pad, np.int32)
    for row, one in zip(tokens, ids, strict=True):
        row[: len(one)] = one
    batch = Prompts(
        tokens=np.repeat(tokens, count, axis=0),
        length=np.repeat(np.array([len(i) for i in ids], np.int32), count),
        prompt_id=np.repeat(np.arange(len(ids), dtype=np.int32), count),
        sample_id=np.tile(np.arange(count, dtype=np.int32), len(ids)),
    )
    run = jax.jit(partial(generate, model=model, length=length))
    rollout = run(params, jax.tree.map(jnp.asarray, batch), jax.random.key(seed), sampling=sampling)
    used = np.asarray(rollout.segments) > 0
    rows = zip(np.asarray(rollout.tokens), used, strict=True)
    return [row[keep].tolist() for row, keep in rows]


def export(
    config: Config,
    directory: Path,
    out: str | Path,
    *,
    learner: str = "policy",
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    origin: str | Path | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Path:
    """One learner's weights as a directory of Hugging Face, or its adapter alone for PEFT.

    The checkpoint is read one kind of matrix at a time, each spread over `devices` (None: all, of
    all processes), so that neither a device nor a host holds the model. `origin`, a directory of
    Hugging Face, gives config.json and tokenizer; None: the one that the run names as a start.
    Without any, the tokenizer.json of the run is copied.

    Raises:
        ConfigError: if no family of Hugging Face computes this model, or it has no adapter.
    """
    out = Path(out).expanduser()
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: valid are float32, bfloat16, float16")
    if any(out.glob("*")) and not (out / "config.json").is_file() and not adapter:
        raise ConfigError(f"{out} is not empty and holds no model; choose another --out")
    params = _leaves(config, directory, learner, step, devices)
    model = config.learners[learner].model
    if origin is None:
        starts = [*config.learners.values(), *config.frozen.values()]
        paths = [one.start.path for one in starts if one.start is not None and one.start.path]
        origin = next((path for path in paths if pretrained.is_directory(path)), None)
    try:
        if adapter:
            return exporting.export_adapter(out, model, params, origin=origin)
        exporting.export(out, model, params, origin=origin, dtype=dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if origin is None and jax.process_index() == 0:
        tokenizers.load(config.tokenizer).base.save(str(out / "tokenizer.json"))
    return out


def _leaves(config: Config, directory: Path, learner: str, step: int | None, devices):
    """A function that reads some of a learner's weights, and of its base's, by their paths."""
    base = _known(config, learner).base
    own = opened_params(directory, learner, step=step)

    def read(names):
        def some(shapes):
            kept = {name: x for name, x in weights.flat(shapes).items() if name in names}
            return sharding.spread(weights.nested(kept), devices)

        found = {} if base is None else restore_frozen(directory, base, target=some)
        return weights.flat(found) | weights.flat(own(some))

    return read


def evaluate_checkpoint(config: Config, directory: Path) -> dict[str, float]:
    """Every evaluation of the experiment at the last checkpoint: name/metric → mean.

    Raises:
        ConfigError: if the experiment names no evaluation.
    """
    if not config.evaluation:
        raise ConfigError(f"the experiment {config.name!r} names no evaluation")
    found = {}
    for name, spec in config.evaluation.items():
        learner = config.learners[spec.learner]
        params = learner_params(config, directory, spec.learner)
        others = {
            other: learner_params(config, directory, other)
            if other in config.learners
            else restore_frozen(directory, other, target=here)
            for other in learner.others
        }
        run = jax.jit(partial(steps.evaluate, learner=learner, models=config.models))
        stream = iter(config.data[spec.batch](seed=config.seed, shard=(0, 1)))
        rows = [run(params, others, next(stream)) for _ in range(spec.batches)]
        for metric in rows[0]:
            found[f"{name}/{metric}"] = float(np.mean([float(row[metric]) for row in rows]))
    return found
