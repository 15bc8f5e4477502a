"""Which processes are meant: by id, by name, by executable, by user; and those that they start."""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from typing import Iterable, Iterator, NamedTuple

from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import process
from pybpfthrottle.linux.process import Process

_COMM_BYTES = 15  # of a process's name the kernel keeps so many


class Selection(NamedTuple):
    """Processes by id, and all that match: now, and when they are started.

    One matches if it has one of the names, one of the executables, and is of one of the users, as
    far as any are given. With ``children`` the processes that a chosen one has started, or starts,
    are chosen too, whatever becomes of it. Those that hold this session are chosen by id alone.
    ``new_sockets`` is false where sockets that are made from now on are limited otherwise.
    """

    processes: tuple[Process, ...] = ()
    names: frozenset[str] = frozenset()
    executables: frozenset[str] = frozenset()
    users: frozenset[int] = frozenset()
    children: bool = True
    new_sockets: bool = True

    @property
    def matches_some(self) -> bool:
        """Whether it is more than processes by their id: then a later one may match."""
        return bool(self.names or self.executables or self.users)

    def matching(self) -> Iterator[int]:
        """The processes that match now, but for this session's."""
        if self.matches_some:
            session = set(process.own_session())
            yield from (
                pid for pid in process.running() if pid not in session and self.matches(pid)
            )

    def matches(self, pid: int) -> bool:
        """Whether a process that is running matches."""
        return (
            (not self.names or _has_name(pid, self.names))
            and (not self.executables or _executes(pid, self.executables))
            and (not self.users or _user(pid) in self.users)
            and not process.is_kernel_thread(pid)
            and not process.has_ended(pid)
        )

    def __str__(self) -> str:
        """For people: ``process 12 (curl)``, or ``all processes named 'curl' of user 1000``."""
        parts = []
        if self.processes:
            pids = [chosen.pid for chosen in self.processes]
            parts.append(f"process{'es' * (len(pids) > 1)} {process.listed(pids)}")
        if self.matches_some:
            words = ["all processes"]
            if self.names:
                words.append(f"named {_any_of(self.names)}")
            if self.executables:
                words.append(f"running {_any_of(self.executables)}")
            if self.users:
                words.append(f"of {_any_of({user_name(uid) for uid in self.users})}")
            parts.append(" ".join(words))
        they = "they start" if len(self.processes) > 1 or self.matches_some else "it starts"
        return " and ".join(parts) + (f", and what {they}" if self.children else "")


def executable(path: str) -> str:
    """The path of an executable. Raises ProcessError for a script, which an interpreter runs."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(2) == b"#!":
            raise ProcessError(
                f"{path} is a script: its processes run the interpreter. Choose them by --name, or"
                " by --exe with the interpreter"
            )
    return path


def user_id(text: str) -> int:
    """The id of a user by name or number. Raises ProcessError."""
    if text.isdigit():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ProcessError(f"there is no user {text!r}") from None


def user_name(uid: int) -> str:
    """The name of a user, or its id where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _any_of(words: Iterable[str]) -> str:
    return " or ".join(sorted(words))


def _has_name(pid: int, names: frozenset[str]) -> bool:
    """As ``pgrep -x``: longer names than the kernel keeps are looked for in the command line."""
    short = process.name_of(pid)
    if short in names:
        return True
    long = [name for name in names if len(name.encode()) > _COMM_BYTES]
    if not any(os.fsencode(name)[:_COMM_BYTES] == os.fsencode(short) for name in long):
        return False
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        first = os.fsdecode(file.read().split(b"\0")[0])
        return os.path.basename(first) in long
    return False


def _executes(pid: int, paths: frozenset[str]) -> bool:
    link = f"/proc/{pid}/exe"
    for path in paths:
        # The second holds while an update has put another file in its place.
        with suppress(OSError):
            if os.path.samefile(link, path):
                return True
        with suppress(OSError):
            if os.readlink(link) == f"{os.path.realpath(path)} (deleted)":
                return True
    return False


def _user(pid: int) -> int:
    """The effective user; -1 if the process is gone."""
    with suppress(OSError), open(f"/proc/{pid}/status", errors="replace") as file:
        for line in file:
            if line.startswith("Uid:"):
                return int(line.split()[2])
    return -1
