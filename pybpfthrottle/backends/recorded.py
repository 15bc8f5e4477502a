"""Throttles whose record is a file: this process's own, another's, and what a crash has left.

What all of them do is here; what differs is the ``Rules`` that a backend puts in force.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import (
    Any,
    Callable,
    ClassVar,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
)

from pybpfthrottle.backends import files
from pybpfthrottle.backends.files import OwnFile
from pybpfthrottle.backends.protocol import (
    ChoosesOnce,
    Dial,
    Executions,
    Match,
    Order,
    Record,
    no_dial,
)
from pybpfthrottle.bpf.obj.plain import Protocol
from pybpfthrottle.errors import BackendError, Error, NoNamespaceError, ProcessError, ThrottleError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import clock, netns, process
from pybpfthrottle.linux.cgroup import Cgroup, locked, locked_if_free
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.supervisor import Chore, Periodic
from pybpfthrottle.targets import Selection, select

log = Logger(__name__)

# How soon it is noticed that somebody has removed the rules: each look starts a program, for 4 ms.
_LOOK_S = 0.5
_LOOK_FOR_STRANGERS_S = 2.0


class State(NamedTuple):
    """Rules as they are. ``intact``: nobody has removed any of them."""

    counters: dict[Direction, Counters]
    intact: bool


class Rules(Protocol):
    """What limits one order, in one network namespace. All methods raise BackendError."""

    @property
    def name(self) -> str:
        """What limits, for people: ``table pybpfthrottle-abcdef``."""

    @property
    def handles(self) -> Mapping[str, Any]:
        """What finds it again, for the record."""

    def create(self, limits: Limits, order: Order, counters: Mapping[Direction, Counters]) -> None:
        """Put it in force, in place of what is damaged; the counters begin at these values."""

    def set_limit(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change a limit; the counters continue."""

    def set_cgroups(self, directions: Sequence[Direction], cgroups: Sequence[Cgroup]) -> None:
        """Limit these cgroups instead; the counters continue."""

    def state(self, directions: Sequence[Direction], cgroups: int) -> Optional[State]:
        """Return what is there, of rules for so many cgroups; None if it is gone."""

    def delete(self) -> object:
        """Remove what is there and the throttle's. Doing so twice is no error."""

    def chores(self) -> Sequence[Chore]:
        """Return what has to be done beside looking for changes by others."""

    def notes(self) -> Sequence[str]:
        """Return what the user should know, a line each."""

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now; none if cgroups are limited."""

    def close(self) -> None:
        """Release resources of this process; what is in force stays."""


# Records the changed handles of rules. Raises BackendError.
Save = Callable[[Mapping[str, Any]], None]


class Kind(NamedTuple):
    """What a backend puts in force.

    ``open`` makes the rules of a throttle in a network namespace; nothing is in force by that.
    ``how`` tells how a rate is kept, ``burst_bytes`` what may pass at once after an idle time.
    ``leftovers`` is what a crash leaves, in the plural; ``usual_cause`` what others may do to it.
    ``cannot_block`` is why it cannot let nothing pass, or empty.
    """

    backend: str
    open: Callable[[str, Order, Place, Mapping[str, Any], Save], Rules]
    how: Callable[[Optional[Rate]], Mapping[str, str]]
    burst_bytes: Callable[[Optional[Rate]], int]
    leftovers: str
    usual_cause: str
    cannot_block: str = ""

    def check(self, rate: Optional[Rate]) -> None:
        """Raise BackendError for what it cannot limit to."""
        if self.cannot_block and rate is not None and rate.is_blocked:
            raise BackendError(f"{self.backend} cannot block: {self.cannot_block}")


class OwnThrottle(ChoosesOnce):
    """The limits of one order. ``put_in_force`` creates the rules, ``remove`` deletes them."""

    def __init__(self, kind: Kind, order: Order, throttle_id: str) -> None:
        self._kind = kind
        self._order = order
        self._id = throttle_id
        self._limits = dict(order.limits)
        self._counters = dict.fromkeys(order.limits, Counters())
        self._file = OwnFile(self)
        self._rules: Rules
        self._place = Place(0)
        self._seen_s = -math.inf
        self._restored = False
        self._lost = False
        self._notes: dict[str, None] = {}
        self._undo = ExitStack()
        self._looking = Periodic(_LOOK_S, self._look)
        self._looking_for_strangers = Periodic(_LOOK_FOR_STRANGERS_S, self._look_for_strangers)

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""
        return self._limits

    def put_in_force(self) -> None:
        """Create the rules. Raises BackendError; then all is undone."""
        try:
            for rate in self._limits.values():
                self._kind.check(rate)
            namespace = self._most_common_namespace()
            self._place = Place(namespace, netns.cookie(namespace))
            # Which numbers are free is not to change until they are used.
            with locked():
                self._rules = self._kind.open(self._id, self._order, self._place, {}, self._save)
                self._undo.callback(self._rules.close)
                self._file.create(self._record())
                self._undo.callback(self._withdraw)
                self._rules.create(self._limits, self._order, {})
        except BaseException:
            # What cannot be deleted now stays recorded, for the next start.
            with suppress(BackendError):
                self.remove()
            raise
        for direction, rate in self._limits.items():
            log.info("%s: limited to %s by the %s", direction, rate, self._rules.name)
        self._look_for_strangers()

    def _save(self, handles: Mapping[str, Any]) -> None:
        self._file.update(handles={**self._where, **handles})

    @property
    def _where(self) -> dict[str, int]:
        """The network namespace, as a record has it."""
        return {"network_namespace": self._place.number, "network_cookie": self._place.cookie}

    def _most_common_namespace(self) -> int:
        """Return the network namespace that most of the processes are in."""
        found = Counter(_namespaces(self._pids()).values())
        own = netns.number()
        return own if own in found or not found else found.most_common(1)[0][0]

    def _pids(self) -> list[int]:
        """Return the processes that are limited, or are about to be."""
        found = [*self._order.spec.target.pids]
        if self._order.command is not None:
            found.append(self._order.command.pid)
        for cgroup in self._order.cgroups:
            with suppress(OSError):
                found += cgroup.pids_below()
        return found

    def _record(self) -> Record:
        cgroups = self._order.cgroups
        return Record(
            id=self._id,
            spec=self._order.spec.changed(limits=self._limits),
            owner=process.identity(),
            backend=self._kind.backend,
            match=Match.CGROUP if cgroups else Match.MARKS,
            cgroups=tuple(cgroup.path for cgroup in cgroups),
            cgroup_ids=tuple(cgroups_v2.ids(cgroups)),
            kept=self._order.spec.kept,
            since_ns=clock.boottime_ns(),
            attached_by=self._rules.name,
            handles={**self._where, **self._rules.handles},
        )

    # Somebody else may remove the rules.

    def _look(self) -> None:
        if self._lost or self._file.removed_by_others:
            return
        # Whoever shows the rates has just looked.
        if time.monotonic() - self._seen_s < _LOOK_S / 2 or self._is_intact():
            return
        # Who removes the throttle holds the lock, and deletes the file after the rules.
        with locked_if_free() as is_free:
            if is_free and self._file.exists():
                self._restore()

    def _is_intact(self) -> bool:
        """Whether all of the rules are there; then note their counters. Raises BackendError."""
        state = self._rules.state(list(self._limits), len(self._order.cgroups))
        if state is None or not state.intact:
            return False
        self._counters, self._seen_s = state.counters, time.monotonic()
        return True

    def _restore(self) -> None:
        """Put the rules back, once: whoever removes them again means it."""
        name = self._rules.name
        if self._restored:
            self._lost = True
            self._say(f"the {name} was removed again, not by pybpfthrottle: the limit ends")
            return
        # If that fails, the next look tries it again.
        self._rules.create(self._limits, self._order, self._counters)
        self._restored = True
        self._say(
            f"the {name} was removed, not by pybpfthrottle ({self._kind.usual_cause}?): it was"
            " restored, and will not be a second time"
        )

    def _look_for_strangers(self) -> None:
        """Note the processes in other network namespaces, where no rule sees their packets."""
        strangers = [
            pid for pid, number in _namespaces(self._pids()).items() if number != self._place.number
        ]
        if strangers:
            self._say(
                f"{process.listed(strangers)}: not limited by {self._kind.backend}, because the"
                " limit is in another network namespace"
            )

    def _say(self, note: str) -> None:
        if note not in self._notes:
            log.warning("%s", note)
            self._notes[note] = None

    # What others do with it.

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted; what is known if the rules are gone."""
        with suppress(BackendError):
            self._is_intact()
        return dict(self._counters)

    def burst_bytes(self, direction: Direction) -> int:
        """Return how much may pass at once after an idle time, beyond the rate."""
        return self._kind.burst_bytes(self._limits[direction])

    def set_rate(
        self, direction: Direction, rate: Optional[Rate], *, paused: Optional[Rate] = None
    ) -> None:
        """Change the limit of a direction; None lifts it. Raises BackendError."""
        self._kind.check(rate)
        with locked():
            self._rules.set_limit(direction, rate)
            self._limits[direction] = rate
            self._file.set_limit(direction, rate, paused)

    def adopt_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Take notice of a limit that somebody else has put in force."""
        self._limits[direction] = rate

    def dial(self, direction: Direction) -> Dial:
        """Raise ThrottleError: each change starts a program."""
        raise no_dial(self._kind.backend)

    def switch(self, method: str) -> None:
        """Raise ThrottleError: there is only one way."""
        raise _no_methods(self._kind, method)

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Limit the cgroup ``come`` instead of ``gone``, which was removed. Raises BackendError."""
        self._set_cgroups([come if one == gone else one for one in self._order.cgroups])

    def add(self, cgroup: Cgroup) -> None:
        """Limit another cgroup, too. Raises BackendError."""
        self._set_cgroups(list(dict.fromkeys([*self._order.cgroups, cgroup])))

    def _set_cgroups(self, cgroups: Sequence[Cgroup]) -> None:
        with locked():
            self._rules.set_cgroups(list(self._limits), cgroups)
            self._order = self._order._replace(cgroups=cgroups)
            self._file.update(
                cgroups=tuple(one.path for one in cgroups),
                cgroup_ids=tuple(cgroups_v2.ids(cgroups)),
            )

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how a direction is limited."""
        return _how(self._kind, self._limits[direction], self._rules.name)

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now; none if cgroups are limited."""
        return self._rules.processes()

    def notes(self) -> Sequence[str]:
        """Return what is not covered, and what others have done, a line each."""
        return [*self._rules.notes(), *self._notes]

    def chores(self) -> Sequence[Chore]:
        """Return the chores that notice what others do."""
        own = [self._file.chore, self._looking, self._looking_for_strangers]
        return [*own, *self._rules.chores()]

    def removed_by_others(self) -> bool:
        """Whether somebody else has removed the limit."""
        return self._lost or self._file.removed_by_others

    def hand_over(self) -> Callable[[], None]:
        """Remove the throttle: its successor's rules and record have the same names."""
        self.remove()
        return lambda: None

    def remove(self) -> None:
        """Delete the rules and the file."""
        with locked():
            self._undo.close()

    def _withdraw(self) -> None:
        self._rules.delete()
        self._file.delete()

    def close(self) -> None:
        """Remove the throttle: it does not outlive this process."""
        self.remove()


