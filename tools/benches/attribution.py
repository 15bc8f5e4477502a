"""Whose bytes they are: what this tool and nethogs tell, beside what the peers have counted."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from benches.child import Child
from benches.surroundings import ENVIRONMENT, python
from pybpfthrottle.demo import peer
from pybpfthrottle.demo.wire import DEVICE, Namespace, Wire
from pybpfthrottle.linux import process

_GRACE_S = 2.0
_PER_SECOND = "500"
# All hooks see packets as the wire has them.
_SEGMENTS = f"ip link set dev {DEVICE} gso_max_segs 1"


class Meter:
    """A program that measures: its output is kept, and its CPU time measured."""

    def __init__(self, stack: ExitStack, command: list[str]) -> None:
        self._file = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - it does
        self._popen = subprocess.Popen(
            command, stdout=self._file, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        stack.callback(self.end)
        self.begin()

    def begin(self) -> None:
        """Measure from now on."""
        self._begin_s, self._cpu_s = time.monotonic(), self._cpu()

    def percent(self) -> float:
        """Return what it has needed, in percent of one core."""
        return round(100 * (self._cpu() - self._cpu_s) / (time.monotonic() - self._begin_s), 2)

    def end(self) -> str:
        """End it; what it has printed."""
        self._popen.send_signal(signal.SIGINT)
        try:
            self._popen.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._file.seek(0)
        return self._file.read()

    def _cpu(self) -> float:
        # man 5 proc_pid_stat
        fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Transfer(NamedTuple):
    """One in the client's namespace: the peer's commands, and its own; the port of the server."""

    name: str
    port: int
    peer: list[str]
    own: list[str]
    # The peer connects to it, and is started last.
    serves: bool = False


def _transfers(wire: Wire, seconds: float) -> Iterator[Transfer]:
    far, length = wire.server.address, str(int(seconds))
    curl = ["curl", "-sN", "-o", "/dev/null", "--limit-rate", "20M"]
    iperf3 = ["iperf3", "-c", far, "-t", length, "-p"]
    yield Transfer(
        "curl",
        peer.PORT,
        python("pybpfthrottle.demo.peer", "serve", far),
        [*curl, "-m", length, f"http://{far}:{peer.PORT}/"],
    )
    serve = ["iperf3", "-s", "-1", "-p"]
    yield Transfer("iperf3, TCP", 5201, [*serve, "5201"], [*iperf3, "5201", "-b", "200M"])
    yield Transfer("iperf3, UDP", 5202, [*serve, "5202"], [*iperf3, "5202", "-u", "-b", "50M"])
    if importlib.util.find_spec("aioquic"):
        quic = "benches.quic_peer"
        yield Transfer(
            "QUIC",
            7200,
            python(quic, "serve", far, "7200"),
            python(quic, "get", far, "7200"),
        )


def _short(wire: Wire) -> Iterator[Transfer]:
    far, near = wire.server.address, wire.client.address
    short = "benches.shorts"
    yield Transfer(
        "500 short connections a second",
        7100,
        python(short, "serve", far, "7100", "1"),
        python(short, "get", far, "7100", _PER_SECOND),
    )
    yield Transfer(
        "pre-forking server",
        7000,
        python(short, "get", near, "7000", _PER_SECOND),
        python(short, "serve", near, "7000", "4"),
        serves=True,
    )


def compared(seconds: float, *, short: bool) -> dict[str, dict[str, Any]]:
    """Return a row for each transfer: bytes, and each tool's in relation to them; and the CPU.

    With ``short`` there are short connections as well.
    """
    with ExitStack() as stack:
        wire = stack.enter_context(Wire())
        transfers = [*_transfers(wire, seconds), *(_short(wire) if short else ())]
        rows = _compared(stack, wire, transfers, seconds)
    return {f"{name} beside short ones" if short else name: row for name, row in rows.items()}


def _compared(
    stack: ExitStack, wire: Wire, transfers: list[Transfer], seconds: float
) -> dict[str, dict[str, Any]]:
    for end in (wire.client, wire.server):
        subprocess.run(end.inside(*_SEGMENTS.split()), check=True)
    _count(wire.server, [one.port for one in transfers])
    meters = {"pybpfthrottle": Meter(stack, python("pybpfthrottle", "monitor", "--json"))}
    if shutil.which("nethogs"):
        hogs = wire.client.inside("nethogs", "-t", "-C", "-v", "2", "-d", "1", DEVICE)
        meters["nethogs"] = Meter(stack, hogs)
    time.sleep(_GRACE_S)
    pids = _run(wire, transfers, seconds, list(meters.values()))
    cpu = {name: meter.percent() for name, meter in meters.items()}
    counted = _counted(wire.server)
    told = {name: _READERS[name](meter.end()) for name, meter in meters.items()}
    rows: dict[str, dict[str, Any]] = {}
    for transfer in transfers:
        rows[transfer.name] = {"MB": round(counted[transfer.port] / 1e6, 2)}
        for name, found in told.items():
            own = sum(found.get(pid, 0) for pid in pids[transfer.port])
            rows[transfer.name][name] = round(own / max(1, counted[transfer.port]), 4)
    return {**rows, "CPU %": cpu}


def _run(
    wire: Wire, transfers: list[Transfer], seconds: float, meters: list[Meter]
) -> dict[int, list[int]]:
    """Run all of them; the processes of each, by port."""
    pids = {}
    with ExitStack() as stack:
        ends = {True: wire.client, False: wire.server}
        for serves in (True, False):
            for one in transfers:
                if one.serves is serves:
                    command = one.own if serves else one.peer
                    server = Child(stack, ends[serves].inside(*command))
                    if command[0] != "iperf3":
                        server.ready()
                    pids[one.port] = server
        time.sleep(1.0)
        for meter in meters:
            meter.begin()
        clients = [
            Child(stack, ends[not one.serves].inside(*(one.peer if one.serves else one.own)))
            for one in transfers
        ]
        time.sleep(seconds + 1.0)
        found = {}
        for one, client in zip(transfers, clients):
            own = pids[one.port].pid if one.serves else client.pid
            found[one.port] = [own, *process.families().get(own, ())]
        for client in clients:
            client.stop()
        time.sleep(2.0)
    return found


def _count(namespace: Namespace, ports: list[int]) -> None:
    """Have the firewall count the packets of each port, in both directions."""
    rules = ["add table inet bench"]
    for chain in ("input", "output"):
        rules.append(f"add chain inet bench {chain} {{ type filter hook {chain} priority 0 ; }}")
    for port in ports:
        rules.append(f"add counter inet bench p{port}")
        for chain in ("input", "output"):
            for side in ("sport", "dport"):
                match = f"meta l4proto {{ tcp, udp }} th {side} {port}"
                rules.append(f"add rule inet bench {chain} {match} counter name p{port}")
    command = namespace.inside("nft", "-f", "-")
    subprocess.run(command, input="\n".join(rules), text=True, check=True)


def _counted(namespace: Namespace) -> dict[int, int]:
    command = namespace.inside("nft", "-j", "list", "counters")
    listed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    counters = [one["counter"] for one in json.loads(listed)["nftables"] if "counter" in one]
    return {int(one["name"][1:]): one["bytes"] for one in counters}


def _of_monitor(text: str) -> dict[int, int]:
    found = {}
    for line in text.splitlines():
        told = json.loads(line)
        found[told["pid"]] = told["download_bytes"] + told["upload_bytes"]
    return found


def _of_nethogs(text: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for line in text.splitlines():
        told = re.fullmatch(r".*/(\d+)/\d+\t(\S+)\t(\S+)", line)
        if told:
            pid = int(told[1])
            # It forgets processes that have ended.
            found[pid] = max(found.get(pid, 0), round(float(told[2]) + float(told[3])))
    return found


_READERS = {"pybpfthrottle": _of_monitor, "nethogs": _of_nethogs}
