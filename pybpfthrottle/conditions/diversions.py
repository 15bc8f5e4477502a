"""What comes in by a longer way: a diversion at each place where a throttle's packets pass."""

from __future__ import annotations

from typing import Callable, Collection, Iterable, Optional

from pybpfthrottle import diversion
from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.protocol import Foothold
from pybpfthrottle.conditions.model import Conditions, Impairment, Injected
from pybpfthrottle.diversion import Diversion
from pybpfthrottle.diversion.places import Diverted
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction
from pybpfthrottle.supervisor import Chore
from pybpfthrottle.throttle import Throttle

_MARKS = "MARKS"


class Diversions:
    """The diversions of one network, none until something needs them. ``close`` ends them."""

    def __init__(self, throttle: Throttle, *, loopback: bool) -> None:
        self._throttle = throttle
        self._loopback = loopback
        self._wanted = Impairment()
        # What those have counted that are closed.
        self._done: list[Injected] = []
        self._diverted = Diverted(
            throttle.foothold, self._divert, lambda one: self._done.append(one.counts())
        )

    def serves(self) -> Collection[Direction]:
        """Return the directions whose packets get lost here, if they are to."""
        return (Direction.DOWNLOAD,) if self._diverted else ()

    def set(self, conditions: Conditions, *, anew: bool = True) -> None:
        """Impair what comes in from now on; ``anew`` or with the chances that are running.

        Raises DiversionError, AttachError or CgroupError.
        """
        self._wanted = impairment = conditions.diverted()
        if not diversion.needs_diversion(impairment):
            self.close()
            return
        for one in self._diverted.open:
            one.change(impairment, anew=anew)
        if not self._diverted:
            self._diverted.begin()

    def follow(self) -> None:
        """Divert at the places that there are now."""
        self._diverted.follow()

    def attached(self) -> list[tuple[Diversion, int]]:
        """Return all there are, and how often the programs of each were attached."""
        return self._diverted.attached()

    def counts(self) -> dict[Direction, Injected]:
        """Return what was done so far, nothing if nothing was ever diverted."""
        found = [*self._done, *(one.counts() for one in self._diverted.open)]
        return {Direction.DOWNLOAD: Injected.sum_of(found)} if found else {}

    def notes(self) -> list[str]:
        """Return what keeps packets from being impaired as asked for, a line each."""
        return list(dict.fromkeys(text for one in self._diverted.open for text in one.problems()))

    def chores(self) -> list[Chore]:
        """Return what a supervisor has to do for them."""
        return self._diverted.chores()

    def close(self) -> None:
        """Give back what is held, and end. Doing so twice is no error."""
        self._diverted.close()

    def _divert(self, scope: Scope, cgroup: Cgroup, foothold: Foothold) -> Diversion:
        marks = foothold.maps[_MARKS] if scope is Scope.MARKED else None
        pids: Optional[Callable[[], Iterable[int]]] = None
        if marks is not None:
            pids = self._throttle.processes
        return diversion.open(cgroup, self._wanted, marks=marks, loopback=self._loopback, pids=pids)