class FoundThrottle(ChoosesOnce):
    """A throttle of another process. ``close`` leaves it in force."""

    def __init__(self, kind: Kind, record: Record) -> None:
        """Raises ThrottleError if it is gone."""
        self._kind = kind
        self._found = record
        self._limits = dict(record.spec.limits)
        self._rules = _open(kind, record)

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""
        return self._limits

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted. Raises ThrottleError if the rules are gone."""
        state = self._rules.state(list(self._limits), len(self._found.cgroups))
        if state is None:
            raise ThrottleError(f"the throttle {self._found.id} is gone")
        return state.counters

    def burst_bytes(self, direction: Direction) -> int:
        """Return how much may pass at once after an idle time, beyond the rate."""
        return self._kind.burst_bytes(self._limits[direction])

    def set_rate(
        self, direction: Direction, rate: Optional[Rate], *, paused: Optional[Rate] = None
    ) -> None:
        """Change the limit of a direction at once, and tell its owner. Raises BackendError."""
        self._kind.check(rate)
        with locked():
            self._rules.set_limit(direction, rate)
            self._limits[direction] = rate
            files.set_limit(self._found, direction, rate, paused)

    def dial(self, direction: Direction) -> Dial:
        """Raise ThrottleError: each change starts a program."""
        raise no_dial(self._kind.backend)

    def switch(self, method: str) -> None:
        """Raise ThrottleError: there is only one way."""
        raise _no_methods(self._kind, method)

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how a direction is limited."""
        return _how(self._kind, self._limits[direction], self._rules.name)

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now; none if cgroups are limited."""
        return self._rules.processes()

    def notes(self) -> Sequence[str]:
        """Return nothing: only the owner knows."""
        return ()

    def chores(self) -> Sequence[Chore]:
        """Return nothing: the owner does the chores."""
        return ()

    def removed_by_others(self) -> bool:
        """Whether the throttle has been removed in the meantime."""
        return files.read(self._kind.backend, self._found.id) is None

    def hand_over(self) -> Callable[[], None]:
        """Remove the throttle: its successor's rules and record have the same names."""
        self.remove()
        return lambda: None

    def remove(self) -> None:
        """Delete the rules and the file, by which its owner notices and exits."""
        with locked():
            self._rules.delete()
            files.delete(self._kind.backend, self._found.id)
        self.close()

    def close(self) -> None:
        """Leave the throttle in force."""
        self._rules.close()


