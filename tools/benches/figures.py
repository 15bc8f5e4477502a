"""What the record of a transfer comes to: ratio, windows, fairness, stalls, percentiles. Pure.

A record is a list of the bytes in each ``BIN_S``, for each flow, from the first byte of all on.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple, Optional, Sequence

BIN_S = 0.01
_BINS_PER_S = round(1 / BIN_S)
# Windows are judged from here on: a limit may take so long to settle.
_SETTLED_S = 2

Bins = Sequence[int]


class RoundTrips(NamedTuple):
    """Of a small flow, in milliseconds."""

    p50_ms: float
    p95_ms: float
    max_ms: float


class Figures(NamedTuple):
    """A transfer in figures. None is what was too short, or too still, to tell.

    ``ratio`` and the windows are TCP payload over what the limit allows, that of the small flow
    inside as well; ``udp_ratio`` is that of the UDP flow beside it.
    """

    ratio: float
    window_min: Optional[float]
    window_max: Optional[float]
    retransmitted_percent: Optional[float]
    inside: Optional[RoundTrips]
    outside: Optional[RoundTrips]
    fairness: Optional[float]
    cpu_s_per_gb: Optional[float]
    stall_s: float
    udp_ratio: Optional[float] = None


def total(flows: Sequence[Bins]) -> list[int]:
    """The bins of all flows together."""
    return [sum(column) for column in zip(*flows)]


def ratio(bins: Bins, rate_bytes_per_s: int) -> float:
    """All bytes over what the limit allows in that time."""
    return sum(bins) / (rate_bytes_per_s * len(bins) * BIN_S)


def windows(bins: Bins, rate_bytes_per_s: int) -> list[float]:
    """The ratio of each whole second after the second one."""
    starts = range(_SETTLED_S * _BINS_PER_S, len(bins) - _BINS_PER_S + 1, _BINS_PER_S)
    return [ratio(bins[start : start + _BINS_PER_S], rate_bytes_per_s) for start in starts]


def fairness(totals: Sequence[int]) -> Optional[float]:
    """Jain's index: 1 if all flows got the same, 1/n if one got all. None if none got anything."""
    squares = sum(count * count for count in totals)
    return sum(totals) ** 2 / (len(totals) * squares) if squares else None


def longest_stall_s(flows: Sequence[Bins]) -> float:
    """The longest time in which some flow got nothing."""
    return max(map(_longest_gap, flows)) * BIN_S


def _longest_gap(bins: Bins) -> int:
    longest = current = 0
    for count in bins:
        current = 0 if count else current + 1
        longest = max(longest, current)
    return longest


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def round_trips(seconds: Sequence[float]) -> Optional[RoundTrips]:
    """Of the times that round trips took; None if there were none."""
    if not seconds:
        return None
    ms = [value * 1e3 for value in seconds]
    return RoundTrips(percentile(ms, 50), percentile(ms, 95), max(ms))


def percent(part: int, whole: int) -> Optional[float]:
    """A share in per cent; None of nothing."""
    return 100.0 * part / whole if whole else None


def median(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over some rounds, of those rounds that have it."""
    return Figures(*map(_median, zip(*rounds)))  # type: ignore[arg-type]


def _median(values: Sequence[object]) -> object:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], RoundTrips):
        return RoundTrips(*map(statistics.median, zip(*known)))
    return statistics.median(known)  # type: ignore[type-var]
