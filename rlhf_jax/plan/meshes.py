"""Which mesh? All that divide the devices, judged by arithmetic; the best few are compiled.

The arithmetic knows what a mesh must send and hold at least, not what the compiler makes of it: it
says which meshes are worth minutes of compiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from rlhf_jax import flops, sharding
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError
from rlhf_jax.phases import init
from rlhf_jax.plan import page
from rlhf_jax.plan.chips import GIB, Chip, Target
from rlhf_jax.plan.phase import cache_bytes, stored_bytes
from rlhf_jax.plan.programs import device_bytes, host_batches, sizes
from rlhf_jax.plan.whole import plan


@dataclass(frozen=True)
class Judged:
    """One mesh: why not, or what it would cost at least."""

    mesh: Mapping[str, int]
    refused: str | None
    bytes: float | None = None  # of each device, without most temporaries
    compute: float | None = None  # seconds of an iteration
    links: float | None = None

    @property
    def seconds(self) -> float:
        """The order of preference."""
        return math.inf if self.refused is not None else self.compute + self.links


def search(
    config: Config,
    target: Target,
    *,
    best: int = 2,
    say: Callable[[str], None] = print,
    **how: Any,
) -> dict[str, Any]:
    """All meshes judged, and plans of the `best` of them, the fastest that fits first.

    `how`: more arguments of `plan`.

    Raises:
        ConfigError: if the chip's limits are not known, or no mesh is possible.
    """
    if target.chip.flops is None:
        raise ConfigError(f"--search compares times, and no limits of {target.chip.name} are known")
    judged = sorted(candidates(config, target), key=lambda one: one.seconds)
    possible = [one for one in judged if one.refused is None]
    if not possible:
        reasons = "\n  ".join(f"{_said(one.mesh)}: {one.refused}" for one in judged[:8])
        raise ConfigError(f"no mesh of {len(target.devices)} devices is possible:\n  {reasons}")
    plans = []
    for one in possible[:best]:
        say(f"mesh {_said(one.mesh)}")
        try:
            plans.append(plan(config, target, mesh=tuple(one.mesh.values()), say=say, **how))
        except ConfigError as error:
            judged[judged.index(one)] = replace(one, refused=str(error))
    plans.sort(key=lambda found: (not found["fits"], (found["seconds"] or [math.inf])[0]))
    rows = [vars(one) | {"seconds": None if one.refused else one.seconds} for one in judged]
    return {"judged": rows, "plans": plans}


def candidates(config: Config, target: Target) -> Iterator[Judged]:
    """Every way to divide the devices over the axes, judged."""
    size = sizes(config, host_batches(config))
    shapes = jax.eval_shape(partial(init, config=config), config.seed)
    frozen = {
        name: jax.eval_shape(lambda n=name: config.models[n].init(jax.random.key(0)))
        for name in config.frozen
    }
    for shape in _divisions(len(target.devices), len(sharding.AXES)):
        mesh = dict(zip(sharding.AXES, shape, strict=True))
        try:
            check(replace(config, mesh=shape), devices=len(target.devices))
            abstract = AbstractMesh(shape, sharding.AXES)
            held = sum(device_bytes(_placed(tree, abstract)) for tree in (shapes, frozen))
        except ValueError as error:  # rows, heads or weights that do not divide
            yield Judged(mesh, str(error))
            continue
        held += _working_bytes(config, mesh, size)
        if held > target.chip.memory:
            room = f"{held / GIB:,.1f} GiB of {target.chip.memory / GIB:,.1f} without temporaries"
            yield Judged(mesh, f"does not fit: {room}", held)
            continue
        compute, links = estimate(config, mesh, size, target.chip, target.host)
        yield Judged(mesh, None, held, compute, links)


def estimate(
    config: Config,
    mesh: Mapping[str, int],
    size: Mapping[str, tuple[int, int]],
    chip: Chip,
    host: int | None = None,
) -> tuple[float, float]:
    """Seconds of an iteration that compute and links need at least.

    With W bytes of weights in the compute dtype, of which tensor t leaves W/t, and f devices that
    share them: every pass over them receives W/t · (f − 1)/f, a backward pass as much again for
    gradients; over data d, 2 (d − 1)/d · W/(f t) once an optimiser step. Tensor costs two
    all-reduces of the activations a layer and pass. A rollout collects its weights once.
    """
    spec, models = config.rollouts, config.models
    devices = math.prod(mesh.values())
    groups = math.prod(mesh[axis] for axis in sharding.WRITERS[0])  # each has its own tokens
    t, d = mesh["tensor"], mesh["data"]
    f = devices // t // d
    compute, received = 0.0, 0.0

    def weights(model):
        """Bytes received for one pass over all of them."""
        return stored_bytes(model, mesh) * (f - 1) / f

    def summed(model, tokens):
        """Bytes received for one pass over so many tokens of a row group, two sums a layer."""
        size = model.layers * tokens * model.width * jax.numpy.dtype(model.dtype).itemsize
        return 4 * size * (t - 1) / t

    if spec is not None:
        rows, text = size["experience"]
        policy, scorers = models[spec.policy], {spec.policy, spec.reference, spec.value} - {None}
        count = partial(flops.forward, rows=rows, tokens=text, read=spec.length)
        compute += count(policy) + sum(count(models[name]) for name in scorers)
        received += weights(policy) + summed(policy, rows * text / groups)
        for name in scorers:
            received += spec.chunks * spec.microbatches * weights(models[name])
            received += summed(models[name], rows * text / groups)
    for learner in config.learners.values():
        if learner.batch not in size:
            continue
        model, (number, tokens) = learner.model, size[learner.batch]
        count = flops.forward(model, rows=number, tokens=tokens, read=tokens)
        again = 1 if model.remat != "none" else 0
        compute += learner.epochs * (3 + again) * count
        steps = learner.epochs * learner.minibatches
        received += steps * learner.microbatches * (3 + again) * weights(model)
        received += learner.epochs * (2 + again) * summed(model, number * tokens / groups)
        received += steps * 2 * stored_bytes(model, mesh) / f * (d - 1) / d
    inside = host is None or devices <= host
    speed = 2 * chip.link if host is None else (chip.link if inside else chip.network)
    return compute / devices / chip.flops, received / speed


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """The plans, and behind them all meshes with the reasons against them."""
    console = console or page.wide()
    for one in found["plans"]:
        page.show(one, console)
        console.print()
    table = Table(title="meshes by arithmetic, before compiling", title_justify="left")
    for name in ("mesh", "seconds", "GiB", "compiled", "why not"):
        table.add_column(name)
    compiled = {_said(one["mesh"]): one for one in found["plans"]}
    for one in found["judged"]:
        made = compiled.get(_said(one["mesh"]))
        seconds = f"{one['seconds']:.3g}" if one["seconds"] is not None else ""
        room = f"{one['bytes'] / GIB:,.1f}" if one["bytes"] is not None else ""
        said = ""
        if made is not None:
            said = f"{made['seconds'][0]:.3g} s" if made["seconds"] else "refused"
            said += "" if made["fits"] else ", does not fit"
        table.add_row(_said(one["mesh"]), seconds, room, said, one["refused"] or "")
    console.print(table)


def _divisions(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for one in (d for d in range(1, n + 1) if n % d == 0):
        yield from ((one, *rest) for rest in _divisions(n // one, parts - 1))


def _placed(tree: Any, mesh: AbstractMesh) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        sharding.shardings(tree, mesh),
    )


def _working_bytes(config: Config, mesh: Mapping[str, int], size: Mapping) -> float:
    """What a phase needs beside the weights at least.

    A rollout its copy of them and the cache, an update a gradient and every layer's input.
    """
    devices = math.prod(mesh.values())
    most = 0.0
    if config.rollouts is not None:
        copies = sum(stored_bytes(config.models[name], mesh) for name in config.rollouts.writers)
        most = copies + cache_bytes(config, mesh, size["experience"])
    for learner in config.learners.values():
        if learner.batch not in size:
            continue
        model, (rows, tokens) = learner.model, size[learner.batch]
        kept = rows * tokens / learner.minibatches / learner.microbatches * model.layers
        kept *= model.width * jax.numpy.dtype(model.dtype).itemsize / (devices / mesh["tensor"])
        gradients = stored_bytes(model, mesh) / (devices / mesh["tensor"] / mesh["data"])
        most = max(most, kept + gradients)
    return most


def _said(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "one device"
