"""Groups: who gets how much of a total that throttles share. Pure; to and from JSON.

A group has a total for each direction. Its members, throttles or other groups, have a weight, a
floor and a ceiling. What is there is divided in proportion to the weights among those who want it;
who wants less than its part leaves the rest to the others. A floor is had whatever the weights say,
a ceiling is never exceeded. A group within a group divides what it is given in the same way.
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Mapping, Optional, Sequence, Union

from pybpfthrottle.bpf.obj.plain import Data, NamedTuple, made
from pybpfthrottle.errors import ShareError
from pybpfthrottle.model import Direction, Rate, printable

LEAST_WEIGHT, MOST_WEIGHT = 1, 10_000

Rates = Mapping[Direction, Rate]
# A rate as on the command line, in bytes per second or as a Rate: for both directions, or by the
# directions' names.
GivenRate = Union[str, int, Rate]
GivenRates = Union[None, GivenRate, Mapping[str, GivenRate]]


class Member(Data, frozen=True):
    """What a throttle, or a group, is to have of the group named ``group``.

    ``weight`` is a number from 1 to 10000; ``floors`` and ``ceilings`` have a rate for some
    directions, or for none.
    """

    group: str
    weight: float = 1
    floors: Rates = made(default_factory=dict)
    ceilings: Rates = made(default_factory=dict)

    @classmethod
    def of(
        cls,
        group: str,
        *,
        weight: Any = 1,
        floor: GivenRates = None,
        ceiling: GivenRates = None,
    ) -> Member:
        """Return a member as a person describes it. Raises ShareError or LimitError.

        ``floor`` and ``ceiling`` are for both directions, or ``{"download": "2M"}``.
        """
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ShareError(f"the weight {weight!r} is not a number: {_WEIGHTS}")
        if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise ShareError(f"the weight {weight:g} is out of range: {_WEIGHTS}")
        made = cls(group, weight, rates("floor", floor), rates("ceiling", ceiling))
        for direction, least in made.floors.items():
            most = made.ceilings.get(direction, least)
            if least > most:
                raise ShareError(
                    f"the floor, {least.written()} of {direction}, is above the ceiling,"
                    f" {most.written()}: lower the floor or raise the ceiling"
                )
        return made

    def share(self, direction: Direction) -> Share:
        """Return it for one direction."""
        floor, ceiling = self.floors.get(direction), self.ceilings.get(direction)
        return Share(
            self.weight,
            floor.bytes_per_s if floor else 0.0,
            ceiling.bytes_per_s if ceiling else math.inf,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; rates are in bytes per second."""
        return {
            "group": self.group,
            "weight": self.weight,
            "floor": _to_json(self.floors),
            "ceiling": _to_json(self.ceilings),
        }


_WEIGHTS = f"a weight is between {LEAST_WEIGHT} and {MOST_WEIGHT}"


class GroupSpec(Data, frozen=True):
    """A group as requested: the total of each direction that its members share.

    ``within`` is what it has of another group; then its totals are ceilings there, and may be
    missing.
    """

    name: str
    totals: Rates = made(default_factory=dict)
    within: Optional[Member] = None

    @classmethod
    def of(
        cls,
        name: str,
        *,
        total: Optional[GivenRate] = None,
        upload: Optional[GivenRate] = None,
        download: Optional[GivenRate] = None,
        within: Optional[Member] = None,
    ) -> GroupSpec:
        """Return a group as a person describes it. Raises ShareError or LimitError.

        ``total`` is for uploads and for downloads, each; ``upload`` and ``download`` are for one.
        """
        totals = dict(rates("total", total))
        for direction, given in ((Direction.UPLOAD, upload), (Direction.DOWNLOAD, download)):
            totals.update({direction: _rate(given)} if given is not None else {})
        if not totals and within is None:
            raise ShareError(
                f"the group {printable(name)} has nothing to share: give it a total, an upload or"
                " a download rate"
            )
        return cls(name, totals, within)

    def ceiling(self, direction: Direction) -> float:
        """Return the most that its members get together; infinite if only another group limits."""
        return self.share(direction).ceiling

    def share(self, direction: Direction) -> Share:
        """Return what it is to have of the group that it is within; its total is a ceiling."""
        share = self.within.share(direction) if self.within else Share()
        total = self.totals.get(direction)
        return share._replace(ceiling=min(share.ceiling, total.bytes_per_s)) if total else share

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; rates are in bytes per second."""
        return {
            "name": self.name,
            "total": _to_json(self.totals),
            "within": self.within.to_json() if self.within else None,
        }


def rates(what: str, given: GivenRates) -> dict[Direction, Rate]:
    """Return the rate of each direction that a person gave. Raises ShareError or LimitError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(Direction, _rate(given))
    known = {str(direction): direction for direction in Direction}
    for name in given:
        if name not in known:
            raise ShareError(f"a {what} has no {printable(str(name))!r}: give upload or download")
    return {known[name]: _rate(rate) for name, rate in given.items()}


