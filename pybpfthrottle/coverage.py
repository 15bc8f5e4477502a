"""Which running throttles cover a process's sockets, and why they do not cover the others."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from socket import IPPROTO_RAW, IPPROTO_TCP, SOCK_RAW
from typing import Any, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle import networks, registry
from pybpfthrottle.backends.ebpf import features, privileges
from pybpfthrottle.backends.ebpf.backend import EbpfBackend
from pybpfthrottle.backends.ebpf.registry import Mark, Rule, Rules
from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import endpoints, netns, process, sockets
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.endpoints import PACKET_FAMILIES, Description, Endpoint, Kind
from pybpfthrottle.linux.process import Identity, Process
from pybpfthrottle.model import Direction, Traffic

MARK, CGROUP, PROCESS = "mark", "cgroup", "process"


class Remark(NamedTuple):
    """A fact about a socket: a stable code, and a text."""

    code: str
    text: str

    def about(self, **what: Any) -> Remark:
        """Return a copy with the placeholders in its text filled in."""
        return self._replace(text=self.text.format(**what))


# Why a socket is not covered; if there are several reasons, the first of these.
NOT_IP = Remark("not-ip", "no IP traffic")
PACKET = Remark("packet", "its packets bypass the cgroup hooks")
CGROUP_REMOVED = Remark("cgroup-removed", "its cgroup was removed, or is not visible here")
LOOPBACK = Remark("loopback", "loopback traffic, limited only with --loopback")
EXEMPT = Remark("exempt", "{address} is not among what is limited: --traffic, --to or --except")
MPTCP = Remark("mptcp", "MPTCP, whose packets show no mark here; --whole-cgroup covers it")
OUT_OF_REACH = Remark("out-of-reach", "marked, but its cgroup {cgroup} is out of reach")
OTHER_CGROUP = Remark("other-cgroup", "created in {cgroup}, before its process moved to {now}")
NOT_MARKED = Remark(
    "not-marked", "not marked; a socket passed on by another process is marked within a second"
)
NO_THROTTLE = Remark("no-throttle", "no throttle covers it; use --pid {pid}")
_REASONS = (
    *(NOT_IP, PACKET, CGROUP_REMOVED, LOOPBACK, EXEMPT, MPTCP, OUT_OF_REACH, OTHER_CGROUP),
    *(NOT_MARKED, NO_THROTTLE),
)
UNKNOWN = Remark("unknown", "not known")
SOCKMAP = Remark(
    "sockmap", "not known: a sockmap program may redirect its data past the cgroup hooks"
)
UNTOLD_NAT = Remark(
    "nat-unknown", "not known: netfilter may redirect its packets, and does not report it"
)

# Notes on other sockets.
TRANSLATED = Remark("translated", "its packets actually go to {end} (NAT)")
LISTENS = Remark("listens", "connections it accepts are limited too")
SHARED = Remark("shared", "limited for these too: {processes}")
CGROUP_ASSUMED = Remark("cgroup-assumed", "if it was created in the process's current cgroup")


class Cover(NamedTuple):
    """A throttle that covers a socket, ``by`` MARK, CGROUP or PROCESS; ``owner`` is its process."""

    owner: Identity
    by: str
    directions: tuple[Direction, ...]


class OpenSocket(NamedTuple):
    """A process's descriptor for a socket, and which throttles cover the socket.

    ``covered`` is None if unknown; ``reason`` says why it is not True. ``cgroup`` is the socket's,
    or the process's if ``cgroup_assumed``. ``shared_with`` lists the other processes that have the
    socket open, as far as inspecting them is permitted.
    """

    fd: int
    inode: int
    description: Description
    cgroup: Optional[Cgroup] = None
    cgroup_assumed: bool = False
    shared_with: tuple[int, ...] = ()
    covers: tuple[Cover, ...] = ()
    covered: Optional[bool] = None
    reason: Optional[Remark] = None
    notes: tuple[Remark, ...] = ()


class Report(NamedTuple):
    """The sockets of a process, by descriptor. ``unknown`` says why coverage is not known."""

    process: Process
    cgroup: Optional[Cgroup]
    sockets: tuple[OpenSocket, ...]
    unknown: Optional[str] = None


class Coverage:
    """The throttles in force now, and reports on processes; ``close`` or ``with`` ends it."""

    def __init__(self) -> None:
        """Linux 4.15. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN.

        Without them ``unknown`` says so, and reports contain what is available.
        """
        self.unknown: Optional[str] = None
        self._rules: Optional[Rules] = None
        self._tables: list[_Limited] = []
        try:
            self._tables = [
                _Limited(
                    record,
                    record.visible_cgroups(),
                    frozenset(get_backend(record.backend).processes(record)),
                )
                for record in registry.records()
                if record.backend != EbpfBackend.name
            ]
            self._rules = Rules()
            self._rules.passed_in(cgroups_v2.root())  # raises what the kernel refuses
        except CgroupError as error:
            self.unknown = str(error)
        except OSError as error:
            self.unknown = _why_unknown(error)

    def report(self, pid: int) -> Report:
        """Report the sockets that a process has open. Whether they are covered needs Linux 5.6.

        Sockets opened or closed meanwhile may be missing or included. Raises ProcessError if there
        is no such process, if it ends, or if inspecting it is not permitted.
        """
        target = Process(pid)
        try:
            listed = sockets.descriptors(pid)
        except OSError as error:
            raise _cannot_look(target, error) from error
        where = None
        with suppress(CgroupError):
            where = cgroups_v2.from_pid(pid)
        try:
            found, unknown = self._covered(target, where, listed), self.unknown
        except OSError as error:
            descriptions = endpoints.listed_in_proc(pid)
            found = [
                _undecided(OpenSocket(*each, descriptions.get(each.inode, Description(Kind()))))
                for each in listed
            ]
            unknown = self.unknown or _why_unknown(error)
        if not target.alive():
            raise ProcessError(f"process {pid} ({target.name}) has ended")
        return Report(target, where, tuple(found), unknown)

    def close(self) -> None:
        """Close the open descriptors."""
        if self._rules is not None:
            self._rules.close()

    def __enter__(self) -> Coverage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _covered(
        self, target: Process, where: Optional[Cgroup], listed: Sequence[sockets.Descriptor]
    ) -> list[OpenSocket]:
        """Raises OSError if borrowing sockets or querying rules is not permitted."""
        with sockets.Lender(target.pid) as lender, _Namespaces() as namespaces:
            borrowed = list(_borrow(lender, listed, self._rules, namespaces))
            if self._rules is None or self.unknown is not None:
                return [
                    _undecided(OpenSocket(one.fd, one.inode, one.description)) for one in borrowed
                ]
            surroundings = namespaces.surroundings(borrowed)
        marked = frozenset(map_id for one in borrowed for map_id in one.marks)
        judge = _Judge(target.pid, where, self._rules, marked, self._tables)
        found = []
        for one in borrowed:
            around = surroundings.get(one.namespace, _NOWHERE)
            own = OpenSocket(one.fd, one.inode, one.description)
            own = own._replace(shared_with=self._shared(one.inode, target.pid))
            found.append(judge.judged(own, one.marks, around, one.namespace))
        return found

    def _shared(self, inode: int, pid: int) -> tuple[int, ...]:
        return tuple(
            other for other in self._users.get(inode, ()) if other not in (pid, os.getpid())
        )

    @cached_property
    def _users(self) -> dict[int, list[int]]:
        """Return the processes that have each socket open, by its inode."""
        found: dict[int, list[int]] = {}
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
            with suppress(OSError):
                for inode in {each.inode for each in sockets.descriptors(pid)}:
                    found.setdefault(inode, []).append(pid)
        return found


class _Limited(NamedTuple):
    """A throttle of whole cgroups, or of processes, by another backend than eBPF."""

    record: Record
    cgroups: list[Cgroup]
    pids: frozenset[int]

    def limits(self, cgroup: Optional[Cgroup], namespace: int, pid: int) -> bool:
        """Whether it limits a socket of a cgroup and process, in a network namespace.

        ``namespace`` is 0 if unknown.
        """
        own = self.record.handles.get("network_namespace", namespace)
        return namespace in (0, own) and (
            pid in self.pids or any(cgroup in one for one in self.cgroups)
        )

    def cover(self) -> Cover:
        """Return it as what covers a socket."""
        limited = [d for d, rate in self.record.spec.limits.items() if rate is not None]
        by = CGROUP if self.record.match is Match.CGROUP else PROCESS
        return Cover(self.record.owner, by, tuple(sorted(limited)))


class _Borrowed(NamedTuple):
    """What a borrowed socket reveals. ``namespace`` is an inode, or 0 if unknown."""

    fd: int
    inode: int
    description: Description
    namespace: int = 0
    marks: frozenset[Mark] = frozenset()


class _Surroundings(NamedTuple):
    """What a network namespace reveals: its sockets' cgroups by inode, and its addresses.

    ``translations`` are the connections' address translations, or None if unknown.
    """

    cgroup_ids: dict[int, int]
    addresses: set[str]
    translations: Optional[dict[netns.Ends, tuple[str, int]]]

    def real_end(self, description: Description) -> Optional[Endpoint]:
        """Return where a socket's packets really go, if they are translated."""
        local, remote = description.local, description.remote
        if not self.translations or local is None or remote is None:
            return None
        if local.port is None or remote.port is None or description.kind.protocol is None:
            return None
        protocol = IPPROTO_TCP if description.kind.is_mptcp() else description.kind.protocol
        ends = netns.Ends(protocol, str(local.ip()), local.port, str(remote.ip()), remote.port)
        real = self.translations.get(ends)
        return None if real is None else Endpoint(*real)

    def on_loopback(self, description: Description) -> bool:
        """Whether a socket's packets pass the loopback device, as packets to a local address do."""
        local, remote = description.local, description.remote
        real = self.real_end(description)
        if real is not None:
            return real.is_loopback() or str(real.ip()) in self.addresses
        end = remote or local
        if end is None or end.is_loopback():
            return end is not None
        return remote is not None and (
            str(remote.ip()) in self.addresses or (local is not None and local.ip() == remote.ip())
        )


