"""Our throttles as the kernel knows them, whoever made them.

Each throttle has a small map that records its purpose. All of its programs refer to that map, so
it exists as long as they do. Throttles of older versions lack it, and are known by their programs.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import time
from contextlib import ExitStack, suppress
from typing import Any, Callable, Container, Iterable, Iterator, Mapping, Optional, Tuple

from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.attach import ATTACH_TYPES
from pybpfthrottle.backends.ebpf.programs import Role, Scope
from pybpfthrottle.backends.ebpf.records import (
    RECORD,
    ThrottleConfig,
    ThrottleFlags,
    ThrottleFormat,
    ThrottleProcess,
    ThrottleRecord,
    ThrottleRecordFlags,
    element,
)
from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.abi import MapType, ProgType
from pybpfthrottle.bpf.codecs import RAW, U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.errors import AttachError
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction, Rate, Target, ThrottleSpec, Traffic

log = Logger(__name__)

CONFIGS = "CGROUP_CONFIGS"
MARKS, PROCESSES = "MARKS", "PROCESSES"
# Fields of a record: the attach method requested of its owner, and why that failed.
ASKED, ANSWER = "asked", "answer"
_TRIES = 10
_OF_SOCKMAPS = (ProgType.SK_SKB, ProgType.SK_MSG)
_MOST_BYTES = ThrottleRecord.text.size


class Entry(NamedTuple):
    """The content of a throttle's record map. ``generation`` grows with each change."""

    generation: int
    flags: int
    fields: dict[str, Any]

    @property
    def removed(self) -> bool:
        """Whether somebody has removed the limit while its owner still runs."""
        return bool(self.flags & ThrottleRecordFlags.REMOVED)

    @property
    def kept(self) -> bool:
        """Whether the throttle stays in force after its owner has ended."""
        return bool(self.flags & ThrottleRecordFlags.KEPT)


class RecordMap:
    """The record map of one throttle. Write it only under the lock of all throttles."""

    def __init__(self, record: Map[Any, Any]) -> None:
        self._map: Map[int, ThrottleRecord] = record.typed(U32, StructureCodec(ThrottleRecord))
        self._first = U32.encode(0)
        self._generation = struct.Struct(f"={ThrottleRecord.generation.offset}xI")

    def is_at(self, generation: int) -> bool:
        """Whether the record is still that of a generation; quicker than reading it."""
        (found,) = self._generation.unpack_from(self._map.elements.lookup(self._first))
        return bool(found == generation)

    def read(self) -> Optional[Entry]:
        """Return the record; None if none was written yet, or by another version."""
        for attempt in range(_TRIES):
            record, again = self._map[0], self._map[0]
            if record.magic != ThrottleFormat.MAGIC:
                return None
            # Updates are not atomic: the value is consistent if nothing was written meanwhile. A
            # generation that stays odd is that of a writer who was killed between two updates.
            is_last = attempt == _TRIES - 1
            if bytes(record) == bytes(again) and (record.generation % 2 == 0 or is_last):
                with suppress(ValueError):
                    fields = json.loads(record.text[: record.length])
                    return Entry(record.generation, record.flags, fields)
            time.sleep(0.001)
        return None

    def slot(self) -> int:
        """Return where the throttle's elements are in maps that it shares."""
        return int(self._map[0].slot)

    def begin(self, slot: int) -> None:
        """Note where the throttle's elements are in maps that it shares, before it is attached."""
        self._map[0] = ThrottleRecord(slot=slot)

    def write(self, fields: Mapping[str, Any], *, flags: int = 0) -> int:
        """Replace the fields; return the new generation.

        Raises OSError; then the record is as before, and can still be read. So it can if this
        process is killed, and is either as before or as it is to be.
        """
        text = _fitting(fields)
        before = self._map[0]
        begun = ThrottleRecord.from_buffer_copy(before)
        begun.generation |= 1
        record = ThrottleRecord(
            magic=ThrottleFormat.MAGIC,
            version=ThrottleFormat.VERSION,
            generation=begun.generation,
            flags=flags,
            length=len(text),
            slot=before.slot,
            text=text,
        )
        with ExitStack() as undo:
            undo.callback(self._map.__setitem__, 0, before)
            self._map[0] = begun
            self._map[0] = record
            record.generation += 1
            self._map[0] = record
            undo.pop_all()
        return int(record.generation)

    def clear(self) -> None:
        """Make it one that was never written."""
        self._map[0] = ThrottleRecord()


