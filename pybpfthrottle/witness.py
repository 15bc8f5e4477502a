"""What the sockets of a throttle's target tell, whatever the throttle itself has counted."""

from __future__ import annotations

import ipaddress
import math
import time
from contextlib import suppress
from typing import Iterable, Optional

from pybpfthrottle.errors import Error
from pybpfthrottle.linux import tcp
from pybpfthrottle.linux.netns import Connection
from pybpfthrottle.throttle import Throttle

# Looking takes at most this fraction of one CPU's time.
_MOST_OF_TIME = 0.01


def processes(throttle: Throttle) -> list[int]:
    """Return the limited processes, those in limited cgroups included."""
    found = list(throttle.processes())
    for cgroup in throttle.cgroups:
        with suppress(Error, OSError):
            found += cgroup.pids_below()
    return [pid for pid in dict.fromkeys(found) if pid]


def cgroup_ids(throttle: Throttle) -> set[int]:
    """Return the ids of the limited cgroups and those below them."""
    found: set[int] = set()
    for cgroup in throttle.cgroups:
        with suppress(Error, OSError):
            found |= cgroup.ids_below()
    return found


def look(throttle: Throttle) -> Optional[tcp.Look]:
    """Return the TCP connections of the target now; None if the kernel cannot list them."""
    try:
        return tcp.look(processes(throttle), cgroup_ids(throttle))
    except OSError:
        return None


def exempt(throttle: Throttle, connections: Iterable[Connection]) -> set[int]:
    """Return the cookies of connections to addresses that the limit is not for, as requested."""
    traffic = throttle.spec.traffic
    if traffic.everywhere:
        return set()
    from pybpfthrottle import networks

    remotes = {one.cookie: one.ends[1][0] for one in connections}
    spared = {
        address
        for address in set(remotes.values())
        if not networks.limits(traffic, ipaddress.ip_address(address))
    }
    return {cookie for cookie, address in remotes.items() if address in spared}


class Spending:
    """Sees to it that what is done repeatedly takes little of the CPU's time."""

    def __init__(self) -> None:
        self.due_s = -math.inf

    def __enter__(self) -> Spending:
        self._begin_s = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        spent_s = time.process_time() - self._begin_s
        self.due_s = time.monotonic() + spent_s / _MOST_OF_TIME

    @property
    def due(self) -> bool:
        """Whether it may be done again."""
        return time.monotonic() >= self.due_s


class RoundTrips:
    """The round trip of the target's connections that carry data."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._before: Optional[tcp.Look] = None
        self._spending = Spending()
        self._latest: Optional[float] = None
        self._counted = 0

    def begin(self) -> None:
        """Look at the connections that the first sample is compared with."""
        self._before = look(self._throttle)

    def sample(self, counted: int) -> Optional[float]:
        """Return the median of those that have moved data since the sample before, in ms; or None.

        ``counted`` is what the throttle has counted until now: nobody looks while that does not
        grow. Where looking takes long, not each sample looks, and has the round trip of the last.
        """
        if counted == self._counted:
            self._latest = None
        elif self._spending.due:
            self._counted = counted
            with self._spending:
                self._look()
        return self._latest

    def _look(self) -> None:
        before, self._before = self._before, look(self._throttle)
        self._latest = None
        if before is not None and self._before is not None:
            self._latest = tcp.round_trip_ms(tcp.between(before, self._before))
