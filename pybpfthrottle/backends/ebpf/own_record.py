"""The record in the kernel of a throttle that this process keeps, and what others write into it."""

from __future__ import annotations

from typing import Any, Mapping, Optional

from pybpfthrottle.backends.ebpf.records import RECORD, ThrottleRecordFlags
from pybpfthrottle.backends.ebpf.registry import ANSWER, ASKED, RecordMap, own_records, record_of
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import Protocol
from pybpfthrottle.errors import AttachError
from pybpfthrottle.linux.cgroup import locked, locked_if_free
from pybpfthrottle.model import Direction, Limits, Rate
from pybpfthrottle.supervisor import Budget, Look

# How often to check whether somebody else has changed or removed the throttle.
_NOTICE_S = 0.25
# Of all throttles of this process.
_NOTICES = Budget(0.0015)


class Recorded(Protocol):
    """The throttle that a record tells of."""

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""

    def recorded(self) -> Mapping[str, Any]:
        """Return the fields of the record that change while the throttle is in force."""

    def change_rate(
        self, direction: Direction, rate: Optional[Rate], paused: Optional[Rate] = None
    ) -> None:
        """Change a limit that is recorded already."""

    def attach_by(self, method: str) -> None:
        """Attach by another method. Raises AttachError."""


class OwnRecord:
    """The record of a throttle; before ``create`` there is none.

    Its chore does what others ask for by changing the record.
    """

    def __init__(self, throttle: Recorded) -> None:
        self._throttle = throttle
        self._map: Optional[RecordMap] = None
        self._fields: dict[str, Any] = {}
        self._flags = ThrottleRecordFlags(0)
        self._generation = 0
        self._is_current = True
        self.removed_by_others = False
        self.chore = Look(_NOTICE_S, self._notice, _NOTICES)

    def create(self, maps: Mapping[str, Map[Any, Any]], *, kept: bool) -> None:
        """Write the record for the first time, into one of the throttle's maps."""
        self._map = RecordMap(maps[RECORD])
        own_records.add(maps[RECORD].id)
        self._flags = ThrottleRecordFlags.KEPT if kept else ThrottleRecordFlags(0)
        self._write()

    def add(self, **fields: Any) -> None:
        """Add fields that stay as they are; the next update writes them."""
        self._fields.update(fields)

    def update(self) -> None:
        """Write what has changed."""
        with locked():
            self._write()

    def update_soon(self) -> None:
        """Write what has changed, now or when the lock is free: the caller must not wait for it."""
        self._is_current = False
        self._update_if_free()

    def say_removed(self) -> None:
        """Mark the throttle as removed: the kernel takes a moment to free programs and maps."""
        if self._map is not None:
            self._map.write(self._fields, flags=ThrottleRecordFlags.REMOVED)

    def is_removed(self) -> bool:
        """Whether somebody else has removed the throttle, noticed or not; under the lock."""
        if self._map is not None and not self._map.is_at(self._generation):
            entry = self._map.read()
            self.removed_by_others |= entry is not None and entry.removed
        return self.removed_by_others

    def _write(self) -> None:
        # Written over, a removal would be noticed by nobody, and the throttle would go on.
        if self._map is not None and not self.is_removed():
            self._fields.update(self._throttle.recorded())
            self._generation = self._map.write(self._fields, flags=self._flags)

    def _update_if_free(self) -> None:
        with locked_if_free() as is_free:
            if is_free:
                self._write()
                self._is_current = True

    def _notice(self) -> bool:
        """Do what somebody else asks for; return whether anything was changed."""
        is_changed = self._look()
        if not self._is_current:
            self._update_if_free()
        return is_changed

    def _look(self) -> bool:
        if self.removed_by_others or self._map is None or self._map.is_at(self._generation):
            return False
        entry = self._map.read()
        if entry is None or entry.generation == self._generation:
            return False
        self._generation = entry.generation
        if entry.removed:
            self.removed_by_others = True
            return True
        spec = record_of(entry, 0).spec
        for direction, rate in spec.limits.items():
            if self._throttle.limits.get(direction) != rate:
                self._throttle.change_rate(direction, rate, spec.paused.get(direction))
        if entry.fields.get(ASKED):
            self._answer(str(entry.fields[ASKED]))
        return True

    def _answer(self, method: str) -> None:
        """Attach by the method that somebody asks for, and record the outcome."""
        try:
            self._throttle.attach_by(method)
            self._fields.pop(ANSWER, None)
        except AttachError as error:
            self._fields[ANSWER] = str(error)
        self.update()
