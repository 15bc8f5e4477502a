"""Files of /proc, line by line."""

from __future__ import annotations


def read(path: str) -> str:
    """Return a file whose names may be of any bytes; what is no UTF-8 is escaped as in paths.

    Raises OSError. Nothing but a newline ends a line: a name may contain a carriage return.
    """
    with open(path, errors="surrogateescape", newline="\n") as file:
        return file.read()


def lines(path: str) -> list[str]:
    """Return its lines. Not by ``splitlines``, for which more than a newline ends a line."""
    return read(path).rstrip("\n").split("\n")
