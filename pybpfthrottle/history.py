"""What was moved on each day, for months: by process name, unit, container, user and rule.

A ``Recorder`` writes it down while traffic is counted, ``read`` returns it. Days are those of the
machine's local time. Bytes are those of IP packets with their headers, loopback excluded; those of
a rule are what its throttle has passed, as billed.
"""

from __future__ import annotations

import logging
import time
from datetime import date, timedelta
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle import registry
from pybpfthrottle.errors import Error
from pybpfthrottle.inforce import InForce, in_force
from pybpfthrottle.ledger import Tally
from pybpfthrottle.model import Counters, Direction, Moved, printable
from pybpfthrottle.periods import Span, day_of, start_of
from pybpfthrottle.store import Store, reading
from pybpfthrottle.supervisor import Chore
from pybpfthrottle.traffic import ProcessTraffic, Watch
from pybpfthrottle.usage import GROUPS, SCOPES, moved_since

log = logging.getLogger(__name__)

RULE = "rule"
# Those of processes, which all add up to the same sum.
_GROUPS = ("name", "unit", "container", "user")
KINDS = (*_GROUPS, RULE)
# At most 400 days of 5 kinds with 200 rows of some 60 bytes: 24 MB, and far less in practice.
_MOST_DAYS = 400
_MOST_SUBJECTS = 100
_LONGEST_SUBJECT = 200
# While the file cannot be written.
_MOST_NEW = 20_000
_SCOPES = SCOPES["network"]

_ADD = """
INSERT INTO usage VALUES (?1, ?2, ?3, ?4, max(?5, 0), max(?6, 0))
ON CONFLICT (day, kind, rest, subject)
DO UPDATE SET download = max(download + ?5, 0), upload = max(upload + ?6, 0)
"""
_SMALLEST = """
SELECT subject, download, upload FROM usage WHERE day = ? AND kind = ? AND rest = 0
ORDER BY download + upload DESC LIMIT -1 OFFSET ?
"""
_REMOVE = "DELETE FROM usage WHERE day = ? AND kind = ? AND rest = 0 AND subject = ?"
_FORGET = """
DELETE FROM usage WHERE day NOT IN (SELECT DISTINCT day FROM usage ORDER BY day DESC LIMIT ?)
"""
_READ = """
SELECT day, subject, rest, download, upload FROM usage WHERE kind = ? AND day >= ? AND day < ?
ORDER BY day, rest, download + upload DESC, subject
"""


class Line(NamedTuple):
    """What a subject has moved on a day; ``rest`` is for all that have no line of their own."""

    day: date
    subject: str
    rest: bool
    moved: Moved


class Throttled(NamedTuple):
    """What a throttle has passed: ``key`` is another one when it counts anew."""

    rule: str
    key: str
    passed: Moved


def throttles_in_force(
    counters: Callable[[InForce], Mapping[Direction, Counters]] = lambda one: one.counters(),
) -> Iterator[Throttled]:
    """Return what each throttle in force has passed, as ``counters`` reads it. Raises OSError."""
    for one in in_force(registry.records()):
        try:
            passed = Moved.passed(counters(one))
        except (Error, OSError):  # it has ended meanwhile
            continue
        name = one.record.spec.name or one.target
        yield Throttled(name, f"{one.id}-{one.record.since_ns}", passed)


class _Key(NamedTuple):
    """The key of the table, in its order."""

    day: str
    kind: str
    rest: bool
    subject: str