def _fitting(fields: Mapping[str, Any]) -> bytes:
    """Return the fields as JSON, with as many names of the target as there is room for."""
    text = json.dumps(fields).encode()
    if len(text) <= _MOST_BYTES:
        return text
    spec = fields["spec"]
    cut = {
        name: value[:1] if isinstance(value, list) else value
        for name, value in spec["target"].items()
    }
    return json.dumps(
        {
            **fields,
            "cgroups": fields["cgroups"][:1],
            "cgroup_ids": fields.get("cgroup_ids", [])[:1],
            "spec": {**spec, "target": cut},
            "cut": True,
        }
    ).encode()[:_MOST_BYTES]


class Unsettled:
    """The ids of objects that have to be looked at: new ones, and earlier ones not settled.

    A machine may have thousands. Of each kind, the kernel gives a new one a higher id than it has
    given before, so only what comes after the last one is listed.
    """

    # It begins anew after 2^31. Long before that, all are listed each time.
    _MANY_IDS = 1 << 30

    def __init__(self, listed: Callable[[int], Iterable[int]]) -> None:
        """``listed`` returns the ids above a number, in ascending order."""
        self._listed = listed
        self._last = 0
        self._ids: set[int] = set()

    def ids(self) -> list[int]:
        """Return them. Raises OSError if looking is not permitted."""
        new = list(self._listed(self._last if self._last < self._MANY_IDS else 0))
        # In this order: another thread that looks meanwhile is not to miss any.
        self._ids.update(new)
        self._last = max([self._last, *new[-1:]])
        return sorted(self._ids)

    def settle(self, object_id: int) -> None:
        """An object is of no interest, or is gone: do not look at it again."""
        self._ids.discard(object_id)


