"""Mechanisms that limit: one module each, behind one small protocol."""

from __future__ import annotations

from enum import IntEnum
from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional, Protocol, Sequence

from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Counters, Direction, Rate
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.targets import Selection

# None: unlimited, but counted.
Limits = Mapping[Direction, Optional[Rate]]

EGRESS_VERDICTS = ("auto", "congestion", "deny")


class Priority(IntEnum):
    """How good a mechanism is; the best available one is chosen."""

    FALLBACK = 1
    GOOD = 2
    BETTER = 3
    BEST = 4


class Options(NamedTuple):
    """What may be chosen beside the limits themselves.

    ``loopback`` limits the loopback device too. ``attach`` tells for a direction how programs are
    attached; ``egress_verdict`` is one of EGRESS_VERDICTS: how an upload's packet is dropped, as
    if by congestion (Linux 5.3) or denied (EPERM for the send of a UDP program). ``shape`` is one
    of settings.SHAPES for a direction. ``guard`` has a child process restore connections if this
    process is killed.
    """

    loopback: bool = False
    attach: Mapping[Direction, AttachPolicy] = MappingProxyType({})
    egress_verdict: str = "auto"
    shape: Mapping[Direction, str] = MappingProxyType({})
    guard: bool = False


class Targets(NamedTuple):
    """What a limit is for: all traffic of cgroups, the sockets of processes, or both together.

    With both, sockets that are of the cgroups must not be the processes' as well: ``new_sockets``
    of the selection is false.
    """

    cgroups: Sequence[Cgroup] = ()
    processes: Optional[Selection] = None


class Handle(Protocol):
    """A limit that is in force on some directions."""

    def counters(self) -> dict[Direction, Counters]:
        """What each direction counted."""

    def set_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit of a direction; None lifts it."""

    def burst_bytes(self, direction: Direction) -> int:
        """What may pass at once after an idle time, beyond the rate."""

    def switch(self, method: str) -> None:
        """Attach by another method, link or legacy, without a moment without a limit."""

    def remove(self) -> None:
        """Take everything away. Doing so twice is no error."""

    def describe(self, direction: Direction) -> dict[str, str]:
        """How a direction is limited, for people and for JSON."""

    def processes(self) -> list[int]:
        """The selected processes that are limited now, and those that they have started."""

    def notes(self) -> Sequence[str]:
        """What the user should know of what is covered and what not, a line each."""


class Backend(Protocol):
    """A mechanism."""

    name: str
    priority: Priority

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Why it cannot limit this direction here, or None."""

    def prepare(self) -> None:
        """Do what takes time and can be done before the targets are known."""

    def apply(self, targets: Targets, limits: Limits, options: Options) -> Handle:
        """Put limits, shared by all of the targets, in force."""
