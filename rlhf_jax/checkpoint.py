"""Checkpoints: one atomic Orbax step holds everything a resume needs, and restores onto any mesh.

DIRECTORY/<step>/state       the TrainState
DIRECTORY/<step>/about       JSON: the place of every data stream, a digest of every array, and more
DIRECTORY/frozen             weights that never change, written once, before the first step

A stream's place is the same in every process (data/streams.py), so a run goes on with any number.

A step's directory gets its name only when all of it is on disk, so a crash at any moment leaves the
steps before it. Truncated and damaged files are errors: every restored array is compared with the
digest taken on the device when it was saved.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rlhf_jax import stored
from rlhf_jax.preemption import Preemption, Stopped
from rlhf_jax.processes import broken_link
from rlhf_jax.stored import FROZEN, CheckpointError
from rlhf_jax.types import Params, TrainState

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Preemption",
    "Stopped",
    "opened_params",
    "restore_frozen",
    "restore_params",
]


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls every method.

    Raises:
        CheckpointError: if the directory cannot be written.
    """

    def __init__(self, directory: Any, *, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep {keep}: at least 1 checkpoint must be kept")
        self.directory = _absolute(directory)
        if not read_only:
            _check_writable(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._last: int | None = None  # what this object saved or restored
        self._size = 0  # bytes of it

    def steps(self) -> list[int]:
        """Steps that are complete on disk, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last complete step, or None; as the first process sees it, for disks lag."""
        found = self._manager.latest_step()
        found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
        return None if found < 0 else found

    def save(
        self,
        step: int,
        state: TrainState,
        data: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start writing a step; returns when its arrays are copied off the device.

        `data` maps names to iterators with a state that is JSON, the same in every process;
        `about` is anything that is JSON. The state may be donated right after. False if this very
        step was just saved or restored.

        Raises:
            CheckpointError: if this step or the one before it could not be written, or processes
                differ in how far they have read.
        """
        if step == self._last:
            return False
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self.directory} already holds step {latest}, so step {step} cannot be saved; "
                f"move the steps after {step - 1} elsewhere to go on from there"
            )
        self.wait()
        items = _items(state, about or {}, _places(data or {}))
        self._last, self._size = step, _size(state)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._not_written(error) from error
        return True

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            CheckpointError: if the step in flight could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Finish what is in flight and let go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def restore(self, step: int, target: TrainState, data: Mapping[str, Any] | None = None):
        """The state of a step, with the shardings of `target`; sets `data` to where it stood.

        Bit for bit what was saved. `target` is a tree of `jax.ShapeDtypeStruct` with shardings, of
        any mesh.

        Raises:
            CheckpointError: if the step is missing, damaged, of other shapes or other data streams.
        """
        path = self._exists(step)
        state = stored.read(path, target)
        for name, stream in (data or {}).items():
            stream.set_state(stored.place(path, name))
        self._last = step
        return state

    def about(self, step: int) -> dict[str, Any]:
        """What `save` was told about the step.

        Raises:
            CheckpointError: if the step is missing or damaged.
        """
        path = self._exists(step)
        with stored.reading(path):
            return stored.about(path)["about"]

    def save_frozen(self, trees: Mapping[str, Params]) -> None:
        """Write weights that never change, once and at once, beside the steps.

        Raises:
            CheckpointError: if there are steps already, or the disk refuses.
        """
        if not trees:
            return
        if self.latest() is not None:
            raise CheckpointError(
                f"{self.directory} already holds steps that belong to other frozen weights; "
                "choose an empty directory"
            )
        trees = dict(trees)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                items = ocp.args.Composite(**_items(trees, {}))
                writer.save(self.directory / FROZEN, args=items, force=True)
        except Exception as error:
            raise _not_written(self.directory / FROZEN, _size(trees), error) from error

    def restore_frozen(self, target: Mapping[str, Params]) -> dict[str, Params]:
        """The frozen weights, with the shardings of `target`.

        Raises:
            CheckpointError: if they are missing, damaged or of other shapes.
        """
        if not target:
            return {}
        path = self.directory / FROZEN
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the frozen weights {sorted(target)} were written there before "
                "the first step; put it back, or start again in an empty directory"
            )
        return stored.read(path, dict(target))

    def _not_written(self, error: Exception) -> CheckpointError:
        path, self._last = self.directory / str(self._last), None
        return _not_written(path, self._size, error)

    def _exists(self, step: int) -> epath.Path:
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(
                f"no complete checkpoint of step {step} in {self.directory}; "
                f"there are {steps if steps else 'none'}"
            )
        return self.directory / str(step)


Target = Params | Callable[[Params], Params] | None


def restore_params(
    run: Any, learner: str, *, step: int | None = None, target: Target = None
) -> Params:
    """One learner's weights from a run's checkpoint, and nothing else of it.

    Without `target` they are numpy arrays on the host; with one they get its shardings, and its
    dtypes if those differ. A function makes the target of the shapes that are stored, or of some.
    `run` is a run's directory; `step` None means the latest.

    Raises:
        CheckpointError: if there is no such checkpoint or learner, or it is damaged or misfits.
    """
    return opened_params(run, learner, step=step)(target)


def opened_params(run: Any, learner: str, *, step: int | None = None) -> Callable[[Target], Params]:
    """`restore_params` of the step that is found now, as a function of the target: part by part.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    directory = epath.Path(run) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            f"{run} holds no checkpoints (there is no {directory}); "
            "give the --out directory of a run, or a stage's directory inside it"
        )
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{directory} holds no complete checkpoint yet")
        path = checkpoints._exists(step)
    return partial(stored.part, path, ("learners", learner, "params"))


def restore_frozen(run: Any, name: str, *, target: Target = None) -> Params:
    """One frozen tree of a run's checkpoints, as `restore_params` has it.

    Raises:
        CheckpointError: if there is none of that name, or it is damaged.
    """
    return stored.part(_absolute(run) / "checkpoints" / FROZEN, (name,), target)


def _absolute(path: Any) -> epath.Path:
    """Orbax finds nothing in a relative one; `absolute` of gs://… is another."""
    path = epath.Path(path)
    return path if path.is_absolute() else path.absolute()


def _items(
    tree: Any, about: Mapping[str, Any], places: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    found = {"digests": stored.digests(tree), "data": places or {}, "about": dict(about)}
    return {"state": ocp.args.StandardSave(tree), "about": ocp.args.JsonSave(found)}


def _meet(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier of all processes, but not for one whose own save has just failed.

    Orbax sends it to another barrier than those that wait for its part of the step; they would find
    each other missing after twenty minutes. Now it raises, ends, and is gone for the others.
    """
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _places(data: Mapping[str, Any]) -> dict[str, Any]:
    """Where the streams stand: one place for all processes, or the data would be read wrongly."""
    found = {name: stream.get_state() for name, stream in data.items()}
    for name, place in found.items():
        digest = np.uint32(zlib.crc32(json.dumps(place, sort_keys=True).encode()))
        everyone = multihost_utils.process_allgather(digest).reshape(-1)
        if (everyone != digest).any():
            raise CheckpointError(
                f"data {name!r}: processes differ in how far they have read, so no other number "
                "of them could go on; a stream makes the rows of `shard` of the same batches in "
                "every process (data/streams.py)"
            )
    return found


def _size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _check_writable(directory: epath.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # file systems of clouds raise what they like
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"cannot write checkpoints to {directory}: {reason}; "
            "choose another directory or change its permissions"
        ) from error


def _not_written(path: epath.Path, size: int, error: BaseException) -> CheckpointError:
    """What to say when a write fails; the steps before it are untouched."""
    full = False
    cause: BaseException | None = error
    while cause is not None:
        full |= getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause)
        cause = cause.__cause__ or cause.__context__
    kept = "the checkpoints before it are intact"
    if full:
        free = shutil.disk_usage(path.parent).free / 2**20
        return CheckpointError(
            f"{path} was not written: the disk is full ({free:.0f} MiB free, up to "
            f"{size / 2**20:.0f} MiB needed); {kept}. Free some space, then resume"
        )
    if broken_link(error):
        return CheckpointError(
            f"the link to another process broke, so {path} was not written; {kept}"
        )
    return CheckpointError(
        f"{path} was not written ({type(error).__name__}: {str(error)[:300]}); {kept}"
    )
