"""From counters to rates and verdicts."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple, Optional

from pybpfthrottle.model import (
    Counters,
    Direction,
    Rate,
    Verdict,
    format_bytes,
    format_rate,
)
from pybpfthrottle.throttle import Throttle

# The rate is the mean over so many samples: TCP comes in bursts.
_WINDOW_SAMPLES = 3


class Reading(NamedTuple):
    """One direction at one moment."""

    direction: Direction
    limit: Optional[Rate]
    actual_bytes_per_s: float
    counters: Counters
    # What the burst may have added to the actual rate.
    spare_bytes_per_s: float = 0.0

    @property
    def ratio(self) -> Optional[float]:
        """Actual to limit; None where there is no limit."""
        return self.actual_bytes_per_s / self.limit.bytes_per_s if self.limit else None

    @property
    def verdict(self) -> Optional[Verdict]:
        """None where there is no limit."""
        if not self.limit:
            return None
        # Where anything came at all it is not idle, however small the rest.
        steady = max(self.actual_bytes_per_s - self.spare_bytes_per_s, 0.0)
        ratio = steady / self.limit.bytes_per_s
        return Verdict.of(ratio or min(self.actual_bytes_per_s, 1e-9))

    def record(self) -> dict[str, Any]:
        """For JSON; rates in bytes per second."""
        ratio = self.ratio
        return {
            "limit": self.limit.bytes_per_s if self.limit else None,
            "actual": round(self.actual_bytes_per_s),
            "ratio": None if ratio is None else round(ratio, 4),
            "verdict": self.verdict.name.lower() if self.verdict else None,
            **self.counters._asdict(),
        }

    def line(self) -> str:
        """``download: actual=48.5 KB/s, limit=50.0 KB/s, ratio=0.97x ✅ THROTTLED``."""
        actual = format_rate(self.actual_bytes_per_s)
        if self.verdict is None:
            return f"{self.direction}: actual={actual}, no limit"
        return (
            f"{self.direction}: actual={actual}, limit={self.limit}, ratio={self.ratio:.2f}x"
            f" {self.verdict.value}"
        )

    def summary(self, elapsed_s: float) -> str:
        """The line, with how much there was in all."""
        share = self.counters.packets_dropped / max(1, self.counters.packets_total)
        return (
            f"{self.line()}, {format_bytes(self.counters.bytes_passed)} in {elapsed_s:.1f} s,"
            f" {share:.1%} of packets dropped"
        )


class Meter:
    """Turns the counters of a throttle into rates."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._start = (time.monotonic(), throttle.counters())
        self._history = deque([self._start], maxlen=_WINDOW_SAMPLES + 1)

    @property
    def elapsed_s(self) -> float:
        """Since the meter was made."""
        return time.monotonic() - self._start[0]

    def sample(self) -> list[Reading]:
        """The rates over the last few samples."""
        self._history.append((time.monotonic(), self._throttle.counters()))
        return self._readings(self._history[0], self._history[-1])

    def total(self) -> list[Reading]:
        """The rates since the start."""
        return self._readings(self._start, (time.monotonic(), self._throttle.counters()))

    def _readings(
        self,
        first: tuple[float, dict[Direction, Counters]],
        last: tuple[float, dict[Direction, Counters]],
    ) -> list[Reading]:
        elapsed = max(last[0] - first[0], 1e-6)
        return [
            Reading(
                direction,
                self._throttle.limits[direction],
                (counters.bytes_passed - first[1][direction].bytes_passed) / elapsed,
                counters,
                self._throttle.burst_bytes(direction) / elapsed,
            )
            for direction, counters in last[1].items()
        ]
