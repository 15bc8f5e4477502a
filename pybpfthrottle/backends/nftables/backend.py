"""The backend: a table of its own for each throttle, with rules that match sockets' cgroups."""

from __future__ import annotations

from functools import cached_property
from typing import Optional, Sequence

from pybpfthrottle.backends.nft import Member, Nft, members
from pybpfthrottle.backends.nftables import rules
from pybpfthrottle.backends.nftables.table import KIND, NAME
from pybpfthrottle.backends.protocol import (
    Match,
    Offer,
    Order,
    Part,
    Priority,
    Ready,
    Record,
)
from pybpfthrottle.backends.recorded import RecordedBackend
from pybpfthrottle.errors import BackendError, CgroupError
from pybpfthrottle.linux import cgroup
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction, Rate

log = Logger(__name__)

_NO_SOCKETS = "nftables tells cgroups apart, and not single sockets"
_LOSES = (
    "packets over the limit are dropped, not delayed, so more is retransmitted",
    "after an idle second as much again may pass at once",
    "headers and acknowledgements count too",
    "connections opened before a process entered its cgroup are not limited",
)


class NftablesBackend(RecordedBackend):
    """Linux 5.13 with cgroup v2; nothing outside of the throttle's own table is touched."""

    name = NAME
    kind = KIND
    title = NAME
    priority = Priority.BETTER
    directions = tuple(Direction)
    counted_nothing = "No packets in the counters of nftables (do its rules match?)"

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Return why it cannot limit this direction here, or None."""
        return self._refused

    def offer(self, direction: Direction, match: Match) -> Offer:
        """Return what it can do for a direction and a way of matching."""
        refused = _NO_SOCKETS if match is not Match.CGROUP else self._refused
        return Offer(self.name, self.priority, direction, match, refused, _LOSES)

    @cached_property
    def _refused(self) -> Optional[str]:
        """Why it cannot limit here.

        The kernel accepts the rules of a throttle, and carries none of them out: nothing can stay.
        """
        try:
            top = cgroup.root()
            cgroup.depth(top)
            with Nft() as nft, members([top], root_level=1) as matched:
                nft.check(_trial([]))
                try:
                    nft.check(_trial(matched))
                except BackendError as error:
                    return f"this kernel or nft cannot match cgroups (Linux 5.13): {error}"
        except (CgroupError, BackendError) as error:
            return str(error)
        return None

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Create a table for the cgroups, and record it. Raises BackendError; all is undone."""
        if order.processes is not None or not order.cgroups:
            raise BackendError(_NO_SOCKETS)
        return self.put_in_force(order, throttle_id)

    def make_ready(self, order: Order) -> Ready:
        """Raise BackendError: later processes are limited by their sockets."""
        raise BackendError(_NO_SOCKETS)

    def processes(self, record: Record) -> list[int]:
        """Return nothing: cgroups are limited."""
        return []


def _trial(matched: Sequence[Member]) -> str:
    """Return the commands for a throttle with an id that no throttle has."""
    return rules.create("trial", dict.fromkeys(Direction, Rate(1_000_000)), matched)
