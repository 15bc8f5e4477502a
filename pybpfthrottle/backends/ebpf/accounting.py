"""The packets of each process, counted at the root cgroup: the programs of traffic.bpf.c.

The counts are the kernel's. Which process a socket belongs to is what its creator was, until user
space says otherwise.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack, suppress
from ctypes import c_char, c_uint32, c_uint64
from typing import Iterable, Iterator, NamedTuple, Optional

from pybpfthrottle.backends.ebpf import attach, programs
from pybpfthrottle.backends.ebpf.programs import Role
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.sockets import Scan, descriptors
from pybpfthrottle.settings import AttachPolicy

_BY_LINK = AttachPolicy("link")


class TrafficKey(ctypes.Structure):
    """struct traffic_key."""

    _fields_ = (("process", c_uint32), ("scope", c_uint32))


class TrafficCounts(ctypes.Structure):
    """struct traffic_counts: of one CPU."""

    _fields_ = (
        ("download_packets", c_uint64),
        ("download_bytes", c_uint64),
        ("upload_packets", c_uint64),
        ("upload_bytes", c_uint64),
    )


class TrafficProcess(ctypes.Structure):
    """struct traffic_process."""

    _fields_ = (
        ("name", c_char * 16),
        ("cgroup_id", c_uint64),
        ("user", c_uint32),
        ("reserved", c_uint32),
    )


class Creator(NamedTuple):
    """What a process was when it created its last socket."""

    name: str
    cgroup_id: int
    user: int


class Accounting:
    """The programs that count, attached to the root cgroup. ``close`` or ``with`` ends it."""

    def __init__(self) -> None:
        """Attach them. Linux 5.10; needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.

        Raises BpfError, ObjectFileError or CgroupError; then nothing stays attached.
        """
        shipped = programs.with_role(Role.COUNT)
        top = cgroup.root()
        with ExitStack() as undo:
            loaded = undo.enter_context(
                loader.load(programs.read("traffic"), [program.name for program in shipped])
            )
            # In the table's order: sockets have owners before packets are counted.
            for program in shipped:
                attached = attach.attach(
                    loaded.programs[program.name],
                    top,
                    program.attach_type,
                    _BY_LINK,
                    repeats=True,
                )
                undo.callback(attached.detach)
            self._owners = loaded.maps["SOCKET_OWNERS"].elements
            self._names: Map[int, TrafficProcess] = loaded.maps["TRAFFIC_NAMES"].typed(
                U32, StructureCodec(TrafficProcess)
            )
            self._counts: Map[TrafficKey, list[TrafficCounts]] = loaded.maps["TRAFFIC"].typed(
                StructureCodec(TrafficKey), StructureCodec(TrafficCounts)
            )
            self._scan = Scan()
            self._attached = undo.pop_all()

    def counts(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield a process id, a scope, and what was counted: the fields of TrafficCounts.

        Process 0 is for packets of no known process.
        """
        for key, cpus in self._counts.items():
            sums = tuple(
                sum(getattr(cpu, name) for cpu in cpus) for name, *_ in TrafficCounts._fields_
            )
            yield key.process, key.scope, sums

    def creator(self, pid: int) -> Optional[Creator]:
        """Return what a process was when it created its last socket, if it has."""
        with suppress(KeyError):
            found = self._names[pid]
            return Creator(found.name.decode(errors="replace"), found.cgroup_id, found.user)
        return None

    def forget(self, pid: int, scopes: Iterable[int]) -> None:
        """Make room: forget the counts of a process that has ended."""
        for scope in scopes:
            self._counts.pop(TrafficKey(pid, scope), None)
        self._names.pop(pid, None)

    def scan(self, pids: Iterable[int]) -> None:
        """Give sockets that were not met before to the processes that have them open.

        One that its owner has open too stays the owner's: others have inherited it.
        """
        held: dict[int, set[int]] = {}
        for found in self._scan.new(pids):
            if not found.is_ip:
                continue
            fd, pid = U32.encode(found.socket.fileno()), found.place.pid
            with suppress(OSError):
                try:
                    owner = U32.decode(self._owners.lookup(fd))
                except FileNotFoundError:
                    owner = 0
                if owner == pid:
                    continue
                if owner and owner not in held:
                    held[owner] = set()
                    with suppress(OSError):
                        held[owner] = {one.inode for one in descriptors(owner)}
                if not owner or found.place.inode not in held[owner]:
                    self._owners.update(fd, U32.encode(pid))

    def close(self) -> None:
        """Detach the programs."""
        self._attached.close()

    def __enter__(self) -> Accounting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
