"""Mechanisms that limit: a room each, behind one small protocol.

A backend makes an offer for a direction and a way of matching packets, puts limits in force as a
``Part`` of a throttle, finds the parts that are in force whoever made them, and takes such a one in
hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from importlib import import_module
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Protocol, Sequence

from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux.cgroup import Cgroup, known_as
from pybpfthrottle.linux.process import Identity, Process
from pybpfthrottle.model import Counters, Direction, Limits, Rate, ThrottleSpec, Traffic
from pybpfthrottle.settings import BACKENDS
from pybpfthrottle.supervisor import Chore
from pybpfthrottle.targets import Selection

# Where each backend of settings.BACKENDS is. Imported when it is needed: most starts need one.
_HOMES = {"ebpf": ("pybpfthrottle.backends.ebpf.backend", "EbpfBackend")}


class Priority(IntEnum):
    """How good a mechanism is; the best available one is chosen."""

    FALLBACK = 1
    GOOD = 2
    BETTER = 3
    BEST = 4


class Match(Enum):
    """How the packets of a target are told from all others."""

    MARKS = "marks"
    CGROUP = "cgroup"


@dataclass(frozen=True)
class Offer:
    """What a backend can do for one direction and way of matching.

    ``refused`` is why it cannot, or None; ``loses`` are the things that it would leave out, a
    sentence each.
    """

    backend: str
    priority: Priority
    direction: Direction
    match: Match
    refused: Optional[str] = None
    loses: tuple[str, ...] = ()


class Order(NamedTuple):
    """What one backend is to put in force: all packets of cgroups, or of the sockets of processes.

    With both, the sockets of the cgroups must not be the processes' as well: then ``new_sockets``
    of the selection is false. ``command`` is limited with what it starts even if it leaves the
    cgroups. ``options`` are the backend's own, or None.
    """

    spec: ThrottleSpec
    limits: Limits
    cgroups: Sequence[Cgroup] = ()
    processes: Optional[Selection] = None
    options: Any = None
    command: Optional[Process] = None

    @property
    def traffic(self) -> Traffic:
        """Which packets are limited."""
        return self.spec.traffic


@dataclass(frozen=True)
class Record:
    """A throttle in force, as it is registered: this process's own, or another's.

    ``owner`` is the process that keeps it, ``kept`` whether it stays after that. ``since_ns`` is
    the time of its start on CLOCK_BOOTTIME. ``removed`` tells that the limit was taken away while
    its owner still runs. ``clears_up`` is a process that restores connections when the owner is
    killed. ``handles`` is what the backend finds it by. ``cgroups`` are paths as its owner sees
    them; an older version did not tell their ids.
    """

    id: str
    spec: ThrottleSpec
    owner: Identity
    backend: str
    match: Match
    cgroups: tuple[str, ...] = ()
    cgroup_ids: tuple[int, ...] = ()
    kept: bool = False
    since_ns: int = 0
    removed: bool = False
    clears_up: Optional[Identity] = None
    attached_by: str = ""
    handles: Mapping[str, Any] = field(default_factory=dict)

    def visible_cgroups(self) -> list[Cgroup]:
        """Return the cgroups that it is on, as this process sees them, if it does."""
        ids = [*self.cgroup_ids, *[None] * len(self.cgroups)]
        found = [known_as(path, number) for path, number in zip(self.cgroups, ids)]
        return [cgroup for cgroup in found if cgroup is not None]


class Part(Protocol):
    """A limit that is in force on some directions, by one backend."""

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted."""

    def set_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit of a direction; None lifts it."""

    def burst_bytes(self, direction: Direction) -> int:
        """Return what may pass at once after an idle time, beyond the rate."""

    def switch(self, method: str) -> None:
        """Attach by another method, without a moment without a limit. Raises ThrottleError."""

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Limit one cgroup instead of another that was removed; the counters go on.

        Raises an error of this package; then it is limited no more than before.
        """

    def remove(self) -> None:
        """Take everything away. Doing so twice is no error."""

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how a direction is limited, for people and for JSON."""

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now, and those that they have started."""

    def notes(self) -> Sequence[str]:
        """Return what the user should know of what is covered and what not, a line each."""

    def chores(self) -> Sequence[Chore]:
        """Return what has to be done while it is in force."""

    def removed_by_others(self) -> bool:
        """Whether somebody else has taken the limit away."""

    def close(self) -> None:
        """Let it go, in force as it is: for one that was taken in hand by ``open``."""


class Ready(Protocol):
    """Limits that are prepared as far as that is possible before it is known for which process."""

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Put them in force, and register them; they are those of the order that it was made for.

        Raises an error of this package; then all is undone.
        """

    def remove(self) -> None:
        """Take everything away. Doing so twice is no error."""


class Executions(Protocol):
    """Tells of each process of this machine that executes a program."""

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program."""

    def executed(self) -> Iterator[int]:
        """Return the processes that have executed a program since it was asked last."""

    def close(self) -> None:
        """Tell no more."""


class Backend(Protocol):
    """A mechanism."""

    name: str
    priority: Priority

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Return why it cannot limit this direction here, or None."""

    def offer(self, direction: Direction, match: Match) -> Offer:
        """Return what it can do for a direction and a way of matching; tried, not guessed."""

    def left(self, origin: Cgroup, other: Cgroup) -> list[str]:
        """Return what handles the packets of one cgroup and not those of another, for people."""

    def prepare(self) -> None:
        """Do what takes time and can be done before the target is known."""

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Put limits, shared by all of the target, in force, and register them.

        Raises an error of this package; then all is undone.
        """

    def make_ready(self, order: Order) -> Ready:
        """Prepare limits for processes that come later. Raises an error of this package."""

    def executions(self) -> Executions:
        """Begin to tell of executions. Raises an error of this package, or OSError."""

    def in_force(self) -> Iterator[Record]:
        """Return what is in force on this machine, whoever made it. Raises OSError."""

    def open(self, record: Record) -> Part:
        """Take one in hand that somebody else keeps. Raises ThrottleError if it is gone."""

    def tidy_up(self) -> None:
        """Remove what a crash has left."""

    def processes(self, record: Record) -> list[int]:
        """Return the processes whose sockets one limits, by their id in the first namespace."""


def get(name: str) -> Backend:
    """Return the backend of this name. Raises ThrottleError if there is none."""
    if name not in _HOMES:
        known = ", ".join(name for name in BACKENDS if name != "auto")
        raise ThrottleError(f"no backend {name!r} (known: {known})")
    module, kind = _HOMES[name]
    backend: Backend = getattr(import_module(module), kind)()
    return backend


def all_backends() -> list[Backend]:
    """Return all backends, the best first."""
    return sorted(map(get, _HOMES), key=lambda backend: -backend.priority)