_NOWHERE = _Surroundings({}, set(), {})


class _Namespaces(ExitStack):
    """The network namespaces of borrowed sockets, kept open."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[int, int] = {}

    def of(self, descriptor: int) -> int:
        """Return the inode of a socket's namespace, or 0 if unknown."""
        try:
            namespace = netns.of_socket(descriptor)
        except OSError:
            return 0
        inode = os.fstat(namespace).st_ino
        if inode in self._open:
            os.close(namespace)
        else:
            self._open[inode] = namespace
            self.callback(os.close, namespace)
        return inode

    def surroundings(self, borrowed: Sequence[_Borrowed]) -> dict[int, _Surroundings]:
        """Return what each namespace reveals, as far as it does."""
        found = {}
        for inode, namespace in self._open.items():
            kinds = {one.description.kind for one in borrowed if one.namespace == inode}
            with suppress(OSError):
                found[inode] = netns.inside(namespace, partial(_surroundings, kinds))
        return found


def _surroundings(kinds: set[Kind]) -> _Surroundings:
    asked = {
        # All raw sockets are listed under one protocol, whatever their own is.
        (kind.family or 0, IPPROTO_RAW if kind.type == SOCK_RAW else kind.protocol or 0)
        for kind in kinds
    }
    return _Surroundings(netns.cgroup_ids(asked), netns.own_addresses(), netns.translations())