class OwnRecords:
    """The ids of the record maps of this process's throttles, but not of its parent's."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._ids: set[int] = set()

    def add(self, map_id: int) -> None:
        """Add one."""
        self._ids = {*self.ids(), map_id}
        self._owner = os.getpid()

    def ids(self) -> set[int]:
        """Return them; some may be gone."""
        return self._ids if self._owner == os.getpid() else set()


own_records = OwnRecords()
# Maps that may be records, and programs that may be of throttles without one.
_maybe_records = Unsettled(maps.all_ids)
_maybe_alone = Unsettled(programs.all_ids)


def in_force(*, others: bool = False) -> Iterator[Record]:
    """Return the throttles of this machine, including leftovers of a crash and removed ones.

    With ``others`` without those of this process. Linux 4.13. Needs CAP_SYS_ADMIN; raises OSError
    without.
    """
    own = own_records.ids() if others else set()
    known = set(own)
    nameless: set[int] = set()
    yield from _recorded(known, nameless, own)
    yield from _without_record(known)
    yield from _by_configs(nameless - known)


def _recorded(known: set[int], nameless: set[int], but: Container[int] = ()) -> Iterator[Record]:
    """Return the throttles with a record, and add their maps to ``known``.

    Each configuration map without a name is added to ``nameless``. ``but`` has the ids of records
    to leave out.
    """
    for map_id in _maybe_records.ids():
        if map_id in but:
            continue
        try:
            record = _record_in(map_id, known, nameless)
        except FileNotFoundError:  # it has ended
            _maybe_records.settle(map_id)
            continue
        except (OSError, KeyError, TypeError, ValueError):
            continue
        if record is not None:
            yield record


def _record_in(map_id: int, known: set[int], nameless: set[int]) -> Optional[Record]:
    """Return what a map records, if it is a record. Raises what reading it raises."""
    if maps.name_by_id(map_id) not in ("", RECORD):
        _maybe_records.settle(map_id)
        return None
    with maps.open_by_id(map_id) as live:
        name = name_of(live)
        if name == CONFIGS:
            nameless.add(map_id)
        if name != RECORD:
            return None
        known.add(map_id)
        entry = RecordMap(live).read()
    if entry is None:
        return None
    record = record_of(entry, map_id)
    known.update(record.handles.get("maps", {}).values())
    return record


def name_of(live: Map[Any, Any]) -> str:
    """Return the name of a map. Raises OSError.

    Before Linux 4.15 maps have no names: then return the name of our map that it resembles.
    """
    spec = live.spec
    if spec.name or spec.type != MapType.ARRAY or spec.key_size != 4 or spec.max_entries > 2:
        return spec.name
    name = RECORD if spec.value_size == ctypes.sizeof(ThrottleRecord) else CONFIGS
    if spec.value_size < ctypes.sizeof(Head):
        return ""
    magic = U32.encode(ThrottleFormat.MAGIC)
    values = live.typed(U32, RAW).values()
    return name if any(value.startswith(magic) for value in values) else ""


def refuse_to_replace(cgroup: Cgroup) -> None:
    """Raise AttachError where one of two limits would switch the other off (before Linux 4.15)."""
    with suppress(OSError):  # who may not look cannot be told
        for record in _recorded(set(), set()):
            if record.removed or process.is_gone(record.owner):
                continue
            for limited in map(Cgroup, record.cgroups):
                if cgroup in limited or limited in cgroup:
                    raise AttachError(
                        f"{limited.path} is already limited by process {record.owner.pid}. This"
                        " kernel (before Linux 4.15) runs only one program per cgroup: a limit on"
                        f" {cgroup.path} would switch that one off. Remove it first"
                    )


def record_of(entry: Entry, map_id: int) -> Record:
    """Return an entry as a record. Raises KeyError, TypeError or ValueError for other versions."""
    fields = entry.fields
    return Record(
        id=str(fields["id"]),
        spec=ThrottleSpec.from_json(fields["spec"]),
        owner=Identity(*map(int, fields["owner"])),
        backend="ebpf",
        match=Match(fields["match"]),
        cgroups=tuple(fields["cgroups"]),
        cgroup_ids=tuple(map(int, fields.get("cgroup_ids", ()))),
        kept=entry.kept,
        since_ns=int(fields["since_ns"]),
        removed=entry.removed,
        clears_up=Identity(*map(int, fields["guard"])) if fields.get("guard") else None,
        attached_by=str(fields.get("attached_by", "")),
        handles={**fields, "record": map_id},
    )


def _without_record(known: set[int]) -> Iterator[Record]:
    """Return the throttles of older versions, as far as their programs reveal them."""
    found: dict[int, Record] = {}
    for info in _maybe_without_record():
        with suppress(OSError, KeyError):
            if known.intersection(info.map_ids):
                _maybe_alone.settle(info.id)
                continue
            named = map_ids(info) if info.name.startswith(shipped.PREFIX) else {}
            if RECORD in named or CONFIGS not in named:
                _maybe_alone.settle(info.id)
                continue
            limits, owner = _limits_of(named[CONFIGS])
            if owner is not None and named[CONFIGS] not in found:
                found[named[CONFIGS]] = Record(
                    id=f"program-{info.id}",
                    spec=ThrottleSpec(Target(), limits),
                    owner=owner,
                    backend="ebpf",
                    match=Match.MARKS if MARKS in named else Match.CGROUP,
                    since_ns=info.load_time_ns,
                    handles={"maps": named},
                )
    yield from found.values()


def _maybe_without_record() -> Iterator[ProgramInfo]:
    with suppress(OSError):  # they may not be seen
        for program_id in _maybe_alone.ids():
            try:
                yield programs.info_by_id(program_id, memory=False)
            except FileNotFoundError:  # it has ended
                _maybe_alone.settle(program_id)
            except OSError:
                continue


def _by_configs(nameless: Iterable[int]) -> Iterator[Record]:
    """Return throttles without a record where maps have no names: from their configurations."""
    for map_id in nameless:
        with suppress(OSError, KeyError):
            limits, owner = _limits_of(map_id)
            if owner is not None:
                yield Record(
                    id=f"map-{map_id}",
                    spec=ThrottleSpec(Target(), limits),
                    owner=owner,
                    backend="ebpf",
                    match=Match.CGROUP,
                    handles={"maps": {CONFIGS: map_id}},
                )


def _limits_of(configs_id: int) -> tuple[dict[Direction, Optional[Rate]], Optional[Identity]]:
    with maps.open_by_id(configs_id) as configs:
        heads = {
            Direction(key): Head.from_buffer_copy(value)
            for key, value in configs.typed(U32, RAW).items()
        }
    limited = {
        direction: head
        for direction, head in heads.items()
        if head.magic == ThrottleFormat.MAGIC and head.rate_bytes_per_s
    }
    limits: dict[Direction, Optional[Rate]] = {
        direction: Rate(head.rate_bytes_per_s) for direction, head in limited.items()
    }
    return limits, next((head.owner for head in limited.values()), None)


class Head(ctypes.Structure):
    """The owner and the rate: the only fields with the same offset in every version."""

    _fields_ = ThrottleConfig._fields_[:6]

    @property
    def owner(self) -> Identity:
        """The process that owns the throttle."""
        return Identity(self.owner_pid, self.owner_pid_namespace, self.owner_start_ticks)


def our_programs() -> Iterator[ProgramInfo]:
    """Return all of our programs on this machine; none without CAP_SYS_ADMIN."""
    return (info for info in _all_programs() if info.name.startswith(shipped.PREFIX))


def _all_programs() -> Iterator[ProgramInfo]:
    with suppress(OSError):  # they may not be seen
        for program_id in programs.all_ids():
            with suppress(OSError):  # it may end meanwhile
                yield programs.info_by_id(program_id, memory=False)


def programs_of(map_id: int) -> dict[int, shipped.Shipped]:
    """Return the programs, by id, of the throttle that has the map with this id."""
    return {
        info.id: program
        for info in our_programs()
        for program in [shipped.by_name(info.name)]
        if program is not None and map_id in info.map_ids
    }


def map_ids(info: ProgramInfo) -> dict[str, int]:
    """Return the ids of a program's maps by their names."""
    found = {}
    for map_id in info.map_ids:
        with suppress(OSError):
            found[_name_by_id(map_id)] = map_id
    return found


