"""Networks that change as a recorded one did: what --record wrote, or a trace of mahimahi.

What --record wrote has rates, and the round trips of TCP where there were any: both are replayed.
"""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle.backends.protocol import Dial
from pybpfthrottle.conditions.model import MAX_DELAY_S
from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import MAX_RATE, MIN_RATE, Direction, Rate
from pybpfthrottle.supervisor import Frequent
from pybpfthrottle.throttle import Throttle

_STEP_S = 0.1  # shorter ones would only be bursts for a token bucket
_MS_PER_STEP = 100
_PACKET_BYTES = 1504  # of a mahimahi opportunity, which is a whole packet
_LONGEST_S = 24 * 3600


@dataclass(frozen=True)
class Trace:
    """The rates of one direction, each for ``step_s``, from the beginning again at the end.

    ``round_trips_s`` has as many round trips, or none if none was recorded.
    """

    step_s: float
    rates: tuple[Rate, ...]
    round_trips_s: tuple[float, ...] = ()

    @property
    def peak(self) -> Rate:
        """The highest rate."""
        return max(self.rates)

    def at(self, elapsed_s: float) -> Rate:
        """Return the rate so long after the start."""
        return self.rates[self._step(elapsed_s)]

    def round_trip_s(self, elapsed_s: float) -> float:
        """Return the round trip so long after the start, if there are any."""
        return self.round_trips_s[self._step(elapsed_s)]

    def _step(self, elapsed_s: float) -> int:
        return int(elapsed_s / self.step_s) % len(self.rates)


def read(path: str, direction: Direction) -> Trace:
    """Read a direction of a trace, by what the file begins with. Raises LimitError.

    JSON lines and CSV are what ``--record`` writes. All else is as mahimahi has it: a line for each
    packet that may pass, with its time in milliseconds.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LimitError(f"cannot read the trace {path}: {error}") from error
    try:
        if lines and lines[0].startswith("{"):
            return _of_samples(_json_samples(lines, direction))
        if lines and lines[0].startswith("time,"):
            return _of_samples(_csv_samples(lines, direction))
        return _of_packets(lines)
    except (ValueError, KeyError, TypeError) as error:
        raise LimitError(
            f"{path} is no trace: {error}; give what --record wrote (.csv, .jsonl), or a line with"
            " milliseconds for each packet, as mahimahi does"
        ) from error


class _Sample(NamedTuple):
    """A line of a recording."""

    elapsed_s: float
    actual: float
    round_trip_s: Optional[float]

    @classmethod
    def of(cls, elapsed_s: Any, actual: Any, round_trip_ms: Any) -> _Sample:
        """Read its fields. Raises ValueError or TypeError."""
        trip_s = None if round_trip_ms in (None, "") else float(round_trip_ms) / 1000
        if trip_s is not None and not 0 <= trip_s <= MAX_DELAY_S:  # NaN too
            raise ValueError(f"{round_trip_ms} ms is no round trip")
        return cls(float(elapsed_s), float(actual), trip_s)


def _json_samples(lines: Sequence[str], direction: Direction) -> Iterator[_Sample]:
    for line in lines:
        event = json.loads(line)
        if event.get("event") == "sample" and str(direction) in event:
            actual = event[str(direction)]["actual"]
            yield _Sample.of(event["elapsed_s"], actual, event.get("round_trip_ms"))


def _csv_samples(lines: Sequence[str], direction: Direction) -> Iterator[_Sample]:
    for row in csv.DictReader(lines):
        if row["direction"] == str(direction):
            yield _Sample.of(row["elapsed_s"], row["actual"], row.get("round_trip_ms"))


def _of_samples(samples: Iterator[_Sample]) -> Trace:
    found = list(samples)
    if not found:
        raise ValueError("it has no samples of this direction")
    last_s = found[-1].elapsed_s
    if not (0 < last_s < _LONGEST_S):
        raise ValueError(f"it ends after {last_s:g} s")
    step_s = last_s / len(found)
    return Trace(
        step_s,
        tuple(_rate(sample.actual) for sample in found),
        _without_gaps([sample.round_trip_s for sample in found]),
    )


def _without_gaps(trips_s: Sequence[Optional[float]]) -> tuple[float, ...]:
    """Return round trips, each as it was before where nothing was sent; none if there are none."""
    last_s = next((one for one in trips_s if one is not None), None)
    if last_s is None:
        return ()
    found = []
    for one in trips_s:
        last_s = last_s if one is None else one
        found.append(last_s)
    return tuple(found)


def _of_packets(lines: Sequence[str]) -> Trace:
    times = [int(line) for line in lines if line.strip()]
    if not times or min(times) < 0 or max(times) > _LONGEST_S * 1000:
        raise ValueError("there are no times of packets in it")
    counts = [0] * max(1, math.ceil(max(times) / _MS_PER_STEP))
    for at_ms in times:
        # A packet at the last millisecond is one of the last step.
        counts[min(at_ms // _MS_PER_STEP, len(counts) - 1)] += 1
    return Trace(_STEP_S, tuple(_rate(count * _PACKET_BYTES / _STEP_S) for count in counts))


def _rate(bytes_per_s: float) -> Rate:
    if not math.isfinite(bytes_per_s):
        raise ValueError(f"{bytes_per_s} is no rate")
    return Rate(min(max(int(bytes_per_s), MIN_RATE.bytes_per_s), MAX_RATE.bytes_per_s))


class Replay(Frequent):
    """Moves a throttle's rates as traces say, from now on, and a delay. It is a chore."""

    def __init__(
        self,
        throttle: Throttle,
        traces: Mapping[Direction, Trace],
        late: Optional[Trace] = None,
        delay: Callable[[float], None] = lambda delay_s: None,
    ) -> None:
        """The throttle has limits of at least the traces' peaks.

        ``delay`` is called with each other round trip of ``late``, but for the first.
        """
        self._traces = traces
        self._late = late
        self._delay = delay
        self._delay_s = None if late is None else late.round_trip_s(0)
        self._dials: dict[Direction, Dial] = {one: throttle.dial(one) for one in traces}
        self._moved: dict[Direction, Optional[Rate]] = dict.fromkeys(traces)
        self._begin_s = time.monotonic()
        self.due_s = self._begin_s

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Move each rate to what it is to be now, and the delay."""
        now_s = time.monotonic()
        for direction, trace in self._traces.items():
            rate = trace.at(now_s - self._begin_s)
            if rate != self._moved[direction]:
                self._dials[direction].move(rate)
                self._moved[direction] = rate
        if self._late is not None:
            delay_s = self._late.round_trip_s(now_s - self._begin_s)
            if delay_s != self._delay_s:
                self._delay(delay_s)
                self._delay_s = delay_s
        self.due_s = now_s + _STEP_S
