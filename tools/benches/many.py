"""A process that holds many throttles, each for a cgroup of its own, until standard input ends.

It reports as JSON, once when they are there and once when they are gone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import Iterator, NamedTuple

from pybpfthrottle import throttle
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import MAX_RATE, Direction

# More than a throttle has open; some descriptors are the process's own.
_DESCRIPTORS_EACH = 16
_DESCRIPTORS_OWN = 256


class Made(NamedTuple):
    """What it took to make some throttles and to read their counters, and what they hold."""

    set_up_s: float
    read_s: float
    memory_bytes: int


def most() -> int:
    """How many one process may hold."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (hard - _DESCRIPTORS_OWN) // _DESCRIPTORS_EACH)


@contextmanager
def _scratch(name: str) -> Iterator[Cgroup]:
    target = cgroup.root().create_child(name)
    try:
        yield target
    finally:
        target.remove(patience_s=5)


def hold(name: str, count: int) -> None:
    """Make them, report, wait, take them away, and report how many seconds that took."""
    with ExitStack() as stack:
        cgroups = [stack.enter_context(_scratch(f"{name}-{number}")) for number in range(count)]
        begin_s = time.perf_counter()
        throttles = [
            stack.enter_context(throttle.apply([target], dict.fromkeys(Direction, MAX_RATE)))
            for target in cgroups
        ]
        made_s = time.perf_counter()
        for each in throttles:
            each.counters()
        read_s = time.perf_counter()
        made = Made(made_s - begin_s, read_s - made_s, _memory_bytes())
        print(json.dumps(made), flush=True)
        sys.stdin.read()
        begin_s = time.perf_counter()
        for each in throttles:
            each.remove()
        print(json.dumps(time.perf_counter() - begin_s), flush=True)


def _memory_bytes() -> int:
    """Of all maps and programs that this process has open."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone.
        with suppress(FileNotFoundError):
            total += int(fdinfo(int(name)).get("memlock", 0))
    return total


def fdinfo(fd: int) -> dict[str, str]:
    """Source: kernel/bpf/syscall.c, bpf_prog_show_fdinfo and bpf_map_show_fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def main() -> None:
    """Hold so many throttles."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name")
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hold(arguments.name, arguments.count)


if __name__ == "__main__":
    main()
