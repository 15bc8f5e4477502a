"""The machine as the full screen sees it: what processes move, what limits them, how to limit."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Mapping, NamedTuple, Optional, Protocol, Sequence

from pybpfthrottle import registry
from pybpfthrottle.errors import Error
from pybpfthrottle.inforce import InForce
from pybpfthrottle.linux import connections
from pybpfthrottle.linux.connections import Connection
from pybpfthrottle.meter import Meter, Reading
from pybpfthrottle.model import Direction, Limits, Target, ThrottleSpec
from pybpfthrottle.plan import Wish
from pybpfthrottle.throttle import Throttle, foresee, open_record, start
from pybpfthrottle.traffic import ProcessTraffic, Watch
from pybpfthrottle.usage import Interval, Intervals

# Looking at connections takes at most this fraction of one CPU's time.
_MOST_OF_TIME = 0.01
# Of a group with many processes, those of the first ones are shown.
_MOST_PROCESSES = 20
# By what Throttle.ended returns.
_ENDS = {
    "removed": "somebody else has removed it",
    "exited": "no limited process is left",
    "vanished": "what was limited is gone",
}


class Force(NamedTuple):
    """How one direction is limited, at one moment."""

    reading: Reading
    backend: str
    shape: str


class Look(NamedTuple):
    """What there is to see at one moment.

    ``forces`` are by the throttle's id. ``notes`` are new ones on throttles that were made here.
    """

    interval: Interval
    forces: Mapping[str, Mapping[Direction, Force]]
    notes: Sequence[str] = ()


class Connections(NamedTuple):
    """The connections of some processes, and when they were read, on time.monotonic()."""

    at_s: float
    found: Sequence[Connection]


class Source(Protocol):
    """Where the full screen has everything from. It may take a while, and may raise Error."""

    def look(self) -> Look:
        """Return what has happened since the last look."""

    def connections(self, members: Sequence[ProcessTraffic]) -> Connections:
        """Return the connections of some processes; they are not read anew each time."""

    def foresee(self, target: Target, limits: Limits) -> Sequence[str]:
        """Return how a target would be limited, a line each."""

    def limit(self, target: Target, limits: Limits) -> Sequence[str]:
        """Limit a target until ``close``; return what to know about it, a line each."""

    def change(self, throttles: Sequence[InForce], target: Target, limits: Limits) -> Sequence[str]:
        """Change throttles, or limit the target where they lack a direction; return notes."""

    def pause(self, throttles: Sequence[InForce]) -> str:
        """Lift limits for now, or put back those that are lifted; return what was done."""

    def remove(self, throttles: Sequence[InForce]) -> None:
        """Remove throttles, whoever made them."""

    def own(self) -> Sequence[str]:
        """Return what is limited from here, in words."""

    def close(self) -> None:
        """Remove what was limited here, and stop counting."""


class Machine:
    """The source that is real. It is used by one thread at a time."""

    def __init__(self, wish: Wish, watch: Watch) -> None:
        """Limit as wished; ``close`` ends the watch too."""
        self._wish = wish
        self._watch = watch
        self._intervals = Intervals(self._watch)
        self._open: dict[str, _Opened] = {}
        self._made: list[Throttle] = []
        self._said: set[str] = set()
        self._news: list[str] = []
        self._chosen: list[int] = []
        self._connections = Connections(0.0, ())
        self._connections_due_s = 0.0

    def look(self) -> Look:
        """Return what has happened since the last look."""
        self._end_what_has_ended()
        interval = self._intervals.next()
        forces = self._forces(interval.cover.throttles)
        notes = self._unsaid([note for throttle in self._made for note in throttle.notes()])
        news, self._news = [*self._news, *notes], []
        return Look(interval, forces, news)

    def connections(self, members: Sequence[ProcessTraffic]) -> Connections:
        """Return the connections of some processes, at most those of the first 20."""
        now = time.monotonic()
        pids = [one.pid for one in members if one.pid is not None and one.alive][:_MOST_PROCESSES]
        if pids != self._chosen or now >= self._connections_due_s:
            begin_s = time.thread_time()
            self._connections = Connections(now, connections.of(pids))
            self._chosen = pids
            self._connections_due_s = now + (time.thread_time() - begin_s) / _MOST_OF_TIME
        return self._connections

    def foresee(self, target: Target, limits: Limits) -> Sequence[str]:
        """Return how a target would be limited, and what that loses. Raises Error."""
        plan = foresee(ThrottleSpec(target, limits), self._wish)
        return [f"By {plan.mechanism}: {plan.place.value}.", *plan.notes]

    def limit(self, target: Target, limits: Limits) -> Sequence[str]:
        """Limit a target until ``close``. Raises Error."""
        return self._limit(target, limits, self._wish)

    def change(self, throttles: Sequence[InForce], target: Target, limits: Limits) -> Sequence[str]:
        """Change throttles; a direction that none of them has gets a throttle of its own."""
        missing = dict(limits)
        for one in throttles:
            before = one.limits
            changed = {
                direction: rate
                for direction, rate in limits.items()
                if direction in before and (before[direction] != rate or direction in one.paused)
            }
            if changed:
                one.set_limits(changed)
            for direction in before:
                missing.pop(direction, None)
        added = {direction: rate for direction, rate in missing.items() if rate is not None}
        # No packet is charged twice: the others do not limit this direction.
        return self._limit(target, added, replace(self._wish, stack=True)) if added else ()

    def pause(self, throttles: Sequence[InForce]) -> str:
        """Pause throttles, or resume those that are paused; return what was done. Raises Error."""
        paused = [one for one in throttles if one.paused]
        for one in paused:
            one.resume()
        for one in throttles if not paused else ():
            one.pause()
        return "Resumed." if paused else "Paused; p puts the limits back."

    def remove(self, throttles: Sequence[InForce]) -> None:
        """Remove throttles, whoever made them. Raises Error."""
        for one in throttles:
            made = next((each for each in self._made if each.id == one.id), None)
            if made is None:
                one.remove()
            else:
                self._made.remove(made)
                made.remove()

    def own(self) -> Sequence[str]:
        """Return what is limited from here, in words."""
        return [throttle.what for throttle in self._made]

    def close(self) -> None:
        """Remove what was limited here, and stop counting."""
        with ExitStack() as undo:
            undo.callback(self._watch.close)
            for opened in self._open.values():
                undo.callback(opened.close)
            for throttle in self._made:
                undo.callback(throttle.remove)
        self._open, self._made = {}, []

    def _limit(self, target: Target, limits: Limits, wish: Wish) -> Sequence[str]:
        throttle = start(ThrottleSpec(target, limits), wish)
        registry.tidy_up()
        throttle.supervise()
        self._made.append(throttle)
        return self._unsaid(throttle.notes())

    def _unsaid(self, notes: Sequence[str]) -> Sequence[str]:
        found = [note for note in notes if note not in self._said]
        self._said.update(found)
        return found

    def _end_what_has_ended(self) -> None:
        for throttle in list(self._made):
            reason = throttle.ended()
            if reason:
                self._made.remove(throttle)
                throttle.remove()
                self._news.append(f"The limit of {throttle.what} has ended: {_ENDS[reason]}.")

    def _forces(self, throttles: Sequence[InForce]) -> Mapping[str, Mapping[Direction, Force]]:
        """Read the counters of all throttles; those that are gone meanwhile are left out."""
        there = {one.id: one for one in throttles}
        for known in [key for key, one in self._open.items() if not one.same_as(there.get(key))]:
            self._open.pop(known).close()
        found = {}
        for key, one in there.items():
            try:
                if key not in self._open:
                    self._open[key] = _Opened(one)
                found[key] = self._open[key].forces()
            except (Error, OSError):
                if key in self._open:
                    self._open.pop(key).close()
        return found


class _Opened:
    """A throttle whose counters are read repeatedly. ``close`` leaves it in force."""

    def __init__(self, one: InForce) -> None:
        """Raises ThrottleError if it is gone."""
        self._one = one
        self._parts: list[tuple[Throttle, Meter]] = []
        with ExitStack() as undo:
            for record in one.parts:
                throttle = open_record(record)
                undo.callback(throttle.close)
                self._parts.append((throttle, Meter(throttle)))
            self._undo = undo.pop_all()

    def same_as(self, one: Optional[InForce]) -> bool:
        """Whether a throttle is still the one that was opened, with the same limits."""
        return one is not None and one.limits == self._one.limits

    def forces(self) -> dict[Direction, Force]:
        """Return how each direction is limited now. Raises Error or OSError."""
        found = {}
        for throttle, meter in self._parts:
            how = throttle.how()
            for reading in meter.sample():
                told = how[reading.direction]
                found[reading.direction] = Force(reading, told["backend"], told["shape"])
        return found

    def close(self) -> None:
        """Release it."""
        self._undo.close()
