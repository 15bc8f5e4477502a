"""What counting for every process costs, and whether it is right, beside nethogs.

CPU is in percent of one core, with a refresh a second, while each process sends on each of its
connections once a second. Bytes are those of IP packets; the firewall of the peers' namespace has
counted them too (nftables), by port. Beside them nethogs measures the same transfers, if installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from contextlib import ExitStack
from typing import Any, Iterator

from benches import attribution, table
from benches.attribution import Meter
from benches.child import Child
from benches.surroundings import ENVIRONMENT, python
from pybpfthrottle import traffic
from pybpfthrottle.demo.wire import Wire

_PORT = 7000
_TOOL = python("pybpfthrottle")
_START_UP_S = 3.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--processes", type=int, default=500, help="how many have connections")
    add("--sockets", default="1000,10000", metavar="NUMBERS", help="of all of them together")
    add("--seconds", type=float, default=10.0, help="how long to measure, and to transfer")
    add("--no-transfers", action="store_true", help="measure only what it costs")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and print a row for each case; the exit status."""
    found: dict[str, dict[str, Any]] = {}
    for sockets in map(int, arguments.sockets.split(",")):
        found.update(_cost(arguments.processes, sockets, arguments.seconds))
    found.update(_start(arguments.processes, 2000))
    if not arguments.no_transfers:
        for short in (False, True):
            found.update(attribution.compared(arguments.seconds, short=short))
    return table.show(found, as_json=arguments.json)


def _cost(processes: int, sockets: int, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    name = f"{processes} processes, {sockets} connections"
    with ExitStack() as stack:
        _crowd(stack, processes, sockets)
        begin_s, cpu_s = time.perf_counter(), time.process_time()
        with traffic.watch() as watch:
            ready_s = time.perf_counter() - begin_s
            time.sleep(1.0)
            watch.snapshot()
            begin_s, cpu_s = time.perf_counter(), time.process_time()
            while time.perf_counter() - begin_s < seconds:
                time.sleep(1.0)
                watch.snapshot()
            percent = 100 * (time.process_time() - cpu_s) / (time.perf_counter() - begin_s)
        yield f"watch, {name}", {"CPU %": round(percent, 2), "begins ms": round(ready_s * 1e3)}
        monitor = Meter(stack, [*_TOOL, "monitor", "--json"])
        time.sleep(_START_UP_S)
        monitor.begin()
        time.sleep(seconds)
        yield f"monitor, {name}", {"CPU %": monitor.percent()}


def _start(processes: int, sockets: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """From the start of the process to the first table in a terminal."""
    with ExitStack() as stack:
        _crowd(stack, processes, sockets)
        begin_s = time.perf_counter()
        main_end, other_end = os.openpty()
        stack.callback(os.close, main_end)
        top = subprocess.Popen(
            [*_TOOL, "top"],
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
            start_new_session=True,
        )
        os.close(other_end)
        stack.callback(top.wait)
        stack.callback(top.kill)
        shown = b""
        while b"down/s" not in shown:
            shown += os.read(main_end, 1 << 16)
        milliseconds = round((time.perf_counter() - begin_s) * 1e3)
    yield f"top, {processes} processes, {sockets} connections", {"on screen ms": milliseconds}


def _crowd(stack: ExitStack, processes: int, sockets: int) -> None:
    wire = stack.enter_context(Wire())
    where = (wire.server.address, str(_PORT))
    Child(stack, wire.server.inside(*python("benches.crowd", "serve", *where))).ready()
    talk = python("benches.crowd", "talk", *where, str(processes), str(sockets))
    Child(stack, wire.client.inside(*talk)).ready()
    time.sleep(1.0)
