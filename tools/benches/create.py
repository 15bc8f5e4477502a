"""Time to put many limits in force one after the other, ours and tc's.

Ours are made by one process, as a daemon would. "checked" is throttle.start with its look for other
limits, as the command line does it; "exactly" is throttle.apply, which limits just what it is told.
tc makes an HTB class for each limit, and no filter, by one command for all or by one for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any, Callable, Iterator

from benches import table
from benches.surroundings import ENVIRONMENT, python
from pybpfthrottle import throttle
from pybpfthrottle.demo.wire import Namespace
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Direction, Limits, Rate, Target, ThrottleSpec
from pybpfthrottle.targets import Selection
from pybpfthrottle.throttle import Throttle

_LIMITS: Limits = {Direction.DOWNLOAD: Rate.parse("1M")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    table.configure(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--throttles", type=int, nargs="+", default=[1, 10, 200], metavar="N")
    parser.add_argument("--hold", help=argparse.SUPPRESS)


def main(arguments: argparse.Namespace) -> int:
    """Measure and show; the exit status."""
    if arguments.hold:
        print(json.dumps(_times(arguments.hold, arguments.throttles[0])))
        return 0
    found = {
        f"{count} {way}": _best(way, count, arguments.rounds)
        for way in (*_WAYS, *_TC)
        for count in arguments.throttles
    }
    return table.show(found, as_json=arguments.json)


def _best(way: str, count: int, rounds: int) -> dict[str, Any]:
    """The round that took the least time altogether."""
    tried = [_TC[way](count) if way in _TC else _child(way, count) for _ in range(rounds)]
    return min(tried, key=lambda row: row["all_ms"])


def _child(way: str, count: int) -> dict[str, Any]:
    """A process of its own makes them: what its first one takes counts too."""
    command = python("benches.create", "--hold", way, "--throttles", str(count))
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _times(way: str, count: int) -> dict[str, Any]:
    with ExitStack() as stack:
        begin = time.perf_counter()
        taken: list[float] = []
        made: list[Throttle] = []
        for one in _WAYS[way](stack, count):
            taken.append(time.perf_counter() - begin)
            stack.callback(one.remove)
            made.append(one)
            begin = time.perf_counter()
        return {
            "first_ms": _ms(taken[0]),
            "second_ms": _ms(sum(taken[1:2])),
            "further_ms": _ms(_median(taken[2:])),
            "remove_ms": _ms(_median([_removed_in(one) for one in made[2:]])),
            "all_ms": _ms(sum(taken)),
        }


def _removed_in(one: Throttle) -> float:
    begin = time.perf_counter()
    one.remove()
    return time.perf_counter() - begin


def _median(taken: list[float]) -> float:
    return sorted(taken)[len(taken) // 2] if taken else 0.0


def _checked(stack: ExitStack, count: int) -> Iterator[Throttle]:
    for target in _cgroups(stack, count):
        yield throttle.start(ThrottleSpec(Target(cgroups=(target.path,)), _LIMITS))


def _exactly(stack: ExitStack, count: int) -> Iterator[Throttle]:
    for target in _cgroups(stack, count):
        yield throttle.apply([target], _LIMITS)


def _processes(stack: ExitStack, count: int) -> Iterator[Throttle]:
    idle = []
    for _ in range(count):
        idle.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        stack.callback(idle[-1].communicate)
    for one in idle:
        yield throttle.apply([], _LIMITS, processes=Selection((Process(one.pid),)))


def _cgroups(stack: ExitStack, count: int) -> list[Cgroup]:
    found = []
    for number in range(count):
        found.append(cgroup.root().create_child(f"bench-{os.getpid()}-{number}"))
        stack.callback(found[-1].remove, patience_s=5)
    return found


def _one_command(count: int) -> dict[str, Any]:
    return _tc(count, lambda lines: [("-batch", "-")])


def _a_command_each(count: int) -> dict[str, Any]:
    return _tc(count, lambda lines: [line.split() for line in lines])


def _tc(count: int, commands: Callable[[list[str]], Any]) -> dict[str, Any]:
    """A class for each limit, on the loopback device of a new namespace."""
    lines = [
        f"class add dev lo parent 1: classid 1:{number:x} htb rate 1mbps"
        for number in range(1, count + 1)
    ]
    namespace = Namespace("", "")
    try:
        namespace.wait()
        subprocess.run(
            namespace.inside("tc", "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb"),
            check=True,
        )
        begin = time.perf_counter()
        for command in commands(lines):
            tc = namespace.inside("tc", *command)
            subprocess.run(tc, input="\n".join(lines), text=True, check=True)
        return {"all_ms": _ms(time.perf_counter() - begin)}
    finally:
        namespace.close()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


_WAYS = {"cgroups, exactly": _exactly, "cgroups, checked": _checked, "processes": _processes}
_TC = {"tc HTB, one command": _one_command, "tc HTB, a command each": _a_command_each}


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    configure(_parser)
    sys.exit(main(_parser.parse_args()))
