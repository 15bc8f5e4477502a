"""The two ends of a transfer: some TCP flows that one process sends as fast as the other lets it.

The receiver reports when its time is over, the sender when its standard input ends. Each report is
one line of JSON, a ``Received`` or a ``Sending``.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from typing import Any, Iterator, NamedTuple, Optional

from benches.figures import BIN_S
from benches.surroundings import READY
from benches.tcp_info import Sent, sent

_CHUNK_BYTES = 1 << 20
# How long a receiver waits for a first byte.
_PATIENCE_S = 15.0
# Close by a reset: what is still queued must not disturb the next transfer.
_RESET = struct.pack("ii", 1, 0)


class Plan(NamedTuple):
    """A transfer, as both ends are told of it."""

    address: str
    port: int
    flows: int
    seconds: float
    congestion_control: str
    # What the connecting end runs beside, in its own cgroup; each gives one line of output when
    # its standard input ends.
    companions: list[list[str]]


class Received(NamedTuple):
    """What a receiver saw, from the first byte of all flows on.

    Times are CLOCK_MONOTONIC, which all processes share; the CPU seconds are the whole machine's.
    """

    begin_s: float
    bins: list[list[int]]
    cpu_s: float


class Sending(NamedTuple):
    """What the sender's connections tell at the end."""

    flows: list[Sent]


def cpu_seconds() -> float:
    """What all CPUs have worked, but for an unknown constant. Source: man 5 proc_stat.

    It is the time in which they were not idle. Where an idle CPU has no tick (NO_HZ) that is
    measured; the times of work are those of what ran at each tick, with which a program of a steady
    rhythm is in step.
    """
    with open("/proc/stat") as file:
        _, _, _, idle, iowait, _, _, steal = map(int, file.readline().split()[1:9])
    own_s = time.monotonic() * os.sysconf("SC_NPROCESSORS_ONLN")
    return own_s - (idle + iowait + steal) / os.sysconf("SC_CLK_TCK")


class Receiver:
    """Reads from all flows, and for some seconds from the first byte on counts what comes."""

    def __init__(self, connections: list[socket.socket], seconds: float) -> None:
        self._connections = connections
        self._seconds = seconds
        self._selector = _selector(connections, selectors.EVENT_READ)
        self._buffer = bytearray(_CHUNK_BYTES)
        self._stopped = False

    def count(self) -> Received:
        """Count until the time is over, or standard input ends."""
        bins = [[0] * round(self._seconds / BIN_S) for _ in self._connections]
        self._selector.select(_PATIENCE_S)
        cpu_before_s = cpu_seconds()
        begin_s = time.monotonic()
        end_s = begin_s + self._seconds
        while (left_s := end_s - time.monotonic()) > 0 and not self._stopped:
            for number, count in self._read(left_s):
                step = int((time.monotonic() - begin_s) / BIN_S)
                if step < len(bins[number]):
                    bins[number][step] += count
        return Received(begin_s, bins, cpu_seconds() - cpu_before_s)

    def drain(self) -> None:
        """Read on, so that the sender does not notice, until standard input ends."""
        while not self._stopped:
            for _ in self._read(None):
                pass

    def _read(self, timeout_s: Optional[float]) -> Iterator[tuple[int, int]]:
        """The number of each flow that something came from, and how much."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._stopped = True
                return
            count = _received(self._connections[key.data], self._buffer)
            if count == 0:
                self._selector.unregister(key.fileobj)
            yield key.data, count


def send(connections: list[socket.socket]) -> Sending:
    """Send until standard input ends."""
    data = memoryview(bytes(_CHUNK_BYTES))
    with _selector(connections, selectors.EVENT_WRITE) as selector:
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    return Sending([sent(connection) for connection in connections])
                try:
                    connections[key.data].send(data)
                except BlockingIOError:
                    pass
                except OSError:
                    selector.unregister(key.fileobj)


def _received(connection: socket.socket, buffer: bytearray) -> int:
    """The bytes that came: 0 at the end of the flow, however it ends."""
    try:
        return connection.recv_into(buffer)
    except OSError:
        return 0


def _selector(connections: list[socket.socket], event: int) -> selectors.BaseSelector:
    """The connections with their number, and standard input with None."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    for number, connection in enumerate(connections):
        connection.setblocking(False)
        selector.register(connection, event, number)
    return selector


def _accept(plan: Plan) -> list[socket.socket]:
    with _socket(plan) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((plan.address, plan.port))
        server.listen(plan.flows)
        print(READY, flush=True)
        return [server.accept()[0] for _ in range(plan.flows)]


def _connect(plan: Plan) -> list[socket.socket]:
    connections = [_socket(plan) for _ in range(plan.flows)]
    for connection in connections:
        connection.settimeout(_PATIENCE_S)
        connection.connect((plan.address, plan.port))
    return connections


def _socket(plan: Plan) -> socket.socket:
    """With the congestion control from the first packet on; accepted ones inherit it."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    name = plan.congestion_control.encode()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
    return made


def _start(companion: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(companion, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _report(report: Any) -> None:
    print(json.dumps(report), flush=True)


def main() -> None:
    """Be one end of a transfer; the connecting end reports for its companions after itself."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("end", choices=("accept", "connect"))
    parser.add_argument("role", choices=("send", "receive"))
    parser.add_argument("plan", type=json.loads)
    arguments = parser.parse_args()
    plan = Plan(*arguments.plan)
    connecting = arguments.end == "connect"
    companions = [_start(each) for each in plan.companions if connecting]
    connections = (_connect if connecting else _accept)(plan)
    if arguments.role == "send":
        _report(send(connections))
    else:
        receiver = Receiver(connections, plan.seconds)
        _report(receiver.count())
        receiver.drain()
    for companion in companions:
        print(companion.communicate()[0], end="", flush=True)


if __name__ == "__main__":
    main()
