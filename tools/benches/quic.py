"""QUIC downloads under each kind of limit. Needs aioquic in this interpreter.

All but rtt and ping are of the time after the first two seconds. billed: all packets that the
client received, with their headers, divided by the limit. ratio: the same of stream data alone;
0.95 is exact. lowest, highest: the same in one second. lost: of the datagrams that the server
sent, those that the client did not get. rtt: as the client's library sees it, ms. ping: the round
trip of a small UDP flow inside the limit, its 95th percentile in ms. helper: CPU time of the
limit's helper processes, s per GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from statistics import mean, median

from benches.child import Child, TransferError
from benches.figures import BIN_S
from benches.line import DelayLine, LineSpec
from benches.methods import LIMITED_PORT, METHODS, OTHER_PORT, Method, MethodError
from benches.surroundings import python
from benches.table import show
from pybpfthrottle.demo.wire import Namespace, Wire
from pybpfthrottle.errors import Error
from pybpfthrottle.model import Direction, Rate

_KNOWN = {method.name: method for method in METHODS if Direction.DOWNLOAD in method.directions}
_COLUMNS = ("billed", "ratio", "lowest", "highest", "lost %", "rtt ms", "ping ms", "helper s/GB")
_START_UP_S = 2.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--limits", default="500K,10M", metavar="RATES")
    add("--connections", default="1,4", metavar="NUMBERS")
    add("--delays", default="0,20", metavar="MS", help="round-trip times; 0 is a veth pair")
    add("--control", default="reno", choices=("reno", "cubic"), help="of the sender")
    add("--methods", default="shape,police,ifb,ifb-codel", metavar="NAMES", help=",".join(_KNOWN))
    add("--seconds", type=float, default=12.0, help="length of each transfer")
    add("--rounds", type=int, default=3, help="rounds; the median counts")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and print a row for each cell and method; the exit status."""
    if importlib.util.find_spec("aioquic") is None:
        print("bench quic: needs aioquic: pip install aioquic", file=sys.stderr)
        return 2
    try:
        limits = list(map(Rate.parse, arguments.limits.split(",")))
        connections = list(map(int, arguments.connections.split(",")))
        delays = list(map(float, arguments.delays.split(",")))
        methods = [_KNOWN[name] for name in arguments.methods.split(",")]
    except KeyError as error:
        print(f"bench quic: --methods: choose from {', '.join(_KNOWN)}, not {error}")
        return 2
    except (ValueError, Error) as error:
        print(f"bench quic: {error}", file=sys.stderr)
        return 2
    table: dict[str, dict[str, float]] = {}
    failed = False
    for delay, rate, count, method in product(delays, limits, connections, methods):
        name = f"{rate} x {count}, {delay:g} ms, {method.name}"
        try:
            rounds = [
                _transfer(method, rate, count, delay, arguments) for _ in range(arguments.rounds)
            ]
        except (TransferError, MethodError, Error) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        values = (round(median(column), 3) for column in zip(*rounds))
        table[name] = dict(zip(_COLUMNS, values))
        print(name, table[name], file=sys.stderr)
    return show(table, as_json=arguments.json) if table else int(failed)


def _transfer(
    method: Method, rate: Rate, count: int, delay_ms: float, arguments: argparse.Namespace
) -> tuple[float, ...]:
    """Download once; the columns. Raises TransferError, MethodError or NamespaceError."""
    with ExitStack() as stack:
        wire = stack.enter_context(DelayLine(LineSpec(delay_ms / 2000)) if delay_ms else Wire())
        method.apply(wire.client, Direction.DOWNLOAD, rate)
        where = (wire.server.address, str(LIMITED_PORT))
        serve = python("benches.quic_peer", "serve", *where, "--control", arguments.control)
        Child(stack, wire.server.inside(*serve)).ready()
        echo = python("benches.quic_peer", "echo", where[0], str(OTHER_PORT))
        Child(stack, wire.server.inside(*echo)).ready()
        get = python("benches.quic_peer", "get", *where, "--connections", str(count))
        prefix = method.prefix(Direction.DOWNLOAD, rate)
        client = Child(stack, wire.client.inside(*prefix, *get))
        client.ready()
        time.sleep(_START_UP_S)
        before = datagrams(wire.server, wire.client)
        time.sleep(max(0.0, arguments.seconds - _START_UP_S))
        lost = lost_datagrams(wire.server, wire.client, before)
        cpu_s = _helpers_s(client.pid)
        client.stop()
        report = client.report()
    per_second = _seconds(report["bins"], arguments.seconds, rate)
    billed = _seconds(report["billed"], arguments.seconds, rate)
    trips = report["round_trips_ms"] or [0.0]
    per_gb = cpu_s / (sum(count for _, count in report["billed"]) / 1e9)
    return (
        *(mean(billed), mean(per_second), min(per_second), max(per_second), lost, mean(trips)),
        *(report["ping_ms"], per_gb),
    )


def _helpers_s(pid: int) -> float:
    """The CPU time of our helpers below a process."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = entry.read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            if int(fields[1]) == pid and name.startswith("pybpf") and name.endswith("-keeper"):
                found += int(fields[11]) + int(fields[12])
    return found / os.sysconf("SC_CLK_TCK")


def _seconds(bins: list[tuple[int, int]], seconds: float, rate: Rate) -> list[float]:
    """What came in each whole second but the first, divided by the limit."""
    by_bin = dict(bins)
    step = round(1 / BIN_S)
    numbers = range(round(_START_UP_S / BIN_S), int(seconds / BIN_S) - step + 1, step)
    sums = [sum(by_bin.get(at + i, 0) for i in range(step)) for at in numbers]
    if not any(sums):
        raise TransferError("no data arrived")
    return [one / rate.bytes_per_s for one in sums]


def lost_datagrams(
    sender: Namespace, receiver: Namespace, before: tuple[int, int] = (0, 0)
) -> float:
    """Return how much of what one end has sent the other did not get, in per cent.

    ``before`` has what was sent, and what came, until some time ago.
    """
    sent, got = (now - one for now, one in zip(datagrams(sender, receiver), before))
    return 100 * (1 - got / sent) if sent else 0.0


def datagrams(sender: Namespace, receiver: Namespace) -> tuple[int, int]:
    """Return how many one end has sent, and the other has got."""
    return _counted(sender, "OutDatagrams"), _counted(receiver, "InDatagrams")


def _counted(end: Namespace, field: str) -> int:
    names, values = (
        line.split()
        for line in Path(f"/proc/{end.process.pid}/net/snmp").read_text().splitlines()
        if line.startswith("Udp:")
    )
    return int(values[names.index(field)])