class Leftover(NamedTuple):
    """The rules of a throttle whose owner was killed."""

    rules: Kind
    record: Record

    def __str__(self) -> str:
        found = self.record
        return f"the {found.attached_by} of {found.backend}, of process {found.owner.pid}"

    @property
    def kind(self) -> str:
        """What it is, in the plural."""
        return self.rules.leftovers

    def to_json(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "id": self.record.id,
            "name": self.record.attached_by.rpartition(" ")[2],
            "owner_pid": self.record.owner.pid,
        }

    def remove(self) -> None:
        """Delete the rules, unless they went with their network namespace. Raises BackendError."""
        with locked():
            with suppress(NoNamespaceError):
                rules = _open(self.rules, self.record)
                try:
                    rules.delete()
                finally:
                    rules.close()
            files.delete(self.rules.backend, self.record.id)


def leftovers(kind: Kind) -> list[Leftover]:
    """Return what was left by killed owners."""
    return [
        Leftover(kind, record)
        for record in files.records(kind.backend)
        if not record.kept and process.is_gone(record.owner)
    ]


def order_of(record: Record) -> Order:
    """Return the order that a throttle was made for, as far as its target is still there."""
    selection = None
    if record.match is Match.MARKS:
        selection = Selection()
        with suppress(ProcessError):
            selection = select(record.spec.target)
    return Order(record.spec, record.spec.limits, record.visible_cgroups(), selection)