def _borrow(
    lender: sockets.Lender,
    listed: Sequence[sockets.Descriptor],
    rules: Optional[Rules],
    namespaces: _Namespaces,
) -> Iterator[_Borrowed]:
    for number, _ in listed:
        try:
            own = lender.borrow(number)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ESRCH):  # it has ended
                continue
            raise
        try:
            with suppress(OSError):  # its number may now be another file's
                description = endpoints.describe(own)
                found = _Borrowed(number, os.fstat(own).st_ino, description)
                if rules is not None and description.kind.is_ip():
                    marks = rules.marks_of(own)
                    found = found._replace(namespace=namespaces.of(own), marks=marks)
                yield found
        finally:
            os.close(own)


class _Judge:
    """Finds out which rules cover the sockets of a process in the cgroup ``now``."""

    def __init__(
        self,
        pid: int,
        now: Optional[Cgroup],
        rules: Rules,
        marked: frozenset[Mark],
        tables: Sequence[_Limited] = (),
    ) -> None:
        """``marked`` has the ids of the maps that mark any of the process's sockets."""
        self._pid = pid
        self._now = now
        self._rules = rules
        self._marked = marked
        self._tables = tables
        self._cgroups = _Cgroups(now)
        self._rules_near: dict[Cgroup, list[Rule]] = {}

    def judged(
        self, own: OpenSocket, marks: frozenset[Mark], around: _Surroundings, namespace: int
    ) -> OpenSocket:
        """Return the socket with its covers, or why there are none. Raises OSError."""
        if not own.description.kind.is_ip():
            return _undecided(own)
        number = around.cgroup_ids.get(own.inode)
        where = self._now if number is None else self._cgroups.by_id(number)
        own = own._replace(cgroup=where, cgroup_assumed=number is None)
        passed = self._passed_in(where)
        if where is None or passed is None:
            return own._replace(reason=CGROUP_REMOVED)
        on_loopback = around.on_loopback(own.description)
        covering = []
        reasons = [NO_THROTTLE.about(pid=f"{self._pid}{' --loopback' if on_loopback else ''}")]
        if own.description.kind.is_mptcp() and not features.MPTCP_SOCKET.available():
            reasons.append(MPTCP)
        for rule in self._near(where, passed):
            reason = self._escapes(own, where, rule.program_id in passed, marks, rule)
            if reason is None:
                reason = _exempt(own.description, rule.traffic, on_loopback=on_loopback)
            if reason is None:
                covering.append(rule)
            else:
                reasons.append(reason)
        covers = [*_covers(covering)]
        for table in self._tables:
            if table.limits(where, namespace, self._pid):
                traffic = table.record.spec.traffic
                reason = _exempt(own.description, traffic, on_loopback=on_loopback)
                if reason is not None:
                    reasons.append(reason)
                else:
                    covers.append(table.cover())
            elif self._now is not None and table.limits(self._now, namespace, self._pid):
                reasons.append(OTHER_CGROUP.about(cgroup=where.path, now=self._now.path))
        if covers:
            own = own._replace(covered=True, covers=tuple(sorted(covers)))
        else:
            own = own._replace(covered=False, reason=min(reasons, key=_rank))
        return self._as_far_as_known(own, around)

    def _as_far_as_known(self, own: OpenSocket, around: _Surroundings) -> OpenSocket:
        """Return the socket with its notes; ``covered`` is None if data may take another path."""
        doubt = None
        if own.description.state == "established" and self._rules.has_sockmaps:
            doubt = SOCKMAP
        elif own.description.remote is not None and around.translations is None:
            doubt = UNTOLD_NAT
        if doubt is not None and (own.covered or own.reason == LOOPBACK):
            own = own._replace(covered=None, covers=(), reason=doubt)
        real = around.real_end(own.description)
        translated = [] if real is None else [TRANSLATED.about(end=real)]
        return own._replace(notes=(*translated, *_notes(own)))

    def _near(self, where: Cgroup, passed: frozenset[int]) -> list[Rule]:
        """Return the rules that concern this process, out of many on the machine."""
        if where not in self._rules_near:
            around = passed | (self._passed_in(self._now) or frozenset())
            self._rules_near[where] = [
                rule
                for rule in self._rules.all
                if rule.program_id in around or rule.mark in self._marked
            ]
        return self._rules_near[where]

    def _escapes(
        self, own: OpenSocket, where: Cgroup, is_passed: bool, marks: frozenset[Mark], rule: Rule
    ) -> Optional[Remark]:
        """Return why a rule does not apply to a socket of the cgroup ``where``; None if it does."""
        if rule.mark is None:
            if is_passed:
                return None
            if self._now and rule.program_id in (self._passed_in(self._now) or ()):
                return OTHER_CGROUP.about(cgroup=where.path, now=self._now.path)
            return NO_THROTTLE.about(pid=self._pid)
        if rule.mark not in marks:
            return NOT_MARKED if rule.mark in self._marked else NO_THROTTLE.about(pid=self._pid)
        if not is_passed:
            return OUT_OF_REACH.about(cgroup=where.path)
        return MPTCP if own.description.kind.is_mptcp() and not rule.multipath else None

    def _passed_in(self, where: Optional[Cgroup]) -> Optional[frozenset[int]]:
        """Return None for a removed cgroup."""
        with suppress(OSError, CgroupError):
            return self._rules.passed_in(where) if where else None
        return None


