"""The protocol of backends: what one offers, puts in force, finds and opens.

A backend makes an offer for a direction and a way of matching packets, puts limits in force as a
``Part`` of a throttle, finds the parts in force, whoever made them, and opens them.
"""

from __future__ import annotations

import typing
from contextlib import suppress
from enum import Enum, IntEnum
from importlib import import_module
from typing import (
    Any,
    Callable,
    Iterator,
    Mapping,
    Optional,
    Sequence,
)

from pybpfthrottle.bpf.obj.plain import Data, NamedTuple, Protocol, made
from pybpfthrottle.errors import CgroupError, ThrottleError
from pybpfthrottle.linux import clock, process
from pybpfthrottle.linux.cgroup import Cgroup, known_as
from pybpfthrottle.linux.process import Identity, Process
from pybpfthrottle.model import Counters, Direction, Limits, Rate, ThrottleSpec, Traffic
from pybpfthrottle.settings import BACKENDS, AttachPolicy
from pybpfthrottle.supervisor import Chore
from pybpfthrottle.targets import Selection

# The module of each backend in settings.BACKENDS, imported on demand; the best comes first.
_HOMES = {
    "ebpf": ("pybpfthrottle.backends.ebpf.backend", "EbpfBackend"),
    "nftables": ("pybpfthrottle.backends.nftables.backend", "NftablesBackend"),
    "tc_htb": ("pybpfthrottle.backends.tc.backend", "HtbBackend"),
    "ifb_tc": ("pybpfthrottle.backends.tc.backend", "IfbBackend"),
    "tc_police": ("pybpfthrottle.backends.tc.backend", "PoliceBackend"),
}


class Priority(IntEnum):
    """How good a mechanism is; the best available one is chosen.

    A FALLBACK limits more than was asked for, so it is used only if it is named.
    """

    FALLBACK = 1
    GOOD = 2
    BETTER = 3
    BEST = 4


class Match(Enum):
    """How a target's packets are told from all others."""

    MARKS = "marks"
    CGROUP = "cgroup"


class Offer(Data, frozen=True):
    """What a backend can do for one direction and way of matching.

    ``refused`` is why it cannot, or None; ``loses`` lists what it would leave out, a sentence each.
    """

    backend: str
    priority: Priority
    direction: Direction
    match: Match
    refused: Optional[str] = None
    loses: tuple[str, ...] = ()


class Order(NamedTuple):
    """What one backend has to limit: all packets of cgroups, or of processes' sockets.

    With both, no socket may belong to a cgroup and a process alike: then the selection's
    ``new_sockets`` is false. ``command`` is limited, with what it starts, even if it leaves the
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


class Record(Data, frozen=True):
    """A throttle in force, as it is registered: this process's own, or another's.

    ``owner`` is the process that keeps it, ``kept`` whether it outlives that process. ``since_ns``
    is its start time on CLOCK_BOOTTIME. ``removed`` says that the limit was removed while the owner
    still runs. ``clears_up`` is a process that restores connections if the owner is killed. The
    backend finds it by ``handles``. ``cgroups`` are paths as the owner sees them; older versions
    did not record their ids.
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
    handles: Mapping[str, Any] = made(default_factory=dict)

    @property
    def supervised(self) -> bool:
        """Whether a process does what the kernel cannot do alone."""
        return not process.is_gone(self.owner)

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return clock.has_come(self.spec.expires_ns)

    def visible_cgroups(self) -> list[Cgroup]:
        """Return the cgroups that it is on, as this process sees them, if it can."""
        ids = [*self.cgroup_ids, *[None] * len(self.cgroups)]
        found = []
        with suppress(CgroupError):  # where cgroup v2 is not mounted none is visible
            found = [known_as(path, number) for path, number in zip(self.cgroups, ids)]
        return [cgroup for cgroup in found if cgroup is not None]


class Use(NamedTuple):
    """What a direction's packets have used of its rate.

    ``unused_ns`` is the time since when the rate has not been used up, less than 0 while more was
    used; it does not grow beyond the burst.
    """

    bytes_passed: int
    packets_dropped: int
    unused_ns: int


class Dial(Protocol):
    """Reads how one direction's rate is used, and moves it below its limit, within microseconds.

    All methods raise ThrottleError or OSError if the throttle is gone.
    """

    @property
    def limit(self) -> Optional[Rate]:
        """The limit as it is recorded; None if there is none now."""

    @property
    def rate(self) -> Optional[Rate]:
        """The rate in force."""

    @property
    def patience_ns(self) -> int:
        """The least ``unused_ns`` that says that more is not wanted, at the rate in force."""

    def is_still(self) -> bool:
        """Whether nothing has passed since ``look`` was called; the least that can be asked."""

    def look(self) -> Use:
        """Return what is used."""

    def move(self, rate: Rate) -> None:
        """Put another rate in force until the next change of the limit, which stays recorded."""


