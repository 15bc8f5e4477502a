"""Processes as /proc shows them."""

from __future__ import annotations

import os
from functools import cache
from typing import Iterator, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import clock, tables

# To start another Python with this package.
PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_PF_KTHREAD = 0x00200000
FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of include/linux/proc_ns.h
_ENDED = ("Z", "X")
_ALL_USERS = (1 << 32) - 1


class Identity(NamedTuple):
    """What identifies a process uniquely during this boot, since a pid may be reused.

    ``start_ticks`` is its start time since boot, in clock ticks of the initial time namespace,
    whichever namespace it was read in.
    """

    pid: int
    pid_namespace: int
    start_ticks: int


@cache
def _identity_of(pid: int) -> Identity:
    stat = _stat(pid)
    return Identity(pid, _pid_namespace(), _start_ticks(stat) if stat else 0)


def identity() -> Identity:
    """Return the identity of this process."""
    return _identity_of(os.getpid())


def is_gone(owner: Identity) -> bool:
    """Whether a process has ended; False for another pid namespace, which is not visible."""
    if owner.pid_namespace != _pid_namespace():
        return False
    stat = _stat(owner.pid)
    if stat is None or _has_ended(stat):
        return True
    return not same(owner, owner._replace(start_ticks=_start_ticks(stat)))


def same(one: Identity, other: Identity) -> bool:
    """Whether two identities mean one process, even if read in different time namespaces.

    The kernel rounds a shifted start time to whole ticks, so it may differ by one.
    """
    return one[:2] == other[:2] and abs(one.start_ticks - other.start_ticks) <= 1


def _start_ticks(stat: list[str]) -> int:
    """Return a process's start time; /proc shows it on the clock of this time namespace."""
    return int(stat[19]) - _in_ticks(clock.offsets().boottime_ns)


def _in_ticks(nanoseconds: int) -> int:
    return nanoseconds * os.sysconf("SC_CLK_TCK") // 1_000_000_000


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class Process:
    """A process that was alive on construction; its start time guards against a reused pid."""

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
        self.identity = Identity(pid, _pid_namespace(), _start_ticks(stat))

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return not is_gone(self.identity)

    def __repr__(self) -> str:
        return f"Process({self.pid}, {self.name!r})"


def _has_ended(stat: list[str]) -> bool:
    """Whether all threads have ended: the first may be a zombie while others still run."""
    return stat[0] in _ENDED and int(stat[17]) <= 1


def _stat(pid: int) -> Optional[list[str]]:
    """Return the fields of /proc/PID/stat after the name, which may contain anything."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace", newline="\n") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"


def running() -> Iterator[int]:
    """Yield the ids of all visible processes, zombies included."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def has_ended(pid: int) -> bool:
    """Whether all threads of a process have ended."""
    stat = _stat(pid)
    return stat is None or _has_ended(stat)


def parent_of(pid: int) -> Optional[int]:
    """Return the parent of a running process, 0 for none that is visible; None if it has ended."""
    stat = _stat(pid)
    return None if stat is None or _has_ended(stat) else int(stat[1])


def families() -> dict[int, list[int]]:
    """Return the running children of each process that has any."""
    found: dict[int, list[int]] = {}
    for pid in running():
        stat = _stat(pid)
        if stat is not None and not _has_ended(stat):
            found.setdefault(int(stat[1]), []).append(pid)
    return found


def in_first_namespace() -> bool:
    """Whether process ids mean the same here as in the kernel."""
    return _pid_namespace() == FIRST_PID_NAMESPACE


def own_status() -> dict[str, str]:
    """Return the fields of /proc/self/status; empty if it cannot be read."""
    try:
        pairs = (line.partition(":") for line in tables.lines("/proc/self/status"))
        return {key: value.strip() for key, _, value in pairs}
    except OSError:
        return {}


def in_own_user_namespace() -> bool:
    """Whether this process is outside the initial user namespace."""
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() != ["0", "0", str(_ALL_USERS)]
    except OSError:
        return False


def instance(pid: int) -> int:
    """Return a number that is another one once another process has the id; 0 if there is none.

    It may change without that: the kernel gives it to what it remembers of a process in /proc.
    """
    try:
        return os.stat(f"/proc/{pid}").st_ino
    except OSError:
        return 0


def is_kernel_thread(pid: int) -> bool:
    """Whether a process is a kernel thread; False if it is gone."""
    stat = _stat(pid)
    return stat is not None and bool(int(stat[6]) & _PF_KTHREAD)


def name_of(pid: int) -> str:
    """Return the name of a process, or ``?`` if it is gone."""
    return _name(pid)


def user_of(pid: int) -> Optional[int]:
    """Return the id of the user that a process belongs to; None if it is gone."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def listed(pids: Sequence[int], *, most: int = 5) -> str:
    """Return processes by pid and name, for people: ``12 (curl), 14 (sh) and 3 more``."""
    text = ", ".join(f"{pid} ({name_of(pid)})" for pid in pids[:most])
    return text if len(pids) <= most else f"{text} and {len(pids) - most} more"


def ancestors(pid: int) -> Iterator[int]:
    """Yield a process and its ancestors, up to the first."""
    while pid > 0:
        yield pid
        stat = _stat(pid)
        if stat is None:
            return
        pid = int(stat[1])


def terminal_of(pid: int) -> int:
    """Return the device number of a process's controlling terminal; 0 if it has none."""
    stat = _stat(pid)
    return 0 if stat is None else int(stat[4]) & 0xFFFFFFFF


def own_session() -> list[int]:
    """Return the pids of this process and its ancestors: the shell, the terminal, sshd."""
    return list(ancestors(os.getpid()))
