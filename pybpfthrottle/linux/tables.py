"""Files of /proc, line by line."""

from __future__ import annotations

import os

_AT_ONCE = 1 << 16


def read(path: str) -> str:
    """Return a file whose names may be of any bytes; what is no UTF-8 is escaped as in paths.

    Raises OSError. Nothing but a newline ends a line: a name may contain a carriage return.
    """
    return os.fsdecode(contents(path))


def contents(path: str) -> bytes:
    """Return what is in a file. Raises OSError."""
    # Python's files ask the kernel twice as much, and such files are read again and again.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, _AT_ONCE), b""))
    finally:
        os.close(fd)


def lines(path: str) -> list[str]:
    """Return its lines. Not by ``splitlines``, for which more than a newline ends a line."""
    return read(path).rstrip("\n").split("\n")
