"""What a crash has left: programs of ours, attached by the legacy call, whose owner is gone."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from contextlib import suppress
from typing import Iterator, NamedTuple, Optional

from pybpfthrottle import cgroup as cgroups_v2
from pybpfthrottle import process
from pybpfthrottle.backends.attach import ATTACH_TYPES
from pybpfthrottle.backends.records import THROTTLE_MAGIC, ThrottleConfig
from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.limits import Direction
from pybpfthrottle.process import Identity

log = logging.getLogger(__name__)

PROGRAM_PREFIX = "pybpft_"
_CONFIGS = "CGROUP_CONFIGS"


class Leftover(NamedTuple):
    """A program without an owner. ``cgroup`` is None where its cgroup was removed."""

    program_id: int
    name: str
    direction: Direction
    owner_pid: int
    cgroup: Optional[Cgroup]

    def __str__(self) -> str:
        where = self.cgroup.path if self.cgroup else "a cgroup that was removed"
        return f"{self.name} (id {self.program_id}) on {where}, of process {self.owner_pid}"


def find() -> list[Leftover]:
    """All of them on this machine. Needs CAP_SYS_ADMIN; without it there seem to be none."""
    ours = {
        info.id: (info, direction, owner)
        for info in _our_programs()
        for direction in [_direction(info)]
        for owner in [_owner(info, direction)]
        if owner is not None and process.is_gone(owner)
    }
    if not ours:
        return []
    places = dict(_places(set(ours)))
    return [
        Leftover(program_id, info.name, direction, owner.pid, places.get(program_id))
        for program_id, (info, direction, owner) in ours.items()
    ]


def remove(leftover: Leftover) -> None:
    """Detach it; disarm it where that cannot be done, as on a removed cgroup."""
    if leftover.cgroup is None or not _detach(leftover, leftover.cgroup):
        _disarm(leftover)
    log.info("Removed %s, which a crash has left", leftover)


def remove_all() -> list[Leftover]:
    """Find and remove; what cannot be removed is left."""
    removed = []
    for leftover in find():
        with suppress(OSError, CgroupError):
            remove(leftover)
            removed.append(leftover)
    return removed


def _our_programs() -> Iterator[ProgramInfo]:
    with suppress(OSError):  # they may not be seen
        for program_id in programs.all_ids():
            with suppress(OSError):  # it may end in between
                info = programs.info_by_id(program_id)
                if info.name.startswith(PROGRAM_PREFIX):
                    yield info


def _direction(info: ProgramInfo) -> Direction:
    return Direction.DOWNLOAD if "ingress" in info.name else Direction.UPLOAD


def _owner(info: ProgramInfo, direction: Direction) -> Optional[Identity]:
    """Who made the program; None if it is not ours, or disarmed already."""
    configs = _configs(info.map_ids)
    if configs is None:
        return None
    with configs:
        config = _Head.from_buffer_copy(configs[direction])
    if config.magic != THROTTLE_MAGIC or not config.rate_bytes_per_s:
        return None
    return Identity(config.owner_pid, config.owner_pid_namespace, config.owner_start_ticks)


class _Head(ctypes.Structure):
    """The owner and the rate, which never move: all that may be relied on in any version."""

    _fields_ = ThrottleConfig._fields_[:6]


def _configs(map_ids: tuple[int, ...]) -> Optional[Map[int, bytes]]:
    """The map of configurations, whose records another version may have made longer or shorter."""
    for map_id in map_ids:
        with suppress(OSError):
            found = maps.open_by_id(map_id)
            if found.spec.name == _CONFIGS and found.spec.value_size >= ctypes.sizeof(_Head):
                return found.typed(U32, RAW)
            found.close()
    return None


def _places(wanted: set[int]) -> Iterator[tuple[int, Cgroup]]:
    for cgroup in cgroups_v2.walk():
        with suppress(CgroupError):
            fd = cgroup.open()
            try:
                for hook in ATTACH_TYPES.values():
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
            links.detach(program.fd, cgroup_fd, ATTACH_TYPES[leftover.direction])
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    finally:
        os.close(cgroup_fd)
    return True


def _disarm(leftover: Leftover) -> None:
    """Unlimited, by its map: the program then lets all packets pass."""
    configs = _configs(programs.info_by_id(leftover.program_id).map_ids)
    if configs is not None:
        with configs:
            record = configs[leftover.direction]
            config = _Head.from_buffer_copy(record)
            config.rate_bytes_per_s = 0
            configs[leftover.direction] = bytes(config) + record[ctypes.sizeof(_Head) :]
