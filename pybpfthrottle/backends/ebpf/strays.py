"""Traffic of limited cgroups that the programs attached to them do not see.

A socket belongs forever to the cgroup in which it was created, and an accepted socket to that of
its listener. So sockets created elsewhere (socket activation, a service that was moved) escape a
unit's limit, and so does a command that moves itself to another cgroup (flatpak, snap, podman, a
systemd scope). Both are limited by marks, from the same token bucket.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import partial
from socket import AF_INET, AF_INET6, IPPROTO_RAW, IPPROTO_TCP, IPPROTO_UDP
from typing import Callable, Iterable, Iterator, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple, Protocol
from pybpfthrottle.errors import CgroupError, Error, ProcessError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import netns, process, sockets
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.endpoints import IPPROTO_MPTCP
from pybpfthrottle.linux.process import Process
from pybpfthrottle.linux.sockets import Borrowed, Place
from pybpfthrottle.logger import Logger
from pybpfthrottle.supervisor import LOOKS, Frequent

log = Logger(__name__)

PERIOD_S = 1.0
# A command that leaves its cgroup does so when it starts.
_SOON_S, _SOON_PERIOD_S = 5.0, 0.25
# While a command starts, scanning takes at most this fraction of one CPU's time.
_MOST_OF_TIME = 0.01
# How long a socket list is trusted for sockets that it does not contain.
_FRESH_S = 0.2
_KINDS = tuple(
    (family, protocol)
    for family in (AF_INET, AF_INET6)
    for protocol in (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_RAW, IPPROTO_MPTCP)
)


class Limiter(Protocol):
    """Limits by marks, beside the cgroups of a throttle."""

    def mark(self, place: Place) -> None:
        """Limit a socket. Raises Error or OSError."""

    def follow(self, pids: Sequence[int]) -> None:
        """Limit the sockets of processes that are outside the cgroups. Raises Error or OSError."""


class _Stray(NamedTuple):
    """A socket of a process in the cgroups, and the id of the cgroup it was created in."""

    place: Place
    cgroup_id: int


class Strays(Frequent):
    """A chore that keeps looking for stray sockets and processes, and limits them."""

    def __init__(
        self,
        cgroups: Callable[[], Sequence[Cgroup]],
        pids_of: Callable[[Sequence[Cgroup]], Iterable[int]],
        limiter: Limiter,
        command: Optional[Process] = None,
    ) -> None:
        """``command`` is followed wherever it goes, with its children."""
        self._cgroups = cgroups
        self._pids_of = pids_of
        self._limiter = limiter
        # The command and its children while they run, and which of them have left.
        self._family = {command.pid: command} if command is not None else {}
        self._command = command
        self._left: set[int] = set()
        self._settled: set[int] = set()
        self._notes: dict[str, None] = {}
        self._begin_s = time.monotonic()
        self.due_s = self._begin_s

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Look for strays, and set when to look again."""
        begin_s = time.thread_time()
        self.changes_chores = False
        self._look_for_sockets()
        if self._command is not None:
            self._look_for_processes()
        cost_s = time.thread_time() - begin_s
        self.due_s = LOOKS.next_due_s(self, cost_s, PERIOD_S)
        now = time.monotonic()
        if self._command is not None and now < self._begin_s + _SOON_S:
            self.due_s = now + max(_SOON_PERIOD_S, cost_s / _MOST_OF_TIME)

    def notes(self) -> tuple[str, ...]:
        """Return what was found, a line each."""
        return tuple(self._notes)

    def _look_for_sockets(self) -> None:
        pids = list(self._pids_of(self._cgroups()))
        places = sockets.places(pids)
        self._settled &= places.keys()
        # The kernel's list is long, and never has what is not IP: ask each socket first.
        new = places.keys() - self._settled
        self._settled |= {inode for inode in new if not _may_be_ip(places[inode])}
        if not places.keys() - self._settled:
            return
        session = sockets.places(process.own_session())
        for stray in list(self._strays(pids, places)):
            # Nobody should accidentally lose the connection they are typing on.
            if stray.place.inode not in session:
                self._limit(stray)

    def _strays(self, pids: Sequence[int], places: dict[int, Place]) -> Iterator[_Stray]:
        """Yield the sockets that the kernel lists under another cgroup, once each."""
        own = ids_below(self._cgroups())
        for pid in _one_for_each_namespace(pids):
            for inode, cgroup_id in _cgroup_ids_at(pid).items():
                if inode in places and inode not in self._settled:
                    self._settled.add(inode)
                    if cgroup_id not in own:
                        yield _Stray(places[inode], cgroup_id)

    def _limit(self, stray: _Stray) -> None:
        self.changes_chores = True
        where = _path_of(stray.cgroup_id)
        who = process.listed([stray.place.pid])
        try:
            self._limiter.mark(stray.place)
        except (Error, OSError) as error:
            self._note(
                f"a socket of {who} was created in another cgroup ({where}). Neither it nor the"
                f" connections it accepts are limited: {error}"
            )
        else:
            self._note(f"limited sockets of {who} that were created in another cgroup ({where})")

    def _look_for_processes(self) -> None:
        """Limit the command's processes that are now in another cgroup."""
        self._meet()
        new: dict[int, Cgroup] = {}
        for pid in self._family.keys() - self._left:
            with suppress(CgroupError, ProcessError):  # it has ended
                where = cgroups_v2.from_pid(pid)
                if not any(where in cgroup for cgroup in self._cgroups()):
                    new[pid] = where
        if not new:
            return
        self.changes_chores = True
        self._left.update(new)
        try:
            self._limiter.follow(sorted(new))
        except (Error, OSError) as error:
            outcome = f"and is not limited there: {error}. {{advice}} limits it"
        else:
            outcome = "and is limited there too, as with --pid"
        for pid, where in new.items():
            advice = outcome.format(advice=_advice(where))
            self._note(f"{process.listed([pid])} has moved to {where.path}, {advice}")

    def _meet(self) -> None:
        """Add the command's new children, and forget those that have ended."""
        self._family = {pid: one for pid, one in self._family.items() if one.alive()}
        self._left &= self._family.keys()
        families = process.families()
        pending = {*self._family, *self._pids_of(self._cgroups())}
        while pending:
            for pid in pending - self._family.keys():
                with suppress(ProcessError):  # it has ended
                    self._family[pid] = Process(pid)
            pending = {child for pid in pending for child in families.get(pid, ())}
            pending -= self._family.keys()

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes[text] = None
            log.info("%s", text)