class Foothold(NamedTuple):
    """Where a limit's packets pass, for programs that do more with them than to limit them.

    ``maps`` are the limit's by name, with its elements in a ``slot``; ``cgroups`` those that are
    limited as a whole, and ``marked_at`` those in which its marked sockets are looked at.
    """

    maps: Mapping[str, Any]
    cgroups: tuple[Cgroup, ...]
    marked_at: tuple[Cgroup, ...]
    policy: AttachPolicy
    slot: int = 0


class Part(Protocol):
    """A limit in force on some directions, by one backend."""

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""

    def counters(self) -> dict[Direction, Counters]:
        """Return each direction's counters."""

    def set_rate(
        self, direction: Direction, rate: Optional[Rate], *, paused: Optional[Rate] = None
    ) -> None:
        """Change the limit of a direction; None lifts it.

        ``paused`` is the limit that is to be back later, for the record.
        """

    def burst_bytes(self, direction: Direction) -> int:
        """Return how much may pass at once after an idle time, beyond the rate."""

    def dial(self, direction: Direction) -> Dial:
        """Return what moves a direction's rate many times a second.

        Raises ThrottleError if that is not possible.
        """

    def foothold(self) -> Foothold:
        """Return where its packets pass. Raises ThrottleError if that is nowhere to be seen."""

    def attach_last(self) -> None:
        """Have what comes in meet it after all programs that are attached by now.

        Raises an error of this package.
        """

    def switch(self, method: str) -> None:
        """Attach by another method, with the limit in force throughout. Raises ThrottleError."""

    def follow(self, pids: Sequence[int]) -> None:
        """Limit more processes. Raises an error of this package."""

    def expect(self, names: Sequence[str]) -> bool:
        """Have the kernel limit processes that begin to have such a name; return if it can."""

    def by_name(self, pids: Sequence[int]) -> Sequence[int]:
        """Return those of some processes that are limited for their names alone, as expected."""

    def let_go(self, pids: Sequence[int]) -> None:
        """Limit some processes no longer, nor the sockets that they have."""

    def add(self, cgroup: Cgroup) -> None:
        """Limit another cgroup, too. Raises an error of this package; then it is not limited."""

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Limit one cgroup in place of a removed one; the counters continue.

        Raises an error of this package; then the new cgroup is limited no more than before.
        """

    def hand_over(self) -> Callable[[], None]:
        """Prepare for a successor with the same id; return what removes what is left of this.

        In between, packets over the limit are dropped if the mechanism can tell the two apart.
        """

    def remove(self) -> None:
        """Take everything away. Doing so twice is no error."""

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how a direction is limited, for people and for JSON."""

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now, and their descendants."""

    def notes(self) -> Sequence[str]:
        """Return what the user should know about what is and is not covered, a line each."""

    def chores(self) -> Sequence[Chore]:
        """Return what has to be done while the limit is in force."""

    def removed_by_others(self) -> bool:
        """Whether somebody else has removed the limit."""

    def close(self) -> None:
        """Close a limit opened by ``open``, leaving it in force as it is."""


@typing.runtime_checkable
class Queueable(typing.Protocol):
    """A part whose downloads without a receive window may wait in a queue."""

    def before_limit(self) -> Foothold:
        """Return where packets pass that come in, before they meet the limit.

        That may need ``attach_last``. Raises ThrottleError if there is no such place.
        """

    def attach_last(self) -> None:
        """Have what comes in meet it after all programs that are attached by now."""

    def processes(self) -> list[int]:
        """Return the processes that are limited by marks."""

    def drops_early(self) -> bool:
        """Whether downloads without a receive window are over the limit now."""

    def on_datagram(self, call: Callable[[], object]) -> None:
        """Call something once a large datagram has left, whose answers may be large as well."""

    def lend(self, is_lent: bool) -> None:
        """Say whether they may owe what comes between that and the start of their queue."""

    def why_no_queue(self) -> Optional[str]:
        """Return why they are not to wait in a queue, or None."""

    def tell_udp(self, how: str, reason: str) -> None:
        """Tell how they are kept to the limit from now on, and why."""


def no_dial(backend: str) -> ThrottleError:
    """Return the error of a part whose rate cannot be moved many times a second."""
    return ThrottleError(
        f"a limit by {backend} cannot share with others: only the backend ebpf moves rates quickly"
    )


class ChoosesOnce:
    """A part that limits what it did when it was made, as far as this process can change that.

    What else is to be limited, only the process that keeps it can change.
    """

    def add(self, cgroup: Cgroup) -> None:
        """Raise ThrottleError."""
        raise ThrottleError(f"{cgroup.path} cannot be added to this limit from here")

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Raise ThrottleError."""
        raise ThrottleError(f"this limit cannot be moved from {gone.path} from here")

    def follow(self, pids: Sequence[int]) -> None:
        """Raise ThrottleError."""
        raise ThrottleError("processes cannot be added to this limit from here")

    def expect(self, names: Sequence[str]) -> bool:
        """Do nothing: whoever keeps it expects them."""
        return False

    def by_name(self, pids: Sequence[int]) -> Sequence[int]:
        """Return none: whoever keeps it looks at them."""
        return ()

    def let_go(self, pids: Sequence[int]) -> None:
        """Raise ThrottleError."""
        raise ThrottleError("processes cannot be taken out of this limit from here")

    def foothold(self) -> Foothold:
        """Raise ThrottleError."""
        raise ThrottleError("a bad network needs a limit of this process, by the backend ebpf")

    def attach_last(self) -> None:
        """Do nothing: no program has to come before it."""


