"""Passes on what a process writes to stderr and, if JAX then ends it, says in words who is gone.

JAX's runtime notices a dead process by its heartbeats and aborts the others, which nothing in them
can prevent or outlive; its last words hold a number. This runs beside each of several processes,
uses nothing but the standard library, and ends when its process does:

    python witness.py '{"parent": 4711, "me": 0, "hosts": ["a", "b"]}' <what the process writes
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

TAIL = 2**16  # bytes of the last words that are looked at


def accompany(me: int, hosts: Sequence[str]) -> None:
    """Start one for this process, which is number `me` of those on `hosts`."""
    told = json.dumps({"parent": os.getpid(), "me": me, "hosts": list(hosts)})
    command = [sys.executable, "-S", "-I", __file__, told]
    theirs, ours = os.pipe()
    # -I: the modules beside it are not those of the standard library.
    subprocess.Popen(command, stdin=theirs, stdout=sys.stderr.fileno())
    os.close(theirs)
    sys.stderr.flush()
    os.dup2(ours, 2)  # C++ writes there, too
    os.close(ours)


def gone(text: str, me: int, hosts: Sequence[str]) -> str | None:
    """What JAX's last words say, in ours; None if it did not end the process for another's sake."""
    _, fatal, last = text.rpartition("JAX distributed service detected fatal errors")
    if not fatal:
        return None

    def named(numbers):
        numbers = sorted({int(n) for n in numbers} - {me})
        known = [n for n in numbers if n < len(hosts)]
        return ", ".join(f"process {n} on {hosts[n]}" for n in known)

    silent = re.findall(r"Task (\d+) heartbeat timeout", last)
    if found := re.search(r"stopped sending heartbeats\):\s*((?:\d+[\s,]+)+)", last):
        silent += re.findall(r"\d+", found[1])
    early = re.findall(r"first task at the barrier: (\d+)", last)
    if who := named(silent):
        said = f"gone: {who} (killed, crashed or cut off)"
    elif me != 0 and "Failed to send RPC to coordination service" in last:
        said = f"gone: {named([0])}, which leads the others (killed, crashed or cut off)"
    elif who := named(early):
        said = f"ended before the others: {who}, whose own message says why"
    else:
        return None
    return (
        f"error: {said}\nAll end with it, here process {me} on {hosts[me]}. What was saved is "
        "intact, and --resume goes on from there with any number of processes"
    )


def main(parent: int, me: int, hosts: Sequence[str]) -> None:
    """Pass on until the process is gone; its children may keep the pipe open for longer."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it is the process's to answer, and perhaps to end
    tail = b""
    while True:
        alive = os.getppid() == parent
        if select.select([0], [], [], 0.5 if alive else 0.0)[0]:
            chunk = os.read(0, TAIL)
            if not chunk:
                break
            tail = (tail + chunk)[-TAIL:]
            while chunk:
                chunk = chunk[os.write(1, chunk) :]
        elif not alive:
            break
    if said := gone(tail.decode(errors="replace"), me, hosts):
        os.write(1, f"{said}\n".encode())


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
