"""Round trips, downloads and losses through a delay: ours, and netem's where the kernel has it.

line is run --netns, which has half of the delay in each direction.

p50, p99: of round trips, in ms beyond the delay that was asked for. Mbit/s: TCP of 100 Mbit/s, and
the CPU time of our keeper meanwhile, with that of the kernel for what it gives back. lost, twice,
behind: of UDP datagrams of 1200 bytes at 100 Mbit/s. sibling: the same of a process beside it, for
which nothing is asked. loss: the share of datagrams that was lost, and the standard deviation.
meant: the share that our keeper lost on purpose. unasked: how many it dropped for want of time or
room, or let pass. unread: how many arrived, but found no room in the receiver's socket.

netem is of a device, so that it delays the sibling too. Where this kernel lacks it, an emulated
machine has it (tools/vmtest --run), whose load has to be small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional

from benches.child import Child, TransferError
from benches.figures import percentile
from benches.surroundings import python
from benches.table import show
from pybpfthrottle import diversion
from pybpfthrottle.conditions.model import Impairment, Injected, Loss
from pybpfthrottle.demo.wire import DEVICE, Namespace, Wire
from pybpfthrottle.errors import Error
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Rate

_KINDS = {"tcp4": 4, "udp4": 4, "tcp6": 6, "udp6": 6}
_DATAGRAM_BYTES = 1200
_NETEM_PACKETS = 1_000_000
_SHOWN = ("twice", "behind", "unasked", "unread")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Row = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--delays", default="20,80,300", metavar="MS", help="delays of what comes in")
    add("--losses", default="0.1,1,5,20", metavar="PERCENT")
    add("--ways", default="none,diversion,line,netem", metavar="NAMES")
    add("--rate", type=Rate.parse, default="100mbit", help="of downloads and datagrams")
    add("--kinds", default=",".join(_KINDS), metavar="NAMES", help="of round trips")
    add("--pings", type=int, default=100)
    add("--seconds", type=float, default=5.0, help="length of each download")
    add("--datagrams", type=int, default=20_000)
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and print a row for each way and delay; the exit status."""
    delays = [float(one) for one in arguments.delays.split(",") if one]
    losses = [float(one) for one in arguments.losses.split(",") if one]
    ways = arguments.ways.split(",")
    unknown = [kind for kind in arguments.kinds.split(",") if kind not in _KINDS]
    if unknown:
        print(f"bench delay: --kinds: choose from {', '.join(_KINDS)}, not {unknown[0]}")
        return 2
    table: dict[str, Row] = {}
    try:
        with ExitStack() as stack:
            lab = _Lab(stack, arguments)
            for way in ways:
                for delay_ms in delays if way != "none" else [0.0]:
                    wanted = Impairment(delay_s=delay_ms / 1e3)
                    _add(table, f"{way}, {delay_ms:g} ms", lab.row(way, wanted))
                for percent in losses if way != "none" else []:
                    wanted = Impairment(loss=Loss.chance(percent / 100), seed=1)
                    _add(table, f"{way}, loss {percent:g} %", lab.losses(way, wanted))
    except (TransferError, Error) as error:
        print(f"bench delay: {error}", file=sys.stderr)
        return 1
    return show(table, as_json=arguments.json)


def _add(table: dict[str, Row], name: str, row: Optional[Row]) -> None:
    if row is None:
        print(f"{name}: left out, this kernel has no sch_netem", file=sys.stderr)
        return
    table[name] = row
    print(name, row, file=sys.stderr)


