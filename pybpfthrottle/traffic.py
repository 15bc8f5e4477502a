"""How much each process sends and receives. Nothing is limited.

The kernel counts, in every network namespace, TCP and UDP alike::

    with pybpfthrottle.traffic.watch() as watch:
        ...
        print(watch.of(1234).download_bytes)

Bytes are those of IP packets, with their headers, as the network carries them.
"""

from __future__ import annotations

import math
import pwd
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from typing import Any, Mapping, NamedTuple, Optional

from pybpfthrottle.backends.ebpf.accounting import Accounting
from pybpfthrottle.errors import CgroupError, ProcessError, ThrottleError
from pybpfthrottle.linux import cgroup, process
from pybpfthrottle.linux.process import Process

# Looking for sockets that were handed over takes at most this fraction of one CPU's time.
_MOST_OF_TIME = 0.01
_PERIOD_S = 1.0
# What a process that has ended leaves in the network is counted for so long.
_LINGER_S = 30.0
# How often to look for another name or cgroup of a busy process.
_RENAMED_S = 5.0
# The number that the kernel's programs count by what they cannot attribute.
_UNKNOWN = 0


class Scope(IntEnum):
    """How far the other end of packets is: enum traffic_scope."""

    INTERNET = 0
    LOCAL = 1  # a private, link-local or multicast address
    LOOPBACK = 2  # this machine


class Usage(NamedTuple):
    """Bytes of IP packets with their headers, and packets as the network carries them."""

    download_packets: int = 0
    download_bytes: int = 0
    upload_packets: int = 0
    upload_bytes: int = 0

    def plus(self, other: Usage) -> Usage:
        """Return the sum."""
        return Usage(*(mine + its for mine, its in zip(self, other)))

    def minus(self, other: Usage) -> Usage:
        """Return the difference."""
        return Usage(*(mine - its for mine, its in zip(self, other)))


