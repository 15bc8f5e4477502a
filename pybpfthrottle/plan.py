"""From a request and the backends on offer to plans, the best first. Pure.

Each fallback is a row: how packets are matched, which backend limits each direction, and what the
user has to know about it.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Iterator, Mapping, Sequence

from pybpfthrottle.backends.protocol import Match, Offer
from pybpfthrottle.bpf.obj.plain import Data, made
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.model import Direction

MATCHINGS = ("auto", "whole-cgroup", "move-cgroup")


class Wish(Data, frozen=True):
    """Preferences for how a throttle is put in force.

    ``matching`` is one of MATCHINGS, for processes. ``backends`` names one for a direction;
    ``options`` has the backends' options by backend name. ``stack`` allows a second limit on what
    is limited already, ``insist`` a limit on this session's own cgroup.
    """

    matching: str = "auto"
    backends: Mapping[Direction, str] = made(default_factory=dict)
    options: Mapping[str, Any] = made(default_factory=dict)
    stack: bool = False
    insist: bool = False


class Place(Enum):
    """Where a limit applies."""

    SOCKETS = "the sockets of the processes, wherever they are"
    CGROUPS = "all of some cgroups"
    MOVED = "cgroups that the processes are moved into, and what they had open before"
    MOVED_ONLY = "cgroups that the processes are moved into"

    @property
    def matches(self) -> tuple[Match, ...]:
        """The kinds of matching that this place needs."""
        if self is Place.SOCKETS:
            return (Match.MARKS,)
        return (Match.CGROUP, Match.MARKS) if self is Place.MOVED else (Match.CGROUP,)


class Situation(Data, frozen=True):
    """What is known about a target.

    ``processes``: processes are limited; ``matches``: they are chosen by their properties, so
    later ones may match; ``shared``: others are in their cgroups too, or one is the root; ``kept``:
    the limit outlives this process, so nobody would move processes back.
    """

    processes: bool
    matches: bool = False
    shared: bool = False
    kept: bool = False


class Plan(Data, frozen=True):
    """One way to put a throttle in force.

    ``why`` in a note is why the previous plan failed; without one it is this plan's ``why``: why
    its backends do not offer to match sockets.
    """

    place: Place
    backends: Mapping[Direction, str]
    notes: tuple[str, ...] = ()
    why: str = ""

    @property
    def mechanism(self) -> str:
        """The names of its backends, for people."""
        return " and ".join(dict.fromkeys(self.backends.values()))

    def same_as(self, other: Plan) -> bool:
        """Whether both do the same, whatever is said of it."""
        return (self.place, self.backends) == (other.place, other.backends)


# The note if the previous row has failed.
_NO_MARKS = "Single sockets cannot be limited here: {why}."
_ALONE = "The processes are alone in their cgroup, so all of it is limited."
_MOVED = "The processes are moved into a cgroup of their own until the limit ends."
_ONLY_NEW = "Connections that are already open are not limited: {why}"


def plans(
    situation: Situation, wish: Wish, directions: Sequence[Direction], offers: Sequence[Offer]
) -> list[Plan]:
    """Return the plans to limit these directions, the best first.

    Raises ThrottleError with each backend's reason if there is no plan.
    """
    rows = list(_places(situation, wish))
    found = [
        Plan(
            place,
            backends,
            (*notes, *_about(place, backends, wish, offers)),
            _why_no_marks(backends, offers),
        )
        for place, notes in rows
        for backends in _backends(place, wish, directions, offers)
    ]
    if not found:
        raise ThrottleError(_refusal([place for place, _ in rows], wish, directions, offers))
    return found


def _places(situation: Situation, wish: Wish) -> Iterator[tuple[Place, tuple[str, ...]]]:
    if not situation.processes or wish.matching == "whole-cgroup":
        yield Place.CGROUPS, ()
        return
    if wish.matching == "move-cgroup":
        yield Place.MOVED, ()
        yield Place.MOVED_ONLY, (_ONLY_NEW,)
        return
    yield Place.SOCKETS, ()
    if situation.matches:  # a later process may be in any cgroup
        return
    if situation.shared and not situation.kept:
        yield Place.MOVED, (_NO_MARKS, _MOVED)
        yield Place.MOVED_ONLY, (_NO_MARKS, _MOVED, _ONLY_NEW)
    elif not situation.shared:
        yield Place.CGROUPS, (_NO_MARKS, _ALONE)


def _backends(
    place: Place, wish: Wish, directions: Sequence[Direction], offers: Sequence[Offer]
) -> Iterator[Mapping[Direction, str]]:
    """Yield a backend for each direction: first the best of each, then the next."""
    usable = {direction: _usable(place, wish, direction, offers) for direction in directions}
    if not all(usable.values()):
        return
    for rank in range(max(map(len, usable.values()))):
        yield {direction: names[min(rank, len(names) - 1)] for direction, names in usable.items()}


def _about(
    place: Place, backends: Mapping[Direction, str], wish: Wish, offers: Sequence[Offer]
) -> Iterator[str]:
    """Yield why no better backend is used, and what those that are used lose."""
    for direction, name in backends.items():
        for offer in offers:
            better = offer.direction is direction and offer.match in place.matches
            if offer.backend == name:
                break
            if better and offer.refused is not None and wish.backends.get(direction) != name:
                yield f"{name} limits {direction}s, as {offer.backend} cannot: {offer.refused}"
    for name in dict.fromkeys(backends.values()):
        losses = dict.fromkeys(
            loss for offer in offers if offer.backend == name for loss in offer.loses
        )
        if losses:
            yield f"{name}: {'; '.join(losses)}"


def _why_no_marks(backends: Mapping[Direction, str], offers: Sequence[Offer]) -> str:
    return next(
        (
            offer.refused
            for offer in offers
            if offer.match is Match.MARKS
            and offer.refused is not None
            and backends.get(offer.direction) == offer.backend
        ),
        "",
    )


def _usable(place: Place, wish: Wish, direction: Direction, offers: Sequence[Offer]) -> list[str]:
    wanted = wish.backends.get(direction, "auto")
    own = [offer for offer in offers if offer.direction is direction and offer.refused is None]
    best_first = sorted(own, key=lambda offer: -offer.priority)
    names = dict.fromkeys(offer.backend for offer in best_first)
    return [
        name
        for name in names
        if wanted in ("auto", name)
        and all(any(o.backend == name and o.match is match for o in own) for match in place.matches)
    ]


def _refusal(
    places: Sequence[Place], wish: Wish, directions: Sequence[Direction], offers: Sequence[Offer]
) -> str:
    for direction in directions:
        if any(_usable(place, wish, direction, offers) for place in places):
            continue
        wanted = wish.backends.get(direction, "auto")
        reasons: dict[str, str] = {}
        # The last place is the least demanding one: what a backend lacks for that counts.
        for match in [match for place in reversed(places) for match in place.matches]:
            for offer in offers:
                if offer.direction is direction and offer.match is match and offer.refused:
                    reasons.setdefault(offer.backend, offer.refused)
        told = [f"{name}: {why}" for name, why in reasons.items() if wanted in ("auto", name)]
        return f"cannot limit {direction}: {'; '.join(told)}"
    return "the backends of the two directions cannot match this target in the same way; name one"
