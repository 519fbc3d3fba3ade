"""A run whose directory is in a bucket, `gs://…`: small files are written here and copied there.

An object cannot be appended to, and metrics are at every step. Checkpoints go to the bucket
directly, by Orbax, which writes to paths and to `gs://`.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
from pathlib import Path

import fsspec
import jax
from etils import epath

from rlhf_jax.config import ConfigError
from rlhf_jax.data import cache_directory

APART = ("checkpoints", "processes")  # what is in the bucket only


def place(directory: str | os.PathLike) -> Path | epath.Path:
    """A run's directory as what it is: a path, or a place in a bucket.

    Raises:
        ConfigError: for what Orbax cannot write to.
    """
    scheme, found, _ = os.fspath(directory).partition("://")
    if not found:
        return Path(directory)
    if scheme != "gs":
        raise ConfigError(
            f"{os.fspath(directory)}: valid is a path or gs://BUCKET/RUN; Orbax writes checkpoints "
            "to no other kind of storage, so mount it and give the folder"
        )
    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError as error:
        raise ConfigError(
            f"{os.fspath(directory)}: pip install 'rlhf-jax[gcs]' ({error})"
        ) from error
    return epath.Path(directory)


def write(path: Path | epath.Path, text: str) -> None:
    """Whole or not at all, as an object always is."""
    if isinstance(path, Path):
        part = path.with_name(f"{path.name}.part")
        part.write_text(text)
        part.replace(path)
    else:
        path.write_text(text)


class Mirror:
    """A run's directory `out`, and `here`, where its small files are: itself, if it is a path.

    In a bucket they are fetched when entered, and sent by `send` and at the end, whatever it is.
    The first process alone sends.
    """

    def __init__(self, out: Path | epath.Path):
        self.out = out
        self._remote = "://" in os.fspath(out)
        self.here = Path(out)
        self._sent: dict[Path, tuple[int, int]] = {}  # size and time of change
        if self._remote:
            name = urllib.parse.quote(os.fspath(out), safe="")
            self.here = cache_directory() / "runs" / f"{name}-{jax.process_index()}"

    def __enter__(self) -> Mirror:
        if self._remote:
            shutil.rmtree(self.here, ignore_errors=True)  # what counts is in the bucket
            self.here.mkdir(parents=True)
            if self.out.exists():
                self._fetch(self.out, self.here)
            self._sent = self._files()
        return self

    def __exit__(self, *exception) -> None:
        self.send()

    def send(self) -> None:
        """Copy to the bucket what was written since the last time."""
        if not self._remote or jax.process_index() != 0:
            return
        for path, state in self._files().items():
            if self._sent.get(path) != state:
                there = self.out / path.relative_to(self.here).as_posix()
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(path.read_bytes())
                self._sent[path] = state

    def _fetch(self, there: epath.Path, here: Path) -> None:
        for path in there.iterdir():
            if path.is_dir() and path.name not in APART:
                (here / path.name).mkdir(exist_ok=True)
                self._fetch(path, here / path.name)
            elif not path.is_dir():
                (here / path.name).write_bytes(path.read_bytes())

    def _files(self) -> dict[Path, tuple[int, int]]:
        files = [path for path in self.here.rglob("*") if path.is_file()]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
