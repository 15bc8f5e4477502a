"""A group of this machine whose totals are its parts of those of a fleet."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Mapping, Protocol

from pybpfthrottle.fleet import fair
from pybpfthrottle.fleet.share import FleetShare
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.supervisor import Chore, Periodic

_PERIOD_S = 1.0


class LocalGroup(Protocol):
    """What divides a total among the throttles of this machine."""

    def demand(self, direction: Direction) -> int:
        """Return what all its members together can use, in bytes per second."""

    def set_total(self, direction: Direction, total: Rate) -> object:
        """Share another total from now on."""


class _Way:
    """One direction of a group: its part of the fleet's total, and the total that it has now."""

    def __init__(self, group: LocalGroup, direction: Direction, share: FleetShare) -> None:
        self._group = group
        self._direction = direction
        self.share = share
        self._part = share.part()
        group.set_total(direction, self._part)

    def follow(self) -> None:
        """Tell what the group wants now, and give it the part that was agreed on."""
        moved = self._group.demand(self._direction)
        # A group that uses all it has cannot tell how much more it would use.
        part = self.share.part(fair.demand(moved, self._part.bytes_per_s, self.share.total))
        if part != self._part:
            self._group.set_total(self._direction, part)
            self._part = part


class FleetGroup:
    """Keeps the totals of a local group at this machine's parts. ``close`` or ``with`` leaves.

    ``name`` and ``totals`` are the same on all machines; ``url`` and ``machines`` are as for
    FleetShare. Its chores have to be run in the loop that the group's are run in.
    """

    def __init__(
        self,
        group: LocalGroup,
        url: str,
        name: str,
        totals: Mapping[Direction, Rate],
        *,
        machines: int = 1,
    ) -> None:
        """Raises SettingsError for an address that is none."""
        shares = {
            direction: FleetShare(url, f"{name}:{direction}", total, machines=machines)
            for direction, total in totals.items()
        }
        self._ways = [_Way(group, direction, share) for direction, share in shares.items()]
        self._chore = Periodic(_PERIOD_S, self._follow)
        self._resources = ExitStack()

    def start(self) -> None:
        """Begin to agree with the others."""
        for way in self._ways:
            self._resources.enter_context(way.share)

    def chores(self) -> list[Chore]:
        """Return what has to be done once a second."""
        return [self._chore]

    def notes(self) -> list[str]:
        """Return why nothing can be agreed on at the moment, each reason once."""
        return list(dict.fromkeys(note for way in self._ways for note in way.share.notes()))

    def close(self) -> None:
        """Leave the fleet; the group keeps the total that it has."""
        self._resources.close()

    def __enter__(self) -> FleetGroup:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self) -> None:
        for way in self._ways:
            way.follow()
