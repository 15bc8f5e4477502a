"""Leftovers of a crash: our legacy-attached programs whose owner is gone."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import nullcontext, suppress
from typing import Any, Iterator, Optional, Sequence

from pybpfthrottle.backends.ebpf import connections
from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.connections import SOCKETS
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.backends.ebpf.records import RECORD, ThrottleFormat, element
from pybpfthrottle.backends.ebpf.registry import (
    CONFIGS,
    Head,
    RecordMap,
    configs_of,
    entry_of,
    in_force,
    open_map,
    our_programs,
    slot_of,
)
from pybpfthrottle.bpf import features, links, maps, programs
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import own_cgroups, process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction

log = Logger(__name__)


class Leftover(NamedTuple):
    """A program without an owner. ``cgroup`` is None if the cgroup was removed.

    Before Linux 4.15 programs cannot be told apart: a leftover is found by the map of its limits,
    ``configs_id``, and ``program_id`` is None.
    """

    program_id: Optional[int]
    name: str
    hook: AttachType
    owner_pid: int
    cgroup: Optional[Cgroup]
    configs_id: int = 0

    def __str__(self) -> str:
        where = self.cgroup.path if self.cgroup else "a cgroup that was removed"
        number = "" if self.program_id is None else f" (id {self.program_id})"
        return f"{self.name}{number} on {where}, of process {self.owner_pid}"

    @property
    def kind(self) -> str:
        """What it is, in the plural."""
        return "programs"

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "id": self.program_id,
            "name": self.name,
            "hook": self.hook.name.lower(),
            "owner_pid": self.owner_pid,
            "cgroup": self.cgroup.path if self.cgroup else None,
        }

    def remove(self) -> None:
        """Detach it, or disarm it. Raises OSError or CgroupError."""
        remove(self)


def find() -> list[Leftover]:
    """Return all leftovers on this machine; none without CAP_SYS_ADMIN."""
    ours = {
        info.id: (info, program.attach_type, owner)
        for info in our_programs()
        for program in [shipped.by_name(info.name)]
        if program is not None and program.role is not Role.FOLLOW
        for owner in [_owner(info)]
        if owner is not None and process.is_gone(owner) and not _is_kept(info)
    }
    unnamed = list(_unnamed())
    if not ours:
        return unnamed
    places = dict(_places(set(ours)))
    return unnamed + [
        Leftover(program_id, info.name, hook, owner.pid, places.get(program_id))
        for program_id, (info, hook, owner) in ours.items()
        # A gate that cannot be detached needs no disarming: without its keeper all packets pass.
        if program_id in places or not _is_gate(info)
    ]


def _is_gate(info: ProgramInfo) -> bool:
    program = shipped.by_name(info.name)
    return program is not None and program.role is Role.GATE


def _unnamed() -> Iterator[Leftover]:
    """Find leftovers by their maps if the kernel names no programs or maps (before Linux 4.15)."""
    if features.QUERY.available():
        return
    with suppress(OSError):  # seeing them may not be permitted
        for record in in_force():
            configs_id = record.handles.get("maps", {}).get(CONFIGS)
            if configs_id is None or record.kept or not process.is_gone(record.owner):
                continue
            for direction in _armed_without_name(configs_id):
                program = shipped.policer(Scope.ALL, direction, "deny")
                for path in record.cgroups or [None]:
                    place = Cgroup(path) if path is not None and os.path.isdir(path) else None
                    yield Leftover(
                        *(None, program.name, program.attach_type, record.owner.pid, place),
                        configs_id=configs_id,
                    )


def _armed_without_name(configs_id: int) -> list[Direction]:
    """Return the directions that an unnamed map limits."""
    with suppress(OSError), maps.open_by_id(configs_id) as found:
        if not found.spec.name:
            heads = found.typed(U32, RAW).items()
            return [
                Direction(key)
                for key, value in heads
                if Head.from_buffer_copy(value).rate_bytes_per_s
            ]
    return []


def remove(leftover: Leftover) -> None:
    """Detach a leftover, or disarm it if that is impossible, as on a removed cgroup.

    Connections that it shaped are restored.
    """
    if leftover.program_id is None:
        _remove_unnamed(leftover)
    else:
        _remove_program(leftover, leftover.program_id)
    log.info("Removed %s, left by a crash", leftover)


def _remove_unnamed(leftover: Leftover) -> None:
    """Detach whatever is on a cgroup of ours; on any other it may be somebody else's by now.

    There the leftover stays until the cgroup is removed, and lets all packets pass.
    """
    if leftover.cgroup is not None and own_cgroups.is_ours(leftover.cgroup):
        fd = leftover.cgroup.open()
        try:
            links.detach(0, fd, leftover.hook)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        finally:
            os.close(fd)
    _disarm([leftover.configs_id])


def _remove_program(leftover: Leftover, program_id: int) -> None:
    try:
        map_ids = programs.info_by_id(program_id).map_ids
    except FileNotFoundError:
        return  # another start has removed it meanwhile
    shaped = open_map(map_ids, SOCKETS)
    with nullcontext() if shaped is None else shaped:
        if leftover.cgroup is None or not _detach(program_id, leftover.hook, leftover.cgroup):
            _disarm(map_ids)
        if shaped is not None and leftover.cgroup is not None:
            connections.restore(connections.pids([leftover.cgroup]), shaped)


def remove_all() -> list[Leftover]:
    """Find and remove leftovers; leave those that cannot be removed."""
    removed = []
    for leftover in find():
        with suppress(OSError, CgroupError):
            remove(leftover)
            removed.append(leftover)
    return removed


def _owner(info: ProgramInfo) -> Optional[Identity]:
    """Return a program's creator; None if the program is not ours, or is disarmed already."""
    configs = configs_of(info.map_ids)
    if configs is not None:
        with configs:
            keys = _limits_in(configs, info.map_ids)
            heads = [Head.from_buffer_copy(configs[key]) for key in keys]
        for head in heads:
            if head.magic == ThrottleFormat.MAGIC and head.rate_bytes_per_s:
                return head.owner
    # Like the gate, it limits nothing by itself; or its limit was lifted, or was about to end.
    entry = entry_of(info.map_ids)
    return Identity(*entry.fields["owner"]) if entry is not None else None


