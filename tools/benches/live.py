"""ns a packet of the programs at work, and what many throttles on one machine cost.

The times are those of BPF statistics (Linux 5.8), which add some 20 ns of their own. Memory is
what the kernel tells of a throttle's maps and programs, without their machine code.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Iterator, Sequence

from benches import table
from benches.methods import Method
from benches.transfer import Cell, transfer
from pybpfthrottle import cgroup, throttle
from pybpfthrottle.bpf import links, programs, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.limits import MAX_RATE, Direction
from pybpfthrottle.throttle import Throttle

_ATTACH_TYPES = {
    Direction.DOWNLOAD: AttachType.CGROUP_INET_INGRESS,
    Direction.UPLOAD: AttachType.CGROUP_INET_EGRESS,
}
_TRANSFER_S = 1.0
# More than a throttle has open; some descriptors are this process's own.
_DESCRIPTORS_EACH = 16
_DESCRIPTORS_OWN = 256
# The shell enters the cgroup before it becomes the client.
_ENTER = 'echo $$ >"$0/cgroup.procs" && exec "$@"'


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    table.configure(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--throttles", type=int, nargs="+", default=[1, 100, 10_000], metavar="N")


def main(arguments: argparse.Namespace) -> int:
    """Measure and show; the exit status."""
    found = {}
    _allow_descriptors(max(arguments.throttles) * _DESCRIPTORS_EACH + _DESCRIPTORS_OWN)
    with _statistics():
        for count in arguments.throttles:
            found[f"{count} throttles"] = _measure(count, arguments.rounds)
    return table.show(found, as_json=arguments.json)


@contextmanager
def _statistics() -> Iterator[None]:
    """The kernel counts the runs of all programs while the descriptor is open."""
    # BPF_STATS_RUN_TIME is 0, and so is all of the attribute. Source: include/uapi/linux/bpf.h.
    fd = syscall.bpf(Cmd.ENABLE_STATS, Attr())
    try:
        yield
    finally:
        os.close(fd)


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))


def _measure(count: int, rounds: int) -> dict[str, Any]:
    """Make so many throttles, each for a cgroup of its own, and use the last."""
    with ExitStack() as stack:
        cgroups = [stack.enter_context(_scratch(number)) for number in range(count)]
        throttles: list[Throttle] = []
        stack.callback(_remove, throttles)
        row: dict[str, Any] = {}
        with _each_us(row, "set_up_us", count):
            for target in cgroups:
                throttles.append(throttle.apply([target], dict.fromkeys(Direction, MAX_RATE)))
        with _each_us(row, "read_us", count):
            for each in throttles:
                each.counters()
        row["memory_kb"] = round(_memory_bytes() / count / 1024, 1)
        for direction in Direction:
            times = [_live_ns(cgroups[-1], direction) for _ in range(rounds)]
            row[f"{direction}_ns"] = round(min(times))
        with _each_us(row, "remove_us", count):
            _remove(throttles)
    return row


def _remove(throttles: Sequence[Throttle]) -> None:
    for each in throttles:
        each.remove()


@contextmanager
def _each_us(row: dict[str, Any], name: str, count: int) -> Iterator[None]:
    """Note how long each of so many took."""
    begin_s = time.perf_counter()
    yield
    row[name] = round((time.perf_counter() - begin_s) / count * 1e6, 1)


@contextmanager
def _scratch(number: int) -> Iterator[Cgroup]:
    target = cgroup.root().create_child(f"bench-{os.getpid()}-{number}")
    try:
        yield target
    finally:
        target.remove(patience_s=5)


def _live_ns(target: Cgroup, direction: Direction) -> float:
    """The mean time of a run of the cgroup's program in a transfer that its limit never touches."""
    (program_id,) = _programs(target, direction)
    before_runs, before_ns = _work(program_id)
    enter = ["sh", "-c", _ENTER, target.path]
    transfer(
        Cell(direction, MAX_RATE, flows=1, congestion_control="cubic", round_trip_ms=0),
        Method("live", "in a cgroup of its own", prefix=lambda direction, rate: enter),
        _TRANSFER_S,
    )
    runs, ns = _work(program_id)
    return (ns - before_ns) / (runs - before_runs)


def _programs(target: Cgroup, direction: Direction) -> Sequence[int]:
    fd = target.open()
    try:
        return links.query(fd, _ATTACH_TYPES[direction]).program_ids
    finally:
        os.close(fd)


def _work(program_id: int) -> tuple[int, int]:
    """How often a program ran, and for how many ns altogether."""
    fd = programs.open_by_id(program_id)
    try:
        told = _fdinfo(fd)
        return int(told["run_cnt"]), int(told["run_time_ns"])
    finally:
        os.close(fd)


def _memory_bytes() -> int:
    """Of all maps and programs that this process has open."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone.
        with suppress(FileNotFoundError):
            total += int(_fdinfo(int(name)).get("memlock", 0))
    return total


def _fdinfo(fd: int) -> dict[str, str]:
    """Source: kernel/bpf/syscall.c, bpf_prog_show_fdinfo and bpf_map_show_fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
