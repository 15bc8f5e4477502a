"""From counters to rates and verdicts."""

from __future__ import annotations

import math
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

# The rate is the mean over this many samples: TCP sends in bursts.
_WINDOW_SAMPLES = 3
# Less than this share of a limit is just keep-alive traffic.
_IDLE_SHARE = 0.01
_LARGEST_PACKET = 64 * 1024


class Reading(NamedTuple):
    """One direction at one moment."""

    direction: Direction
    limit: Optional[Rate]
    actual_bytes_per_s: float
    counters: Counters
    # How much the burst may have added to the actual rate.
    spare_bytes_per_s: float = 0.0
    # Packets, in the time that the rate covers.
    dropped: int = 0
    # For a whole run: the active seconds, which the rate covers.
    active_s: Optional[float] = None

    @property
    def ratio(self) -> Optional[float]:
        """The actual rate divided by the limit; None if there is none, or all is blocked."""
        if self.limit is None or self.limit.is_blocked:
            return None
        return self.actual_bytes_per_s / self.limit.bytes_per_s

    @property
    def verdict(self) -> Optional[Verdict]:
        """None if there is no limit."""
        if self.limit is None:
            return None
        if self.ratio is None:
            return Verdict.NOT_WORKING if self.actual_bytes_per_s else Verdict.BLOCKED
        steady = max(self.actual_bytes_per_s - self.spare_bytes_per_s, 0.0)
        steady_ratio = steady / self.limit.bytes_per_s
        return Verdict.judge(self.ratio, steady_ratio, dropped=bool(self.dropped))

    def record(self) -> dict[str, Any]:
        """Return it for JSON; rates are in bytes per second."""
        ratio = self.ratio
        active = {} if self.active_s is None else {"active_s": round(self.active_s, 3)}
        return {
            **active,
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
            f"{self.direction}: actual={actual}, limit={self.limit}{self._ratio(', ratio=')}"
            f" {self.verdict.value}"
        )

    def short(self) -> str:
        """``download 48.5 KB/s 0.97x ✅``."""
        actual = format_rate(self.actual_bytes_per_s)
        if self.verdict is None:
            return f"{self.direction} {actual} no limit"
        return f"{self.direction} {actual}{self._ratio()} {self.verdict.short}".rstrip()

    def shortest(self) -> str:
        """``↓48.5K 0.97x``."""
        arrow = "↓" if self.direction is Direction.DOWNLOAD else "↑"
        actual = format_rate(self.actual_bytes_per_s).removesuffix("B/s").replace(" ", "")
        return f"{arrow}{actual}{self._ratio()}"

    def _ratio(self, before: str = " ") -> str:
        return "" if self.ratio is None else f"{before}{self.ratio:.2f}x"

    def summary(self, elapsed_s: float) -> str:
        """Return the line, with the total amount."""
        share = self.counters.packets_dropped / max(1, self.counters.packets_total)
        active_s = elapsed_s if self.active_s is None else self.active_s
        idle = f"{active_s:.1f} of " if 0 < active_s < elapsed_s - 1 else ""
        # Only a limit drops, perhaps one that was lifted.
        is_limited = self.verdict is not None or share
        dropped = f", {share:.1%} of packets dropped" if is_limited else ""
        amount = format_bytes(self.counters.bytes_passed)
        return f"{self.line()}, {amount} in {idle}{elapsed_s:.1f} s{dropped}"


class _Span(NamedTuple):
    """Some seconds, and the bytes that passed in them."""

    seconds: float = 0.0
    passed: int = 0

    def plus(self, other: _Span) -> _Span:
        return _Span(self.seconds + other.seconds, self.passed + other.passed)

    @property
    def rate(self) -> float:
        return self.passed / self.seconds if self.seconds else 0.0


