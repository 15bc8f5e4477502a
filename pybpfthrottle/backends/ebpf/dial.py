"""The dial of a throttle in the kernel: reads how its rate is used and moves it, cheaply."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Mapping, Optional

from pybpfthrottle.backends.ebpf.bucket import Bucket, inverse_of
from pybpfthrottle.backends.ebpf.keeper import Element
from pybpfthrottle.backends.ebpf.records import ThrottleBucket, ThrottleStats
from pybpfthrottle.backends.protocol import Use
from pybpfthrottle.bpf.maps import Map, possible_cpus
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import clock
from pybpfthrottle.model import Direction, Rate

_MS = 1_000_000
_NS_PER_S = 1_000_000_000
# Where more is wanted the bucket is never so far behind the clock. A single flow that is paced
# stays 22 ms behind it, as TCP paces its headers too; who is policed may wait for a timer.
_PATIENCE_NS = {"gate": 25 * _MS, "window": 25 * _MS, "pace": 45 * _MS, "police": 100 * _MS}
# What a sender sends at once at low rates.
_TWO_SEGMENTS = 3000
_FIELDS = [name for name, *_ in ThrottleStats._fields_]
_TOTAL, _DROPPED, _DROPPED_PACKETS = map(
    _FIELDS.index, ("bytes_total", "bytes_dropped", "packets_dropped")
)


class MapDial:
    """One direction's rate in the maps of a throttle, which stay the throttle's.

    Each look is two commands, and one while nothing passes.
    """

    def __init__(
        self,
        maps: Mapping[str, Map[Any, Any]],
        bucket: Bucket,
        direction: Direction,
        *,
        moved: Callable[[Rate], None],
        is_gone: Callable[[], bool],
    ) -> None:
        """``moved`` is called with each new rate, ``is_gone`` before the maps are used."""
        self._bucket = bucket
        self._direction = direction
        self._moved = moved
        self._is_gone = is_gone
        element = bucket.element(direction)
        self._level = Element(maps["CGROUP_BUCKETS"].fd, element, ThrottleBucket)
        counts = ctypes.c_uint64 * (len(_FIELDS) * possible_cpus())
        self._stats = Element(maps["CGROUP_STATS"].fd, element, counts)
        self._counts = memoryview(self._stats.value).cast("B").cast("Q")
        self._even_at_ns = -1
        self._passed = self._dropped = 0

    @property
    def limit(self) -> Optional[Rate]:
        """The limit as it is recorded; None if there is none now."""
        return self._bucket.rates[self._direction]

    @property
    def rate(self) -> Optional[Rate]:
        """The rate in force."""
        return self._bucket.in_force(self._direction)

    @property
    def patience_ns(self) -> int:
        """How far the bucket is behind the clock where more is not wanted."""
        rate = self.rate
        usual = _PATIENCE_NS[self._bucket.method(self._direction)]
        return usual + (_TWO_SEGMENTS * _NS_PER_S // rate.bytes_per_s if rate else 0)

    def is_still(self) -> bool:
        """Whether nothing has passed since ``look`` was called."""
        self._be_there()
        return bool(self._level.read().even_at_ns == self._even_at_ns)

    def look(self) -> Use:
        """Return what is used."""
        if not self.is_still():
            self._even_at_ns = self._level.value.even_at_ns
            self._stats.read()
            self._passed = self._sum(_TOTAL) - self._sum(_DROPPED)
            self._dropped = self._sum(_DROPPED_PACKETS)
        unused_ns = clock.monotonic_ns() - self._even_at_ns
        inverse, rate = self._level.value.inverse_rate, self.rate
        if unused_ns < 0 and rate and inverse:
            # Until the next packet it is as it was at the rate before.
            unused_ns = unused_ns * inverse_of(rate) // inverse
        return Use(self._passed, self._dropped, unused_ns)

    def move(self, rate: Rate) -> None:
        """Put another rate in force."""
        self._be_there()
        self._bucket.move_rate(self._direction, rate)
        self._moved(rate)

    def _sum(self, field: int) -> int:
        """Return what all CPUs have counted, when that was read last."""
        return sum(self._counts[field :: len(_FIELDS)])

    def _be_there(self) -> None:
        # What belonged to a throttle may belong to another one soon.
        if self._is_gone():
            raise ThrottleError("the throttle has been removed")
