"""From a spec to a throttle: plan it, put it in force, read it, change it, remove it."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Sequence,
    TypeVar,
    cast,
)

from pybpfthrottle import registry, targets
from pybpfthrottle.backends.protocol import (
    CARRYING,
    Backend,
    Dial,
    Executions,
    Foothold,
    Match,
    Offer,
    Order,
    Part,
    Priority,
    Queueable,
    Ready,
    Record,
    all_backends,
)
from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.errors import (
    AttachError,
    BackendError,
    BpfError,
    CgroupError,
    Error,
    NoMarksError,
    ProcessError,
    ThrottleError,
)
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup, locked, locked_if_free, unit_name
from pybpfthrottle.linux.own_cgroups import Moved, OwnCgroup
from pybpfthrottle.linux.process import Process, has_ended
from pybpfthrottle.linux.units import Comings, Unit
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Counters, Direction, Limits, Rate, Target, ThrottleSpec, Traffic
from pybpfthrottle.plan import Place, Plan, Situation, Wish, plans
from pybpfthrottle.supervisor import Chore, Driver, InThread, OnEventLoop
from pybpfthrottle.targets import Selection

if TYPE_CHECKING:
    from pybpfthrottle.diversion.limit_queue import LimitQueue

log = Logger(__name__)

T = TypeVar("T")


class Throttle:
    """Limits in force, shared by cgroups or processes. ``remove`` or ``with`` ends it.

    Another process's throttle, opened by ``open_record``, stays in force after ``with``.

    While it is in force, a supervisor runs its ``chores``: the creator's own, or a background
    thread within ``with``, or the event loop within ``async with``.
    """

    def __init__(
        self,
        throttle_id: str,
        spec: ThrottleSpec,
        parts: Mapping[Direction, Part],
        cgroups: Sequence[Cgroup],
        selection: Optional[Selection],
        undo: ExitStack,
        *,
        own: bool = True,
        ids: Optional[Mapping[Cgroup, int]] = None,
        queue: Optional[LimitQueue] = None,
    ) -> None:
        self.id = throttle_id
        self.spec = spec
        self.cgroups = tuple(cgroups)
        self.selection = selection
        self.started_s = time.monotonic()
        self._parts = dict(parts)
        self._queue = queue
        self._undo = undo
        self._own = own
        self._driver: Optional[Driver] = None
        self._removed = False
        self._goes_on: Callable[[], bool] = lambda: not self.vanished()
        self._end = "exited" if selection is not None else "vanished"
        # What is done instead of what was requested, a line each; ``notes`` has them too.
        self.plan_notes: tuple[str, ...] = ()
        paths = ", ".join(cgroup.path for cgroup in self.cgroups)
        self.what = paths if selection is None else str(selection)
        # Ids of the cgroups meant: others may be created at their paths later.
        self._ids = dict(ids or _ids(self.cgroups))
        self._comings: Optional[Comings] = None
        self._said: dict[str, None] = {}

    @property
    def limits(self) -> Limits:
        """The limit for each direction; None is unlimited."""
        return {direction: part.limits[direction] for direction, part in self._parts.items()}

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted since the throttle was made. Raises ThrottleError."""
        self._refuse_if_removed()

        def read() -> dict[Direction, Counters]:
            found: dict[Direction, Counters] = {}
            for part in self._distinct_parts():
                found.update(part.counters())
            return found

        return self._do(read)

    def burst_bytes(self, direction: Direction) -> int:
        """Return what may pass at once after an idle time, beyond the rate."""
        return self._do(lambda: self._parts[direction].burst_bytes(direction))

    def dial(self, direction: Direction) -> Dial:
        """Return what moves a direction's rate below its limit, for the chores of a group.

        Raises ThrottleError if that is not possible.
        """
        if direction not in self._parts:
            raise ThrottleError(f"the throttle {self.id} has no {direction} limit to share")
        return self._do(lambda: self._parts[direction].dial(direction))

    def foothold(self) -> Foothold:
        """Return where its packets pass, for programs that do more with them.

        Raises ThrottleError for what is limited by other means than eBPF, or by other processes.
        """
        return self._do(self._distinct_parts()[0].foothold)

    def attach_last(self) -> None:
        """Have what comes in meet the limit after all programs that are attached by now.

        Raises an error of this package.
        """
        self._do(self._distinct_parts()[0].attach_last)

    def set_limit(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change a limit while it is in force; None lifts it. Raises ThrottleError."""
        if direction not in self._parts:
            raise ThrottleError(f"this throttle has no {direction} limit to change; start another")
        self._set(direction, rate)

    def set(self, **limits: Any) -> None:
        """Change limits: ``set(download="2M", upload=None)``; None lifts one.

        Raises LimitError or ThrottleError.
        """
        for direction, rate in limits_of(**limits).items():
            self.set_limit(direction, rate)

    @property
    def paused(self) -> Limits:
        """The limits that are lifted for now, and that ``resume`` puts back."""
        return self.spec.paused

    def pause(self) -> None:
        """Lift the limits for now; the record says that, and to what. Raises ThrottleError."""
        for direction, rate in self.limits.items():
            if rate is not None:
                self._set(direction, None, paused=rate)

    def resume(self) -> None:
        """Put back the limits that were paused. Raises ThrottleError."""
        for direction, rate in dict(self.paused).items():
            self._set(direction, rate)

    def _set(
        self, direction: Direction, rate: Optional[Rate], *, paused: Optional[Rate] = None
    ) -> None:
        self._refuse_if_removed()
        self._do(lambda: self._parts[direction].set_rate(direction, rate, paused=paused))
        self.spec = self.spec.with_limit(direction, rate, paused)

    def switch(self, method: str) -> None:
        """Attach by another method, link or legacy; the limit stays in force throughout.

        Raises AttachError; then the old attachments remain.
        """

        def switch() -> None:
            for part in self._distinct_parts():
                part.switch(method)

        self._do(switch)

    def how(self) -> dict[Direction, dict[str, str]]:
        """Return how each direction is limited: backend, attach method and shaping."""
        return self._do(
            lambda: {direction: part.describe(direction) for direction, part in self._parts.items()}
        )

    def vanished(self) -> bool:
        """Whether nothing is left to limit, now or later."""
        if self._comings is not None or len(self._gone()) < len(self.cgroups):
            return False
        if self.selection is None:
            return True
        return not self.selection.waits and not self.processes()

    def ended(self) -> str:
        """Return why the throttle has ended; empty if it has not.

        ``removed``: somebody else removed it; ``exited``: all limited processes have ended;
        ``vanished``: the given cgroups are gone.
        """
        if self._do(lambda: any(part.removed_by_others() for part in self._distinct_parts())):
            return "removed"
        return "" if self._goes_on() else self._end

    @property
    def in_force(self) -> bool:
        """Whether the throttle was not removed, and has something to limit, now or later."""
        return not self._removed and not self.ended()

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now, and their children."""
        return self._do(
            lambda: sorted({pid for part in self._distinct_parts() for pid in part.processes()})
        )

    def notes(self) -> list[str]:
        """Return what is not covered, or covered in addition, a line each; more may come later."""
        found = self._do(lambda: [note for part in self._distinct_parts() for note in part.notes()])
        gone = [] if self.vanished() else [self._says_gone(one) for one in self._gone()]
        return list(dict.fromkeys([*self.plan_notes, *found, *self._said, *gone]))

    def why_vanished(self) -> str:
        """Return what became of the cgroups that are gone, for people."""
        return "; ".join(map(self._says_gone, self._gone()))

    def add(self, cgroup: Cgroup) -> None:
        """Limit another cgroup as a whole, too. Raises an error of this package."""

        def add() -> None:
            for part in self._distinct_parts():
                part.add(cgroup)

        self._do(add)
        self.cgroups = tuple(dict.fromkeys([*self.cgroups, cgroup]))
        self._ids.update(_ids([cgroup]))

    def is_on(self, cgroup: Cgroup) -> bool:
        """Whether a cgroup is limited, and not only one that was at its path before."""
        return cgroup in self._ids and cgroup.is_still(self._ids[cgroup])

    def follow(self, pids: Sequence[int]) -> None:
        """Limit more processes, if a rule chooses them. Raises an error of this package."""

        def follow() -> None:
            for part in self._distinct_parts():
                part.follow(pids)

        self._do(follow)

    def expect(self, names: Sequence[str]) -> bool:
        """Have processes that begin to have such a name limited before anybody looks at them.

        Returns whether the kernel can. Names are compared as far as it keeps them.
        """

        def expect() -> bool:
            can = [part.expect(names) for part in self._distinct_parts()]
            return all(can)

        return self._do(expect)

    def by_name(self, pids: Sequence[int]) -> frozenset[int]:
        """Return those of some processes that are limited for their names alone.

        Whoever expected them decides: ``follow`` makes them stay, ``let_go`` ends it.
        """
        parts = self._distinct_parts
        return self._do(lambda: frozenset(pid for part in parts() for pid in part.by_name(pids)))

    def let_go(self, pids: Sequence[int]) -> None:
        """Limit some processes no longer, nor the sockets that they have."""

        def let_go() -> None:
            for part in self._distinct_parts():
                part.let_go(pids)

        self._do(let_go)

    def chores(self) -> list[Chore]:
        """Return the chores for a supervisor to run while the throttle is in force."""
        if self._removed:
            return []
        found = [chore for part in self._distinct_parts() for chore in part.chores()]
        found += [] if self._queue is None else self._queue.chores()
        return found if self._comings is None else [self._comings, *found]

    def remove(self) -> None:
        """Remove the limits. Doing so twice is no error."""
        self._do(self._take_away)
        if self._driver is not None:
            driver, self._driver = self._driver, None
            driver.release()

    def lasts_as_long_as(self, goes_on: Callable[[], bool]) -> None:
        """End the throttle once ``goes_on`` returns False, or its cgroups are gone."""
        self._goes_on = lambda: goes_on() and not self.vanished()
        self._end = "exited"

    def follow_units(self, stand_ins: Mapping[Cgroup, str] = MappingProxyType({})) -> None:
        """Limit its units again when they restart, each in a new cgroup.

        The throttle then waits for units that do not run. ``stand_ins`` are cgroups in place of
        those that the named units do not have yet.
        """
        names = set(map(unit_name, self.spec.target.units))
        found = {cgroup: os.path.basename(cgroup.path) for cgroup in self.cgroups}
        found.update(stand_ins)
        units = [
            Unit(name, cgroup, self._ids[cgroup]) for cgroup, name in found.items() if name in names
        ]
        if units:
            self._comings = Comings(units, self._unit_moved, self._unit_stopped)
            self._undo.callback(self._comings.close)

    def close(self) -> None:
        """Release another process's throttle that was opened by ``open_record``."""
        self._undo.pop_all()
        for part in self._distinct_parts():
            part.close()

    def supervise(self) -> None:
        """Run the chores in a background thread of this process until the throttle is removed."""
        if self._driver is None:
            self._driver = InThread(self.chores)

    def __enter__(self) -> Throttle:
        if self._own:
            self.supervise()
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self.remove()
        else:
            self.close()

    async def __aenter__(self) -> Throttle:
        from asyncio import get_running_loop

        if self._own:
            if self._driver is not None:
                self._driver.release()
            self._driver = OnEventLoop(self.chores, get_running_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def __repr__(self) -> str:
        limits = ", ".join(f"{direction} {rate}" for direction, rate in self.limits.items())
        return f"<Throttle {self.id} {limits}>"

    def _unit_moved(self, unit: Unit, cgroup: Cgroup) -> bool:
        """Limit a unit in its new cgroup."""
        try:
            for part in self._distinct_parts():
                part.move(unit.cgroup, cgroup)
        except Error as error:
            self._say(f"{unit.name} was restarted and is no longer limited: {error}")
            return False
        self.cgroups = tuple(cgroup if one == unit.cgroup else one for one in self.cgroups)
        self._say(f"{unit.name} was restarted: it is limited again")
        return True

    def _unit_stopped(self, unit: Unit) -> None:
        self._say(f"{unit.name} is not running: the limit waits for it")

    def _say(self, note: str) -> None:
        # Only once: a service may restart all the time.
        if note not in self._said:
            log.info("%s", note)
            self._said[note] = None

    def _gone(self) -> list[Cgroup]:
        """Return the cgroups that are gone, except those of units."""
        if self._comings is not None:
            names = set(map(unit_name, self.spec.target.units))
            given = [one for one in self.cgroups if os.path.basename(one.path) not in names]
        else:
            given = list(self.cgroups)
        return [one for one in given if not one.is_still(self._ids.get(one, 0))]

    def _says_gone(self, cgroup: Cgroup) -> str:
        text = f"the cgroup {cgroup.path} was removed while it was limited"
        if cgroup.exists():
            text += "; a new one at the same path is not limited"
        return text

    def _take_away(self) -> None:
        self._removed = True  # The driver has no more chores from now on, before it is left too.
        self._undo.close()

    def _refuse_if_removed(self) -> None:
        if self._removed:
            raise ThrottleError(f"the throttle {self.id} was removed, and its counters with it")

    def _do(self, function: Callable[[], T]) -> T:
        return function() if self._driver is None else self._driver.call(function)

    def _distinct_parts(self) -> list[Part]:
        return list({id(part): part for part in self._parts.values()}.values())


def limits_of(download: Any = ..., upload: Any = ...) -> dict[Direction, Optional[Rate]]:
    """Return the limits that are given as a Rate, text, bytes per second, or None.

    Raises LimitError.
    """
    given = {Direction.DOWNLOAD: download, Direction.UPLOAD: upload}
    return {
        direction: None if rate is None else _rate(rate)
        for direction, rate in given.items()
        if rate is not ...
    }


def _rate(given: Any) -> Rate:
    if isinstance(given, Rate):
        return given
    return Rate.parse(given) if isinstance(given, str) else Rate.of(int(given))


def start(spec: ThrottleSpec, wish: Wish = Wish()) -> Throttle:  # noqa: B008 - immutable
    """Put a throttle in force by the best means that work here.

    Raises ThrottleError, BpfError, CgroupError or ProcessError; then nothing stays attached.
    """
    spec = spec.changed(target=targets.with_sockets(spec.target))
    with locked():
        selection, cgroups, situation = _resolved(spec, wish)

        def carry_out(plan: Plan, why: Optional[NoMarksError]) -> Throttle:
            return _carry_out(plan, spec, wish, selection, cgroups, why)

        try:
            return _first_that_works(_plans(situation, wish, list(spec.limits)), carry_out)
        except NoMarksError as error:
            if spec.target.matches or spec.target.by_rule:
                raise _no_marks(error) from error
            raise


def foresee(spec: ThrottleSpec, wish: Wish = Wish()) -> Plan:  # noqa: B008 - immutable
    """Return the plan that ``start`` would try first. Nothing is changed.

    Raises what ``start`` raises for what is refused beforehand.
    """
    *_, situation = _resolved(spec, wish)
    plan = next(_plans(situation, wish, list(spec.limits)))
    return plan.changed(notes=tuple(note.format(why=plan.why) for note in plan.notes))


def _resolved(
    spec: ThrottleSpec, wish: Wish
) -> tuple[Optional[Selection], Sequence[Cgroup], Situation]:
    """Return the processes and the cgroups that are to be limited, and what is known of them."""
    selection = targets.select(spec.target) if spec.target.processes else None
    cgroups = _whole_cgroups(spec.target, wish, selection)
    if not wish.stack:
        registry.refuse_limited(selection, cgroups)
    situation = Situation(
        processes=selection is not None,
        matches=spec.target.matches or spec.target.by_rule,
        shared=selection is not None and targets.share_cgroups(selection),
        kept=spec.kept,
    )
    return selection, cgroups, situation


def _first_that_works(
    found: Iterable[Plan], carry_out: Callable[[Plan, Optional[NoMarksError]], Throttle]
) -> Throttle:
    """Carry out plans until one works; the throttle's notes say which backends have failed.

    A plan is given why sockets could not be marked before. Raises the first error if none works,
    with why better backends than that have no plan.
    """
    why: Optional[NoMarksError] = None
    failures: list[tuple[Plan, Error]] = []
    for plan in found:
        if any(plan.backends == failed.backends for failed, _ in failures):
            continue
        try:
            throttle = carry_out(plan, why)
        except NoMarksError as error:
            why = error
        except (BpfError, BackendError) as error:
            log.info("Failed by %s: %s", plan.mechanism, error)
            failures.append((plan, error))
        else:
            notes = [f"{failed.mechanism} has failed: {error}" for failed, error in failures]
            throttle.plan_notes = (*notes, *throttle.plan_notes)
            return throttle
    if not failures:
        raise why or AssertionError("there is at least one plan")
    failed, failure = failures[0]
    reasons = _unavailable_before(failed)
    if isinstance(failure, BackendError) and reasons:
        raise BackendError(f"{failure}. Better ones: {'; '.join(reasons)}") from failure
    raise failure


def _unavailable_before(plan: Plan) -> list[str]:
    """Return why the backends that are better than a plan's are unavailable."""
    reasons: list[str] = []
    for backend in all_backends():
        if backend.name in plan.backends.values():
            break
        able = [direction for direction in plan.backends if direction in backend.directions]
        found = filter(None, map(backend.unavailable, able))
        reasons += [f"{backend.name}: {reason}" for reason in list(found)[:1]]
    return reasons


def _plans(situation: Situation, wish: Wish, directions: Sequence[Direction]) -> Iterator[Plan]:
    """Yield the plans, the best first. A backend is asked only if no better one has worked.

    Raises ThrottleError with each backend's reason if there is no plan.
    """
    for name in {*wish.backends.values()} - {"auto"}:
        get_backend(name)  # raises if there is none
    offers: list[Offer] = []
    yielded: list[Plan] = []
    refusal: Optional[ThrottleError] = None
    for backend in all_backends():
        wanted = {wish.backends.get(direction, "auto") for direction in directions}
        if backend.name not in wanted and ("auto" not in wanted or not _is_automatic(backend)):
            continue
        offers += [
            backend.offer(direction, match)
            for direction in directions
            if direction in backend.directions or wish.backends.get(direction) == backend.name
            for match in Match
        ]
        try:
            found = plans(situation, wish, directions, offers)
        except ThrottleError as error:
            refusal = error
            continue
        for plan in found:
            if not any(plan.same_as(before) for before in yielded):
                yielded.append(plan)
                yield plan
    if not yielded:
        raise refusal or AssertionError("there is at least one backend")


def _no_marks(why: Optional[NoMarksError]) -> ThrottleError:
    remedy = own_cgroups.without_one("use --cgroup or --unit")
    return ThrottleError(f"single processes cannot be limited here: {why}; {remedy}")


def _whole_cgroups(target: Target, wish: Wish, selection: Optional[Selection]) -> list[Cgroup]:
    """Return the cgroups requested, either directly or as those of processes."""
    if selection is None:
        return targets.given_cgroups(target, insist=wish.insist)
    return targets.whole_cgroups(selection) if wish.matching == "whole-cgroup" else []


def _carry_out(
    plan: Plan,
    spec: ThrottleSpec,
    wish: Wish,
    selection: Optional[Selection],
    cgroups: Sequence[Cgroup],
    why: Optional[NoMarksError],
) -> Throttle:
    """Put a throttle in force by one plan. Raises NoMarksError if the next one may work."""
    notes = [note.format(why=why or plan.why) for note in plan.notes]
    throttle = _place(plan, spec, wish, selection, cgroups)
    with _removed_on_failure(throttle):
        if selection is None:
            throttle.follow_units()
        else:
            moved = plan.place in (Place.MOVED, Place.MOVED_ONLY)
            notes.append(targets.reaches_far(selection, moved=moved))
            if moved and not selection.children:
                notes.append(
                    "What they start from now on is limited too: it begins in that cgroup."
                )
    throttle.plan_notes = tuple(filter(None, notes))
    return throttle


def _place(
    plan: Plan,
    spec: ThrottleSpec,
    wish: Wish,
    selection: Optional[Selection],
    cgroups: Sequence[Cgroup],
) -> Throttle:
    """Put a throttle in force where a plan says."""
    if selection is None:
        return _enforce(spec, plan.backends, cgroups, None, wish.options, ExitStack())
    if plan.place is Place.SOCKETS:
        return _enforce(spec, plan.backends, [], selection, wish.options, ExitStack())
    if plan.place is Place.CGROUPS:
        cgroups = cgroups or targets.own_cgroups(selection)
        throttle = _enforce(spec, plan.backends, cgroups, None, wish.options, ExitStack())
        throttle.lasts_as_long_as(lambda: any(one.alive() for one in selection.processes))
        return throttle
    return _move(plan, spec, wish, selection)


@contextmanager
def _removed_on_failure(throttle: Throttle) -> Iterator[None]:
    """Leave nothing in force if what follows fails."""
    try:
        yield
    except BaseException:
        throttle.remove()
        raise


def _move(plan: Plan, spec: ThrottleSpec, wish: Wish, selection: Selection) -> Throttle:
    """Move processes into cgroups of their own, and limit those."""
    # First move back what a crash has left behind, or processes would later return there.
    own_cgroups.remove_abandoned()
    before = selection._replace(new_sockets=False) if plan.place is Place.MOVED else None
    with ExitStack() as undo:
        moved = undo.enter_context(Moved(one.pid for one in selection.processes))
        throttle = _enforce(spec, plan.backends, moved.cgroups, before, wish.options, undo)
        undo.callback(throttle.remove)
        moved.move(children=selection.children)
        undo.pop_all()
    throttle.lasts_as_long_as(moved.populated)
    throttle.what = f"{selection}, moved"
    return throttle


def apply(
    cgroups: Sequence[Cgroup],
    limits: Limits,
    *,
    processes: Optional[Selection] = None,
    traffic: Traffic = Traffic(),  # noqa: B008 - immutable
    options: Any = None,
    backends: Mapping[Direction, str] = MappingProxyType({}),
    target: Optional[Target] = None,
    name: str = "",
    command: Optional[Process] = None,
) -> Throttle:
    """Put shared limits in force on exactly these cgroups, whatever else is limited there.

    With ``processes`` the limits apply to their sockets, whatever the cgroup. ``options`` are for
    the eBPF backend. ``backends`` names a mechanism for a direction; the default is the best one
    available. ``target`` and ``name`` go into the record that others see. ``command`` and its
    children are limited even if they leave the cgroups. Raises ThrottleError, BpfError,
    CgroupError or ProcessError; then nothing stays attached.
    """
    if not limits:
        raise ThrottleError("no limit was given")
    spec = ThrottleSpec(
        target or targets.target_of(processes, cgroups), dict(limits), traffic, name
    )
    chosen = {
        direction: choose(
            direction,
            backends.get(direction, "auto"),
            Match.CGROUP if processes is None else Match.MARKS,
        ).name
        for direction in limits
    }
    with cgroups_v2.mounted_once():
        return _enforce(
            *(spec, chosen, cgroups, processes, {"ebpf": options}, ExitStack()), command=command
        )


def _enforce(
    spec: ThrottleSpec,
    chosen: Mapping[Direction, str],
    cgroups: Sequence[Cgroup],
    processes: Optional[Selection],
    options: Mapping[str, Any],
    undo: ExitStack,
    ready: Mapping[str, Ready] = MappingProxyType({}),
    command: Optional[Process] = None,
    throttle_id: Optional[str] = None,
) -> Throttle:
    """Have each backend put its directions in force.

    ``undo`` passes to the throttle; if there is none, all of it is undone.

    ``ready`` has what backends have prepared for similar orders.
    """
    throttle_id = throttle_id or registry.new_id()
    ids = _ids(cgroups)
    parts: dict[Direction, Part] = {}
    with undo:
        for name in dict.fromkeys(chosen.values()):
            order = _order(spec, name, chosen, cgroups, processes, options)
            order = order._replace(command=command)
            part = (ready[name] if name in ready else get_backend(name)).apply(order, throttle_id)
            undo.callback(part.remove)
            parts.update(dict.fromkeys(order.limits, part))
        queue = _queue_for(parts.get(Direction.DOWNLOAD), undo)
        kept = undo.pop_all()
    return Throttle(throttle_id, spec, parts, cgroups, processes, kept, ids=ids, queue=queue)


def _queue_for(part: Optional[Part], undo: ExitStack) -> Optional[LimitQueue]:
    """Return the queue that downloads may get, if their backend can do with one."""
    if part is None or not _can_queue(type(part)):
        return None
    from pybpfthrottle.diversion.limit_queue import LimitQueue

    queue = LimitQueue(cast(Queueable, part))
    undo.callback(queue.close)
    return queue


@cache
def _can_queue(kind: type[Part]) -> bool:
    # Python asks for each method of a protocol, each time.
    return issubclass(kind, Queueable)


def _order(
    spec: ThrottleSpec,
    name: str,
    chosen: Mapping[Direction, str],
    cgroups: Sequence[Cgroup],
    processes: Optional[Selection],
    options: Mapping[str, Any],
) -> Order:
    """Return the order for one backend."""
    limits = {
        direction: rate for direction, rate in spec.limits.items() if chosen[direction] == name
    }
    return Order(spec, limits, cgroups, processes, options.get(name))


def _ids(cgroups: Iterable[Cgroup]) -> dict[Cgroup, int]:
    """Return the ids of cgroups; 0 for one that is gone."""
    found = dict.fromkeys(cgroups, 0)
    for cgroup in found:
        with suppress(OSError):
            found[cgroup] = cgroup.id
    return found


def open_record(record: Record) -> Throttle:
    """Open a throttle that is in force, whoever made it; ``close`` releases it.

    Raises ThrottleError if it is gone.
    """
    part = get_backend(record.backend).open(record)
    undo = ExitStack()
    undo.callback(part.remove)
    return Throttle(
        record.id,
        record.spec,
        dict.fromkeys(record.spec.limits, part),
        record.visible_cgroups(),
        None,
        undo,
        own=False,
    )


def take_over(records: Sequence[Record], options: Mapping[str, Any]) -> Throttle:
    """Keep a throttle from now on whose process has ended; ``records`` are those of its parts.

    It is put in force anew, and counts anew. Raises ThrottleError, BpfError, CgroupError or
    ProcessError; then it is not in force any more.
    """
    first = records[0]
    limits = {one: rate for record in records for one, rate in record.spec.limits.items()}
    paused = {one: rate for record in records for one, rate in record.spec.paused.items()}
    spec = first.spec.changed(limits=limits, paused=paused)
    chosen = {one: record.backend for record in records for one in record.spec.limits}
    with locked(), ExitStack() as undo:
        pids = get_backend(first.backend).processes(first)
        for record in records:
            undo.callback(get_backend(record.backend).open(record).hand_over())
        selection, cgroups = _still_there(first, pids)
        stand_ins = _stand_ins(first, cgroups, undo)
        throttle = _enforce(
            *(spec, chosen, [*cgroups, *stand_ins], selection, options, ExitStack()),
            throttle_id=first.id,
        )
    if selection is None:
        with _removed_on_failure(throttle):
            throttle.follow_units(stand_ins)
        throttle.what = ", ".join([*(one.path for one in cgroups), *stand_ins.values()])
    return throttle


def _stand_ins(record: Record, cgroups: Sequence[Cgroup], undo: ExitStack) -> dict[Cgroup, str]:
    """Make a cgroup for each unit of a throttle that does not run, and is waited for.

    ``undo`` removes them: then it is as if the units had stopped. Raises CgroupError.
    """
    stand_ins: dict[Cgroup, str] = {}
    running = {os.path.basename(cgroup.path) for cgroup in cgroups}
    for name in sorted(set(map(unit_name, record.spec.target.units)) - running):
        # The unit's own first; others are of the same slice, or stood in for it.
        before = sorted(record.cgroups, key=lambda path: os.path.basename(path) != name)
        parents = [Cgroup(os.path.dirname(path)) for path in before]
        try:
            parent = next(filter(Cgroup.exists, parents), cgroups_v2.root())
            made = own_cgroups.create_empty(parent)
        except OSError as error:
            raise CgroupError(f"cannot wait for {name}: {error.strerror}") from error
        undo.callback(made.remove)
        stand_ins[made.cgroup] = name
    return stand_ins


def _still_there(record: Record, pids: Sequence[int]) -> tuple[Optional[Selection], list[Cgroup]]:
    """Return the processes or the cgroups of a throttle that has limited ``pids`` until now."""
    if record.match is Match.CGROUP:
        return None, _cgroups_again(record)
    target = record.spec.target
    if target.by_rule:
        found = tuple(Process(pid) for pid in pids if not has_ended(pid))
        return targets.select(target)._replace(processes=found), []
    if target.pids:
        # Its children too; a number that has been given to another process is not among these.
        target = target.changed(pids=tuple(pids))
        if not pids and not target.matches:
            raise ProcessError("all processes that it limited have ended")
    return targets.select(target), []


def _cgroups_again(record: Record) -> list[Cgroup]:
    """Return the cgroups of a throttle that are left, with the new ones of restarted units."""
    found = record.visible_cgroups()
    for name in record.spec.target.units:
        with suppress(CgroupError):
            found.append(cgroups_v2.from_unit(name))
    return list(dict.fromkeys(found))


def prepare() -> None:
    """Do slow work ahead of ``apply``, for example in a thread."""
    next(all_backends()).prepare()  # the best is most likely the one


def choose(direction: Direction, name: str = "auto", match: Match = Match.CGROUP) -> Backend:
    """Return the named backend, or the best available one, for a way of matching.

    Raises ThrottleError that says why each backend is unavailable.
    """
    able = [one for one in all_backends() if direction in one.directions and _is_automatic(one)]
    candidates = able if name == "auto" else [get_backend(name)]
    reasons = []
    for backend in candidates:
        reason = backend.offer(direction, match).refused
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ThrottleError(f"cannot limit {direction}: {'; '.join(reasons)}")


def _is_automatic(backend: Backend) -> bool:
    """Whether a backend may be used without being named."""
    return backend.priority is not Priority.FALLBACK


def start_command(pid: int, spec: ThrottleSpec, wish: Wish) -> tuple[Throttle, Optional[OwnCgroup]]:
    """Limit a process that is held back, and what it will start, in a cgroup of its own.

    Where nothing can be attached there beside the programs of others, its sockets are limited,
    and no cgroup is returned; the caller removes one that is. Raises ThrottleError, BpfError,
    CgroupError or ProcessError.
    """
    cgroups_v2.mount()  # it tells best what is missing
    origin = cgroups_v2.from_pid(pid)
    own = own_cgroups.create_for(pid, escapes=partial(_escapes, origin))
    with ExitStack() as undo:
        undo.callback(own.remove)
        undo.callback(_move_back, pid, origin)

        def carry_out(plan: Plan, why: Optional[NoMarksError]) -> Throttle:
            try:
                throttle = _apply_plan(plan, spec, wish, [own.cgroup], command=Process(pid))
            except AttachError as error:
                return _limit_sockets(pid, plan, spec, wish, error)
            throttle.plan_notes = plan.notes
            return throttle

        found = _plans(Situation(processes=False), wish, list(spec.limits))
        throttle = _first_that_works(found, carry_out)
        if throttle.cgroups:
            undo.pop_all()
            return throttle, own
    return throttle, None


def _escapes(origin: Cgroup, parent: Cgroup) -> str:
    """Return the programs that packets of a cgroup pass, and would not if they came from another.

    Nobody's firewall is to be left by a limit.
    """
    # Only what is attached to cgroups itself can be left, so that no other backend is asked.
    lost = [program for name in CARRYING for program in get_backend(name).left(origin, parent)]
    return ", ".join(lost)


def _move_back(pid: int, origin: Cgroup) -> None:
    with suppress(ProcessLookupError):
        origin.move_in(pid)


def _limit_sockets(
    pid: int, plan: Plan, spec: ThrottleSpec, wish: Wish, why: AttachError
) -> Throttle:
    """Limit a process by marks on its sockets. Raises ``why`` where that is refused as well."""
    try:
        selection = targets.select(Target(pids=(pid,)))
        throttle = _apply_plan(plan, spec, wish, [], selection=selection)
    except (NoMarksError, BpfError) as error:
        log.info("Cannot limit the command's sockets either: %s", error)
        raise why from error
    throttle.plan_notes = (f"the command's sockets are limited, not a cgroup: {why}",)
    return throttle


def _apply_plan(
    plan: Plan,
    spec: ThrottleSpec,
    wish: Wish,
    cgroups: Sequence[Cgroup],
    *,
    selection: Optional[Selection] = None,
    command: Optional[Process] = None,
) -> Throttle:
    with locked():
        return _enforce(
            *(spec, plan.backends, cgroups, selection, wish.options, ExitStack()), command=command
        )


class Each:
    """A throttle for each process of a target, now and later. ``remove`` or ``with`` ends all.

    As a chore it limits a process as soon as it executes a matching program, if the kernel reports
    that. Loading may take longer than a download, so some throttles are loaded ahead.
    """

    _PERIOD_S = 1.0
    _AHEAD = 2
    _ASK_PERIOD_S, _ASK_PATIENCE_S = 0.02, 5.0

    def __init__(self, spec: ThrottleSpec, wish: Wish) -> None:
        """Limit the processes that match now. Raises what ``start`` raises."""
        self._spec = spec
        self._wish = wish
        self._selection = targets.select(spec.target)
        self._backends = {
            direction: choose(direction, wish.backends.get(direction, "auto"), Match.MARKS).name
            for direction in spec.limits
        }
        self.throttles: list[Throttle] = []
        # Called with each throttle that begins later.
        self.begun: Callable[[Throttle], None] = lambda throttle: None
        self._notes: dict[str, None] = {}
        self._executions: Optional[Executions] = None
        self._ready: list[dict[str, Ready]] = []
        # Throttles that began at once and still have to be checked for conflicts, each with the
        # deadline until which to wait for others that are about to limit something.
        self._unasked: list[tuple[Throttle, float]] = []
        self.due_s = self._look_s = math.inf
        with ExitStack() as undo:
            undo.callback(self.remove)
            try:
                self._begin_all()
            except NoMarksError as error:
                raise _no_marks(error) from error
            undo.pop_all()

    def _begin_all(self) -> None:
        """Limit the processes that are there, and be ready for those that come."""
        if self.waits():
            self._look_s = 0.0
            # First: who is started while others are limited is not missed.
            self._listen()
            self._make_ready()
        for pid in self._spec.target.pids:
            self._begin(pid)
        self._limit(self._selection.matching())
        self._set_due()

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._executions is None else self._executions.fileno()

    def run(self) -> None:
        """Limit the processes that match and have no limit yet."""
        if self._executions is not None:
            executed = set(self._executions.executed())
            self._limit((pid for pid in executed if self._selection.matches(pid)), at_once=True)
        if self._unasked:
            self._ask()
        if time.monotonic() >= self._look_s:
            self._look_s = time.monotonic() + self._PERIOD_S
            self._limit(self._selection.matching())
        elif len(self._ready) < self._AHEAD:
            try:
                self._make_ready()
            except (Error, OSError) as error:  # later processes have to wait longer
                log.info("Cannot load programs in advance: %s", error)
                self.due_s = self._look_s
                return
        self._set_due()

    def notes(self) -> list[str]:
        """Return what is not limited, or was limited with a delay, a line each."""
        return list(self._notes)

    def _set_due(self) -> None:
        # One at a time: new processes may arrive in between.
        lacks = self.waits() and len(self._ready) < self._AHEAD
        self.due_s = 0.0 if lacks else self._look_s
        if self._unasked:
            self.due_s = min(self.due_s, time.monotonic() + self._ASK_PERIOD_S)

    def _listen(self) -> None:
        backend = get_backend(next(iter(self._backends.values())))
        try:
            self._executions = backend.executions()
        except (Error, OSError) as error:
            self._notes[
                f"new processes are limited within {self._PERIOD_S:g} s, not at once, because the"
                f" kernel does not report when they start: {error}"
            ] = None

    def _make_ready(self) -> None:
        """Load one throttle ahead. Raises what ``start`` raises."""
        nobody = Selection(children=self._spec.target.children)
        made: dict[str, Ready] = {}
        with ExitStack() as undo:
            for name in dict.fromkeys(self._backends.values()):
                order = _order(self._spec, name, self._backends, [], nobody, self._wish.options)
                made[name] = get_backend(name).make_ready(order)
                undo.callback(made[name].remove)
            undo.pop_all()
        self._ready.append(made)

    def _limit(self, pids: Iterable[int], *, at_once: bool = False) -> None:
        """Limit the processes that have no limit yet."""
        wanted = set(pids)
        if not wanted:
            return
        limited = {pid for throttle in self.throttles for pid in throttle.processes()}
        for pid in wanted - limited:
            try:
                if at_once:
                    self._begin_at_once(pid)
                else:
                    self.begun(self._begin(pid))
            except ProcessError as error:  # it has ended, or another instance limits it
                log.info("Process %d is not limited: %s", pid, error)
            except Error as error:
                self._notes[f"a process that matches is not limited: {error}"] = None

    def end(self, throttle: Throttle) -> None:
        """Remove one throttle."""
        self.throttles.remove(throttle)
        throttle.remove()

    def waits(self) -> bool:
        """Whether later processes may come."""
        return self._selection.matches_some

    def chores(self) -> list[Chore]:
        """Return the chores of all throttles."""
        return [self, *(chore for throttle in self.throttles for chore in throttle.chores())]

    def remove(self) -> None:
        """Remove all throttles."""
        with ExitStack() as stack:
            if self._executions is not None:
                stack.callback(self._executions.close)
            for one in [one for made in self._ready for one in made.values()]:
                stack.callback(one.remove)
            for throttle in self.throttles:
                stack.callback(throttle.remove)
            self.throttles, self._ready = [], []

    def __enter__(self) -> Each:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, pid: int) -> Throttle:
        """Limit a process. Raises ProcessError if another instance does."""
        with locked():
            if not self._wish.stack:
                registry.refuse_limited(targets.select(self._target(pid)), [])
            throttle = self._put_in_force(pid)
        self.throttles.append(throttle)
        return throttle

    def _begin_at_once(self, pid: int) -> None:
        """Limit a process that may be transferring already; check for other limits later.

        Other instances may take a while to put limits in force; do not wait for them here.
        """
        throttle = self._put_in_force(pid)
        self.throttles.append(throttle)
        self._unasked.append((throttle, time.monotonic() + self._ASK_PATIENCE_S))

    def _ask(self) -> None:
        """Remove throttles on what another instance limits; the others have begun."""
        with locked_if_free() as is_free:
            if not is_free and time.monotonic() < self._unasked[0][1]:
                return
            unasked, self._unasked = self._unasked, []
            for throttle, _ in unasked:
                try:
                    if not self._wish.stack:
                        registry.refuse_limited(throttle.selection, [])
                    self.begun(throttle)
                except ProcessError as error:
                    log.info("Not limited: %s: %s", throttle.what, error)
                    self.end(throttle)

    def _put_in_force(self, pid: int) -> Throttle:
        target = self._target(pid)
        spec = self._spec.changed(target=target)
        with ExitStack() as undo:
            ready = self._ready.pop(0) if self._ready else {}
            for one in ready.values():
                undo.callback(one.remove)
            throttle = _enforce(
                *(spec, self._backends, [], targets.select(target)),
                *(self._wish.options, ExitStack(), ready),
            )
            undo.pop_all()
        return throttle

    def _target(self, pid: int) -> Target:
        return Target(pids=(pid,), children=self._spec.target.children)
