"""Stand-ins for programs of clusters: each call is written down, then answered as a test says."""

import os
import shlex

SCRIPT = """#!/usr/bin/env bash
printf '%s\\0' "${{0##*/}}" "$@" $'\\x01' >>{calls}
{answer}
"""


def install(folder, programs):
    """Put stand-ins into `folder`, name -> lines of bash; returns the PATH that has them first."""
    folder.mkdir(exist_ok=True)
    for name, answer in programs.items():
        calls = shlex.quote(str(folder / "calls"))
        (folder / name).write_text(SCRIPT.format(calls=calls, answer=answer))
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


def calls(folder):
    """What was called, in order, with what arguments."""
    path = folder / "calls"
    found = path.read_text().split("\0\x01\0")[:-1] if path.exists() else []
    return [call.split("\0") for call in found]
