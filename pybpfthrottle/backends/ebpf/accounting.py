"""The packets of each process, counted at the root cgroup: the programs of traffic.bpf.c.

The counts are the kernel's. Which process a socket belongs to is what its creator was, until user
space says otherwise, or another one closes a connection that user space has not met.
"""

from __future__ import annotations

import ctypes
import errno
from contextlib import ExitStack, suppress
from ctypes import c_char, c_uint32, c_uint64
from typing import Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle.backends.ebpf import attach, programs
from pybpfthrottle.bpf import loader, privileges
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.codecs import U32, StructureCodec, TupleCodec
from pybpfthrottle.bpf.errors import BpfError
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.privileges import Capability
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.sockets import Scan, descriptors
from pybpfthrottle.settings import AttachPolicy

_BY_LINK = AttachPolicy("link")
_NEEDED = (Capability.CAP_BPF, Capability.CAP_PERFMON, Capability.CAP_NET_ADMIN)
_OF_PACKETS = (AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS)
_ALL_BITS, _SIGN = (1 << 64) - 1, 1 << 63


class TrafficKey(ctypes.Structure):
    """struct traffic_key."""

    _fields_ = (("process", c_uint32), ("scope", c_uint32), ("interface", c_uint32))


class TrafficRemote(ctypes.Structure):
    """struct traffic_remote."""

    _fields_ = (("key", TrafficKey), ("address", c_uint32 * 4))


class TrafficCounts(ctypes.Structure):
    """struct traffic_counts: of one CPU."""

    _fields_ = (
        ("download_packets", c_uint64),
        ("download_bytes", c_uint64),
        ("upload_packets", c_uint64),
        ("upload_bytes", c_uint64),
    )


class TrafficOwner(ctypes.Structure):
    """struct traffic_owner."""

    _fields_ = (
        ("process", c_uint32),
        ("open", c_uint32),
        ("charged", TrafficRemote),
        ("reserved", c_uint32),
        ("counts", TrafficCounts),
    )


class TrafficProcess(ctypes.Structure):
    """struct traffic_process."""

    _fields_ = (
        ("name", c_char * 16),
        ("cgroup_id", c_uint64),
        ("namespace", c_uint64),
        ("user", c_uint32),
        ("reserved", c_uint32),
    )


# Records that are read by the thousand are read as tuples.
_KEY, _REMOTE, _COUNTS = TupleCodec("=3I"), TupleCodec("=3I16s"), TupleCodec("=4Q")

Sums = tuple[int, ...]


class Creator(NamedTuple):
    """What a process was when it created its last socket.

    ``namespace`` is the cookie of the socket's network namespace, 0 if it is not known.
    """

    name: str
    cgroup_id: int
    user: int
    namespace: int = 0


class Move(NamedTuple):
    """What one process was charged for, and another one has moved: as of Accounting.remotes."""

    source: int
    sink: int
    scope: int
    interface: int
    address: bytes
    sums: Sums

    @classmethod
    def of(cls, owner: TrafficOwner, sink: int) -> Move:
        """Return what the record of a socket's storage says, for its new owner."""
        key, counts = owner.charged.key, owner.counts
        sums = tuple(getattr(counts, name) for name, _ in TrafficCounts._fields_)
        address = bytes(owner.charged.address)
        return cls(owner.process, sink, key.scope, key.interface, address, sums)


