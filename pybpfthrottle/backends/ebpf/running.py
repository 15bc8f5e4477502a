"""The limits that programs of ours keep at present, whichever process put them in force."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack, suppress
from typing import Iterator, NamedTuple, Optional

from pybpfthrottle.backends.ebpf import leftovers
from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.attach import ATTACH_TYPES
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.backends.ebpf.records import ThrottleConfig, ThrottleFlags, ThrottleFormat
from pybpfthrottle.bpf import links, programs
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.model import Direction

# The map of the socket storage; by a descriptor of a socket it has the mark of that.
MARKS = "MARKS"


class Rule(NamedTuple):
    """A program that limits a direction: of all sockets, or of those in the map ``marks_id``."""

    program_id: int
    direction: Direction
    owner: Identity
    loopback: bool
    marks_id: Optional[int] = None


class Rules:
    """Those of all throttles of this machine; ``close`` or ``with`` ends it."""

    def __init__(self) -> None:
        """Linux 4.15. Needs CAP_SYS_ADMIN; raises OSError without."""
        self._resources = ExitStack()
        self._marks: dict[int, Map[int, bytes]] = {}
        self._passed: dict[Cgroup, frozenset[int]] = {}
        next(programs.all_ids(), None)  # it tells what is refused
        self.all = [rule for info in leftovers.our_programs() for rule in self._read(info)]

    def marks_of(self, descriptor: int) -> frozenset[int]:
        """The ids of the maps that have a mark of a socket, given by a descriptor."""
        return frozenset(map_id for map_id, marks in self._marks.items() if descriptor in marks)

    def passed_in(self, cgroup: Cgroup) -> frozenset[int]:
        """The ids of the programs that packets pass whose sockets are of a cgroup.

        Needs CAP_NET_ADMIN. Raises OSError, or CgroupError if it is gone.
        """
        if cgroup not in self._passed:
            fd = cgroup.open()
            try:
                self._passed[cgroup] = frozenset(
                    program_id
                    for hook in ATTACH_TYPES.values()
                    for program_id in links.query(fd, hook, effective=True).program_ids
                )
            finally:
                os.close(fd)
        return self._passed[cgroup]

    def close(self) -> None:
        """Close the maps."""
        self._resources.close()

    def __enter__(self) -> Rules:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, info: ProgramInfo) -> Iterator[Rule]:
        program = shipped.by_name(info.name)
        if program is None or program.role is not Role.POLICE or program.direction is None:
            return
        config = _config(info, program.direction)
        if config is None or config.magic != ThrottleFormat.MAGIC or not config.rate_bytes_per_s:
            return
        owner = Identity(config.owner_pid, config.owner_pid_namespace, config.owner_start_ticks)
        rule = Rule(info.id, program.direction, owner, bool(config.flags & ThrottleFlags.LOOPBACK))
        if program.scope is Scope.ALL:
            yield rule
            return
        marks_id = self._open_marks(info)
        if marks_id is not None:
            yield rule._replace(marks_id=marks_id)

    def _open_marks(self, info: ProgramInfo) -> Optional[int]:
        """The id of its map of marks; both directions of a throttle have the same."""
        known = self._marks.keys() & set(info.map_ids)
        if known:
            return known.pop()
        found = leftovers.open_map(info.map_ids, MARKS)
        if found is None:
            return None
        self._resources.enter_context(found)
        map_id = found.info().id
        self._marks[map_id] = found.typed(U32, RAW)
        return map_id


def _config(info: ProgramInfo, direction: Direction) -> Optional[ThrottleConfig]:
    """The record of a direction; what another version's does not have is 0."""
    with suppress(OSError, KeyError):  # it may end meanwhile
        configs = leftovers.configs_of(info.map_ids)
        if configs is not None:
            with configs:
                record = configs[direction]
            return ThrottleConfig.from_buffer_copy(
                record.ljust(ctypes.sizeof(ThrottleConfig), b"\0")
            )
    return None
