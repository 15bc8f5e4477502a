"""Who uses the line, as rows: what processes, or groups of them, moved in an interval."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from pybpfthrottle.errors import Error
from pybpfthrottle.inforce import Cover, InForce, limits_together
from pybpfthrottle.model import Limits, Moved
from pybpfthrottle.traffic import ProcessTraffic, Scope, Usage, Watch

# By the names of --scope.
SCOPES: Mapping[str, tuple[Scope, ...]] = {
    "network": (Scope.INTERNET, Scope.LOCAL),
    "internet": (Scope.INTERNET,),
    "local": (Scope.LOCAL,),
    "loopback": (Scope.LOOPBACK,),
    "all": tuple(Scope),
}
GROUPS: Mapping[str, Callable[[ProcessTraffic], str]] = {
    "process": lambda one: "" if one.pid is None else f"{one.pid} {one.name}",
    "name": lambda one: one.name,
    "user": ProcessTraffic.user_name,
    "cgroup": lambda one: one.cgroup,
    "unit": lambda one: one.unit,
    "container": lambda one: one.container,
    "interface": lambda one: one.share,
    "remote": lambda one: one.share,
}
_SHARES = ("interface", "remote")
ORDERS = ("rate", "down", "up", "total", "name")


class Row(NamedTuple):
    """One process, or group of processes, in one interval.

    ``label`` tells it from other rows of the same ``group``, ``members`` has who belongs to it,
    ``throttles`` what limits any of them.
    """

    group: str
    label: str
    members: tuple[ProcessTraffic, ...]
    total: Usage
    moved: Usage
    seconds: float
    throttles: tuple[InForce, ...] = ()

    @property
    def down(self) -> float:
        """Bytes per second received."""
        return self.moved.download_bytes / self.seconds

    @property
    def up(self) -> float:
        """Bytes per second sent."""
        return self.moved.upload_bytes / self.seconds

    @property
    def processes(self) -> int:
        """How many known processes belong to it."""
        return sum(one.processes for one in self.members if one.pid is not None)

    @property
    def limits(self) -> Limits:
        """The lowest limit of each direction that is limited."""
        return limits_together(self.throttles)

    def key(self, order: str) -> Any:
        """Return what rows are sorted by, the first ones smallest."""
        name = self.members[0].name
        totals = self.total.download_bytes + self.total.upload_bytes
        if order == "rate":
            return -self.down - self.up, -totals, name
        if order == "down":
            return -self.down, -self.total.download_bytes, name
        if order == "up":
            return -self.up, -self.total.upload_bytes, name
        return (-totals, name) if order == "total" else (name, -totals)

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON, with the fields that all of its members share."""
        told = [one.identity() for one in self.members]
        same = {
            name: value if all(one[name] == value for one in told) else None
            for name, value in told[0].items()
        }
        return {
            **same,
            **{name: self.label for name in _SHARES if name == self.group},
            "processes": self.processes,
            "download_bytes": self.total.download_bytes,
            "upload_bytes": self.total.upload_bytes,
            "download_packets": self.total.download_packets,
            "upload_packets": self.total.upload_packets,
            "download_bytes_per_s": round(self.down, 1),
            "upload_bytes_per_s": round(self.up, 1),
            "limits": {
                str(direction): rate.bytes_per_s for direction, rate in self.limits.items() if rate
            },
        }


