"""A throttle that another process keeps, opened here to be read, changed or removed."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from typing import Any, Callable, Optional, Sequence

from pybpfthrottle.backends.ebpf import connections, pins, registry
from pybpfthrottle.backends.ebpf.bucket import Bucket
from pybpfthrottle.backends.ebpf.connections import SOCKETS
from pybpfthrottle.backends.ebpf.programs import Shipped
from pybpfthrottle.backends.ebpf.records import RECORD, ThrottleFlags, ThrottleRecordFlags
from pybpfthrottle.backends.ebpf.registry import ANSWER, ASKED, Entry, RecordMap, record_of
from pybpfthrottle.backends.protocol import (
    ChoosesOnce,
    Dial,
    Match,
    Record,
)
from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.abi import LinkType
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.errors import AttachError, CgroupError, ThrottleError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup, locked
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.supervisor import Chore

# How long a throttle's owner may take to attach it by another method.
_PATIENCE_S = 5.0
_STEP_S = 0.02

_SHAPES = (
    (ThrottleFlags.GATE, "gate"),
    (ThrottleFlags.WINDOW, "window"),
    (ThrottleFlags.PACE, "pace"),
)


class FoundThrottle(ChoosesOnce):
    """A throttle of another process. ``close`` or ``remove`` closes its descriptors."""

    def __init__(
        self, record: Record, live: dict[str, Map[Any, Any]], resources: ExitStack
    ) -> None:
        self._found = record
        self._slot = int(record.handles.get("slot", 0))
        self._maps = live
        self._resources = resources
        self._record = RecordMap(live[RECORD]) if RECORD in live else None
        self._pins: Optional[list[str]] = None
        self._bucket = Bucket(
            live,
            record.spec.limits,
            traffic=record.spec.traffic,
            shapes={
                direction: record.handles.get("shapes", {}).get(str(direction), "auto")
                for direction in Direction
            },
            owner=record.owner,
            expires_ns=record.spec.expires_ns,
            slot=self._slot,
        )
        self._bucket.refused = record.handles.get("refused") or {}
        self._udp: dict[str, str] = record.handles.get("udp") or {}

    @classmethod
    def open(cls, record: Record) -> FoundThrottle:
        """Open the throttle's maps. Needs CAP_SYS_ADMIN. Raises ThrottleError if it is gone."""
        with ExitStack() as undo:
            try:
                live = {
                    name: undo.enter_context(maps.open_by_id(map_id))
                    for name, map_id in _map_ids(record).items()
                }
                return cls(record, live, undo.pop_all())
            except (FileNotFoundError, KeyError) as error:
                raise ThrottleError(f"the throttle {record.id} is gone") from error
            except OSError as error:
                raise ThrottleError(f"cannot open the throttle {record.id}: {error}") from error

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""
        return self._bucket.rates

    def counters(self) -> dict[Direction, Counters]:
        """Return each direction's counters, summed over all CPUs."""
        return self._bucket.counters()

    def burst_bytes(self, direction: Direction) -> int:
        """Return how much may pass at once after an idle time, beyond the rate."""
        return self._bucket.burst_bytes(direction)

    def set_rate(
        self, direction: Direction, rate: Optional[Rate], *, paused: Optional[Rate] = None
    ) -> None:
        """Change the limit of a direction at once, and tell its owner. Raises ThrottleError."""
        with locked():
            entry = self._entry()
            self._bucket.set_rate(direction, rate)
            if entry is not None:
                spec = record_of(entry, 0).spec.with_limit(direction, rate, paused)
                self._write({**entry.fields, "spec": spec.to_json()}, entry.flags)

    def dial(self, direction: Direction) -> Dial:
        """Raise ThrottleError: the rate is the owner's to move."""
        raise ThrottleError(
            f"the throttle {self._found.id} cannot share with others here: process"
            f" {self._found.owner.pid} keeps it"
        )

    def switch(self, method: str) -> None:
        """Have the owner attach the throttle by another method, and wait until that is done.

        Only the owner can do this, as a link ends with the process that made it. Raises AttachError
        if the owner cannot, ThrottleError if it does not.
        """
        with locked():
            entry = self._entry()
            if entry is None:
                raise ThrottleError(f"the throttle {self._found.id} was made by an older version")
            fields = {name: value for name, value in entry.fields.items() if name != ANSWER}
            generation = self._write({**fields, ASKED: method}, entry.flags)
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and not process.is_gone(self._found.owner):
            entry = self._entry()
            if entry is not None and entry.generation != generation:
                if entry.fields.get(ANSWER):
                    raise AttachError(str(entry.fields[ANSWER]))
                return
            time.sleep(_STEP_S)
        raise ThrottleError(
            f"process {self._found.owner.pid} did not switch within {_PATIENCE_S:g} s;"
            " it may be stopped or gone"
        )

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how it is attached and shaped, as far as its maps show."""
        flags = self._bucket.flags(direction)
        shape = next((name for flag, name in _SHAPES if flags & flag), "police")
        return {
            "backend": "ebpf",
            "attached_by": self._found.attached_by,
            "shape": shape,
            **(self._udp if direction is Direction.DOWNLOAD else {}),
        }

    def processes(self) -> list[int]:
        """Return the processes that are limited now, as ids in the initial pid namespace."""
        return registry.processes(self._found)

    def notes(self) -> Sequence[str]:
        """Return nothing: only the owner knows."""
        return ()

    def chores(self) -> Sequence[Chore]:
        """Return nothing: the owner does the chores."""
        return ()

    def removed_by_others(self) -> bool:
        """Whether the throttle has been removed in the meantime."""
        entry = self._entry()
        return entry is not None and entry.removed

    def hand_over(self) -> Callable[[], None]:
        """Only drop packets from now on, so that a successor finds connections as they were."""
        with locked():
            self._pins = pins.of(self._found.id)
            self._bucket.stop_shaping()
            self._restore()
        return self.remove

    def remove(self) -> None:
        """Remove the limit, and make its owner exit. Doing so twice is no error."""
        with self._resources.pop_all():
            if not self._maps:
                return
            with locked(), ExitStack() as steps:
                # Runs in reverse order: let all packets pass, restore connections, then detach.
                # If one step fails, the rest still run.
                steps.callback(self._mark_removed)
                # Not those of a successor.
                for path in pins.of(self._found.id) if self._pins is None else self._pins:
                    steps.callback(pins.unpin, path)
                steps.callback(self._detach)
                steps.callback(self._restore)
                steps.callback(self._bucket.lift)
            self._maps = {}

    def close(self) -> None:
        """Close the descriptors, and leave the throttle in force."""
        self._resources.close()

    def _entry(self) -> Optional[Entry]:
        return None if self._record is None else self._record.read()

    def _write(self, fields: dict[str, Any], flags: int) -> int:
        return 0 if self._record is None else self._record.write(fields, flags=flags)

    def _mark_removed(self) -> None:
        entry = self._entry()
        if entry is not None:
            self._write(entry.fields, entry.flags | ThrottleRecordFlags.REMOVED)

    def _restore(self) -> None:
        if SOCKETS in self._maps:
            where = self._found.visible_cgroups()
            if self._found.match is Match.MARKS:  # processes may hand sockets over
                where = [cgroups_v2.root()]
            connections.restore(connections.pids(where), self._maps[SOCKETS], self._slot)

    def _detach(self) -> None:
        """Detach the programs from cgroups. Programs at tracepoints end with the owner."""
        ids = _map_ids(self._found)
        # All of them hold the record; versions without a record had only one object.
        ours = registry.programs_of(ids.get(RECORD) or next(iter(ids.values())))
        with suppress(OSError):  # before Linux 5.8 they cannot be listed
            for link in links.all_infos():
                if link.program_id in ours and link.type == LinkType.CGROUP:
                    # Linux 5.9; on older kernels the programs stay, and let all packets pass.
                    with suppress(OSError), links.open_by_id(link.id) as open_link:
                        open_link.force_detach()
        for cgroup in self._found.visible_cgroups():
            with suppress(CgroupError):
                _detach_legacy(cgroup, ours)


def _detach_legacy(cgroup: Cgroup, ours: dict[int, Shipped]) -> None:
    fd = cgroup.open()
    try:
        for program_id, program in ours.items():
            if not isinstance(program.hook, str):
                with suppress(OSError), programs.open_by_id(program_id) as live:
                    links.detach(live.fd, fd, program.hook)
    finally:
        os.close(fd)


def _map_ids(record: Record) -> dict[str, int]:
    found: dict[str, int] = record.handles["maps"]
    return found
