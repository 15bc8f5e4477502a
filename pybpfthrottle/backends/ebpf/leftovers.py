"""What a crash has left: programs of ours, attached by the legacy call, whose owner is gone."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from contextlib import nullcontext, suppress
from typing import Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle.backends.ebpf import connections
from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.connections import SOCKETS
from pybpfthrottle.backends.ebpf.programs import Role
from pybpfthrottle.backends.ebpf.records import RECORD, ThrottleFormat
from pybpfthrottle.backends.ebpf.registry import Head, RecordMap, configs_of, open_map, our_programs
from pybpfthrottle.bpf import links, programs
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Identity

log = logging.getLogger(__name__)


class Leftover(NamedTuple):
    """A program without an owner. ``cgroup`` is None where its cgroup was removed."""

    program_id: int
    name: str
    hook: AttachType
    owner_pid: int
    cgroup: Optional[Cgroup]

    def __str__(self) -> str:
        where = self.cgroup.path if self.cgroup else "a cgroup that was removed"
        return f"{self.name} (id {self.program_id}) on {where}, of process {self.owner_pid}"


def find() -> list[Leftover]:
    """All of them on this machine. Needs CAP_SYS_ADMIN; without it there seem to be none."""
    ours = {
        info.id: (info, program.attach_type, owner)
        for info in our_programs()
        for program in [shipped.by_name(info.name)]
        if program is not None and program.role is not Role.FOLLOW
        for owner in [_owner(info)]
        if owner is not None and process.is_gone(owner) and not _is_kept(info)
    }
    if not ours:
        return []
    places = dict(_places(set(ours)))
    return [
        Leftover(program_id, info.name, hook, owner.pid, places.get(program_id))
        for program_id, (info, hook, owner) in ours.items()
    ]


def remove(leftover: Leftover) -> None:
    """Detach it; disarm it where that cannot be done, as on a removed cgroup.

    Connections that it shaped get back what they had.
    """
    map_ids = programs.info_by_id(leftover.program_id).map_ids
    shaped = open_map(map_ids, SOCKETS)
    with nullcontext() if shaped is None else shaped:
        if leftover.cgroup is None or not _detach(leftover, leftover.cgroup):
            _disarm(map_ids)
        if shaped is not None and leftover.cgroup is not None:
            connections.restore(connections.pids([leftover.cgroup]), shaped)
    log.info("Removed %s, which a crash has left", leftover)


def remove_all() -> list[Leftover]:
    """Find and remove; what cannot be removed is left."""
    removed = []
    for leftover in find():
        with suppress(OSError, CgroupError):
            remove(leftover)
            removed.append(leftover)
    return removed


def _owner(info: ProgramInfo) -> Optional[Identity]:
    """Who made the program; None if it is not ours, or disarmed already."""
    configs = configs_of(info.map_ids)
    if configs is None:
        return None
    with configs:
        heads = [Head.from_buffer_copy(record) for record in configs.values()]
    for head in heads:
        if head.magic == ThrottleFormat.MAGIC and head.rate_bytes_per_s:
            return head.owner
    return None


def _is_kept(info: ProgramInfo) -> bool:
    """Whether the throttle of a program is to stay without its owner."""
    record = open_map(info.map_ids, RECORD)
    if record is None:
        return False
    with record:
        entry = RecordMap(record).read()
    return entry is not None and entry.kept


def _places(wanted: set[int]) -> Iterator[tuple[int, Cgroup]]:
    for cgroup in cgroups_v2.walk():
        with suppress(CgroupError):
            fd = cgroup.open()
            try:
                for hook in shipped.HOOKS:
                    with suppress(OSError):
                        for program_id in links.query(fd, hook).program_ids:
                            if program_id in wanted:
                                yield program_id, cgroup
            finally:
                os.close(fd)


def _detach(leftover: Leftover, cgroup: Cgroup) -> bool:
    """Whether it could be detached: a link that a child has inherited cannot."""
    cgroup_fd = cgroup.open()
    try:
        with programs.open_by_id(leftover.program_id) as program:
            links.detach(program.fd, cgroup_fd, leftover.hook)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    finally:
        os.close(cgroup_fd)
    return True


def _disarm(map_ids: Sequence[int]) -> None:
    """Unlimited, by its map: the program then lets all packets pass."""
    configs = configs_of(map_ids)
    if configs is not None:
        with configs:
            for direction, record in list(configs.items()):
                head = Head.from_buffer_copy(record)
                head.rate_bytes_per_s = 0
                configs[direction] = bytes(head) + record[ctypes.sizeof(Head) :]
