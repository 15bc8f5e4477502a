"""Time per packet of live programs in ns, and the cost of many throttles on one machine.

Times come from BPF statistics (Linux 5.8), which add some 20 ns of their own. Memory is what the
kernel reports for a throttle's maps and programs, without their machine code.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, Sequence

from benches import many, table
from benches.child import Child
from benches.many import Made
from benches.methods import Method
from benches.surroundings import python
from benches.transfer import Cell, transfer
from pybpfthrottle.bpf import links, programs, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import MAX_RATE, Direction

_ATTACH_TYPES = {
    Direction.DOWNLOAD: AttachType.CGROUP_INET_INGRESS,
    Direction.UPLOAD: AttachType.CGROUP_INET_EGRESS,
}
_TRANSFER_S = 1.0
# A busy machine may need some ms for each of them.
_PATIENCE_S = 300.0
# The shell enters the cgroup before it becomes the client.
_ENTER = 'echo $$ >"$0/cgroup.procs" && exec "$@"'


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    table.configure(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--throttles", type=int, nargs="+", default=[1, 100, 10_000], metavar="N")


def main(arguments: argparse.Namespace) -> int:
    """Measure and show; the exit status."""
    with _statistics():
        found = {
            f"{count} throttles": _measure(count, arguments.rounds) for count in arguments.throttles
        }
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


def _measure(count: int, rounds: int) -> dict[str, Any]:
    """Have so many throttles made, and use one of them."""
    with ExitStack() as stack:
        name = f"bench-{os.getpid()}"
        holders, made = _hold(stack, name, count)
        used = Cgroup(os.path.join(cgroup.root().path, f"{name}-0-0"))
        live = {
            f"{direction}_ns": round(min(_live_ns(used, direction) for _ in range(rounds)))
            for direction in Direction
        }
        removed_s = sum(map(_removed_s, holders))
    return {
        **live,
        "set_up_us": round(sum(each.set_up_s for each in made) / count * 1e6, 1),
        "read_us": round(sum(each.read_s for each in made) / count * 1e6, 1),
        "remove_us": round(removed_s / count * 1e6, 1),
        "memory_kb": round(sum(each.memory_bytes for each in made) / count / 1024, 1),
    }


def _hold(stack: ExitStack, name: str, count: int) -> tuple[list[Child], list[Made]]:
    """As many processes as their descriptors make necessary, one after the other."""
    holders, made = [], []
    share = many.most()
    for number, first in enumerate(range(0, count, share)):
        part = str(min(share, count - first))
        holders.append(Child(stack, python("benches.many", f"{name}-{number}", part)))
        made.append(Made(*holders[-1].report(_PATIENCE_S)))
    return holders, made


def _removed_s(holder: Child) -> float:
    holder.stop()
    return float(holder.report(_PATIENCE_S))


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
    info = programs.info_by_id(program_id)
    return info.run_count, info.run_time_ns
