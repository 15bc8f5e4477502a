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
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from itertools import count
from operator import lt
from typing import Any, Container, Hashable, Iterable, Mapping, NamedTuple, Optional, TypeVar

from pybpfthrottle.backends.ebpf.accounting import Accounting, Move, Sums
from pybpfthrottle.errors import CgroupError, ProcessError, ThrottleError
from pybpfthrottle.linux import cgroup, containers, netns, process
from pybpfthrottle.linux.process import Process

# Looking for sockets that were handed over takes at most this fraction of one CPU's time.
_MOST_OF_TIME = 0.003
_PERIOD_S = 1.0
# What a process that has ended leaves in the network is counted for so long.
_LINGER_S = 10.0
# So many processes that have ended are told one by one; older ones are added up.
_MOST_ENDED = 1000
# How often to look for another name or cgroup of a busy process.
_RENAMED_S = 15.0
# How often to look whether a process is a zombie.
_SAME_S = 30.0
# The number that the kernel's programs count by what they cannot attribute.
_UNKNOWN = 0
_MOST_REMOTES = _MOST_CGROUPS = 65536
# What has moved with addresses that were forgotten, as there were too many.
OTHER_REMOTES = "other"

# A scope and an interface's index; the same with a remote address.
_Place = tuple[int, int]
_Remote = tuple[int, int, bytes]
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96

_K = TypeVar("_K", bound=Hashable)


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


_Scopes = Mapping[Scope, Usage]


