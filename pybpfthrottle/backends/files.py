"""The records of throttles whose mechanism cannot carry one: a JSON file each, in ``DIRECTORY``.

A file is written before anything of its throttle is in force, and deleted after all of it was
removed: what a crash has left behind can be found by it. Write under the lock of all throttles.
"""

from __future__ import annotations

import json
import os
from typing import Any, Iterator, Mapping, Optional

from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.bpf.obj.plain import NamedTuple, Protocol
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux import run_files
from pybpfthrottle.linux.cgroup import locked, locked_if_free
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.model import Direction, Limits, Rate, ThrottleSpec
from pybpfthrottle.supervisor import Periodic

DIRECTORY = run_files.DIRECTORY
VERSION = 1
_SUFFIX = ".json"
# How often to check whether somebody else has changed or removed the throttle.
_NOTICE_S = 0.25


class Entry(NamedTuple):
    """The content of a file. ``generation`` grows with each change."""

    generation: int
    record: Record


def write(record: Record, generation: int = 1) -> None:
    """Write a throttle's file, or replace it. Raises BackendError if that is impossible."""
    text = json.dumps(
        {
            "version": VERSION,
            "generation": generation,
            "id": record.id,
            "backend": record.backend,
            "spec": record.spec.to_json(),
            "owner": list(record.owner),
            "match": record.match.value,
            "cgroups": list(record.cgroups),
            "cgroup_ids": list(record.cgroup_ids),
            "kept": record.kept,
            "since_ns": record.since_ns,
            "attached_by": record.attached_by,
            "handles": dict(record.handles),
        }
    )
    try:
        run_files.write(_path(record.backend, record.id), text)
    except OSError as error:
        raise BackendError(
            f"cannot record the throttle in {DIRECTORY}: {error.strerror}; this needs root and a"
            " writable /run"
        ) from error


def read(backend: str, throttle_id: str) -> Optional[Entry]:
    """Return what a file says; None if there is none, or it is of another version or broken."""
    try:
        text = run_files.read(_path(backend, throttle_id))
        if text is None:
            return None
        fields = json.loads(text)
        if fields["version"] != VERSION or fields["backend"] != backend:
            return None
        return Entry(int(fields["generation"]), _record(fields))
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def ids(backend: str) -> list[str]:
    """Return the ids of a backend's throttles that have a file, whatever is in it."""
    return run_files.stems(f".{backend}{_SUFFIX}", DIRECTORY)


def records(backend: str) -> Iterator[Record]:
    """Return the throttles of a backend that have a file, leftovers of a crash included."""
    for throttle_id in ids(backend):
        entry = read(backend, throttle_id)
        if entry is not None:
            yield entry.record


def update(backend: str, throttle_id: str, **changes: Any) -> Optional[Entry]:
    """Change fields of a record; None if the file is gone. Raises BackendError."""
    entry = read(backend, throttle_id)
    if entry is None:
        return None
    changed = Entry(entry.generation + 1, entry.record.changed(**changes))
    write(changed.record, changed.generation)
    return changed


def set_limit(
    record: Record, direction: Direction, rate: Optional[Rate], paused: Optional[Rate] = None
) -> None:
    """Record a changed limit, which the throttle's owner then knows of. Raises BackendError."""
    entry = read(record.backend, record.id)
    if entry is not None:
        spec = entry.record.spec.with_limit(direction, rate, paused)
        update(record.backend, record.id, spec=spec)


def delete(backend: str, throttle_id: str) -> None:
    """Delete a throttle's file. Doing so twice is no error."""
    run_files.delete(_path(backend, throttle_id))


def _path(backend: str, throttle_id: str) -> str:
    return os.path.join(DIRECTORY, f"{throttle_id}.{backend}{_SUFFIX}")


def _record(fields: Mapping[str, Any]) -> Record:
    """Return a file's fields as a record. Raises KeyError, TypeError or ValueError."""
    return Record(
        id=str(fields["id"]),
        spec=ThrottleSpec.from_json(fields["spec"]),
        owner=Identity(*map(int, fields["owner"])),
        backend=str(fields["backend"]),
        match=Match(fields["match"]),
        cgroups=tuple(map(str, fields["cgroups"])),
        cgroup_ids=tuple(map(int, fields["cgroup_ids"])),
        kept=bool(fields["kept"]),
        since_ns=int(fields["since_ns"]),
        attached_by=str(fields["attached_by"]),
        handles=dict(fields["handles"]),
    )


class Recorded(Protocol):
    """The throttle that a file tells of."""

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""

    def adopt_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Take notice of a limit that somebody else has changed, and put in force."""


class OwnFile:
    """The file of a throttle that this process keeps; before ``create`` there is none.

    Its chore notices what others do to the throttle, and tell of by the file.
    """

    def __init__(self, throttle: Recorded) -> None:
        self._throttle = throttle
        self._record: Optional[Record] = None
        self._generation = 0
        self.removed_by_others = False
        self.chore = Periodic(_NOTICE_S, self._notice)

    def create(self, record: Record) -> None:
        """Write the file for the first time. Raises BackendError."""
        with locked():
            write(record)
        self._record, self._generation = record, 1

    def update(self, **changes: Any) -> None:
        """Change fields of the record, unless somebody has removed it. Raises BackendError."""
        if self._record is not None:
            with locked():
                entry = update(self._record.backend, self._record.id, **changes)
            if entry is not None:
                self._adopt(entry)

    def set_limit(
        self, direction: Direction, rate: Optional[Rate], paused: Optional[Rate] = None
    ) -> None:
        """Record a limit that this process has changed. Raises BackendError."""
        if self._record is not None:
            self.update(spec=self._record.spec.with_limit(direction, rate, paused))

    def exists(self) -> bool:
        """Whether the file is there: if not, somebody has removed the throttle."""
        return self._record is not None and self._entry() is not None

    def delete(self) -> None:
        """Delete the file, after all of the throttle was removed."""
        if self._record is not None:
            delete(self._record.backend, self._record.id)
            self._record = None

    def _entry(self) -> Optional[Entry]:
        return None if self._record is None else read(self._record.backend, self._record.id)

    def _notice(self) -> None:
        if self._record is None or self.removed_by_others:
            return
        # While somebody changes something, the file and the kernel may disagree.
        with locked_if_free() as is_free:
            entry = self._entry() if is_free else None
        if not is_free:
            return
        if entry is None:
            self.removed_by_others = True
        elif entry.generation != self._generation:
            self._adopt(entry)

    def _adopt(self, entry: Entry) -> None:
        """Take notice of what the file says, which somebody else may have changed."""
        self._record, self._generation = entry.record, entry.generation
        for direction, rate in entry.record.spec.limits.items():
            if self._throttle.limits.get(direction) != rate:
                self._throttle.adopt_rate(direction, rate)
