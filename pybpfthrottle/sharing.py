"""A group in force: its members' rates are moved many times a second, as they use what they have.

Each member always has what it gets while all want more, its guaranteed rate, so it starts at once.
Who wants more than it has is held back by its shaper, as its token bucket tells; who uses less
lends the rest to those. The rates are those of the members' own shapers: nothing is dropped for
it, and no packet passes a second limit.

A member that begins again takes its guaranteed rate while another still uses what it had borrowed,
until the next look. What passes by that beyond the total is made up for afterwards.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, TypeVar

from pybpfthrottle.backends.protocol import Dial
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import Error, ThrottleError
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import MIN_RATE, Direction, Limits, Rate
from pybpfthrottle.shares import Branch, GroupSpec, Member, Want, check, divide
from pybpfthrottle.supervisor import Chore, Driver, Frequent, InThread
from pybpfthrottle.throttle import Throttle

log = Logger(__name__)

T = TypeVar("T")
G = TypeVar("G", bound="Group")

_MS = 0.001
_NS_PER_S = 1_000_000_000
# How often to look: as often as costs a hundredth of a CPU, within these bounds. What is unused is
# to be lent within 100 ms, and a bucket needs some of these to tell.
_SHORTEST_S, _LONGEST_S = 15 * _MS, 60 * _MS
_MOST_BUSY = 0.01
# If nobody has moved anything for so long, look less often.
_QUIET_S, _QUIET_PERIOD_S = 1.0, 80 * _MS
# After somebody has begun, look once more soon, to see how much it wants.
_SOON_S = 10 * _MS
# A member is idle after so long without a packet.
_IDLE_S = 0.5
# Who sends nothing for so long after what came last should be through has no more, unless it owes
# much.
_SILENT_S, _MUCH_OWED_NS = 10 * _MS, 70_000_000
# What a member keeps that uses less than it has: a little more than it uses. If it uses less and
# less, that falls to no less than this share of it from one look to the next.
_MARGIN, _DECAY = 1.04, 0.25
# An idle member has at least so much, if the total allows: two segments in 20 ms to begin with.
_FIRST_RATE = 150_000.0
# Nobody starves, whatever the weights: its connections would be slow to take what others leave. All
# together have a 20th of the total for that, and none needs more than this.
_LEAST_PART, _LEAST_RATE = 1 / 20, 150_000.0
# Smaller changes are not worth it.
_LEAST_CHANGE = 1 / 64
# What a sender was allowed at the old rate has to fit into the debt at the new one.
_MOST_DECREASE = 1 / 4
# How fast what passed beyond the total is made up for, and how much of it; and how much less than
# the total counts for later: as much as buckets allow for a burst.
_REPAY_S, _MOST_OVER_S, _MOST_SPARE_S = 0.2, 0.5, 0.05


class Now(NamedTuple):
    """What a member has of one direction at the moment; rates in bytes per second.

    ``rate`` is None while its limit is paused or blocked. ``guaranteed`` is what it has while all
    want more.
    """

    throttle: str
    group: str
    direction: Direction
    rate: Optional[int]
    guaranteed: int
    used: int
    held_back: bool

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**self._asdict(), "direction": str(self.direction)}


class Seat:
    """A member in one direction. Rates are in bytes per second."""

    def __init__(
        self, throttle: Throttle, member: Member, dial: Dial, direction: Direction
    ) -> None:
        self.throttle = throttle
        self.member = member
        # What it has while all want more, and while others have much more weight.
        self.guaranteed = self.least = 0.0
        # Whether it wants more than it has; whether it has moved something lately.
        self.is_held = self.is_active = False
        # What it used in the time between the last two looks, and what it can use.
        self.used = self.demand = 0.0
        self._own_share = member.share(direction)
        self._dial = dial
        self._came_s = -math.inf
        # From when on it has no more to send, unless something comes before; and whether something
        # should have come already, as it did in each look before.
        self.silent_s = -math.inf
        self.is_late = False
        self._passed, self._dropped, _ = dial.look()
        self._see_limit()

    @property
    def has_other_limit(self) -> bool:
        """Whether somebody has changed its limit; ``look`` takes notice."""
        return self._dial.rate is not self._in_force

    def _see_limit(self) -> None:
        limit, self._in_force = self._dial.limit, self._dial.rate
        # While it is paused or blocked it has no part in all this.
        self.is_out = any(rate is None or rate.is_blocked for rate in (limit, self._in_force))
        self.share, self.rate = self._own_share, math.inf
        if limit and self._in_force and not self.is_out:
            self.share = self._own_share.below(limit.bytes_per_s)
            self.rate = float(self._in_force.bytes_per_s)

    def look(self, now: float, seconds: float) -> int:
        """Find out what it uses and wants; return the bytes that have passed since the last look.

        Raises ThrottleError or OSError if its throttle is gone.
        """
        if self.has_other_limit:
            self._see_limit()
        elif not (self.is_active or self.is_held) and self._dial.is_still():
            return 0
        use = self._dial.look()
        came, self._passed = use.bytes_passed - self._passed, use.bytes_passed
        has_dropped, self._dropped = use.packets_dropped > self._dropped, use.packets_dropped
        self.used = came / seconds
        if came:
            self._came_s = now
            self.silent_s = now + came / self.rate + _SILENT_S
        self.is_active = now - self._came_s < _IDLE_S
        self.is_held = not self.is_out and (has_dropped or self._is_held_back(now, use.unused_ns))
        self.is_late = self.is_held and not came and self.silent_s - self._came_s < 2 * seconds
        if self.is_held:
            self.demand = math.inf
        elif came:
            before = self.rate if math.isinf(self.demand) else self.demand
            self.demand = max(self.used * _MARGIN, before * _DECAY)
        else:
            self.demand = 0.0
        return 0 if self.is_out else came

    def _is_held_back(self, now: float, unused_ns: int) -> bool:
        """Whether it would use more if it had more."""
        if now >= self.silent_s and unused_ns > -_MUCH_OWED_NS:
            return False
        # Once it is held back, more has to be left before it is not.
        enough_ns = self._dial.patience_ns if self.is_held else self._dial.patience_ns // 2
        # One that begins uses up its burst first.
        return unused_ns < enough_ns or self.used >= self.rate

    def want(self, demand: float) -> Want:
        """Return what it is to have if it can use so much."""
        return self.share.want(0.0 if self.is_out else demand, self.least)

    def move(self, rate: float) -> None:
        """Put a rate in force, for one that is not out.

        Raises ThrottleError or OSError if its throttle is gone.
        """
        self._in_force = Rate(max(MIN_RATE.bytes_per_s, int(rate)))
        self._dial.move(self._in_force)
        self.rate = float(self._in_force.bytes_per_s)


class Pool:
    """One direction of a group: its total, and who shares it."""

    def __init__(self, direction: Direction, total: Rate, inner: Sequence[GroupSpec]) -> None:
        self.direction = direction
        self._total = float(total.bytes_per_s)
        self._inner = {each.name: each.share(direction) for each in inner}
        # By the name of the group within this one that they are in, or "".
        self._seats: dict[str, list[Seat]] = {name: [] for name in ("", *self._inner)}
        # Throttles that are gone, and have left by that.
        self.lost: list[Throttle] = []
        # The bytes that have passed beyond the total.
        self._over = 0.0
        # Whether all have what they have while nobody moves anything.
        self._is_at_rest = True

    def __iter__(self) -> Iterator[Seat]:
        """Yield who shares it, in the order of ``_divided``."""
        return chain.from_iterable(self._seats.values())

    @property
    def is_quiet(self) -> bool:
        """Whether nobody moves anything."""
        return not any(seat.is_active for seat in self)

    @property
    def demand(self) -> float:
        """What all together can use, in bytes per second; at most the total."""
        return min(sum(seat.demand for seat in self), self._total)

    @property
    def due_s(self) -> float:
        """When to look in any case: then somebody is through who is late already."""
        return min((seat.silent_s for seat in self if seat.is_late), default=math.inf)

    def set_total(self, total: Rate) -> None:
        """Share another total from now on."""
        self._total = float(total.bytes_per_s)
        self._arrange()

    def add(self, throttle: Throttle, member: Member) -> None:
        """Have one more share it. Raises ThrottleError."""
        seat = Seat(throttle, member, throttle.dial(self.direction), self.direction)
        self._seats[member.group if member.group in self._inner else ""].append(seat)
        self._arrange()
        if not seat.is_out:
            seat.move(seat.guaranteed)

    def discard(self, throttle: Throttle) -> None:
        """Have a throttle leave, if it is here."""
        for seats in self._seats.values():
            seats[:] = [seat for seat in seats if seat.throttle is not throttle]
        self._arrange()

    def _arrange(self) -> None:
        """Find out what each has while all want more."""
        spare = self._total - sum(seat.share.floor for seat in self)
        each = max(min(spare, self._total * _LEAST_PART), 0.0) / max(len(list(self)), 1)
        for seat in self:
            seat.least = min(each, _LEAST_RATE)
        parts = self._divided(self._total, [seat.want(math.inf) for seat in self])
        for seat, part in zip(self, parts):
            seat.guaranteed = part
        self._is_at_rest = False

    def look(self, now: float, seconds: float) -> bool:
        """Find out what all use; return whether somebody has begun. Who is gone leaves."""
        has_begun, came = False, 0
        changed = [seat for seat in self if seat.has_other_limit]
        for seat in list(self):
            was_active = seat.is_active
            try:
                came += seat.look(now, seconds)
            except (ThrottleError, OSError) as error:
                self._lose(seat, error)
            has_begun |= seat.is_active and not was_active
        if changed:
            self._arrange()
        over = self._over + came - self._total * seconds
        self._over = min(max(over, -_MOST_SPARE_S * self._total), _MOST_OVER_S * self._total)
        return has_begun

    def turn(self) -> None:
        """Move the rates to what they are to be now: first down, then up."""
        if self._is_at_rest and self.is_quiet:
            return
        wanted = [(seat, rate) for seat, rate in zip(self, self._wanted()) if not seat.is_out]
        lowered = [(seat, rate) for seat, rate in wanted if rate < seat.rate * (1 - _LEAST_CHANGE)]
        raised = [(seat, rate) for seat, rate in wanted if rate > seat.rate * (1 + _LEAST_CHANGE)]
        self._is_at_rest = self.is_quiet and not lowered
        for seat, rate in lowered:
            self._move(seat, max(rate, seat.rate * _MOST_DECREASE))
        # What could not be taken from one yet is not there for the others.
        lacking = sum(seat.rate - rate for seat, rate in lowered if seat.is_held)
        rise = sum(rate - seat.rate for seat, rate in raised if seat.is_held)
        part = max(0.0, 1 - lacking / rise) if rise else 1.0
        for seat, rate in raised:
            self._move(seat, seat.rate + (rate - seat.rate) * (part if seat.is_held else 1.0))

    def _wanted(self) -> list[float]:
        """Return the rate that each is to have.

        Who is held back gets its part of what the others leave. The others may begin at any moment:
        besides what they use they have what they are guaranteed, and what they would get if those
        wanted more that have moved something lately.
        """
        total = max(self._total / 2, self._total - max(self._over, 0.0) / _REPAY_S)
        parts = self._divided(total, [seat.want(seat.demand) for seat in self])
        active = parts
        if any(seat.is_active and not seat.is_held for seat in self):
            wants = [seat.want(math.inf if seat.is_active else 0.0) for seat in self]
            active = self._divided(self._total, wants)
        first = min(_FIRST_RATE, self._total / max(len(parts), 1))
        return [
            part
            if seat.is_held
            else min(max(part, other, seat.guaranteed, first), seat.share.ceiling)
            for seat, part, other in zip(self, parts, active)
        ]

    def _divided(self, total: float, wants: Sequence[Want]) -> list[float]:
        """Divide a total among all, by what each wants."""
        first = len(self._seats[""])
        branches, at = [], first
        for name, share in self._inner.items():
            branches.append(Branch(share, wants[at : at + len(self._seats[name])]))
            at += len(self._seats[name])
        parts, inner = divide(total, wants[:first], branches)
        return [*parts, *chain.from_iterable(inner)]

    def _move(self, seat: Seat, rate: float) -> None:
        try:
            seat.move(rate)
        except (ThrottleError, OSError) as error:
            self._lose(seat, error)

    def _lose(self, seat: Seat, error: Exception) -> None:
        log.info("The throttle %s has left its group: %s", seat.throttle.id, error)
        self.lost.append(seat.throttle)
        self.discard(seat.throttle)


class Group(Frequent):
    """Throttles that share a total, in groups within it too. ``remove`` or ``with`` ends them all.

    It is a chore, to be run in the same loop as those of its members.
    """

    def __init__(self, spec: GroupSpec, inner: Iterable[GroupSpec] = ()) -> None:
        """``inner`` are the groups within it. Raises ShareError for what cannot be."""
        self.spec = spec
        self.inner = tuple(inner)
        check([spec, *self.inner])
        self._members: dict[Throttle, Member] = {}
        self._pools = {each: Pool(each, total, self.inner) for each, total in spec.totals.items()}
        self._looked_s = self._moved_s = time.monotonic()
        self._cost_s = 0.0
        self._driver: Optional[Driver] = None
        self.due_s = math.inf

    def __contains__(self, throttle: object) -> bool:
        """Whether a throttle is a member."""
        return throttle in self._members

    def limits(self, member: Member) -> Limits:
        """Return the limits to start a member's throttle with: the most that it may ever have."""
        group = next((each for each in self.inner if each.name == member.group), self.spec)
        found: dict[Direction, Optional[Rate]] = {}
        for direction, total in self.spec.totals.items():
            ceilings = (member.share(direction).ceiling, group.ceiling(direction))
            found[direction] = Rate(int(min(total.bytes_per_s, *ceilings)))
        return found

    def add(self, throttle: Throttle, member: Member, who: str = "") -> None:
        """Have a throttle share from now on, which was started with ``limits(member)``.

        ``who`` is what to call it in an error. Raises ShareError for what cannot be, ThrottleError
        for a throttle whose rate cannot be moved.
        """
        self.check(member, who or f"the throttle {throttle.id}")
        self._do(partial(self._add, throttle, member))

    def check(self, member: Member, who: str) -> None:
        """Raise ShareError if there is no place for a member; ``who`` is what to call it."""
        others = [(f"the throttle {one.id}", each) for one, each in self._members.items()]
        check([self.spec, *self.inner], [*others, (who, member)])

    def _add(self, throttle: Throttle, member: Member) -> None:
        with ExitStack() as undo:
            undo.callback(self._discard, throttle)
            for pool in self._pools.values():
                pool.add(throttle, member)
            undo.pop_all()
        self._members[throttle] = member
        for pool in self._pools.values():
            pool.turn()
        self.due_s = min(self.due_s, time.monotonic() + _SOON_S)

    def discard(self, throttle: Throttle) -> None:
        """Have a throttle leave, if it is a member; its own limit is in force again."""
        self._do(partial(self._discard, throttle))

    def _discard(self, throttle: Throttle) -> None:
        self._forget(throttle)
        with suppress(Error, OSError):  # it may be gone
            for direction in self._pools.keys() & throttle.limits.keys():
                throttle.set_limit(direction, throttle.limits[direction])

    def _forget(self, throttle: Throttle) -> None:
        self._members.pop(throttle, None)
        for pool in self._pools.values():
            pool.discard(throttle)
        if not self._members:
            self.due_s = math.inf

    def set_total(self, direction: Direction, total: Rate) -> None:
        """Share another total from now on, such as this machine's part of a larger one.

        If it is less than all floors together, each has the same part of its floor.
        """
        self._do(partial(self._pools[direction].set_total, total))

    def demand(self, direction: Direction) -> int:
        """Return what all members together can use, in bytes per second; at most the total."""
        return self._do(lambda: int(self._pools[direction].demand))

    def state(self) -> list[Now]:
        """Return what each member has and uses at the moment."""
        return self._do(self._state)

    def _state(self) -> list[Now]:
        return [
            Now(
                *(seat.throttle.id, seat.member.group, pool.direction),
                *(None if seat.is_out else int(seat.rate), int(seat.guaranteed), int(seat.used)),
                seat.is_held,
            )
            for pool in self._pools.values()
            for seat in pool
        ]

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Look at what the members use, and move their rates."""
        now, began_ns = time.monotonic(), time.thread_time_ns()
        seconds, self._looked_s = max(now - self._looked_s, _MS), now
        pools = self._pools.values()
        begun = [pool for pool in pools if pool.look(now, seconds)]
        for pool in pools:
            pool.turn()
            while pool.lost:
                self._forget(pool.lost.pop())
        if not all(pool.is_quiet for pool in pools):
            self._moved_s = now
        self._cost_s += ((time.thread_time_ns() - began_ns) / _NS_PER_S - self._cost_s) / 8
        late_s = min((pool.due_s for pool in pools), default=math.inf)
        due_s = now + (_SOON_S if begun else self._period_s(now))
        self.due_s = min(due_s, max(late_s, now + _SOON_S)) if self._members else math.inf

    def _period_s(self, now: float) -> float:
        if now - self._moved_s > _QUIET_S:
            return _QUIET_PERIOD_S
        return min(max(self._cost_s / _MOST_BUSY, _SHORTEST_S), _LONGEST_S)

    def chores(self) -> list[Chore]:
        """Return the chores for a supervisor: this one. Its members have theirs."""
        return [self]

    def supervise(self) -> None:
        """Run its chore in the background thread that looks after the throttles of this process."""
        if self._driver is None:
            self._driver = InThread(self.chores)

    def remove(self) -> None:
        """Remove all members, and stop sharing."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.release()
        with ExitStack() as stack:
            for throttle in list(self._members):
                stack.callback(throttle.remove)
                self._forget(throttle)

    def __enter__(self: G) -> G:
        self.supervise()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _do(self, function: Callable[[], T]) -> T:
        return function() if self._driver is None else self._driver.call(function)


def groups_of(specs: Iterable[GroupSpec]) -> dict[str, Group]:
    """Return the groups by their names and by those of the groups within them.

    Raises ShareError for what cannot be.
    """
    every = list(specs)
    check(every)
    found: dict[str, Group] = {}
    for spec in every:
        if spec.within is None:
            inner = [one for one in every if one.within and one.within.group == spec.name]
            made = Group(spec, inner)
            found.update(dict.fromkeys((spec.name, *(each.name for each in inner)), made))
    return found
