"""A throttle by nftables that this process keeps."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Iterable, Optional, Sequence

from pybpfthrottle.backends.files import OwnFile
from pybpfthrottle.backends.nftables.nft import Nft
from pybpfthrottle.backends.nftables.rules import BURST_BYTES
from pybpfthrottle.backends.nftables.table import Table
from pybpfthrottle.backends.protocol import Match, Order, Record
from pybpfthrottle.errors import BackendError, ThrottleError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import clock, netns, process
from pybpfthrottle.linux.cgroup import Cgroup, locked, locked_if_free
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.supervisor import Chore, Periodic

log = logging.getLogger(__name__)

NAME = "nftables"
# How soon it is noticed that somebody has removed the table: each look starts nft, for 4 ms.
_LOOK_S = 0.5
_LOOK_FOR_STRANGERS_S = 2.0


def how(rate: Optional[Rate], table: str) -> dict[str, str]:
    """Return how a direction is limited, for people and for JSON."""
    return {
        "backend": NAME,
        "attached_by": f"table {table}",
        "shape": "police" if rate else "none",
        "shape_reason": "nftables can drop packets, and not delay them",
    }


def burst_bytes(rate: Optional[Rate]) -> int:
    """Return the size of the kernel's bucket: never less than a second's worth."""
    return rate.bytes_per_s + BURST_BYTES if rate else 0


class NftablesThrottle:
    """The limits of one order. ``put_in_force`` creates the table, ``remove`` deletes it."""

    def __init__(self, order: Order, throttle_id: str) -> None:
        self._order = order
        self._id = throttle_id
        self._limits = dict(order.limits)
        self._counters = dict.fromkeys(order.limits, Counters())
        self._file = OwnFile(self)
        self._nft: Nft
        self._table: Table
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
        """Create the table. Raises BackendError; then all is undone."""
        try:
            self._nft = self._undo.enter_context(Nft(self._namespace()))
            self._table = Table(self._id, self._nft, loopback=self._order.traffic.loopback)
            self._file.create(self._record())
            self._undo.callback(self._withdraw)
            self._table.create(self._limits, self._order.cgroups)
        except BaseException:
            # What nft cannot delete now stays recorded, for the next start.
            with suppress(BackendError):
                self.remove()
            raise
        for direction, rate in self._limits.items():
            log.info("%s: limited to %s by the table %s", direction, rate, self._table.name)
        self._look_for_strangers()

    def _namespace(self) -> int:
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
            spec=dataclasses.replace(self._order.spec, limits=self._limits),
            owner=process.identity(),
            backend=NAME,
            match=Match.CGROUP,
            cgroups=tuple(cgroup.path for cgroup in cgroups),
            cgroup_ids=tuple(cgroups_v2.ids(cgroups)),
            since_ns=clock.boottime_ns(),
            attached_by=f"table {self._table.name}",
            handles={"network_namespace": self._nft.namespace},
        )

    # Somebody else may remove the table.

    def _look(self) -> None:
        if self._lost or self._file.removed_by_others:
            return
        # Whoever shows the rates has just looked.
        if time.monotonic() - self._seen_s < _LOOK_S / 2 or self._is_intact():
            return
        # Who removes the throttle holds the lock, and deletes the file after the table.
        with locked_if_free() as is_free:
            if is_free and self._file.exists():
                self._restore()

    def _is_intact(self) -> bool:
        """Whether all of the table is there; then note its counters. Raises BackendError."""
        state = self._table.state(list(self._limits), len(self._order.cgroups))
        if state is None or not state.intact:
            return False
        self._counters, self._seen_s = state.counters, time.monotonic()
        return True

    def _restore(self) -> None:
        """Put the table back, once: whoever removes it again means it."""
        name = self._table.name
        if self._restored:
            self._lost = True
            self._say(f"the table {name} was removed again, not by pybpfthrottle: the limit ends")
            return
        self._restored = True
        self._table.create(self._limits, self._order.cgroups, self._counters)
        self._say(
            f"the table {name} was removed, not by pybpfthrottle (nft flush ruleset?): it was"
            " restored, and will not be a second time"
        )

    def _look_for_strangers(self) -> None:
        """Note the processes in other network namespaces, where no rule sees their packets."""
        strangers = [
            pid
            for pid, number in _namespaces(self._pids()).items()
            if number != self._nft.namespace
        ]
        if strangers:
            self._say(
                f"{process.listed(strangers)}: not limited by nftables, because the limit is in"
                " another network namespace"
            )

    def _say(self, note: str) -> None:
        if note not in self._notes:
            log.warning("%s", note)
            self._notes[note] = None

    # What others do with it.

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted; what is known if the table is gone."""
        with suppress(BackendError):
            self._is_intact()
        return dict(self._counters)

    def burst_bytes(self, direction: Direction) -> int:
        """Return how much may pass at once after an idle time, beyond the rate."""
        return burst_bytes(self._limits[direction])

    def set_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit of a direction; None lifts it. Raises BackendError."""
        with locked():
            self._table.set_limit(direction, rate)
            self._limits[direction] = rate
            self._file.set_limit(direction, rate)

    def adopt_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Take notice of a limit that somebody else has put in force."""
        self._limits[direction] = rate

    def switch(self, method: str) -> None:
        """Raise ThrottleError: there is only one way."""
        raise ThrottleError(f"{NAME} has no attach methods, and cannot switch to {method}")

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Limit the cgroup ``come`` instead of ``gone``, which was removed. Raises BackendError."""
        cgroups = [come if one == gone else one for one in self._order.cgroups]
        with locked():
            self._table.set_cgroups(list(self._limits), cgroups)
            self._order = self._order._replace(cgroups=cgroups)
            self._file.update(
                cgroups=tuple(one.path for one in cgroups),
                cgroup_ids=tuple(cgroups_v2.ids(cgroups)),
            )

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how a direction is limited."""
        return how(self._limits[direction], self._table.name)

    def processes(self) -> list[int]:
        """Return nothing: cgroups are limited."""
        return []

    def notes(self) -> Sequence[str]:
        """Return what is not covered, and what others have done, a line each."""
        return list(self._notes)

    def chores(self) -> Sequence[Chore]:
        """Return the chores that notice what others do."""
        return [self._file.chore, self._looking, self._looking_for_strangers]

    def removed_by_others(self) -> bool:
        """Whether somebody else has removed the limit."""
        return self._lost or self._file.removed_by_others

    def remove(self) -> None:
        """Delete the table and the file."""
        with locked():
            self._undo.close()

    def _withdraw(self) -> None:
        self._table.delete()
        self._file.delete()

    def close(self) -> None:
        """Remove the throttle: it does not outlive this process."""
        self.remove()


def _namespaces(pids: Iterable[int]) -> dict[int, int]:
    """Return the network namespaces of processes, as far as they can be seen."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = netns.number(pid)
    return found