def _rate(given: GivenRate) -> Rate:
    if isinstance(given, Rate):
        return given
    rate = Rate.parse(given) if isinstance(given, str) else Rate.of(given)
    if rate.is_blocked:
        raise ShareError("nothing can be shared of what is blocked: give a rate such as 500K")
    return rate


def _to_json(given: Rates) -> dict[str, int]:
    return {str(direction): rate.bytes_per_s for direction, rate in given.items()}


class _Seat(NamedTuple):
    """A member of a group: a throttle, or the group ``spec``."""

    who: str
    member: Member
    spec: Optional[GroupSpec] = None


_Seats = Mapping[str, Sequence[_Seat]]


def check(groups: Iterable[GroupSpec], members: Iterable[tuple[str, Member]] = ()) -> None:
    """Raise ShareError for what cannot be: an unknown group, floors above their total, ...

    ``members`` are throttles, each with what to call it in an error.
    """
    known: dict[str, GroupSpec] = {}
    for spec in groups:
        if spec.name in known:
            raise ShareError(f"there are two groups {printable(spec.name)}: rename one")
        known[spec.name] = spec
    seats: dict[str, list[_Seat]] = {name: [] for name in known}
    for seat in [
        *(
            _Seat(f"the group {each.name}", each.within, each)
            for each in known.values()
            if each.within
        ),
        *(_Seat(*each) for each in members),
    ]:
        if seat.member.group not in known:
            raise ShareError(
                f"{printable(seat.who)} is in the group {printable(seat.member.group)}, which does"
                f" not exist; {_there_are(known)}"
            )
        seats[seat.member.group].append(seat)
    for spec in known.values():
        if spec.within:
            _refuse_within(spec, known[spec.within.group])
        for direction in Direction:
            _refuse_floors(spec, direction, seats)


def _there_are(known: Mapping[str, GroupSpec]) -> str:
    names = ", ".join(map(printable, sorted(known)))
    return f"there are {names}" if names else "there are no groups"


def _refuse_within(spec: GroupSpec, outer: GroupSpec) -> None:
    """Raise ShareError if a group cannot be within another."""
    name = printable(spec.name)
    if outer is spec:
        raise ShareError(f"the group {name} is in itself: name another group, or none")
    if outer.within is not None:
        top = printable(outer.within.group)
        raise ShareError(
            f"the group {name} is in {printable(outer.name)}, which is in {top}: a group within a"
            f" group has no groups; put {name} into {top}"
        )
    for direction in spec.totals:
        if direction not in outer.totals:
            raise ShareError(
                f"the group {name} has a total of {direction}, and the group"
                f" {printable(outer.name)}, which it is in, has none: give it one"
            )


