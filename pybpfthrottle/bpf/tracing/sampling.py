"""Profiles: a program runs so many times a second on each CPU, or each time a counter overflows."""

from __future__ import annotations

import errno
import os
from typing import Optional

from pybpfthrottle.bpf import perf, perf_abi
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link, Links
from pybpfthrottle.bpf.maps import cpu_numbers
from pybpfthrottle.bpf.perf_abi import PerfEventAttr
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.tracing import events, nearest

ONLINE = "/sys/devices/system/cpu/online"
# The numbers of enum perf_sw_ids and enum perf_hw_id.
EVENTS = {
    **{
        name: (perf_abi.PERF_TYPE_SOFTWARE, number)
        for number, name in enumerate(
            (
                *("cpu-clock", "task-clock", "page-faults", "context-switches", "cpu-migrations"),
                *("minor-faults", "major-faults"),
            )
        )
    },
    **{
        name: (perf_abi.PERF_TYPE_HARDWARE, number)
        for number, name in enumerate(
            (
                *("cycles", "instructions", "cache-references", "cache-misses"),
                *("branches", "branch-misses", "bus-cycles"),
            )
        )
    },
}


def attach_perf_event(
    program: Program,
    *,
    frequency_hz: int = 0,
    period: int = 0,
    event: str = "cpu-clock",
    pid: Optional[int] = None,
    cpu: Optional[int] = None,
    cookie: Optional[int] = None,
) -> Link:
    """Run a program by an event's frequency, or each ``period`` events. Linux 4.9.

    On each CPU that is online now, or on one, or for one process. ``event`` is one of ``EVENTS``;
    those that the hardware counts are lacking in many virtual machines. Raises AttachError, and
    ValueError unless one of frequency and period is positive.
    """
    if (frequency_hz > 0) == (period > 0):
        raise ValueError("give either frequency_hz= or period=, a positive number")
    if event not in EVENTS:
        raise AttachError(f"there is no event {event!r}{nearest.hint(event, EVENTS)}")
    attr = PerfEventAttr(sample_period=frequency_hz or period)
    attr.type, attr.config = EVENTS[event]
    attr.flags = perf_abi.ATTR_FREQ if frequency_hz else 0
    places = [-1] if pid is not None and cpu is None else online() if cpu is None else [cpu]
    parts: list[Link] = []
    try:
        for place in places:
            fd = perf.open_event(attr, pid=-1 if pid is None else pid, cpu=place)
            parts.append(events.attach(program, fd, cookie=cookie))
    except OSError as error:
        for part in parts:
            part.close()
        raise AttachError(
            f"cannot attach {program.name!r} to the event {event}: {_why(error, pid)}",
            errno=error.errno or 0,
        ) from error
    return Links(parts)


def _why(error: OSError, pid: Optional[int]) -> str:
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        return f"{error}: this machine does not count it, as few virtual ones do; use cpu-clock"
    return events.why(error, pid)


def online() -> list[int]:
    """Return the numbers of the CPUs that are online."""
    try:
        return cpu_numbers(perf.read(ONLINE))
    except OSError:
        return sorted(os.sched_getaffinity(0))
