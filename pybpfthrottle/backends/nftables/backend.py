"""The backend: a table of its own for each throttle, with rules that match sockets' cgroups."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import cached_property
from typing import Iterator, Optional, Sequence

from pybpfthrottle.backends import files, recorded
from pybpfthrottle.backends.nft import Member, Nft, members
from pybpfthrottle.backends.nftables import rules
from pybpfthrottle.backends.nftables.table import KIND, NAME
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
from pybpfthrottle.backends.recorded import FoundThrottle, OwnThrottle
from pybpfthrottle.errors import BackendError, CgroupError, Error
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate

log = logging.getLogger(__name__)

_NO_SOCKETS = "nftables tells cgroups apart, and not single sockets"
_LOSES = (
    "packets over the limit are dropped, not delayed, so more is retransmitted",
    "after an idle second as much again may pass at once",
    "headers and acknowledgements count too",
    "connections opened before a process entered its cgroup are not limited",
)


class NftablesBackend:
    """Linux 5.13 with cgroup v2; nothing outside of the throttle's own table is touched."""

    name = NAME
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

    def left(self, origin: Cgroup, other: Cgroup) -> list[str]:
        """Return nothing: rules of others name cgroups that are not known here."""
        return []

    def prepare(self) -> None:
        """Do nothing: there is nothing to load."""

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Create a table for the cgroups, and record it. Raises BackendError; all is undone."""
        if order.processes is not None or not order.cgroups:
            raise BackendError(_NO_SOCKETS)
        throttle = OwnThrottle(KIND, order, throttle_id)
        throttle.put_in_force()
        return throttle

    def make_ready(self, order: Order) -> Ready:
        """Raise BackendError: later processes are limited by their sockets."""
        raise BackendError(_NO_SOCKETS)

    def executions(self) -> Executions:
        """Raise BackendError: netfilter knows nothing of executions."""
        raise BackendError("nftables does not report executions")

    def in_force(self) -> Iterator[Record]:
        """Return what is recorded, whoever made it."""
        return files.records(self.name)

    def open(self, record: Record) -> Part:
        """Open a throttle that another process keeps. Raises ThrottleError if it is gone."""
        return FoundThrottle(KIND, record)

    def leftovers(self) -> Sequence[Leftover]:
        """Return the tables that a crash has left."""
        return recorded.leftovers(KIND)

    def tidy_up(self) -> None:
        """Delete the tables that a crash has left, as far as possible here."""
        for leftover in recorded.leftovers(KIND):
            with suppress(Error, OSError):
                leftover.remove()
                log.info("Removed %s, left by a crash", leftover)

    def processes(self, record: Record) -> list[int]:
        """Return nothing: cgroups are limited."""
        return []


def _trial(matched: Sequence[Member]) -> str:
    """Return the commands for a throttle with an id that no throttle has."""
    return rules.create("trial", dict.fromkeys(Direction, Rate(1_000_000)), matched)
