"""What rules have passed, by day, and what throttles have counted since somebody last asked.

Throttles begin anew with a restart, a rule does not: its days only grow, whatever happens to its
throttles and to the process that looks at them.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional

from pybpfthrottle.errors import StoreError
from pybpfthrottle.model import Counters, Direction, Moved
from pybpfthrottle.periods import Span
from pybpfthrottle.store import Store, reading

# A month of 31 days, and another one that a clock may have been in.
_MOST_DAYS = 100
_MOST_COUNTERS = 4096
# Each rule has a span for each of its periods, and another one after it.
_MOST_KNOWN = 4096
_ADD = """
INSERT INTO passed VALUES (?, ?, ?, ?) ON CONFLICT (rule, day) DO UPDATE
SET download = download + excluded.download, upload = upload + excluded.upload
"""
_FORGET_DAYS = """
DELETE FROM passed WHERE day NOT IN (SELECT DISTINCT day FROM passed ORDER BY day DESC LIMIT ?)
"""
_USED = """
SELECT coalesce(sum(download + upload), 0) FROM passed WHERE rule = ? AND day >= ? AND day < ?
"""
_FORGET_COUNTERS = """
DELETE FROM counter WHERE rowid NOT IN (SELECT rowid FROM counter ORDER BY rowid DESC LIMIT ?)
"""


def used_in_file(path: str, rule: str, span: Span) -> int:
    """Return what the file says that a rule has used on some days; 0 if it cannot be read."""
    try:
        with reading(path) as query:
            [[found]] = query(_USED, rule, *_days(span))
    except StoreError:
        return 0
    return int(found)


def _days(span: Span) -> tuple[str, str]:
    return span.first.isoformat(), span.after.isoformat()


class Tally:
    """Counters of throttles as they were last read, by owner and key: a book of a store.

    The key is another one when a throttle counts anew, such as its id and when it began. What of
    it is only in memory when the process is killed is counted again, as it is lost elsewhere.
    """

    def __init__(self, store: Optional[Store]) -> None:
        self._store = store
        self._last: dict[tuple[str, str], Moved] = {}
        self._fresh: set[tuple[str, str]] = set()

    def added(self, owner: str, key: str, now: Moved) -> Moved:
        """Return what has been counted since the last time that this was asked.

        Raises StoreError.
        """
        last = self._last.get((owner, key)) or self._stored(owner, key)
        self._last[owner, key] = now
        self._fresh.add((owner, key))
        return Moved(*(new - old if new >= old else new for new, old in zip(now, last)))

    def update(self) -> None:
        """Do nothing: whoever counts has done so."""

    def save(self, execute: Callable[..., Any]) -> None:
        """Write those that were looked at since the last time."""
        for owner, key in self._fresh:
            values = (owner, key, *self._last[owner, key])
            execute("INSERT OR REPLACE INTO counter VALUES (?, ?, ?, ?)", values)
        if self._fresh:
            execute(_FORGET_COUNTERS, (_MOST_COUNTERS,))

    def saved(self) -> None:
        """Forget those that nobody has looked at for a while: they can be read again."""
        self._last = {key: self._last[key] for key in self._fresh}
        self._fresh = set()

    def _stored(self, owner: str, key: str) -> Moved:
        if self._store is None:
            return Moved()
        sql = "SELECT download, upload FROM counter WHERE owner = ? AND key = ?"
        return next((Moved(*row) for row in self._store.rows(sql, owner, key)), Moved())


class Ledger:
    """What rules have passed, by day: a book of a store, or of memory alone if that is None."""

    def __init__(self, store: Optional[Store]) -> None:
        self._store = store
        self._tally = Tally(store)
        self._new: dict[tuple[str, str], Moved] = {}
        self._known: dict[tuple[str, Span], int] = {}
        if store is not None:
            store.add(self)

    def count(self, rule: str, key: str, counters: Mapping[Direction, Counters], day: str) -> None:
        """Charge a rule with what one of its throttles has passed since the last call.

        ``key`` is another one when the throttle counts anew, such as its id and when it began;
        ``day`` is ``Quota.day``. Call it also before a throttle is removed. Raises StoreError.
        """
        added = self._tally.added(rule, key, Moved.passed(counters))
        if any(added):
            self._new[rule, day] = self._new.get((rule, day), Moved()).plus(added)

    def used(self, rule: str, span: Span) -> int:
        """Return how many bytes a rule has passed in both directions on some days."""
        return self._stored(rule, span) + self._added(rule, span)

    def update(self) -> None:
        """Do nothing: the rules' counters are read by whoever keeps the rules."""

    def save(self, execute: Callable[..., Any]) -> None:
        """Write what was added."""
        self._tally.save(execute)
        for (rule, day), added in self._new.items():
            execute(_ADD, (rule, day, *added))
        if self._new:
            execute(_FORGET_DAYS, (_MOST_DAYS,))

    def saved(self) -> None:
        """Begin anew to add."""
        self._tally.saved()
        if len(self._known) > _MOST_KNOWN:
            self._known = {}
        self._known = {
            (rule, span): known + self._added(rule, span)
            for (rule, span), known in self._known.items()
        }
        self._new = {}

    def _added(self, rule: str, span: Span) -> int:
        """Return what is not in the file yet."""
        first, after = _days(span)
        return sum(
            sum(passed)
            for (whose, day), passed in self._new.items()
            if whose == rule and first <= day < after
        )

    def _stored(self, rule: str, span: Span) -> int:
        """Return what the file has; it is read once, as it may fail later."""
        if (rule, span) not in self._known:
            if self._store is None:
                return 0
            try:
                [[self._known[rule, span]]] = self._store.rows(_USED, rule, *_days(span))
            except StoreError:
                return 0
        return self._known[rule, span]