def _name_by_id(map_id: int) -> str:
    name = maps.name_by_id(map_id)
    if not name:
        with maps.open_by_id(map_id) as one:
            name = name_of(one)
    return name


def open_map(ids: Iterable[int], name: str) -> Optional[Map[Any, Any]]:
    """Return the map with this name among these ids, if any; the caller closes it."""
    for map_id in ids:
        with suppress(OSError):
            if _name_by_id(map_id) == name:
                return maps.open_by_id(map_id)
    return None


def configs_of(ids: Iterable[int]) -> Optional[Map[int, bytes]]:
    """Return the configuration map; its records may be longer in another version."""
    found = open_map(ids, CONFIGS)
    if found is None:
        return None
    if found.spec.value_size < ctypes.sizeof(Head):
        found.close()
        return None
    return found.typed(U32, RAW)


def processes(record: Record) -> list[int]:
    """Return the processes whose sockets a throttle limits, as ids in the initial pid namespace."""
    map_id = record.handles.get("maps", {}).get(PROCESSES)
    if map_id is None:
        return []
    try:
        with maps.open_by_id(map_id) as found:
            codec = StructureCodec(ThrottleProcess)
            if found.spec.value_size != ctypes.sizeof(ThrottleProcess):
                return sorted(found.typed(U32, RAW))  # an older version's, which has it alone
            slot = int(record.handles.get("slot", 0))
            return sorted(pid for pid, one in found.typed(U32, codec).items() if one.slot == slot)
    except OSError:  # it is gone
        return []


# A map of marks, and the slot that a socket's mark has in it; None for any.
Mark = Tuple[int, Optional[int]]


class Rule(NamedTuple):
    """A program that limits one direction of all sockets, or of those with a ``mark``.

    ``multipath``: it limits packets of MPTCP sockets too. ``traffic`` is what it is for.
    """

    program_id: int
    direction: Direction
    owner: Identity
    traffic: Traffic = Traffic()
    mark: Optional[Mark] = None
    multipath: bool = True


