"""QUIC downloads under each kind of limit.

The server is ngtcp2's, which paces; nginx, which sends at once what it may, and has 131 KB on their
way at least; or aioquic's, in this interpreter, which is too slow for 10 MB/s. The client of the
first two is curl. All but aioquic are those of Debian trixie, unpacked in a cache.

All but lost, rtt and ping are of the time after the first two seconds. billed: all packets that
the client received, with their headers, divided by the limit. ratio: the same of stream data
alone; 0.95 is exact. lowest, highest: the same in one second. lost: of all datagrams that the
server sent, those that the client did not get, whose programs may have been too slow. rtt: as
aioquic's client sees it, ms. ping: the round trip of a small UDP flow inside the limit, its 95th
percentile in ms. helper: CPU time of the limit's helper processes, s per GB, and per cent of a
core. start lost: what our limit has dropped in the first two seconds, KB.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple, Optional

from vm import VmError

from benches.child import Child, TransferError
from benches.figures import BIN_S
from benches.line import DelayLine, LineSpec
from benches.methods import LIMITED_PORT, METHODS, OTHER_PORT, Method, MethodError
from benches.servers import Place, serve_http3
from benches.surroundings import python
from benches.table import show
from benches.unpacked import Unpacked, unpacked
from pybpfthrottle import throttles
from pybpfthrottle.demo.wire import DEVICE, Namespace, Wire, ip
from pybpfthrottle.errors import Error
from pybpfthrottle.model import Direction, Rate

_KNOWN = {method.name: method for method in METHODS if Direction.DOWNLOAD in method.directions}
_START_UP_S = 2.0
# The queue of a limit holds half a second.
_ON_THE_WAY_S = 0.8
_ETHERNET_BYTES = 14  # veth has it, and the delay line has not


class Row(NamedTuple):
    """The columns of one transfer; None is what cannot be told."""

    billed: float
    ratio: float
    lowest: float
    highest: float
    lost_percent: float
    rtt_ms: Optional[float]
    ping_ms: float
    helper_s_per_gb: float
    helper_percent: float
    start_lost_kb: Optional[float]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--limits", default="500K,10M", metavar="RATES")
    add("--connections", default="1,4", metavar="NUMBERS")
    add("--delays", default="0,20", metavar="MS", help="round-trip times; 0 is a veth pair")
    add("--server", default="ngtcp2", choices=("ngtcp2", "nginx", "aioquic"))
    add("--control", default="reno", choices=("reno", "cubic", "bbr"), help="of the latter two")
    add("--methods", default="shape,police,ifb,ifb-codel", metavar="NAMES", help=",".join(_KNOWN))
    add("--seconds", type=float, default=12.0, help="length of each transfer")
    add("--rounds", type=int, default=3, help="rounds; the median counts")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and print a row for each cell and method; the exit status."""
    programs = None
    try:
        if arguments.server != "aioquic":
            programs = unpacked()
        elif importlib.util.find_spec("aioquic") is None:
            print("bench quic: needs aioquic: pip install aioquic", file=sys.stderr)
            return 2
        limits = list(map(Rate.parse, arguments.limits.split(",")))
        connections = list(map(int, arguments.connections.split(",")))
        delays = list(map(float, arguments.delays.split(",")))
        methods = [_KNOWN[name] for name in arguments.methods.split(",")]
    except KeyError as error:
        print(f"bench quic: --methods: choose from {', '.join(_KNOWN)}, not {error}")
        return 2
    except (ValueError, Error, VmError) as error:
        print(f"bench quic: {error}", file=sys.stderr)
        return 2
    table: dict[str, dict[str, float]] = {}
    failed = False
    for delay, rate, count, method in product(delays, limits, connections, methods):
        name = f"{rate} x {count}, {delay:g} ms, {method.name}"
        try:
            rounds = [
                _transfer(method, rate, count, delay, programs, arguments)
                for _ in range(arguments.rounds)
            ]
        except (TransferError, MethodError, Error) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        table[name] = {
            field.replace("_", " "): round(median(values), 3)
            for field, values in zip(Row._fields, zip(*rounds))
            if None not in values
        }
        print(name, table[name], file=sys.stderr)
    return show(table, as_json=arguments.json) if table else int(failed)