class _Cgroups:
    """Cgroups by id. Most sockets belong to the cgroup that their process is in."""

    def __init__(self, usual: Optional[Cgroup]) -> None:
        self._found: dict[int, Cgroup] = {}
        self._complete = False
        if usual is not None:
            with suppress(OSError):
                self._found[usual.id] = usual

    def by_id(self, number: int) -> Optional[Cgroup]:
        """Return None for a cgroup that was removed, or is not visible here."""
        if number not in self._found and not self._complete:
            self._complete = True
            for each in cgroups_v2.walk():
                with suppress(OSError):  # it may have vanished
                    self._found[each.id] = each
        return self._found.get(number)


def _exempt(description: Description, traffic: Traffic, *, on_loopback: bool) -> Optional[Remark]:
    """Return why a limit is not for a socket's packets, or None if it is."""
    if on_loopback and not traffic.loopback:
        return LOOPBACK
    address = None if description.remote is None else description.remote.ip()
    if address is None or traffic.everywhere or networks.limits(traffic, address):
        return None
    return EXEMPT.about(address=address)


def _covers(rules: Sequence[Rule]) -> tuple[Cover, ...]:
    together: dict[tuple[Identity, str], set[Direction]] = {}
    for rule in rules:
        by = CGROUP if rule.mark is None else MARK
        together.setdefault((rule.owner, by), set()).add(rule.direction)
    return tuple(
        Cover(owner, by, tuple(sorted(directions)))
        for (owner, by), directions in sorted(together.items())
    )


