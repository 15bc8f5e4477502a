"""The backend: the token bucket in the kernel, at the cgroup's ingress and egress hooks.

Most commands need only a part of it, so each method imports what it needs.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Iterator, Optional, Sequence

from pybpfthrottle.backends.ebpf import features, privileges, programs, registry
from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.protocol import (
    Executions,
    Leftover,
    Match,
    Offer,
    Order,
    Part,
    Priority,
    Ready,
    Record,
)
from pybpfthrottle.errors import CgroupError, Error
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup, locked
from pybpfthrottle.model import Direction


class EbpfBackend:
    """Linux 4.10 with cgroup v2; nothing outside of the cgroup is touched."""

    name = "ebpf"
    title = "eBPF"
    priority = Priority.BEST
    directions = tuple(Direction)
    counted_nothing = "No stats in BPF map (eBPF not initialized?)"

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Return why it cannot limit this direction here, or None."""
        try:
            cgroup.mount()
        except CgroupError as error:
            return str(error)
        refused = features.CGROUP_SKB.missing()
        if refused is None:
            return None
        if isinstance(refused, OSError) and refused.errno in (errno.EPERM, errno.ENOSYS):
            return privileges.why_refused(refused, "BPF_PROG_LOAD")
        return f"this kernel does not accept cgroup_skb programs (CONFIG_CGROUP_BPF): {refused}"

    def offer(self, direction: Direction, match: Match) -> Offer:
        """Return what it can do for a direction and a way of matching.

        Whether this kernel takes marks on sockets shows when they are put in force: to try it
        beforehand would take as long.
        """
        return Offer(self.name, self.priority, direction, match, self.unavailable(direction))

    def left(self, origin: Cgroup, other: Cgroup) -> list[str]:
        """Return the programs that run for one cgroup and not for another one, for people."""
        from pybpfthrottle.backends.ebpf import attached

        with suppress(OSError, CgroupError):  # then nothing can be attached either
            return [str(program) for program in attached.left(origin, other)]
        return []

    def prepare(self) -> None:
        """Read the object and import ahead; what is wrong is told when it is applied."""
        from pybpfthrottle.backends.ebpf import throttle  # noqa: F401

        with suppress(Error):
            programs.read(programs.object_for(Scope.ALL))

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Load once, attach to each target, and register it.

        Raises BpfError, CgroupError, ProcessError or ThrottleError; then all is undone.
        """
        from pybpfthrottle.backends.ebpf.throttle import EbpfThrottle

        throttle = EbpfThrottle(order, throttle_id)
        throttle.put_in_force()
        return throttle

    def make_ready(self, order: Order) -> Ready:
        """Load for processes that come later; nothing is attached to a cgroup before they do.

        Raises BpfError or ThrottleError.
        """
        from pybpfthrottle.backends.ebpf.throttle import EbpfThrottle

        throttle = EbpfThrottle(order, "")
        throttle.prepare()
        return throttle

    def executions(self) -> Executions:
        """Begin to tell of executions. Linux 5.8; needs CAP_PERFMON.

        Raises BpfError, ObjectFileError or OSError.
        """
        from pybpfthrottle.backends.ebpf.marks import Tracing

        return Tracing.begin({}, executions=True, processes=False)

    def in_force(self, *, others: bool = False) -> Iterator[Record]:
        """Return what is in force on this machine, whoever made it. Raises OSError."""
        return registry.in_force(others=others)

    def open(self, record: Record) -> Part:
        """Take one in hand that somebody else keeps. Raises ThrottleError if it is gone."""
        from pybpfthrottle.backends.ebpf.found import FoundThrottle

        return FoundThrottle.open(record)

    def leftovers(self) -> Sequence[Leftover]:
        """Return the programs that a crash has left attached."""
        from pybpfthrottle.backends.ebpf import leftovers

        return leftovers.find()

    def tidy_up(self) -> None:
        """Remove the programs that a crash has left attached, and pins."""
        from pybpfthrottle.backends.ebpf import leftovers, pins

        leftovers.remove_all()
        with locked():
            # Who was removing one may have been killed while it did.
            found = [one for one in registry.in_force() if one.supervised or not one.removed]
            pins.tidy_up({record.id for record in found})

    def processes(self, record: Record) -> list[int]:
        """Return the processes whose sockets one limits, by their id in the first namespace."""
        return registry.processes(record)
