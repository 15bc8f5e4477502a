"""The kernel's clocks. In a time namespace (Linux 5.6) processes see shifted ones.

BPF programs and process start times use the clocks of the initial time namespace, and so do all
records shared by instances in different time namespaces. Times to compare with these are read here.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cache
from typing import Iterator, Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple

_FIRST_TIME_NAMESPACE = 0xEFFFFFFA  # PROC_TIME_INIT_INO of include/linux/proc_ns.h
_NS_PER_S = 1_000_000_000


class Offsets(NamedTuple):
    """How far a time namespace's clocks are ahead of the initial one's, in nanoseconds."""

    monotonic_ns: int = 0
    boottime_ns: int = 0


def monotonic_ns() -> int:
    """Return CLOCK_MONOTONIC as bpf_ktime_get_ns reads it."""
    return time.monotonic_ns() - offsets().monotonic_ns


def boottime_ns() -> int:
    """Return CLOCK_BOOTTIME as in bpf_ktime_get_boot_ns and the load times of programs."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - offsets().boottime_ns


def has_come(at_ns: int) -> bool:
    """Whether a time on ``boottime_ns`` has come; 0 never does."""
    return 0 < at_ns <= boottime_ns()


def boot_time_s() -> float:
    """Return when the kernel was started, in seconds since 1970."""
    return time.time() - boottime_ns() / _NS_PER_S


@cache
def offsets() -> Offsets:
    """Return how far this process's clocks are ahead."""
    own = _namespace("self", "time")
    if own in (None, _FIRST_TIME_NAMESPACE):
        return Offsets()
    for who in _relatives():
        # The file describes the namespace for a process's children, which after unshare(2) is not
        # its own.
        if _namespace(who, "time_for_children") == own:
            with suppress(OSError, ValueError), open(f"/proc/{who}/timens_offsets") as file:
                return parse(file.read())
    return Offsets()


def parse(text: str) -> Offsets:
    """Parse /proc/PID/timens_offsets: a line per clock, by name (Linux 5.7) or number."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        clock, seconds, nanoseconds = line.split()
        found[clock] = int(seconds) * _NS_PER_S + int(nanoseconds)
    return Offsets(
        found.get("monotonic", found.get("1", 0)), found.get("boottime", found.get("7", 0))
    )


def _relatives() -> Iterator[str]:
    """Yield the processes to ask, likely ones first: one of them tells the namespace it is in."""
    yield "self"
    yield str(os.getppid())
    yield from filter(str.isdigit, os.listdir("/proc"))


def _namespace(who: str, kind: str) -> Optional[int]:
    try:
        return os.stat(f"/proc/{who}/ns/{kind}").st_ino
    except OSError:  # before Linux 5.6, or not permitted
        return None