@dataclass(frozen=True)
class ProcessTraffic:
    """What a process has moved since the watch began.

    ``pid`` is None for the packets that belong to no known process: of the kernel itself, of
    connections whose process has ended, and of sockets that may not be examined. ``cgroup`` is a
    path. ``alive`` tells whether the process still runs. ``number`` tells processes apart that have
    had the same ``pid``, one after the other; 0 is for no known process.

    ``by_interface`` has the interfaces' names in the process's own network namespace. ``by_remote``
    is empty unless the watch counts remotes; what belongs to addresses that were forgotten is below
    OTHER_REMOTES. ``share`` is the part that this is of a process, as ``shares`` returns it.

    Of more than a thousand processes that have ended, those that ended first are added up by name,
    user and cgroup: ``processes`` is how many, and ``pid`` that of one of them.
    """

    number: int
    pid: Optional[int]
    name: str
    user: Optional[int]
    cgroup: str
    alive: bool
    by_scope: _Scopes = field(default_factory=dict)
    by_interface: Mapping[str, _Scopes] = field(default_factory=dict)
    by_remote: Mapping[str, _Scopes] = field(default_factory=dict)
    share: str = ""
    processes: int = 1

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

    @property
    def unit(self) -> str:
        """The systemd unit, of a user's ``user@1000.service/app-x.scope``; empty if in none."""
        return cgroup.unit_of(self.cgroup)

    @property
    def container(self) -> str:
        """The container, such as ``docker/web``, or with a short id; empty outside of containers.

        The name is read from the engine's own files, if they may be read.
        """
        found = containers.of_path(self.cgroup)
        return f"{found.engine}/{containers.name_of(found, self.user)}" if found else ""

    def user_name(self) -> str:
        """Return the user's name, or the number where it has none."""
        return "" if self.user is None else _user_name(self.user)

    def shares(self, by: str) -> list[ProcessTraffic]:
        """Return it by "interface" or "remote" (address): a part for each; else it alone."""
        parts = {"interface": self.by_interface, "remote": self.by_remote}.get(by)
        if parts is None:
            return [self]
        return [replace(self, by_scope=scopes, share=share) for share, scopes in parts.items()]

    def identity(self) -> dict[str, Any]:
        """Return for JSON who it is."""
        return {
            "pid": self.pid,
            "name": self.name,
            "user": self.user_name() or None,
            "cgroup": self.cgroup or None,
            "unit": self.unit or None,
            "container": self.container or None,
        }

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON: bytes and packets in total, by scope, interface and address."""
        return {
            **self.identity(),
            "alive": self.alive,
            "download_bytes": self.download_bytes,
            "upload_bytes": self.upload_bytes,
            "scopes": _scopes_json(self.by_scope),
            "interfaces": {name: _scopes_json(one) for name, one in self.by_interface.items()},
            "remotes": {name: _scopes_json(one) for name, one in self.by_remote.items()},
        }


@lru_cache(maxsize=1024)
def _user_name(user: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return str(user)


def _scopes_json(scopes: _Scopes) -> dict[str, Any]:
    return {scope.name.lower(): usage._asdict() for scope, usage in scopes.items()}


@dataclass
class _Account:
    """What is known of a process. ``before``: counts that the kernel has forgotten, or another's.

    ``counted`` is the kernel's latest, ``changed_s`` when that has changed, and ``met_s`` when its
    name and cgroup were last read. ``remotes`` is the kernel's latest by address, as far as it did
    not forget it.
    """

    number: int
    pid: int
    process: Optional[Process]
    name: str
    user: Optional[int]
    cgroup: str
    met_s: float
    changed_s: float
    namespace: Optional[_Namespace] = None
    before: dict[_Place, Usage] = field(default_factory=dict)
    counted: dict[_Place, Sums] = field(default_factory=dict)
    remotes_before: dict[_Remote, Usage] = field(default_factory=dict)
    remotes: dict[_Remote, Sums] = field(default_factory=dict)
    seen_s: float = -math.inf
    instance: int = 0
    processes: int = 1
    lives: bool = True
    told: Optional[ProcessTraffic] = None

    def look(self, running: Container[int]) -> None:
        """Find out whether the process still runs, given the ids of those that do."""
        if self.lives and self.pid not in running:
            self.lives, self.told = False, None

    def examine(self, now: float, within_s: float = _SAME_S) -> None:
        """Find out whether it is still the same process, not for longer than that a zombie."""
        instance = process.instance(self.pid)
        if self.lives and (instance != self.instance or now - self.seen_s > within_s):
            self.instance, self.seen_s = instance, now
            if self.process is None or not self.process.alive():
                self.lives, self.told = False, None

    def charge(self, place: _Place, usage: Usage) -> None:
        """Add what the kernel has counted for another process, or does not know any more."""
        self.before[place] = self.before.get(place, Usage()).plus(usage)
        self.told = None

    def total(self) -> dict[_Place, Usage]:
        """Return what it has moved; ``before`` is negative for what another process has."""
        return _sum(self.before, self.counted)

    def take_in(self, other: _Account) -> None:
        """Add what another one has moved that has ended."""
        self.before, self.counted = _sum(self.total(), other.total()), {}
        mine = _sum(self.remotes_before, self.remotes)
        self.remotes_before = _sum(mine, _sum(other.remotes_before, other.remotes))
        while len(self.remotes_before) > _MOST_REMOTES:
            del self.remotes_before[next(iter(self.remotes_before))]
        self.remotes = {}
        self.processes += other.processes
        self.told = None

    def interface(self, index: int) -> str:
        """Return the name of an interface."""
        return self.namespace.name(index) if self.namespace else f"#{index}"

    def note_remote(self, remote: _Remote, sums: Sums) -> None:
        """Take what the kernel has counted for an address; it may have begun again at nothing."""
        last = self.remotes.get(remote)
        if last == sums:
            return
        if last is not None and any(map(lt, sums, last)):
            before = self.remotes_before.get(remote, Usage())
            self.remotes_before[remote] = before.plus(Usage(*last))
        self.remotes[remote] = sums
        self.told = None
        if len(self.remotes) > _MOST_REMOTES:
            oldest = next(iter(self.remotes))
            del self.remotes[oldest]
            self.remotes_before.pop(oldest, None)


def _sum(one: Mapping[_K, Sums], other: Mapping[_K, Sums]) -> dict[_K, Usage]:
    found = {key: Usage(*sums) for key, sums in one.items()}
    for key, sums in other.items():
        found[key] = found[key].plus(Usage(*sums)) if key in found else Usage(*sums)
    return found


class _Cgroups:
    """The paths of cgroups, with one look at the mounts and at all cgroups each moment at most."""

    def __init__(self) -> None:
        self._by_id: dict[int, str] = {}
        self.look_again()

    def look_again(self) -> None:
        """Begin another moment."""
        self._mounted: Optional[cgroup.Mount] = None
        self._walked = False

    def of(self, pid: int) -> str:
        """Return that of a process; empty if it has ended."""
        with suppress(ProcessError, CgroupError):
            self._mounted = self._mounted or cgroup.mount()
            return cgroup.from_pid(pid, self._mounted).path
        return ""

    def by_id(self, number: int) -> str:
        """Return that with an id, which may be gone if it was seen before."""
        if number not in self._by_id and not self._walked:
            self._walked = True
            if len(self._by_id) > _MOST_CGROUPS:
                self._by_id.clear()
            for found in cgroup.walk():
                with suppress(OSError):
                    self._by_id[found.id] = found.path
        return self._by_id.get(number, "")


class _Namespace:
    """A network namespace, whose interfaces have numbers and names of their own.

    ``pid`` is a process in it, None for this process's own.
    """

    def __init__(self, number: int, pid: Optional[int]) -> None:
        """Raises OSError."""
        self._number = number
        self.pid = pid
        self._read()

    def name(self, interface: int) -> str:
        """Return the name of an interface, or its number where there is none, or no longer."""
        if interface not in self.names and time.monotonic() - self._read_s > _RENAMED_S:
            with suppress(OSError):
                if netns.number(self.pid) == self._number:
                    self._read()
        return self.names.get(interface, f"#{interface}")

    def refresh(self) -> None:
        """Read once in a while: another namespace may have got the number."""
        if time.monotonic() - self._read_s > _RENAMED_S:
            with suppress(OSError):
                self._read()

    def _read(self) -> None:
        self.cookie, self.names = netns.interfaces(self.pid)
        self._read_s = time.monotonic()


class _Namespaces:
    """The network namespaces of the processes that were met."""

    def __init__(self) -> None:
        self._found: dict[int, _Namespace] = {}
        self._searched_s = -math.inf

    def of(self, pid: Optional[int] = None) -> Optional[_Namespace]:
        """Return that of a process, or this process's own."""
        with suppress(OSError):
            number = netns.number(pid)
            if number not in self._found:
                self._found[number] = _Namespace(number, pid)
            self._found[number].pid = pid
            self._found[number].refresh()
            return self._found[number]
        return None

    def by_cookie(self, cookie: int) -> Optional[_Namespace]:
        """Return one that a process is in; the cookie is the kernel's (Linux 5.14)."""
        if time.monotonic() - self._searched_s > _RENAMED_S and cookie not in self._cookies():
            self.search()
        return next((one for one in self._found.values() if 0 < one.cookie == cookie), None)

    def search(self) -> set[str]:
        """Find those of all processes; the names of their interfaces."""
        self._searched_s = time.monotonic()
        found = {self.of(), *map(self.of, process.running())}
        return {name for one in found if one for name in one.names.values()}

    def _cookies(self) -> set[int]:
        return {one.cookie for one in self._found.values()}


