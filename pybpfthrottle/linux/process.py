"""What /proc says of a process, and waiting for its end."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache
from typing import Iterable, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import locks

_PF_KTHREAD = 0x00200000
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of include/linux/proc_ns.h
_ENDED = ("Z", "X")


class Identity(NamedTuple):
    """What tells a process from all others of this boot: a pid may be used again."""

    pid: int
    pid_namespace: int
    start_ticks: int


@cache
def _identity_of(pid: int) -> Identity:
    stat = _stat(pid)
    return Identity(pid, _pid_namespace(), int(stat[19]) if stat else 0)


def identity() -> Identity:
    """That of this process."""
    return _identity_of(os.getpid())


def is_gone(owner: Identity) -> bool:
    """Whether a process has ended; false for one of another pid namespace, which cannot be seen."""
    if owner.pid_namespace != _pid_namespace():
        return False
    stat = _stat(owner.pid)
    return stat is None or int(stat[19]) != owner.start_ticks or _has_ended(stat)


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class Process:
    """A process that was alive when this was made; its start time guards against a reused pid."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessError if there is no such process, or if it is a kernel thread."""
        stat = _stat(pid)
        if stat is None:
            raise ProcessError(f"there is no process {pid}")
        if _has_ended(stat):
            raise ProcessError(f"process {pid} ({_name(pid)}) has ended (it is a zombie)")
        if is_kernel_thread(pid):
            raise ProcessError(f"process {pid} ({_name(pid)}) is a kernel thread")
        self.pid = pid
        self.name = _name(pid)
        self._identity = Identity(pid, _pid_namespace(), int(stat[19]))

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return not is_gone(self._identity)

    def claim(self) -> int:
        """Lock it for a limit, so that no second one is put on it unknowingly.

        The lock ends with the descriptor that is returned. Raises ProcessError that names who has
        it, or has one of a process above; or if the process has ended.
        """
        locks.settle("/proc")
        holder = claimed(ancestors(self.pid))
        if holder is None:
            with suppress(BlockingIOError):
                try:
                    return locks.lock(f"/proc/{self.pid}")
                except FileNotFoundError:
                    raise ProcessError(f"process {self.pid} ({self.name}) has ended") from None
        by = holder.by if holder else os.getpid()
        whose = "" if holder is None or holder.claimed == self.pid else ", with its parents"
        raise ProcessError(
            f"process {self.pid} ({self.name}) is limited already{whose}, by process {by}: its"
            " packets would be charged to both limits. If you mean both, add --stack"
        )

    def __repr__(self) -> str:
        return f"Process({self.pid}, {self.name!r})"


def _has_ended(stat: list[str]) -> bool:
    """Whether all of a process has: its first thread may be a zombie while others go on."""
    return stat[0] in _ENDED and int(stat[17]) <= 1


def _stat(pid: int) -> Optional[list[str]]:
    """The fields of /proc/PID/stat from the third (the state) on; the name may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"


class Claimed(NamedTuple):
    """A process that has a limit, and the process that holds that."""

    claimed: int
    by: int


def claimed(pids: Iterable[int]) -> Optional[Claimed]:
    """The first of some processes that another one than this has claimed."""
    held = locks.holders("/proc")
    if held:
        for pid in pids:
            with suppress(OSError):
                by = held.get(locks.key(f"/proc/{pid}"), os.getpid())
                if by != os.getpid():
                    return Claimed(pid, by)
    return None


def running() -> Iterator[int]:
    """The ids of all processes that are visible, those that have ended and wait included."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def has_ended(pid: int) -> bool:
    """Whether no thread of a process runs any more."""
    stat = _stat(pid)
    return stat is None or _has_ended(stat)


def families() -> dict[int, list[int]]:
    """The children of each process that has some, but for those that have ended."""
    found: dict[int, list[int]] = {}
    for pid in running():
        stat = _stat(pid)
        if stat is not None and not _has_ended(stat):
            found.setdefault(int(stat[1]), []).append(pid)
    return found


def in_first_namespace() -> bool:
    """Whether process ids mean the same here as in the kernel."""
    return _pid_namespace() == _FIRST_PID_NAMESPACE


def is_kernel_thread(pid: int) -> bool:
    """Whether a process is one of the kernel's own; false if it is gone."""
    stat = _stat(pid)
    return stat is not None and bool(int(stat[6]) & _PF_KTHREAD)


def name_of(pid: int) -> str:
    """The name of a process, or ``?`` if it is gone."""
    return _name(pid)


def listed(pids: Sequence[int], *, most: int = 5) -> str:
    """Processes by pid and name, for people: ``12 (curl), 14 (sh) and 3 more``."""
    text = ", ".join(f"{pid} ({name_of(pid)})" for pid in pids[:most])
    return text if len(pids) <= most else f"{text} and {len(pids) - most} more"


def ancestors(pid: int) -> Iterator[int]:
    """A process and its parents, up to the first."""
    while pid > 0:
        yield pid
        stat = _stat(pid)
        if stat is None:
            return
        pid = int(stat[1])


def own_session() -> list[int]:
    """The pids of this process and what it runs below: the shell, the terminal, the sshd."""
    return list(ancestors(os.getpid()))


def links_of(pid: int) -> set[int]:
    """The ids of the BPF links that a process has a descriptor of, as far as this one may look."""
    found = set()
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError), open(f"/proc/{pid}/fdinfo/{descriptor}") as file:
                match = re.search(r"^link_id:\t(\d+)$", file.read(), re.MULTILINE)
                if match:
                    found.add(int(match[1]))
    return found


def holders_of_links() -> dict[int, list[int]]:
    """For each BPF link the processes that have a descriptor of it. It looks at all processes."""
    found: dict[int, list[int]] = {}
    for pid in running():
        for link_id in links_of(pid):
            found.setdefault(link_id, []).append(pid)
    return found
