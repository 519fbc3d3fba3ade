"""Scripts of `tpu/` with a job's values in them, quoted for the shell."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from rlhf_jax.config import ConfigError

TEMPLATES = files("rlhf_jax") / "tpu"


def from_git(options: Namespace) -> bool:
    """Do the hosts work in a repository that they fetch?"""
    return (options.install or "").startswith("git+")


def filled(name: str, values: Mapping[str, str | Sequence[str]]) -> str:
    """A script of `tpu/` with its values, each quoted for the shell."""
    lines = [
        f"{key}={shlex.quote(value)}" if isinstance(value, str) else f"{key}=({shlex.join(value)})"
        for key, value in values.items()
    ]
    return (TEMPLATES / name).read_text().replace("# @values@", "\n".join(lines), 1)


def host(
    options: Namespace, *, extra: str, experiment: str, work: str = "", wheel: str = ""
) -> str:
    """host.sh for this job. `extra`: gpu, tpu or tpu,gcs; `wheel` replaces a local path."""
    what, source, revision = options.install or "", "", ""
    extra = f"[{extra}]" if extra else ""
    if from_git(options):
        found = re.fullmatch(r"git\+((?:https|ssh)://[^@\s]+)@([\w][\w./-]*)", what)
        if found is None:
            raise ConfigError(
                f"--install {re.sub(r'//[^/]*@', '//…@', what)}: valid is "
                "git+https://HOST/REPOSITORY@REVISION; a revision makes all hosts and restarts run "
                "the same, and a password has no place here"
            )
        source, revision, what = found[1], found[2], f"./source{extra}"
    elif what.endswith(".whl"):
        if "://" not in what and not Path(what).is_file():
            raise ConfigError(f"--install {what}: there is no such file")
        what = (wheel or what) + extra
    elif what:
        found = re.fullmatch(r"(rlhf[-_]jax)(\[[\w,.-]+\])?([<>=!~][^;@]*)?", what)
        if found is None:
            raise ConfigError(f"--install {what}: valid is git+…, a wheel or rlhf-jax==VERSION")
        what = f"{found[1]}{found[2] or extra}{found[3] or ''}"
    values = {
        "NAME": options.name,
        "EXPERIMENT": experiment,
        "SETTINGS": [f"--set={setting}" for setting in options.settings],
        "OUT": options.out,
        "INSTALL": what,
        "SOURCE": source,
        "REVISION": revision,
        "BEFORE": options.before or "",
        "WORK": work,
    }
    return filled("host.sh", values)