class _Lab:
    """A wire with a far end, and a cgroup for what is impaired."""

    def __init__(self, stack: ExitStack, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._wire = stack.enter_context(Wire())
        own = own_cgroups.create_empty(cgroups.root())
        stack.callback(own.remove)
        self._place: Cgroup = own.cgroup
        self._report = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "line.jsonl"
        # What the near end is run by.
        self._by: list[str] = []
        Child(stack, self._wire.server.inside(*python("benches.delay_peer", "far"))).ready()

    def row(self, way: str, wanted: Impairment) -> Optional[Row]:
        """Measure round trips, a download and datagrams; None without netem."""
        server = self._wire.server
        found: Row = {}
        with self._impaired(way, wanted) as late:
            if late is _MISSING:
                return None
            for kind in self._arguments.kinds.split(","):
                host = server.address6 if _KINDS[kind] == 6 else server.address
                trips = self._ask("ping", host, kind[:3], str(self._arguments.pings))["trips"]
                for percent in (50, 99):
                    beyond = percentile(trips, percent) - wanted.delay_s * 1e3
                    found[f"{kind} p{percent}"] = round(beyond, 3)
            found.update(self._download(late))
            found.update(self._datagrams(late))
            found.update(self._sibling())
        return found

    def losses(self, way: str, wanted: Impairment) -> Optional[Row]:
        """Return the share that was lost, in per cent, and how far it may be off by chance."""
        count = self._arguments.datagrams
        with self._impaired(way, wanted) as late:
            if late is _MISSING:
                return None
            got = self._many(late)
        share = wanted.loss.share if wanted.loss else 0.0
        return {
            "lost": round(100 * (1 - got["came"] / count), 3),
            "sigma": round(100 * (share * (1 - share) / count) ** 0.5, 3),
            "meant": round(100 * got["meant"] / count, 3),
            "unasked": got["unasked"],
            "unread": got["unread"],
        }

    def _download(self, late: Any) -> Row:
        before, sent = _cpu_s(late), _retransmitted(self._wire.server)
        seconds = self._arguments.seconds
        host = self._wire.server.address
        got = self._ask("get", host, str(self._arguments.rate.bytes_per_s), str(seconds))
        return {
            "Mbit/s": round(got["bytes_per_s"] * 8e-6, 1),
            "keeper CPU %": round(100 * (_cpu_s(late) - before) / (seconds + 1), 1),
            "retransmitted": _retransmitted(self._wire.server) - sent,
        }

    def _datagrams(self, late: Any) -> Row:
        got = self._many(late)
        lost = self._arguments.datagrams - got["came"]
        return {"lost": lost, **{name: got[name] for name in _SHOWN}}

    def _sibling(self) -> Row:
        host = self._wire.server.address
        trips = self._ask("ping", host, "udp", str(self._arguments.pings), beside=True)["trips"]
        got = self._ask("get", host, str(self._arguments.rate.bytes_per_s), "1", beside=True)
        return {
            "sibling p50": round(percentile(trips, 50), 3),
            "sibling Mbit/s": round(got["bytes_per_s"] * 8e-6, 1),
        }

    def _many(self, late: Any) -> Row:
        """Return what came of many datagrams, and what our keeper has done to them."""
        numbers = (self._arguments.rate.bytes_per_s, self._arguments.datagrams, _DATAGRAM_BYTES)
        before = late.counts() if late else Injected()
        got: Row = self._ask("datagrams", self._wire.server.address, *map(str, numbers))
        after = late.counts() if late else self._counted_by_line()
        got["meant"] = after.lost - before.lost
        got["unasked"] = _unasked(after) - _unasked(before)
        return got

    def _counted_by_line(self) -> Injected:
        """Return what the line of the last command has counted, nothing without one."""
        if not self._by:
            return Injected()
        *_, last = self._report.read_text().splitlines()
        return Injected(**json.loads(last)["network"]["download"]["diverted"])

    def _ask(self, *what: str, beside: bool = False) -> Any:
        with ExitStack() as stack:
            command = python("benches.delay_peer", *what)
            by = [] if beside else self._by
            near = Child(stack, self._wire.client.inside(*by, *command))
            near.ready()
            if not (beside or by):
                self._place.move_in(near.pid)
            near.stop()
            return near.report(120)

    @contextmanager
    def _impaired(self, way: str, wanted: Impairment) -> Iterator[Any]:
        if way == "diversion":
            pids = [self._wire.client.process.pid]
            with diversion.open(self._place, wanted, pids=lambda: pids) as late:
                yield late
        elif way == "line":
            share = wanted.loss.share if wanted.loss else 0.0
            self._by = python("pybpfthrottle", "run", "-q", "--netns", "--seed", "1")
            self._by += ["--json-file", str(self._report)]
            self._by.append(f"--delay={wanted.delay_s * 1e3:g}ms")
            self._by += [f"--download-loss={100 * share:g}%", "--"]
            yield None
            self._by = []
        elif way == "netem":
            loss = f" loss {100 * wanted.loss.share:g}%" if wanted.loss else ""
            options = f"netem delay {wanted.delay_s * 1e3:g}ms{loss} limit {_NETEM_PACKETS}"
            added = self._tc("add", *options.split())
            yield None if added else _MISSING
            if added:
                self._tc("del")
        else:
            yield None

    def _tc(self, what: str, *options: str) -> bool:
        command = self._wire.server.inside("tc", "qdisc", what, "dev", DEVICE, "root", *options)
        return not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def _unasked(counted: Injected) -> int:
    return counted.late_dropped + counted.passed_undelayed


# Instead of a way that this kernel does not have.
_MISSING = object()


def _cpu_s(late: Any) -> float:
    """Return the CPU time that our keeper has taken."""
    if late is None:
        return 0.0
    with open(f"/proc/{late.keeper_pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _retransmitted(end: Namespace) -> int:
    """Return how many segments a namespace has sent once more."""
    text = subprocess.check_output(end.inside("cat", "/proc/net/snmp"), text=True)
    names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])
