"""Networks that change as a recorded one did: what --record wrote, or a trace of mahimahi."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import dataclass
from typing import Iterator, Mapping, Optional, Sequence

from pybpfthrottle.backends.protocol import Dial
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
    """The rates of one direction, each for ``step_s``, from the beginning again at the end."""

    step_s: float
    rates: tuple[Rate, ...]

    @property
    def peak(self) -> Rate:
        """The highest rate."""
        return max(self.rates)

    def at(self, elapsed_s: float) -> Rate:
        """Return the rate so long after the start."""
        return self.rates[int(elapsed_s / self.step_s) % len(self.rates)]


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


def _json_samples(lines: Sequence[str], direction: Direction) -> Iterator[tuple[float, float]]:
    for line in lines:
        event = json.loads(line)
        if event.get("event") == "sample" and str(direction) in event:
            yield float(event["elapsed_s"]), float(event[str(direction)]["actual"])


def _csv_samples(lines: Sequence[str], direction: Direction) -> Iterator[tuple[float, float]]:
    for row in csv.DictReader(lines):
        if row["direction"] == str(direction):
            yield float(row["elapsed_s"]), float(row["actual"])


def _of_samples(samples: Iterator[tuple[float, float]]) -> Trace:
    found = list(samples)
    if not found:
        raise ValueError("it has no samples of this direction")
    last_s = found[-1][0]
    if not (0 < last_s < _LONGEST_S):
        raise ValueError(f"it ends after {last_s:g} s")
    step_s = last_s / len(found)
    return Trace(step_s, tuple(_rate(actual) for _, actual in found))


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
    """Moves a throttle's rates as traces say, from now on. It is a chore."""

    def __init__(self, throttle: Throttle, traces: Mapping[Direction, Trace]) -> None:
        """The throttle has limits of at least the traces' peaks."""
        self._traces = traces
        self._dials: dict[Direction, Dial] = {one: throttle.dial(one) for one in traces}
        self._moved: dict[Direction, Optional[Rate]] = dict.fromkeys(traces)
        self._begin_s = time.monotonic()
        self.due_s = self._begin_s

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Move each rate to what it is to be now."""
        now_s = time.monotonic()
        for direction, trace in self._traces.items():
            rate = trace.at(now_s - self._begin_s)
            if rate != self._moved[direction]:
                self._dials[direction].move(rate)
                self._moved[direction] = rate
        self.due_s = now_s + _STEP_S