def _is_kept(info: ProgramInfo) -> bool:
    """Whether a program's throttle should outlive its owner; not if that was about to remove it."""
    entry = entry_of(info.map_ids)
    return entry is not None and entry.kept and not entry.removed


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


def _detach(program_id: int, hook: AttachType, cgroup: Cgroup) -> bool:
    """Detach a leftover; return whether that worked: a link inherited by a child stays."""
    cgroup_fd = cgroup.open()
    try:
        with programs.open_by_id(program_id) as program:
            links.detach(program.fd, cgroup_fd, hook)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    finally:
        os.close(cgroup_fd)
    return True


def _limits_in(configs: Map[int, bytes], map_ids: Sequence[int]) -> list[int]:
    """Return which keys of a configuration map are of a program's throttle.

    In slot 0 is one that has the map for itself, or else the program is for all slots.
    """
    slot = slot_of(map_ids)
    return [element(slot, direction) for direction in Direction] if slot else list(configs)


def _disarm(map_ids: Sequence[int]) -> None:
    """Lift the limit in the program's map, so that it lets all packets pass, and clear its record.

    Without both it is not found again.
    """
    configs = configs_of(map_ids)
    if configs is not None:
        with configs:
            for key in _limits_in(configs, map_ids):
                record = configs[key]
                head = Head.from_buffer_copy(record)
                head.rate_bytes_per_s = 0
                configs[key] = bytes(head) + record[ctypes.sizeof(Head) :]
    told = open_map(map_ids, RECORD)
    if told is not None:
        with told:
            RecordMap(told).clear()
