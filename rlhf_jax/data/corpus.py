"""Fetch the human-rated snippets once: through pip, checked by hash, kept in the user's cache.

The corpus travels inside the source distribution of vaderSentiment 3.3.2 (MIT licence) as
`additional_resources/hutto_ICWSM_2014.tar.gz`. Please cite: C.J. Hutto and E.E. Gilbert, "VADER:
A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
It is fetched on first use and never stored in this repository.
"""

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from rlhf_jax.data import DataError, cache_directory

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
TOP = "vaderSentiment-3.3.2"


def sdist() -> Path:
    """Path of the verified source distribution; downloads it where the cache lacks it.

    Safe with several processes at once: each downloads beside the cache and renames.
    """
    target = cache_directory() / SDIST
    if target.exists():
        if _sha256(target) != SHA256:
            raise DataError(
                f"{target} is not the expected file: its sha256 is {_sha256(target)}, not "
                f"{SHA256}. Delete it and run again, or put the right one there."
            )
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as scratch:
            os.replace(_download(Path(scratch), target), target)
    except OSError as error:
        raise DataError(
            f"The cache directory {target.parent} cannot be written to ({error.strerror}). "
            "Set RLHF_JAX_CACHE to a directory that can."
        ) from error
    return target


def read(member: str) -> bytes:
    """Content of one file of the source distribution, e.g. `vaderSentiment/vader_lexicon.txt`."""
    with tarfile.open(sdist()) as outer:
        return _content(outer, f"{TOP}/{member}")


def read_snippets(names: list[str]) -> dict[str, bytes]:
    """Contents of files of the corpus, e.g. `tweets_GroundTruth.txt`."""
    inner = io.BytesIO(read("additional_resources/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=inner) as archive:
        return {name: _content(archive, f"hutto_ICWSM_2014/{name}") for name in names}


def _content(archive: tarfile.TarFile, member: str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member  # every member we ask for is a regular file
    return file.read()


def _download(scratch: Path, target: Path) -> Path:
    """Ask pip for the file, by hash; return where it landed."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    tries = []
    for pip in _pips():
        # pip checks the hash, then asks setuptools for the package's metadata. It brings its own
        # setuptools for that (build isolation), so a virtual environment without one is enough.
        # `--no-binary` names the package: `:all:` would also build that setuptools from source.
        command = [*pip, "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--no-binary", PACKAGE.split("==")[0]]
        command += ["--dest", str(scratch), "--requirement", str(requirements)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            tries.append(f"{' '.join(pip)}: {error}")
            continue
        path = scratch / SDIST
        if done.returncode == 0 and path.exists() and _sha256(path) == SHA256:
            return path
        tries.append(f"{' '.join(pip)}: {done.stderr.strip()[-600:]}")
    raise DataError(
        f"Could not fetch the human-rated snippets ({PACKAGE}).\n"
        f"Without a network, put this file there by hand:\n"
        f"  file    {SDIST}  (the source distribution of vaderSentiment 3.3.2 on PyPI)\n"
        f"  sha256  {SHA256}\n"
        f"  where   {target}\n"
        f"What was tried:\n  " + "\n  ".join(tries or ["no pip and no uv was found"])
    )


def _pips() -> list[list[str]]:
    """Commands that may run pip; an environment made by uv has none of its own."""
    pips = []
    if importlib.util.find_spec("pip") is not None:
        pips.append([sys.executable, "-m", "pip"])
    elif uv := shutil.which("uv"):
        pips.append([uv, "tool", "run", "--quiet", "pip"])
    if not pips and (pip := shutil.which("pip3")):
        pips.append([pip])
    return pips


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