class Leftover(Protocol):
    """Something that a crash has left in force. As text it is described for people."""

    @property
    def kind(self) -> str:
        """What it is, in the plural: ``programs``, ``tables``."""

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""

    def remove(self) -> None:
        """Remove it. Raises an error of this package, or OSError."""


class Ready(Protocol):
    """Limits prepared as far as possible before the process is known."""

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Put the limits of the order that this was prepared for in force, and register them.

        Raises an error of this package; then all is undone.
        """

    def remove(self) -> None:
        """Take everything away. Doing so twice is no error."""


class Executions(Protocol):
    """Reports each process on this machine that executes a program."""

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program."""

    def executed(self) -> Iterator[int]:
        """Return the processes that have executed a program since the last call."""

    def close(self) -> None:
        """Stop reporting."""


class Backend(Protocol):
    """A mechanism.

    ``title`` is its name for people. ``directions`` are those that it can limit.
    ``counted_nothing`` is what it means that it has counted nothing although packets have passed,
    and what to look at next.
    """

    name: str
    title: str
    priority: Priority
    directions: tuple[Direction, ...]
    counted_nothing: str

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Return why it cannot limit this direction here, or None."""

    def offer(self, direction: Direction, match: Match) -> Offer:
        """Return what it can do for a direction and a way of matching; probed, not guessed."""

    def left(self, origin: Cgroup, other: Cgroup) -> list[str]:
        """Return what handles one cgroup's packets but not another's, for people."""

    def prepare(self) -> None:
        """Do the slow work that can be done before the target is known."""

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Put limits in force, shared by the whole target, and register them.

        Raises an error of this package; then all is undone.
        """

    def make_ready(self, order: Order) -> Ready:
        """Prepare limits for processes that come later. Raises an error of this package."""

    def executions(self) -> Executions:
        """Begin to report executions. Raises an error of this package, or OSError."""

    def in_force(self, *, others: bool = False) -> Iterator[Record]:
        """Return what is in force on this machine, whoever made it. Raises OSError.

        With ``others`` what this process has made may be left out.
        """

    def open(self, record: Record) -> Part:
        """Open a limit that another process keeps. Raises ThrottleError if it is gone."""

    def leftovers(self) -> Sequence[Leftover]:
        """Return what a crash has left in force."""

    def tidy_up(self) -> None:
        """Remove the leftovers of a crash, as far as possible here."""

    def processes(self, record: Record) -> list[int]:
        """Return the processes whose sockets it limits, as ids in the initial pid namespace."""


def get(name: str) -> Backend:
    """Return the backend with this name. Raises ThrottleError if there is none."""
    if name not in _HOMES:
        known = ", ".join(name for name in BACKENDS if name != "auto")
        raise ThrottleError(f"unknown backend {name!r}; choose from {known}")
    module, kind = _HOMES[name]
    backend: Backend = getattr(import_module(module), kind)()
    return backend


# The backends whose throttles carry their records; those of all others are recorded in files.
CARRYING = ("ebpf",)
NAMES = tuple(_HOMES)


def all_backends() -> Iterator[Backend]:
    """Return all backends, best first; each is imported when its turn comes."""
    return map(get, _HOMES)