class OfCgroups:
    """Tells whether a socket was created in certain cgroups, as far as the kernel reveals it."""

    def __init__(self, cgroups: Callable[[], Sequence[Cgroup]]) -> None:
        self._cgroups = cgroups
        self._answers: dict[tuple[int, int, int], tuple[float, dict[int, int]]] = {}

    def __call__(self, found: Borrowed) -> bool:
        """False if the kernel does not say: before Linux 5.8, and for unbound sockets."""
        with suppress(OSError):
            cgroup_id = self._ids(found).get(found.place.inode)
            return cgroup_id is not None and cgroup_id in ids_below(self._cgroups())
        return False

    def _ids(self, found: Borrowed) -> dict[int, int]:
        namespace = netns.of_socket(found.socket.fileno())
        try:
            kind = (int(found.socket.family), found.socket.proto)
            key = (os.fstat(namespace).st_ino, *kind)
            at_s, ids = self._answers.get(key, (0.0, {}))
            if found.place.inode not in ids and time.monotonic() > at_s + _FRESH_S:
                ids = netns.inside(namespace, partial(netns.cgroup_ids, [kind]))
                self._answers[key] = (time.monotonic(), ids)
            return ids
        finally:
            os.close(namespace)


def ids_below(cgroups: Iterable[Cgroup]) -> set[int]:
    """Return the ids of cgroups and their descendants."""
    found = set()
    for cgroup in cgroups:
        for below in cgroups_v2.walk(cgroup):
            with suppress(OSError):  # it is gone
                found.add(below.id)
    return found


def _may_be_ip(place: Place) -> bool:
    """False for a socket that never sends IP packets, such as a Unix socket."""
    with suppress(OSError), sockets.borrow(place) as own:
        return Borrowed(own, place).is_ip
    return True


def _one_for_each_namespace(pids: Iterable[int]) -> list[int]:
    found: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):
            found.setdefault(os.stat(f"/proc/{pid}/ns/net").st_ino, pid)
    return list(found.values())


def _cgroup_ids_at(pid: int) -> dict[int, int]:
    """Return the cgroup id of each socket in a process's network namespace; empty if denied."""
    with suppress(OSError):
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return netns.inside(namespace, partial(netns.cgroup_ids, _KINDS))
        finally:
            os.close(namespace)
    return {}


def _path_of(cgroup_id: int) -> str:
    for cgroup in cgroups_v2.walk():
        with suppress(OSError):  # it is gone
            if cgroup.id == cgroup_id:
                return cgroup.path
    return "now removed"


def _advice(where: Cgroup) -> str:
    name = os.path.basename(where.path)
    if name.endswith((".service", ".scope")):
        return f"--unit {name}"
    return "--pid" if where.is_root() else f"--cgroup {where.path}"
