"""Is this machine, or this set of machines, fit to train? One line for each thing looked at.

Every process measures and all of them see what the others found, so that all end with the same
verdict; the first one prints it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rlhf_jax import probes, sharding
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError
from rlhf_jax.experiment import describe
from rlhf_jax.runs import apart

GIB = 2**30
Facts = Sequence[Mapping[str, Any]]  # of every process, as probes.py has them


@dataclass(frozen=True)
class Line:
    """One finding."""

    level: str  # "ok", "warn" or "fail"
    name: str
    said: str
    todo: str = ""  # unless ok


def doctor(source: str, configs: Mapping[str, Config], directory: str | None) -> list[Line]:
    """Look at everything. `source` says how the processes were found; `directory`: checkpoints."""
    with probes.Patience():
        facts = probes.gathered(probes.local_facts() | {"experiment": describe(configs)})
        lines = [versions(facts), processes(source, facts), devices(facts), memory(facts)]
        lines += experiments(facts) + meshes(configs, jax.devices())
        if len(facts) > 1:
            lines.append(clock(probes.clock_readings()))
        if all(line.level != "fail" for line in lines):  # else there may be no such mesh
            first = [config.mesh for config in configs.values()][:1]
            mesh = sharding.make_mesh(*first)
            lines += [collective(mesh, axis) for axis in mesh.axis_names if mesh.shape[axis] > 1]
        if directory is not None:
            lines.append(storage(probes.gathered(probes.stored(directory)), directory))
    return lines


def show(lines: Sequence[Line]) -> int:
    """Print the findings, in the first process; the exit status: 1 if one of them is a failure."""
    failed = [line.name for line in lines if line.level == "fail"]
    if jax.process_index() == 0:
        for line in lines:
            todo = f"\n{'':19s}→ {line.todo}" if line.todo else ""
            print(f"{line.level:5s} {line.name:12s} {line.said}{todo}", flush=True)
    else:
        print(f"{'fail: ' + ', '.join(failed) if failed else 'ok'}; process 0 prints it all")
    return int(bool(failed))


def versions(facts: Facts) -> Line:
    """The same everywhere, or nothing else can be trusted."""
    said = ", ".join(f"{name} {found}" for name, found in facts[0]["versions"].items())
    for i, one in enumerate(facts):
        if differ := [n for n, x in one["versions"].items() if x != facts[0]["versions"][n]]:
            other = ", ".join(f"{name} {one['versions'][name]}" for name in differ)
            said = f"{said}; but process {i} on {one['host']} has {other}"
            return Line("fail", "versions", said, "install the same versions on every host")
    return Line("ok", "versions", said)


def processes(source: str, facts: Facts) -> Line:
    """How many, where, and how they were found."""
    hosts = len({one["host"] for one in facts})
    return Line("ok", "processes", f"{len(facts)} on {hosts} host(s); found by: {source}")


def devices(facts: Facts) -> Line:
    """Of one kind, and as many in every process."""
    kinds = {(tuple(one["kinds"]), one["devices"]) for one in facts}
    said = f"{sum(one['devices'] for one in facts)} × {', '.join(facts[0]['kinds'])}"
    if len(kinds) > 1 or len(facts[0]["kinds"]) > 1:
        shown = "; ".join(
            f"process {i} on {x['host']}: {x['devices']} × {', '.join(x['kinds'])}"
            for i, x in enumerate(facts)
        )
        return Line("fail", "devices", shown, "leave out or repair the host that differs")
    if facts[0]["platform"] == "cpu":
        todo = "fine for a trial; for an accelerator install rlhf-jax[tpu] or rlhf-jax[gpu]"
        return Line("warn", "devices", said, todo)
    return Line("ok", "devices", said)


def memory(facts: Facts) -> Line:
    """The least that a host has free, and the most of a device that is taken already."""
    least = min(facts, key=lambda one: one["free"])
    said = f"{least['free'] / GIB:.1f} of {least['total'] / GIB:.1f} GiB free on {least['host']}"
    fullest = max(facts, key=lambda one: one["used"])
    if fullest["limit"]:
        said += f"; {fullest['limit'] / GIB:.1f} GiB on a device"
        if fullest["used"] > 0.1 * fullest["limit"]:
            said += f", {fullest['used'] / GIB:.1f} of them taken on {fullest['host']}"
            return Line("warn", "memory", said, "end the other program that uses the device")
    if least["free"] < 0.1 * least["total"]:
        todo = "end other programs; saving copies this host's part of the state to its memory"
        return Line("warn", "memory", said, todo)
    return Line("ok", "memory", said)


def experiments(facts: Facts) -> list[Line]:
    """The same in every process: a line if not."""
    todo = "start every process with the same command and the same files"
    return [Line("fail", "experiment", said, todo)] if (said := apart(facts)) else []


def meshes(configs: Mapping[str, Config], devices: Sequence) -> list[Line]:
    """The experiment's stages against the devices that are there."""
    lines, count = [], len(devices)
    for name, config in configs.items():
        try:
            check(config, devices=count, slices=sharding.slices_of(devices))
        except ConfigError as error:
            todo = "change the experiment with --set, or the number of devices"
            lines.append(Line("fail", "mesh", f"{name}: {error}", todo))
            continue
        shape = sharding.mesh_shape(config.mesh, count)
        sizes = " × ".join(f"{axis} {n}" for axis, n in zip(sharding.AXES, shape, strict=True))
        lines.append(Line("ok", "mesh", f"{name}: {sizes}"))
    return lines