def _open(kind: Kind, record: Record) -> Rules:
    """Return the rules of a record. Raises NoNamespaceError if their namespace is gone."""

    def save(handles: Mapping[str, Any]) -> None:
        files.update(kind.backend, record.id, handles={**record.handles, **handles})

    handles = record.handles
    place = Place(int(handles["network_namespace"]), int(handles.get("network_cookie", 0)))
    return kind.open(record.id, order_of(record), place, handles, save)


def _how(kind: Kind, rate: Optional[Rate], name: str) -> dict[str, str]:
    how = {"backend": kind.backend, "attached_by": name, **kind.how(rate)}
    return how | ({"shape": "block"} if rate and rate.is_blocked else {})


def _no_methods(kind: Kind, method: str) -> ThrottleError:
    return ThrottleError(f"{kind.backend} has no attach methods, and cannot switch to {method}")


def _namespaces(pids: Iterable[int]) -> dict[int, int]:
    """Return the network namespaces of processes, as far as they can be seen."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = netns.number(pid)
    return found


class RecordedBackend:
    """What the backends whose throttles are recorded in files do alike."""

    name: ClassVar[str]
    kind: ClassVar[Kind]

    def left(self, origin: Cgroup, other: Cgroup) -> list[str]:
        """Return nothing: what others have made does not depend on a cgroup that is known here."""
        return []

    def prepare(self) -> None:
        """Do nothing: there is nothing to load."""

    def put_in_force(self, order: Order, throttle_id: str) -> OwnThrottle:
        """Create the rules of an order, and record them. Raises BackendError; all is undone."""
        if not order.traffic.everywhere:
            raise BackendError(f"{self.name} does not tell addresses apart, and ebpf does")
        throttle = OwnThrottle(self.kind, order, throttle_id)
        throttle.put_in_force()
        return throttle

    def executions(self) -> Executions:
        """Raise BackendError: networking knows nothing of executions."""
        raise BackendError(f"{self.name} does not report executions")

    def in_force(self, *, others: bool = False) -> Iterator[Record]:
        """Return what is recorded, whoever made it."""
        return files.records(self.name)

    def open(self, record: Record) -> FoundThrottle:
        """Open a throttle that another process keeps. Raises ThrottleError if it is gone."""
        return FoundThrottle(self.kind, record)

    def leftovers(self) -> list[Leftover]:
        """Return what a crash has left."""
        return leftovers(self.kind)

    def tidy_up(self) -> None:
        """Remove what a crash has left, as far as possible here."""
        for leftover in self.leftovers():
            with suppress(Error, OSError):
                leftover.remove()
                log.info("Removed %s, left by a crash", leftover)