class Watch:
    """Counts from now on. ``close`` or ``with`` ends it.

    Call ``refresh`` about once a second, or have a supervisor do so: that finds out which process
    uses a socket that was handed over or accepted for it. ``snapshot`` and ``of`` call it too.
    """

    def __init__(self, *, interfaces: Iterable[str] = (), remotes: bool = False) -> None:
        """Begin. Linux 5.10; needs root, or CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_SYS_PTRACE.

        With ``interfaces`` only what passes these is told; a name means an interface in the network
        namespace of each process. With ``remotes`` remote addresses are counted too.

        Raises ThrottleError in a pid namespace, where the kernel's process ids are not known, and
        for an interface that nobody has; BpfError or CgroupError if the kernel refuses. Then
        nothing stays attached.
        """
        if not process.in_first_namespace():
            raise ThrottleError(
                "traffic cannot be counted in a pid namespace (of a container): the kernel's"
                " process ids are not known there"
            )
        self._namespaces = _Namespaces()
        self._wanted = frozenset(interfaces)
        for missing in sorted(self._wanted - self._namespaces.search() if self._wanted else ()):
            raise ThrottleError(f"there is no network interface {missing!r}; see: ip link")
        self._accounts: dict[int, _Account] = {}
        self._cgroups = _Cgroups()
        # By number; those that are added up by what they share.
        self._ended: dict[int, _Account] = {}
        self._added_up: dict[tuple[Any, ...], _Account] = {}
        self._numbers = count(1)
        self._unknown = _Account(
            *(0, _UNKNOWN, None, "unknown", None, "", math.inf, 0.0),
            namespace=self._namespaces.of(),
            lives=False,
        )
        self.due_s = time.monotonic()
        with ExitStack() as undo:
            self._accounting = Accounting(remotes=remotes)
            undo.callback(self._accounting.close)
            # What is open has an owner before anything is counted.
            self.refresh()
            self._accounting.begin()
            undo.pop_all()
        self.since_s = time.time()

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
        self._cgroups.look_again()
        running = frozenset(process.running())
        for account in self._accounts.values():
            account.look(running)
        if now >= self.due_s:
            begin_s = time.thread_time()
            for move in self._accounting.scan(sorted(running)):
                self._move(move, now)
            spent_s = time.thread_time() - begin_s
            self.due_s = now + max(_PERIOD_S, spent_s / _MOST_OF_TIME)
        self._read(now)
        return now

    def snapshot(self) -> list[ProcessTraffic]:
        """Return what each process has moved, those that have ended included.

        The last one, without a process id, is what belongs to no known process.
        """
        self.refresh()
        ended = [*self._added_up.values(), *self._ended.values()]
        return [*map(self._told, [*ended, *self._accounts.values(), self._unknown])]

    def of(self, pid: int) -> ProcessTraffic:
        """Return what a process has moved. Raises ProcessError if there is no such process.

        For one that has ended, what it had moved by then.
        """
        now = self.refresh()
        account = self._accounts.get(pid)
        if account is None:
            ended = [one for one in self._ended.values() if one.pid == pid]
            account = ended[-1] if ended else self._meet(pid, now, Process(pid))
        account.examine(now, within_s=0)
        return self._told(account)

    def close(self) -> None:
        """Stop counting."""
        self._accounting.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, now: float) -> None:
        counted: dict[int, dict[_Place, Sums]] = {}
        for pid, scope, interface, sums in self._accounting.counts():
            counted.setdefault(pid, {})[scope, interface] = sums
        self._note_unknown(counted.pop(_UNKNOWN, {}))
        for pid, usage in counted.items():
            self._note(pid, usage, now)
        # After the totals: as they are the smaller ones, nothing seems to be missing here.
        for pid, scope, interface, address, sums in self._accounting.remotes():
            account = self._accounts.get(pid) if pid else self._unknown
            if account is not None:
                account.note_remote((scope, interface, address), sums)
        for account in list(self._accounts.values()):
            if now - account.changed_s > _LINGER_S and not account.lives:
                self._end(account)

    def _note_unknown(self, usage: dict[_Place, Sums]) -> None:
        if usage != self._unknown.counted:
            self._unknown.counted, self._unknown.told = usage, None

    def _note(self, pid: int, usage: dict[_Place, Sums], now: float) -> None:
        account = self._accounts.get(pid)
        if account is None:
            account = self._meet(pid, now)
        if usage == account.counted:
            return
        account.examine(now)
        if not account.lives:
            successor = _process(pid)
            if successor is not None:
                # The number was given to another process: what was counted until now stays behind.
                before = {
                    place: Usage().minus(Usage(*one)) for place, one in account.counted.items()
                }
                self._end(account, forgets=False)
                account = self._meet(pid, now, successor)
                account.before = before
        account.counted, account.told = usage, None
        account.changed_s = now
        # It may have executed another program, or moved to another cgroup.
        if account.lives and now - account.met_s > _RENAMED_S:
            account.name = process.name_of(pid)
            account.cgroup = self._cgroups.of(pid) or account.cgroup
            account.met_s = now

    def _move(self, move: Move, now: float) -> None:
        """Charge a process with what another one was charged for until now."""
        place, usage = (move.scope, move.interface), Usage(*move.sums)
        sink = self._accounts.get(move.sink) or self._meet(move.sink, now)
        source = self._unknown
        if move.source:
            source = self._accounts.get(move.source) or self._meet(move.source, now)
        source.charge(place, Usage().minus(usage))
        sink.charge(place, usage)
        remote = (*place, move.address)
        if any(move.sums) and any(move.address):
            before = sink.remotes_before.get(remote, Usage())
            sink.remotes_before[remote] = before.plus(usage)

    def _meet(self, pid: int, now: float, found: Optional[Process] = None) -> _Account:
        found = found or _process(pid)
        creator = self._accounting.creator(pid)
        if found is None and creator is None:
            # The last packets of a process that was taken for done with.
            for account in reversed(self._ended.values()):
                if account.pid == pid:
                    self._accounts[pid] = self._ended.pop(account.number)
                    account.changed_s = now
                    return account
        user = process.user_of(pid) if found else None
        if user is None and creator is not None:
            user = creator.user
        name = found.name if found else creator.name if creator else "?"
        where = self._cgroups.of(pid) if found else ""
        if not where and creator is not None:
            where = self._cgroups.by_id(creator.cgroup_id)
        namespace = self._namespaces.of(pid) if found else None
        if namespace is None and creator is not None:
            namespace = self._namespaces.by_cookie(creator.namespace)
        account = self._accounts[pid] = _Account(
            next(self._numbers), pid, found, name, user, where, now, now, namespace
        )
        account.lives, account.instance, account.seen_s = bool(found), process.instance(pid), now
        return account

    def _end(self, account: _Account, *, forgets: bool = True) -> None:
        if forgets:
            self._accounting.forget(account.pid, account.counted)
        self._accounting.forget_remotes(account.pid, account.remotes)
        account.before, account.counted = account.total(), {}
        account.process, account.lives, account.told = None, False, None
        del self._accounts[account.pid]
        self._ended[account.number] = account
        if len(self._ended) > _MOST_ENDED:
            oldest = self._ended.pop(next(iter(self._ended)))
            shared = (oldest.name, oldest.user, oldest.cgroup, id(oldest.namespace))
            if self._added_up.setdefault(shared, oldest) is not oldest:
                self._added_up[shared].take_in(oldest)

    def _told(self, account: _Account) -> ProcessTraffic:
        if account.told is None:
            account.told = self._tell(account)
        return account.told

    def _tell(self, account: _Account) -> ProcessTraffic:
        by_scope: dict[Scope, Usage] = {}
        by_interface: dict[str, dict[Scope, Usage]] = {}
        for (scope, index), usage in account.total().items():
            name = account.interface(index)
            if not self._wanted or name in self._wanted:
                _add(by_scope, Scope(scope), usage)
                _add(by_interface.setdefault(name, {}), Scope(scope), usage)
        return ProcessTraffic(
            account.number,
            account.pid or None,
            account.name,
            account.user,
            account.cgroup,
            account.lives,
            by_scope,
            by_interface,
            self._by_remote(account, by_scope),
            processes=account.processes,
        )

    def _by_remote(
        self, account: _Account, by_scope: Mapping[Scope, Usage]
    ) -> dict[str, dict[Scope, Usage]]:
        found: dict[str, dict[Scope, Usage]] = {}
        if not self._accounting.counts_remotes:
            return found
        known: dict[Scope, Usage] = {}
        for (scope, index, address), usage in _sum(account.remotes_before, account.remotes).items():
            if not self._wanted or account.interface(index) in self._wanted:
                _add(found.setdefault(_address(address), {}), Scope(scope), usage)
                _add(known, Scope(scope), usage)
        for scope, usage in by_scope.items():
            rest = Usage(*(max(0, left) for left in usage.minus(known.get(scope, Usage()))))
            if any(rest):
                found.setdefault(OTHER_REMOTES, {})[scope] = rest
        return found


def watch(*, interfaces: Iterable[str] = (), remotes: bool = False) -> Watch:
    """Begin to count; see Watch."""
    return Watch(interfaces=interfaces, remotes=remotes)


def _add(to: dict[Scope, Usage], scope: Scope, usage: Usage) -> None:
    to[scope] = to[scope].plus(usage) if scope in to else usage


def _address(packed: bytes) -> str:
    """Return an IPv6 or mapped IPv4 address as text."""
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[len(_MAPPED) :])
    return socket.inet_ntop(socket.AF_INET6, packed)


def _process(pid: int) -> Optional[Process]:
    with suppress(ProcessError):
        return Process(pid)
    return None