def _transfer(
    method: Method,
    rate: Rate,
    count: int,
    delay_ms: float,
    programs: Optional[Unpacked],
    arguments: argparse.Namespace,
) -> Row:
    """Download once. Raises TransferError, MethodError or NamespaceError."""
    with ExitStack() as stack:
        wire = stack.enter_context(DelayLine(LineSpec(delay_ms / 2000)) if delay_ms else Wire())
        address, ethernet = wire.server.address, 0 if delay_ms else _ETHERNET_BYTES
        carry_datagrams(wire)
        method.apply(wire.client, Direction.DOWNLOAD, rate)
        if programs is None:
            get = _serve_aioquic(stack, wire.server, count, arguments.control)
        else:
            ngtcp2 = arguments.control if arguments.server == "ngtcp2" else None
            get = _serve_http3(stack, wire.server, count, programs, ngtcp2)
        answer = python("benches.quic_ping", "answer", address, str(OTHER_PORT))
        Child(stack, wire.server.inside(*answer)).ready()
        prefix = method.prefix(Direction.DOWNLOAD, rate)
        at_first = datagrams(wire)
        client = Child(stack, wire.client.inside(*prefix, *get))
        client.ready()
        time.sleep(_START_UP_S)
        start_lost_kb = _dropped_kb(client.pid)
        before = _counted(wire, client)
        time.sleep(max(0.0, arguments.seconds - _START_UP_S))
        counted = (now - one for now, one in zip(_counted(wire, client), before))
        seconds, octets, sent, got, cpu_s = counted
        client.stop()
        report = client.report()
        fall_silent(wire)
        left, came = (now - one for now, one in zip(datagrams(wire), at_first))
    per_second = _seconds(report["bins"], arguments.seconds, rate)
    if not any(per_second):
        raise TransferError(
            f"no data arrived after {_START_UP_S:g} s; of {sent:.0f} packets that the server then"
            f" sent, with pings, {got:.0f} did; dropped before that: {start_lost_kb or 0:.0f} KB"
        )
    billed = (octets / sent - ethernet) * got
    trips = report.get("round_trips_ms")
    return Row(
        *(billed / seconds / rate.bytes_per_s, mean(per_second), min(per_second), max(per_second)),
        100 * (1 - came / left),
        mean(trips) if trips else None,
        report["ping_ms"],
        *(cpu_s / (billed / 1e9), 100 * cpu_s / seconds),
        start_lost_kb,
    )


def _serve_aioquic(stack: ExitStack, server: Namespace, count: int, control: str) -> list[str]:
    """Start the server; return the client's command."""
    where = (server.address, str(LIMITED_PORT))
    serve = python("benches.quic_peer", "serve", *where, "--control", control)
    Child(stack, server.inside(*serve)).ready()
    return python("benches.quic_peer", "get", *where, "--connections", str(count))


def _serve_http3(
    stack: ExitStack, server: Namespace, count: int, programs: Unpacked, ngtcp2: Optional[str]
) -> list[str]:
    """Start the server; return the client's command."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    place = Place(server.address, directory, programs)
    serve_http3(stack, server, place, LIMITED_PORT, ngtcp2)
    get = ("benches.quic_curl", server.address, str(OTHER_PORT), str(count))
    return python(*get, "--", *place.curl_http3(LIMITED_PORT))


def _dropped_kb(pid: int) -> Optional[float]:
    """What the limit of one of our processes has dropped; None if it has none."""
    for running in throttles():
        if running.owner_pid == pid:
            with closing(running.open()) as throttle:
                return throttle.counters()[Direction.DOWNLOAD].bytes_dropped / 1000
    return None


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
    return [one / rate.bytes_per_s for one in sums]


def carry_datagrams(wire: Wire) -> None:
    """Have each packet be one datagram: cut before the device, and none that finds a neighbour."""
    wire.change("gso_max_segs 1")
    if not isinstance(wire, DelayLine):
        wire.change("arp off address 02:00:00:00:00:01")  # the same, so each is for the other end
    for end in (wire.client, wire.server):
        ip(end, f"-6 address flush dev {DEVICE}")


def _counted(wire: Wire, client: Child) -> tuple[float, ...]:
    """Return the time, bytes and packets sent, packets that came, and CPU time, all until now."""
    octets, _ = _sent(wire.server)
    return time.monotonic(), octets, *datagrams(wire), _helpers_s(client.pid)


def _sent(end: Namespace) -> tuple[int, int]:
    """Return what has left by the device: bytes, maybe with headers of Ethernet, and packets."""
    lines = Path(f"/proc/{end.process.pid}/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith(f"{DEVICE}:")).split()
    return int(fields[9]), int(fields[10])


def datagrams(wire: Wire) -> tuple[int, int]:
    """Return how many packets the server has sent, and how many datagrams came to the client."""
    came = sum(
        _udp_count(wire.client, field) for field in ("InDatagrams", "NoPorts", "RcvbufErrors")
    )
    return _sent(wire.server)[1], came


def fall_silent(wire: Wire) -> None:
    """Have the server send nothing more, and what is on its way arrive: that is not lost."""
    ip(wire.server, f"route add blackhole {wire.client.address}/32")
    time.sleep(_ON_THE_WAY_S)


def _udp_count(end: Namespace, field: str) -> int:
    """Return what the kernel counts in a network namespace."""
    names, values = (
        line.split()
        for line in Path(f"/proc/{end.process.pid}/net/snmp").read_text().splitlines()
        if line.startswith("Udp:")
    )
    return int(values[names.index(field)])