class Rules:
    """The rules of all throttles on this machine; ``close`` or ``with`` releases them."""

    def __init__(self) -> None:
        """Linux 4.15. Needs CAP_SYS_ADMIN; raises OSError without."""
        self._resources = ExitStack()
        self._marks: dict[int, Map[int, bytes]] = {}
        self._passed: dict[Cgroup, frozenset[int]] = {}
        next(programs.all_ids(), None)  # raises if this is not permitted
        # Whether data may pass from socket to socket without packets.
        self.has_sockmaps = any(info.type in _OF_SOCKMAPS for info in _all_programs())
        self.all = [rule for info in our_programs() for rule in self._read(info)]

    def marks_of(self, descriptor: int) -> frozenset[Mark]:
        """Return the marks of the socket behind a descriptor, each also without its slot."""
        found: set[Mark] = set()
        for map_id, marks in self._marks.items():
            with suppress(KeyError):
                found |= {(map_id, U32.decode(marks[descriptor])), (map_id, None)}
        return frozenset(found)

    def passed_in(self, cgroup: Cgroup) -> frozenset[int]:
        """Return the ids of the programs that packets pass if their sockets belong to a cgroup.

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
        marks_id = None if program.scope is Scope.ALL else self._open_marks(info)
        if marks_id is None and program.scope is not Scope.ALL:
            return
        for slot, config in _configs(info, program.direction):
            owner = Identity(config.owner_pid, config.owner_pid_namespace, config.owner_start_ticks)
            mark = None if marks_id is None else (marks_id, slot)
            traffic = _traffic(info, config)
            multipath = program.multipath or mark is None
            yield Rule(info.id, program.direction, owner, traffic, mark, multipath)

    def _open_marks(self, info: ProgramInfo) -> Optional[int]:
        """Return the id of a program's map of marks, which both directions of a throttle share."""
        known = self._marks.keys() & set(info.map_ids)
        if known:
            return known.pop()
        found = open_map(info.map_ids, MARKS)
        if found is None:
            return None
        self._resources.enter_context(found)
        map_id = found.id
        self._marks[map_id] = found.typed(U32, RAW)
        return map_id


def _traffic(info: ProgramInfo, config: ThrottleConfig) -> Traffic:
    """Return which packets a program is for; its networks are only in the record."""
    loopback = bool(config.flags & ThrottleFlags.LOOPBACK)
    if config.flags & ThrottleFlags.NETWORKS:
        entry = entry_of(info.map_ids)
        if entry is not None:
            return Traffic.from_json(entry.fields["spec"]).changed(loopback=loopback)
    return Traffic(loopback=loopback)


def entry_of(map_ids: Iterable[int]) -> Optional[Entry]:
    """Return what the record among these maps says, if there is one."""
    record = open_map(map_ids, RECORD)
    if record is None:
        return None
    with record:
        return RecordMap(record).read()


def slot_of(map_ids: Iterable[int]) -> int:
    """Return where a throttle has its elements in maps that others may share."""
    record = open_map(map_ids, RECORD)
    if record is None:
        return 0
    with record:
        return RecordMap(record).slot()


def _configs(
    info: ProgramInfo, direction: Direction
) -> Iterator[tuple[Optional[int], ThrottleConfig]]:
    """Yield what a program limits a direction to, if it does.

    One that several throttles share is for several slots, each of which is told; of any other the
    slot does not matter.
    """
    with suppress(OSError, KeyError):  # it may end meanwhile
        configs = configs_of(info.map_ids)
        if configs is None:
            return
        with configs:
            own = slot_of(info.map_ids)
            slots = [own] if own else range(configs.spec.max_entries // len(Direction))
            found = dict(configs.items())
            records = [(slot, found[element(slot, direction)]) for slot in slots]
        for slot, record in records:
            # Fields unknown to the writer's version are 0.
            data = record.ljust(ctypes.sizeof(ThrottleConfig), b"\0")
            config = ThrottleConfig.from_buffer_copy(data)
            if config.magic == ThrottleFormat.MAGIC and config.rate_bytes_per_s:
                yield (slot if len(records) > 1 else None), config
