"""Locks on directories, by which running instances know of each other.

The kernel gives a lock up with the descriptor, and so however its holder ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress

# How long what a killed instance left behind may take to clear up.
_PATIENCE_S = 2.0


def lock(path: str) -> int:
    """Lock a directory; the descriptor holds it. BlockingIOError if another process does."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def holders(path: str) -> dict[str, int]:
    """The process that holds each lock on the file system of a path, by the lock's ``key``.

    See /proc/locks in man 5 proc. Raises OSError if there is no such path.
    """
    device = key(path).rpartition(":")[0] + ":"
    found = {}
    with suppress(OSError), open("/proc/locks") as table:
        for line in table:
            fields = line.split()
            # Without those that wait.
            if "->" not in fields and fields[5].startswith(device):
                found[fields[5]] = int(fields[4])
    return found


def settle(path: str) -> None:
    """Wait until no lock on this file system is held for a process that has ended.

    What that left behind clears up under its lock. Gives up after two seconds.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and any(
        pid > 0 and not os.path.exists(f"/proc/{pid}") for pid in holders(path).values()
    ):
        time.sleep(0.01)


def key(path: str) -> str:
    """What the kernel calls a locked directory. Raises OSError."""
    status = os.stat(path)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