def _notes(own: OpenSocket) -> Iterator[Remark]:
    if own.covered and own.description.state == "listen":
        yield LISTENS
    if own.covered and own.shared_with:
        yield SHARED.about(processes=process.listed(own.shared_with))
    if own.covered and own.cgroup_assumed:
        yield CGROUP_ASSUMED


def _rank(reason: Remark) -> int:
    return next(rank for rank, each in enumerate(_REASONS) if each.code == reason.code)


def _undecided(own: OpenSocket) -> OpenSocket:
    """Return what is known about a socket regardless of the throttles."""
    kind = own.description.kind
    if kind.is_ip() or kind.family is None:
        return own._replace(reason=UNKNOWN)
    return own._replace(
        covered=False, reason=PACKET if kind.family_name in PACKET_FAMILIES else NOT_IP
    )


def _cannot_look(target: Process, error: OSError) -> ProcessError:
    if isinstance(error, PermissionError):
        return ProcessError(
            f"cannot inspect process {target.pid} ({target.name}):"
            f" {sockets.why_refused(error).text}"
        )
    return ProcessError(f"process {target.pid} ({target.name}) has ended")


def _why_unknown(error: OSError) -> str:
    """Return why it is unknown whether sockets are covered."""
    asked = str(error.filename or "").startswith("BPF_")
    if asked and not isinstance(error, PermissionError):
        return privileges.why_refused(error, str(error.filename))
    if error.errno == errno.ENOSYS:
        return "this kernel does not support pidfd_getfd (Linux 5.6), or a filter refuses it"
    if asked:
        return (
            f"{error.filename} gives {errno.errorcode.get(error.errno or 0)}: seeing throttles"
            " requires root (CAP_SYS_ADMIN and CAP_NET_ADMIN)"
        )
    if error.errno == errno.EPERM:
        return (
            f"{error.filename} gives EPERM, so its sockets cannot be borrowed:"
            f" {sockets.why_refused(error).text}"
        )
    return f"its sockets cannot be borrowed: {error.strerror}"