class Activity:
    """The active time of one direction, without its idle seconds.

    A transfer begins and ends somewhere within a sample. The first and the last sample count for
    as long as their bytes take at the rate of the samples in between.
    """

    def __init__(self) -> None:
        self.bursts = 1
        self._done = _Span()
        self._first, self._inner, self._last = _Span(), _Span(), _Span()
        self._pause_s = 0.0

    def add(self, seconds: float, passed: int, *, came: int, limit: Optional[Rate]) -> None:
        """Add a sample: what ``passed``, and what ``came``, which includes what was dropped."""
        if came <= (limit.bytes_per_s * seconds * _IDLE_SHARE if limit else 0):
            self._pause_s += seconds
            return
        # At a low limit one packet takes long: the limit itself causes such pauses.
        if self._pause_s > _longest_pause_s(limit):
            self._end()
        if self._first.seconds:
            self._inner = self._inner.plus(self._last).plus(_Span(self._pause_s, 0))
            self._last = _Span(seconds, passed)
        else:
            self._first = _Span(seconds, passed)
        self._pause_s = 0.0

    def total(self) -> _Span:
        """Return the active seconds, and what passed in them."""
        edges = [span for span in (self._first, self._last) if span.seconds]
        # Without samples in between, use the longer edge: the other may last only a moment.
        rate = self._inner.rate or max(edges, default=_Span()).rate
        found = self._done.plus(self._inner)
        for span in edges:
            seconds = min(span.seconds, span.passed / rate) if rate else span.seconds
            found = found.plus(_Span(seconds, span.passed))
        return found

    def _end(self) -> None:
        if self._first.seconds:
            self.bursts += 1
        self._done = self.total()
        self._first = self._inner = self._last = _Span()


def _longest_pause_s(limit: Optional[Rate]) -> float:
    if limit is None:
        return 0.0
    return math.inf if limit.is_blocked else _LARGEST_PACKET / limit.bytes_per_s


class Meter:
    """Turns a throttle's counters into rates."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._start = (time.monotonic(), throttle.counters())
        self._history = deque([self._start], maxlen=_WINDOW_SAMPLES + 1)
        self._limits = dict(throttle.limits)
        self._activities = {direction: Activity() for direction in self._start[1]}

    @property
    def elapsed_s(self) -> float:
        """The seconds from the meter's creation to the last reading of the counters."""
        return self._history[-1][0] - self._start[0]

    def sample(self) -> list[Reading]:
        """Return the rates over the last few samples, which all had the same limits."""
        limits, self._limits = self._limits, dict(self._throttle.limits)
        self._look()
        first, last = self._history[0], self._history[-1]
        if limits != self._limits:
            # What has passed until here says nothing of the new ones.
            self._history = deque([last], self._history.maxlen)
        elapsed = max(last[0] - first[0], 1e-6)
        return [
            Reading(
                direction,
                limits[direction],
                (counters.bytes_passed - first[1][direction].bytes_passed) / elapsed,
                counters,
                self._throttle.burst_bytes(direction) / elapsed,
                counters.packets_dropped - first[1][direction].packets_dropped,
            )
            for direction, counters in last[1].items()
        ]

    def total(self) -> list[Reading]:
        """Return the rates since the start, over the active time."""
        self._look()
        return [
            self._total(direction, counters) for direction, counters in self._history[-1][1].items()
        ]

    def _look(self) -> None:
        before, counters = self._history[-1]
        now = (time.monotonic(), self._throttle.counters())
        self._history.append(now)
        for direction, activity in self._activities.items():
            activity.add(
                now[0] - before,
                now[1][direction].bytes_passed - counters[direction].bytes_passed,
                came=now[1][direction].bytes_total - counters[direction].bytes_total,
                limit=self._throttle.limits[direction],
            )

    def _total(self, direction: Direction, counters: Counters) -> Reading:
        activity = self._activities[direction]
        active = activity.total()
        # Too little for any second to count as active: use the mean over the whole time.
        passed = active if active.seconds else _Span(self.elapsed_s, counters.bytes_passed)
        seconds = max(passed.seconds, 1e-6)
        return Reading(
            direction,
            self._throttle.limits[direction],
            passed.passed / seconds,
            counters,
            self._throttle.burst_bytes(direction) * activity.bursts / seconds,
            counters.packets_dropped,
            active.seconds,
        )