@dataclass(frozen=True)
class ProcessTraffic:
    """What a process has moved since the watch began.

    ``pid`` is None for the packets that belong to no known process: of the kernel itself, of
    connections whose process has ended, and of sockets that may not be examined. ``cgroup`` is a
    path. ``alive`` tells whether the process still runs. ``number`` tells processes apart that have
    had the same ``pid``, one after the other; 0 is for no known process.
    """

    number: int
    pid: Optional[int]
    name: str
    user: Optional[int]
    cgroup: str
    alive: bool
    by_scope: Mapping[Scope, Usage] = field(default_factory=dict)

    def usage(self, *scopes: Scope) -> Usage:
        """Return what was moved in some scopes, or in all of them."""
        found = Usage()
        for scope, usage in self.by_scope.items():
            if not scopes or scope in scopes:
                found = found.plus(usage)
        return found

    @property
    def download_bytes(self) -> int:
        """What it has received, loopback excluded."""
        return self.usage(Scope.INTERNET, Scope.LOCAL).download_bytes

    @property
    def upload_bytes(self) -> int:
        """What it has sent, loopback excluded."""
        return self.usage(Scope.INTERNET, Scope.LOCAL).upload_bytes

    def user_name(self) -> str:
        """Return the user's name, or the number where it has none."""
        if self.user is None:
            return ""
        with suppress(KeyError):
            return pwd.getpwuid(self.user).pw_name
        return str(self.user)

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON: bytes and packets in total, and by scope."""
        return {
            "pid": self.pid,
            "name": self.name,
            "user": self.user_name() or None,
            "cgroup": self.cgroup or None,
            "alive": self.alive,
            "download_bytes": self.download_bytes,
            "upload_bytes": self.upload_bytes,
            "scopes": {
                scope.name.lower(): usage._asdict() for scope, usage in self.by_scope.items()
            },
        }


@dataclass
class _Account:
    """What is known of a process. ``before``: counts that the kernel has forgotten, or another's.

    ``counted`` is the kernel's latest, ``changed_s`` when that has changed, and ``met_s`` when its
    name and cgroup were last read.
    """

    number: int
    pid: int
    process: Optional[Process]
    name: str
    user: Optional[int]
    cgroup: str
    met_s: float
    changed_s: float
    before: dict[Scope, Usage] = field(default_factory=dict)
    counted: dict[Scope, Usage] = field(default_factory=dict)
    asked_s: float = -math.inf
    lives: bool = False

    def alive(self, now: float) -> bool:
        """Whether the process still runs, asked once for each moment."""
        if self.asked_s != now:
            self.lives = self.process is not None and self.process.alive()
            self.asked_s = now
        return self.lives

    def total(self) -> dict[Scope, Usage]:
        """Return what it has moved; ``before`` is negative for what another process has."""
        none = Usage()
        scopes = {**self.before, **self.counted}
        return {
            scope: self.before.get(scope, none).plus(self.counted.get(scope, none))
            for scope in scopes
        }


class Watch:
    """Counts from now on. ``close`` or ``with`` ends it.

    Call ``refresh`` about once a second, or have a supervisor do so: that finds out which process
    uses a socket that was handed over or accepted for it. ``snapshot`` and ``of`` call it too.
    """

    def __init__(self) -> None:
        """Begin. Linux 5.10; needs root, or CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_SYS_PTRACE.

        Raises ThrottleError in a pid namespace, where the kernel's process ids are not known, and
        BpfError or CgroupError if the kernel refuses; then nothing stays attached.
        """
        if not process.in_first_namespace():
            raise ThrottleError(
                "traffic cannot be counted in a pid namespace (of a container): the kernel's"
                " process ids are not known there"
            )
        self._accounting = Accounting()
        self.since_s = time.time()
        self._accounts: dict[int, _Account] = {}
        self._ended: list[_Account] = []
        self._numbers = count(1)
        self._unknown: dict[Scope, Usage] = {}
        self.due_s = time.monotonic()
        self.refresh()

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Refresh, as a supervisor's chore."""
        self.refresh()

    def refresh(self) -> float:
        """Find out who uses which socket, and read what the kernel has counted.

        Returns the time of the counts, on time.monotonic().
        """
        now = time.monotonic()
        if now >= self.due_s:
            begin_s = time.thread_time()
            self._accounting.scan(process.running())
            spent_s = time.thread_time() - begin_s
            self.due_s = now + max(_PERIOD_S, spent_s / _MOST_OF_TIME)
        self._read(now)
        return now

    def snapshot(self) -> list[ProcessTraffic]:
        """Return what each process has moved, those that have ended included.

        The last one, without a process id, is what belongs to no known process.
        """
        now = self.refresh()
        found = [_told(account, now) for account in [*self._ended, *self._accounts.values()]]
        return [*found, ProcessTraffic(0, None, "unknown", None, "", False, dict(self._unknown))]

    def of(self, pid: int) -> ProcessTraffic:
        """Return what a process has moved. Raises ProcessError if there is no such process.

        For one that has ended, what it had moved by then.
        """
        now = self.refresh()
        account = self._accounts.get(pid)
        if account is None:
            ended = [one for one in self._ended if one.pid == pid]
            account = ended[-1] if ended else self._meet(pid, now, Process(pid))
        return _told(account, now)

    def close(self) -> None:
        """Stop counting."""
        self._accounting.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, now: float) -> None:
        counted: dict[int, dict[Scope, Usage]] = {}
        for pid, scope, sums in self._accounting.counts():
            counted.setdefault(pid, {})[Scope(scope)] = Usage(*sums)
        self._unknown = {**self._unknown, **counted.pop(_UNKNOWN, {})}
        for pid, usage in counted.items():
            self._note(pid, usage, now)
        for account in list(self._accounts.values()):
            if now - account.changed_s > _LINGER_S and not account.alive(now):
                self._accounting.forget(account.pid, account.counted)
                self._end(account)

    def _note(self, pid: int, usage: dict[Scope, Usage], now: float) -> None:
        account = self._accounts.get(pid)
        if account is None:
            account = self._meet(pid, now)
        if usage == account.counted:
            return
        lives = account.alive(now)
        if not lives:
            successor = _process(pid)
            if successor is not None:
                # The number was given to another process: what was counted until now stays behind.
                before = {scope: Usage().minus(one) for scope, one in account.counted.items()}
                self._end(account)
                account = self._meet(pid, now, successor)
                account.before = before
        account.counted = usage
        account.changed_s = now
        # It may have executed another program, or moved to another cgroup.
        if lives and now - account.met_s > _RENAMED_S:
            account.name = process.name_of(pid)
            account.cgroup = _cgroup_of(pid) or account.cgroup
            account.met_s = now

    def _meet(self, pid: int, now: float, found: Optional[Process] = None) -> _Account:
        found = found or _process(pid)
        creator = self._accounting.creator(pid)
        user = process.user_of(pid) if found else None
        if user is None and creator is not None:
            user = creator.user
        name = found.name if found else creator.name if creator else "?"
        where = _cgroup_of(pid) if found else ""
        if not where and creator is not None:
            place = cgroup.by_id(creator.cgroup_id)
            where = place.path if place is not None else ""
        account = self._accounts[pid] = _Account(
            next(self._numbers), pid, found, name, user, where, now, now
        )
        return account

    def _end(self, account: _Account) -> None:
        account.before, account.counted = account.total(), {}
        account.process = None
        self._ended.append(account)
        del self._accounts[account.pid]


def watch() -> Watch:
    """Begin to count; see Watch."""
    return Watch()


def _told(account: _Account, now: float) -> ProcessTraffic:
    return ProcessTraffic(
        account.number,
        account.pid,
        account.name,
        account.user,
        account.cgroup,
        account.alive(now),
        account.total(),
    )


def _process(pid: int) -> Optional[Process]:
    with suppress(ProcessError):
        return Process(pid)
    return None


def _cgroup_of(pid: int) -> str:
    with suppress(ProcessError, CgroupError):
        return cgroup.from_pid(pid).path
    return ""
