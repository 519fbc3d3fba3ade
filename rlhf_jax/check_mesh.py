"""Mistakes in an experiment that only a mesh shows: what does not divide over its devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_jax.config import Config, ConfigError, batch_size, rollout_rows
from rlhf_jax.rollout import check_slots
from rlhf_jax.sharding import AXES, check_slices, mesh_shape


def checked_mesh(config: Config, devices: int, slices: int = 1) -> tuple[int, ...]:
    """The sizes of the experiment's mesh over so many devices, in so many slices.

    Raises:
        ConfigError: saying which sizes are valid.
    """
    try:
        mesh = mesh_shape(config.mesh, devices)
        check_slices(mesh, slices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except TypeError as error:
        raise ConfigError(f"mesh={config.mesh}: four sizes, ({', '.join(AXES)})") from error
    return mesh


def check_sizes(config: Config, mesh: Sequence[int]) -> None:
    """What a mesh splits of a model divides: heads, MLP and vocabulary by tensor, its width by all
    who share its weights.

    Raises:
        ConfigError: with the sizes of the mesh that would do, and the model's.
    """
    _, fsdp, tensor, sequence = mesh
    split = {
        "tensor": (tensor, ("heads", "kv_heads", "mlp", "side_mlp", "vocab")),
        "fsdp × sequence": (fsdp * sequence, ("width",)),
    }
    for name, model in config.models.items():
        for axes, (parts, fields) in split.items():
            sizes = {field: getattr(model, field, None) or 0 for field in fields}
            wrong = {field: size for field, size in sizes.items() if size % parts}
            if wrong:
                most = math.gcd(*sizes.values())
                fits = [n for n in range(1, min(most, math.prod(mesh)) + 1) if most % n == 0]
                up = ", ".join(f"{f}={-(-n // parts) * parts}" for f, n in wrong.items())
                raise ConfigError(
                    f"mesh {tuple(mesh)}: {', '.join(f'{f}={n}' for f, n in wrong.items())} of "
                    f"the model of {name!r} cannot be split by {axes} = {parts}; with this model "
                    f"{axes} can be {', '.join(map(str, fits))}, and "
                    f"{parts} needs a model with {up}"
                )


def check_rows(config: Config, mesh: Sequence[int]) -> None:
    """Every minibatch splits evenly over micro-batches and over the devices that share rows."""
    sizes = {"experience": rollout_rows(config)} if config.rollouts is not None else {}
    sizes |= {name: batch_size(config, name) for name in config.data}
    sizes |= {name: one.pool.rows for name, one in config.derived.items() if one.pool is not None}
    data, fsdp, _, sequence = mesh
    if sizes.get("experience") is not None:
        spec, rows = config.rollouts, sizes["experience"]
        writers = data * fsdp * sequence
        parts = spec.chunks * spec.samples * writers
        if spec.chunks > 1 and rows % parts:
            raise ConfigError(
                f"rollouts.chunks: {rows} rows do not divide into {spec.chunks} chunks × "
                f"{spec.samples} samples × {writers} devices; use a multiple of {parts}"
            )
        try:
            rows //= spec.chunks
            check_slots(rows, spec.slots, samples=spec.samples, groups=writers)
        except ValueError as error:
            raise ConfigError(f"rollouts.slots: {error}") from error
        parts = spec.microbatches * data * fsdp
        if spec.widths and rows % parts:
            raise ConfigError(
                f"rollouts.microbatches: the {rows} rows of a chunk do not divide into "
                f"{spec.microbatches} micro-batches × {data * fsdp} devices, which widths need; "
                f"use rows per chunk that are a multiple of {parts}"
            )
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
