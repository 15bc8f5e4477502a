"""Small files in /run that only root, or whoever runs this program, may have written."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Optional

from pybpfthrottle.linux import process

DIRECTORY = "/run/pybpfthrottle"
# How the files of wayout.py end. Nobody has to import that to see that there are none.
WAYS_OUT = ".way-out.json"


def write(path: str, text: str) -> None:
    """Write a file, or replace it at once, in a directory of ours. Raises OSError."""
    # The draft's name ends differently from what anybody looks for.
    draft = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            file.write(text)
        os.rename(draft, path)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)
        raise


def read(path: str) -> Optional[str]:
    """Return a file's text; None if somebody else could have written it.

    Raises OSError, or ValueError for what is no text.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd) as file:
        status = os.fstat(fd)
        # Who can write it could have root do what is not to be done.
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
            return None
        return file.read()


def stems(end: str, directory: str = "") -> list[str]:
    """Return the names of the files that end so, without that end; by default of ``DIRECTORY``."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        names = sorted(os.listdir(directory or DIRECTORY))
        return [name[: -len(end)] for name in names if name.endswith(end)]
    return []


def tidy_up() -> None:
    """Remove the drafts of processes that were killed, and the directory if nothing else is in it.

    Call it under the lock of all throttles: then none of them is being written.
    """
    with suppress(OSError):
        for name in os.listdir(DIRECTORY):
            writer = name.rpartition(".")[2]
            if writer.isdecimal() and process.has_ended(int(writer)):
                with suppress(OSError):
                    os.unlink(os.path.join(DIRECTORY, name))
        os.rmdir(DIRECTORY)


def delete(path: str) -> None:
    """Delete a file, and its directory with the last one. Doing so twice is no error."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    # Unless another one is just beginning.
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))