class Interval(NamedTuple):
    """What all processes had moved before and after some seconds, and what was limited then."""

    before: Sequence[ProcessTraffic]
    after: Sequence[ProcessTraffic]
    seconds: float
    cover: Cover

    def rows(
        self,
        scope: str = "network",
        group: str = "process",
        order: str = "rate",
        keeps: Callable[[ProcessTraffic], bool] = lambda one: True,
        interface: str = "",
    ) -> list[Row]:
        """Return a row for each process or group that has ever moved anything in this scope.

        With ``interface`` only what passed that one counts.
        """
        groups: dict[str, list[ProcessTraffic]] = {}
        shown = list(_shares(_through(filter(keeps, self.after), interface), group))
        for one in shown:
            groups.setdefault(GROUPS[group](one), []).append(one)
        known = earlier(_shares(_through(self.before, interface), group), shown)
        rows = []
        for label, members in groups.items():
            total = _sum(members, SCOPES[scope])
            past = _sum((had for one in members for had in known(one)), SCOPES[scope])
            # A listener's process was charged for what another one accepts: no negative rate.
            moved = Usage(*(max(0, count) for count in total.minus(past)))
            if any(total):
                throttles = self._throttles(members)
                rows.append(
                    Row(group, label, tuple(members), total, moved, self.seconds, throttles)
                )
        return sorted(rows, key=lambda row: row.key(order))

    def interfaces(self) -> list[str]:
        """Return the names of the interfaces that anything has passed."""
        return sorted({name for one in self.after for name in one.by_interface})

    def _throttles(self, members: Iterable[ProcessTraffic]) -> tuple[InForce, ...]:
        found = (each for one in members for each in self.cover.of(one.pid, one.cgroup))
        return tuple({each.id: each for each in found}.values())


def earlier(
    before: Iterable[ProcessTraffic], after: Iterable[ProcessTraffic]
) -> Callable[[ProcessTraffic], Sequence[ProcessTraffic]]:
    """Return what finds for one of ``after`` those of ``before`` that it is made of.

    That is itself; and, where many have ended, those that are added up since then.
    """
    known = {(one.number, one.share): one for one in before}
    found: dict[tuple[int, str], list[ProcessTraffic]] = {}
    sums: dict[tuple[Any, ...], tuple[int, str]] = {}
    for one in after:
        key = (one.number, one.share)
        found[key] = [known.pop(key)] if key in known else []
        if one.processes > 1:
            sums[one.name, one.user, one.cgroup, one.share] = key
    for gone in known.values():
        taken_in = sums.get((gone.name, gone.user, gone.cgroup, gone.share))
        if taken_in is not None:
            found[taken_in].append(gone)
    return lambda one: found[one.number, one.share]


def moved_since(
    before: Iterable[ProcessTraffic], after: Sequence[ProcessTraffic], scopes: Iterable[Scope]
) -> Iterator[tuple[ProcessTraffic, Moved]]:
    """Yield those that have moved something, and how much.

    That is negative for what has turned out to be another one's, which has as much more.
    """
    known = earlier(before, after)
    for one in after:
        usage = one.usage(*scopes).minus(_sum(known(one), scopes))
        moved = Moved(usage.download_bytes, usage.upload_bytes)
        if any(moved):
            yield one, moved


def _through(found: Iterable[ProcessTraffic], interface: str) -> Iterator[ProcessTraffic]:
    """Yield what of each has passed an interface; all of it if none is named."""
    for one in found:
        if interface:
            part = one.by_interface.get(interface, {})
            one = replace(one, by_scope=part, by_interface={interface: part})
        yield one


def _shares(found: Iterable[ProcessTraffic], group: str) -> Iterator[ProcessTraffic]:
    return (share for one in found for share in one.shares(group))


def _sum(found: Iterable[ProcessTraffic], scopes: Iterable[Scope]) -> Usage:
    total = Usage()
    for one in found:
        total = total.plus(one.usage(*scopes))
    return total


class Intervals:
    """The intervals of a watch, each from one call of ``next`` to the following one."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._before = watch.snapshot()
        self._begin_s = time.monotonic()

    def next(self) -> Interval:
        """End the interval, and return it. Raises what Watch.snapshot raises."""
        before, begin_s = self._before, self._begin_s
        self._before, self._begin_s = self._watch.snapshot(), time.monotonic()
        cover = Cover([])
        with suppress(OSError, Error):
            cover = Cover.now()
        seconds = max(self._begin_s - begin_s, 1e-6)
        return Interval(before, self._before, seconds, cover)