class Recorder:
    """Writes down what is moved from now on: a book of a store, and a chore for midnight.

    Without a ``watch`` only what throttles pass is written down. A supervisor needs ``chores``, and
    the watch itself.
    """

    def __init__(
        self,
        store: Store,
        watch: Optional[Watch],
        throttles: Callable[[], Iterable[Throttled]] = throttles_in_force,
    ) -> None:
        """Raises what Watch.snapshot raises."""
        self._store = store
        self._watch = watch
        self._throttles = throttles
        self._tally = Tally(store)
        self._before: Sequence[ProcessTraffic] = watch.snapshot() if watch else ()
        self._new: dict[_Key, Moved] = {}
        self._last_day = ""
        self._ended = False
        self._begin()
        store.add(self)

    def chores(self) -> Sequence[Chore]:
        """Return what a supervisor has to do, the writing of the store included."""
        return [*self._store.chores(), self]

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def end(self) -> None:
        """Note what was moved until now, and nothing from now on; the store still writes it."""
        self.update()
        self._ended = True

    def run(self) -> None:
        """Note what was moved until midnight."""
        self.update()

    def update(self) -> None:
        """Note what was moved since the last time, on the day when that was."""
        if self._ended:
            return
        day = self._day
        for note in (self._note_traffic, self._note_throttles):
            try:
                note(day)
            except (Error, OSError) as error:
                log.warning("Cannot note the usage: %s", error)
        self._begin()

    def save(self, execute: Callable[..., Any]) -> None:
        """Write what is new."""
        self._tally.save(execute)
        for key, moved in self._new.items():
            execute(_ADD, (*key, *moved))
        for day, kind in {(key.day, key.kind) for key in self._new}:
            _add_up_smallest(execute, day, kind)
        newest = max((key.day for key in self._new), default="")
        if newest != self._last_day:
            self._last_day = newest
            execute(_FORGET, (_MOST_DAYS,))

    def saved(self) -> None:
        """Begin anew to add."""
        self._tally.saved()
        self._new = {}

    def _begin(self) -> None:
        """Begin to count for the day that it is now; be due when it ends."""
        now = time.time()
        today = day_of(now)
        self._day = today.isoformat()
        wait_s = start_of(today + timedelta(days=1)) - now
        self.due_s = time.monotonic() + max(1.0, wait_s)

    def _note_traffic(self, day: str) -> None:
        if self._watch is None:
            return
        after = self._watch.snapshot()
        for one, moved in moved_since(self._before, after, _SCOPES):
            for kind in _GROUPS:
                self._add(day, kind, GROUPS[kind](one), moved)
        self._before = after

    def _note_throttles(self, day: str) -> None:
        for rule, key, passed in self._throttles():
            added = self._tally.added("", key, passed)
            if any(added):
                self._add(day, RULE, rule, added)

    def _add(self, day: str, kind: str, subject: str, moved: Moved) -> None:
        """Add what was moved; it is negative for what another process has turned out to have."""
        key = _Key(day, kind, False, printable(subject)[:_LONGEST_SUBJECT])
        if key not in self._new and len(self._new) >= _MOST_NEW:
            key = _Key(day, kind, True, "")
        self._new[key] = self._new.get(key, Moved()).plus(moved)


def _add_up_smallest(execute: Callable[..., Any], day: str, kind: str) -> None:
    """Have at most twice so many rows; then the smallest become one."""
    smallest = execute(_SMALLEST, (day, kind, _MOST_SUBJECTS)).fetchall()
    if len(smallest) <= _MOST_SUBJECTS:
        return
    rest = Moved()
    for subject, *moved in smallest:
        execute(_REMOVE, (day, kind, subject))
        rest = rest.plus(Moved(*moved))
    execute(_ADD, (day, kind, True, "", *rest))


def last_days(count: int, now_s: Optional[float] = None) -> Span:
    """Return the last days, today included."""
    after = day_of(time.time() if now_s is None else now_s) + timedelta(days=1)
    return Span(after - timedelta(days=count), after)


def read(path: str, kind: str, span: Span) -> list[Line]:
    """Return what was moved on some days, by one of KINDS. Raises StoreError."""
    with reading(path) as query:
        rows = query(_READ, kind, span.first.isoformat(), span.after.isoformat())
    return [
        Line(date.fromisoformat(day), subject, bool(rest), Moved(*moved))
        for day, subject, rest, *moved in rows
    ]


def by_subject(lines: Iterable[Line]) -> dict[tuple[str, bool], Moved]:
    """Return what each subject has moved on all days, the most first, and then the rest."""
    found: dict[tuple[str, bool], Moved] = {}
    for line in lines:
        key = (line.subject, line.rest)
        found[key] = found.get(key, Moved()).plus(line.moved)
    return dict(sorted(found.items(), key=lambda one: (one[0][1], -sum(one[1]), one[0])))


def by_day(lines: Iterable[Line]) -> dict[date, Moved]:
    """Return what was moved on each day, the first one first."""
    found: dict[date, Moved] = {}
    for line in lines:
        found[line.day] = found.get(line.day, Moved()).plus(line.moved)
    return dict(sorted(found.items()))