def _refuse_floors(spec: GroupSpec, direction: Direction, seats: _Seats) -> None:
    """Raise ShareError if the floors of a group's members are more than the group can have."""
    most = spec.ceiling(direction)
    if math.isinf(most):
        return
    floors = {seat.who: _floor(seat, direction, seats) for seat in seats[spec.name]}
    own = spec.within.share(direction).floor if spec.within else 0
    if own > most:
        raise ShareError(
            f"the floor of the group {printable(spec.name)}, {_written(own)} of {direction}, is"
            f" above its total, {_written(most)}: lower the floor or raise the total"
        )
    if sum(floors.values()) > most:
        parts = ", ".join(
            f"{printable(who)} {_written(each)}" for who, each in floors.items() if each
        )
        raise ShareError(
            f"the floors of the group {printable(spec.name)} are more than the {_written(most)} of"
            f" {direction} that it has: {parts}. Lower them, or raise the total"
        )


def _floor(seat: _Seat, direction: Direction, seats: _Seats) -> float:
    """Return the floor of a member; a group's is that of its own members at least."""
    own = seat.member.share(direction).floor
    if seat.spec is None:
        return own
    return max(own, sum(_floor(each, direction, seats) for each in seats[seat.spec.name]))


def _written(bytes_per_s: float) -> str:
    return Rate(int(bytes_per_s)).written()


class Share(NamedTuple):
    """What a member is to have of one direction, in bytes per second."""

    weight: float = 1.0
    floor: float = 0.0
    ceiling: float = math.inf

    def below(self, ceiling: float) -> Share:
        """Return it with a ceiling of at most so much."""
        return self._replace(floor=min(self.floor, ceiling), ceiling=min(self.ceiling, ceiling))

    def want(self, demand: float, least: float = 0.0) -> Want:
        """Return what it is to have if it can use so much: at least ``least``, if it may."""
        most = min(self.ceiling, demand)
        return Want(self.weight, min(max(self.floor, least), most), most)


class Want(NamedTuple):
    """What somebody is to have at least, and can use at most; beyond the least by its weight."""

    weight: float
    least: float
    most: float


class Branch(NamedTuple):
    """A group within a group, and what its members want."""

    share: Share
    wants: Sequence[Want]

    def want(self) -> Want:
        """Return what all of it is to have; its members' floors are its own too."""
        most = min(self.share.ceiling, sum(want.most for want in self.wants))
        least = max(min(self.share.floor, most), sum(want.least for want in self.wants))
        return Want(self.share.weight, min(least, most), most)


def divide(
    total: float, wants: Sequence[Want], branches: Sequence[Branch] = ()
) -> tuple[list[float], list[list[float]]]:
    """Divide a total among members and groups, and what a group gets among its members.

    Return what each member gets, and for each group what its members get: see ``fill``.
    """
    parts = fill(total, [*wants, *(branch.want() for branch in branches)])
    inner = zip(parts[len(wants) :], branches)
    return parts[: len(wants)], [fill(part, branch.wants) for part, branch in inner]


def fill(total: float, wants: Sequence[Want]) -> list[float]:
    """Divide a total by weighted max-min: like water, it rises in all to the same level.

    Each gets the level times its weight, but not less than its least nor more than its most. Nobody
    can get more unless somebody with less, by weight, gets less. All of the total is used if
    somebody can use it. If the total does not suffice for what all have at least, each gets the
    same share of that.
    """
    if sum(want.most for want in wants) <= total:
        return [want.most for want in wants]
    least = sum(want.least for want in wants)
    if least >= total:
        return [want.least * total / (least or 1) for want in wants]  # nothing of a total of 0
    level = _level(total, least, wants)
    return [min(max(level * want.weight, want.least), want.most) for want in wants]


def _level(total: float, least: float, wants: Sequence[Want]) -> float:
    """Return the level at which all together get the total, which is more than ``least``."""
    # Above its least a member takes part in the rise, until it has its most.
    steps = sorted(
        step
        for want in wants
        if want.most > want.least
        for step in (
            (want.least / want.weight, want.weight),
            (want.most / want.weight, -want.weight),
        )
    )
    filled, level, rising = least, 0.0, 0.0
    for at, weight in steps:
        if filled + rising * (at - level) >= total:
            break
        # An infinite step never comes before the total is reached.
        filled += rising * (at - level)
        level, rising = at, rising + weight
    # Rounding may have used up the steps.
    return level + (total - filled) / rising if rising > 0 else level