def clock(readings: Sequence[Sequence[float]]) -> Line:
    """Seconds between the fastest and the slowest clock, in the round that disturbed least."""
    best = min(readings, key=lambda row: max(row) - min(row))
    skew = max(best) - min(best)
    said = f"{skew * 1e3:.0f} ms apart at most (process {best.index(max(best))} is ahead)"
    if skew < 1.0:
        return Line("ok", "clocks", said)
    level = "warn" if skew < 60.0 else "fail"  # storage services refuse what is minutes off
    return Line(level, "clocks", said, "let every host follow a time server (chrony, systemd)")


def collective(mesh: jax.sharding.Mesh, axis: str) -> Line:
    """Is a sum over the axis right, and fast?"""
    speed, right = probes.all_reduce(mesh, axis)
    said = f"{speed / 1e9:.2f} GB/s per device, all-reduce over {axis} ({mesh.shape[axis]} devices)"
    if not right:
        todo = "a link or a device computes wrongly: replace the host"
        return Line("fail", "collective", f"a sum over {axis} is wrong", todo)
    if speed < 1e9 and mesh.devices.flat[0].platform != "cpu":
        todo = "are all hosts in one slice or network block, and does NCCL use its fast interface?"
        return Line("warn", "collective", said, todo)
    return Line("ok", "collective", said)


def storage(facts: Facts, directory: str) -> Line:
    """Everybody can write there, and sees what the others write."""
    for i, one in enumerate(facts):
        who, where = f"process {i} on {one['host']}", f"process {(i + 1) % len(facts)} wrote"
        if "cannot write" in one:
            said = f"{who} cannot write to {directory}: {one['cannot write']}"
            lacks = "rlhf-jax[gcs]" in one["cannot write"]
            todo = "choose another directory, or change its permissions"
            todo = "pip install 'rlhf-jax[gcs]' on every host" if lacks else todo
            return Line("fail", "checkpoints", said, todo)
        if "cannot see" in one or not one.get("same", True):
            said = f"{who} does not see what {where} to {directory}: {one.get('cannot see', '')}"
            todo = "choose a directory that all hosts share: NFS, a mounted bucket"
            return Line("fail", "checkpoints", said, todo)
    write, read = (probes.SIZE / max(one[k] for one in facts) / 1e6 for k in ("write", "read"))
    said = f"{directory}: {write:.0f} MB/s written, {read:.0f} MB/s read, by the slowest process"
    free = min((one["free"] for one in facts if "free" in one), default=None)
    said += "" if free is None else f"; {free / GIB:.0f} GiB free"
    if free is not None and free < 10 * GIB:
        return Line("warn", "checkpoints", said, "free some space: two checkpoints are kept")
    if write < 20:
        return Line("warn", "checkpoints", said, "saving will be slow: choose a faster directory")
    return Line("ok", "checkpoints", said)
