"""Commands that tell when they got there and how much memory they took, timed from their start."""

from __future__ import annotations

import statistics
import subprocess
import time
from typing import Any, Mapping, Sequence

Sample = tuple[float, int]


def timed(command: Sequence[str], environment: Mapping[str, str]) -> Sample:
    """Milliseconds, and the peak memory in KB (0: not known), as the command prints them.

    It prints the time (ns) at which it got there and its peak, or the times of two moments.
    """
    begin = time.time_ns()
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    first, second = (int(word) for word in done.stdout.split() if word.isdigit())
    if second > first:  # the time of the beginning and of the end
        return (second - first) / 1e6, 0
    return (first - begin) / 1e6, second


def ended(command: Sequence[str], environment: Mapping[str, str]) -> Sample:
    """Milliseconds until a command has ended."""
    begin = time.time_ns()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    return (time.time_ns() - begin) / 1e6, 0


def medians(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """A row for each name."""
    return {
        name: {
            "ms": round(statistics.median(ms for ms, _ in pairs), 1),
            "peak_mb": round(statistics.median(kb for _, kb in pairs) / 1024, 1) or "",
        }
        for name, pairs in samples.items()
    }