class Accounting:
    """The programs that count, attached to the root cgroup. ``close`` or ``with`` ends it.

    New sockets have owners from the start; after a first ``scan`` so have others. Then ``begin``.
    """

    def __init__(self, *, remotes: bool = False) -> None:
        """Attach what sees new sockets. Linux 5.10; CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.

        With ``remotes`` they count by remote address as well. Raises BpfError, ObjectFileError or
        CgroupError; then nothing stays attached.
        """
        # Without them no BTF can be loaded, and what fails is a map: EINVAL would tell nothing.
        if privileges.missing_capabilities(_NEEDED):
            why = privileges.why_not_permitted("BPF_MAP_CREATE", _NEEDED)
            raise BpfError(f"traffic cannot be counted: {why}", errno=errno.EPERM)
        shipped = programs.counters()
        self._packets = [program for program in shipped if program.attach_type in _OF_PACKETS]
        with ExitStack() as undo:
            spec = programs.read("traffic-remotes" if remotes else "traffic")
            loaded = undo.enter_context(loader.load(spec, [program.name for program in shipped]))
            self._programs = loaded.programs
            _attach(undo, loaded.programs, (one for one in shipped if one not in self._packets))
            self._owners: Map[int, TrafficOwner] = loaded.maps["SOCKET_OWNERS"].typed(
                U32, StructureCodec(TrafficOwner)
            )
            self._names: Map[int, TrafficProcess] = loaded.maps["TRAFFIC_NAMES"].typed(
                U32, StructureCodec(TrafficProcess)
            )
            self._counts: Map[Sequence[int], list[Sums]] = loaded.maps["TRAFFIC"].typed(
                _KEY, _COUNTS
            )
            self._remotes: Optional[Map[tuple[int, int, int, bytes], Sums]] = None
            if remotes:
                self._remotes = loaded.maps["TRAFFIC_REMOTES"].typed(_REMOTE, _COUNTS)
            self._scan = Scan()
            self._attached = undo.pop_all()

    def begin(self) -> None:
        """Count packets from now on. Raises BpfError or CgroupError."""
        _attach(self._attached, self._programs, self._packets)

    def counts(self) -> Iterator[tuple[int, int, int, Sums]]:
        """Yield a process id, a scope, an interface, and the counts: the fields of TrafficCounts.

        Process 0 is for packets of no known process.
        """
        for (process, scope, interface), cpus in self._counts.items():
            yield process, scope, interface, tuple(map(_signed_sum, zip(*cpus)))

    @property
    def counts_remotes(self) -> bool:
        """Whether it counts by remote address."""
        return self._remotes is not None

    def remotes(self) -> Iterator[tuple[int, int, int, bytes, Sums]]:
        """Yield the same by remote address, of IPv6 or mapped, as far as it was asked for.

        Of so many addresses that the map is full, those that were idle longest are forgotten.
        """
        if self._remotes is not None:
            for key, sums in self._remotes.items():
                yield (*key, sums)

    def creator(self, pid: int) -> Optional[Creator]:
        """Return what a process was when it created its last socket, if it has."""
        with suppress(KeyError):
            found = self._names[pid]
            name = found.name.decode(errors="replace")
            return Creator(name, found.cgroup_id, found.user, found.namespace)
        return None

    def forget(self, pid: int, places: Iterable[tuple[int, int]]) -> None:
        """Make room: forget the counts of a process that has ended, by scope and interface."""
        for scope, interface in places:
            self._counts.pop((pid, scope, interface), None)
        self._names.pop(pid, None)

    def forget_remotes(self, pid: int, remotes: Iterable[tuple[int, int, bytes]]) -> None:
        """Forget which addresses a process has communicated with."""
        if self._remotes is not None:
            for remote in remotes:
                self._remotes.pop((pid, *remote), None)

    def scan(self, pids: Iterable[int]) -> Iterator[Move]:
        """Give sockets that were not met before to the processes that have them open.

        One that its owner has open too stays the owner's: others have inherited it. Yields what a
        connection has moved before, and what another process was charged for.
        """
        held: dict[int, set[int]] = {}
        for found in self._scan.new(pids):
            if not found.is_ip:
                continue
            fd, pid = found.socket.fileno(), found.place.pid
            with suppress(OSError):
                first = TrafficOwner(process=pid)
                before = self._owners.setdefault(fd, first)
                owner: int = before.process
                if before is first:
                    continue
                if owner and owner != pid and owner not in held:
                    held[owner] = set()
                    with suppress(OSError):
                        held[owner] = {one.inode for one in descriptors(owner)}
                if owner and found.place.inode in held.get(owner, ()):
                    pid = owner
                if before.open or pid != owner:
                    self._owners[fd] = TrafficOwner(process=pid)
                if before.open and pid != owner:
                    yield Move.of(before, pid)

    def close(self) -> None:
        """Detach the programs."""
        self._attached.close()

    def __enter__(self) -> Accounting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _attach(
    undo: ExitStack, loaded: Mapping[str, Program], shipped: Iterable[programs.Shipped]
) -> None:
    top = cgroup.root()
    for one in shipped:
        attached = attach.attach(loaded[one.name], top, one.attach_type, _BY_LINK, repeats=True)
        undo.callback(attached.detach)


def _signed_sum(cpus: Sequence[int]) -> int:
    """Return the sum of all CPUs' numbers.

    What a process takes over may be subtracted on another CPU than it was added on; and a moment
    passes between the two readings.
    """
    found = sum(cpus) & _ALL_BITS
    return found - (1 << 64) if found & _SIGN else found
