"""Real transfers between two network namespaces, one end of them limited."""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

from benches.line import DelayLine, LineSpec
from since import parse, running

from pybpfthrottle.bpf import links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.demo import peer
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import SO_MAX_PACING_RATE, tcp_of
from pybpfthrottle.model import Rate

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TOOL = [sys.executable, "-m", "pybpfthrottle"]
# Of what is not limited; more would only make a small machine too busy to measure anything.
FASTEST = Rate.parse("100M")
LARGEST_PACKET = 64 * 1024
TIME_IS_UP = 28  # curl's exit status


class Transfer(NamedTuple):
    """When how many bytes of payload were received, counted in seconds from the first."""

    events: list[tuple[float, int]]

    def ratio(self, rate: Rate, seconds: float) -> float:
        """What came in so many seconds, over what the limit allows in them."""
        return sum(count for at, count in self.events if at < seconds) / rate.bytes_per_s / seconds

    def windows(self, rate: Rate, seconds: int) -> list[float]:
        """The ratio of each whole second."""
        found = [0.0] * seconds
        for at, count in self.events:
            if at < seconds:
                found[int(at)] += count / rate.bytes_per_s
        return found


class Lab:
    """A wire with an HTTP server at its far end."""

    def __init__(self, wire: Wire, url: str, server: subprocess.Popen[str]) -> None:
        self.wire = wire
        self.url = url
        self.server = server

    def inside(self, *command: str) -> list[str]:
        """A command line that runs in the client's namespace."""
        return self.wire.client.inside(*command)

    def download(self, options: list[str], seconds: float, *, before: str = "") -> Transfer:
        """Curl from the server below ``pybpfthrottle run`` with these options."""
        curl = f"{before} exec curl --globoff -sN --max-time {seconds} {self.url}"
        return self.read(self.inside(*TOOL, "run", "-q", *options, "--", "sh", "-c", curl))

    def read(self, command: list[str]) -> Transfer:
        """Run a command and note when its output comes."""
        events: list[tuple[float, int]] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as client:
            assert client.stdout
            first = 0.0
            while chunk := os.read(client.stdout.fileno(), 1 << 20):
                first = first or time.monotonic()
                events.append((time.monotonic() - first, len(chunk)))
        return Transfer(events)

    def upload(self, options: list[str], seconds: float) -> Transfer:
        """Curl to the server; it is the server that counts."""
        curl = ["curl", "--globoff", "-sN", "--max-time", str(seconds), "-T", "-", self.url]
        with open("/dev/zero", "rb") as zeros:
            done = subprocess.run(
                self.inside(*TOOL, "run", "-q", *options, "--", *curl),
                stdin=zeros,
                stdout=subprocess.DEVNULL,
                env=ENVIRONMENT,
                timeout=seconds + 30,
            )
        assert done.returncode == TIME_IS_UP  # else the server has nothing to tell
        assert self.server.stdout
        steps = json.loads(self.server.stdout.readline())["timeline"]
        return Transfer([(step * peer.STEP_S, count) for step, count in enumerate(steps)])


@contextmanager
def lab(
    *,
    ipv6: bool = False,
    round_trip_s: float = 0.0,
    fastest: Optional[Rate] = FASTEST,
    listen: str = "",
    control: str = "",
    later: Sequence[tuple[float, float]] = (),
) -> Iterator[Lab]:
    """A lab of its own, with a delay if one is asked for; nothing of it is left afterwards.

    ``later`` has other round trips, and how many seconds after the first packet each begins.
    The server sends no connection more than ``fastest``. It has the wire's address, or ``listen``,
    and the congestion control ``control``.
    """
    changes = [(at_s, way_s / 2) for at_s, way_s in later]
    line = LineSpec(round_trip_s / 2, later=changes)
    with DelayLine(line) if round_trip_s else Wire() as wire:
        address = wire.server.address6 if ipv6 else wire.server.address
        if control:
            chosen = f"net.ipv4.tcp_congestion_control={control}"
            subprocess.run(wire.server.inside("sysctl", "-qw", chosen), check=True)
        server = start_server(wire.server.inside, listen or address)
        if fastest is not None:
            pace(server.pid, fastest)
        try:
            host = f"[{address}]" if ipv6 else address
            yield Lab(wire, f"http://{host}:{peer.PORT}/", server)
        finally:
            server.kill()
            server.communicate()


def pace(server: int, fastest: Rate) -> None:
    """What a server accepts from now on sends no more than this."""
    for listener in tcp_of([server]):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", fastest.bytes_per_s)
        )


def start_server(inside: Callable[..., list[str]], address: str) -> subprocess.Popen[str]:
    """Start the HTTP server and wait until it listens; the caller ends it."""
    server = subprocess.Popen(
        inside(sys.executable, "-m", "pybpfthrottle.demo.peer", "serve", address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        universal_newlines=True,
    )
    assert server.stdout
    assert server.stdout.readline().strip() == peer.READY
    return server


def three_times(transfer: Callable[[Lab], Transfer], *, ipv6: bool = False) -> list[Transfer]:
    """Run a transfer three times side by side, each in a lab of its own."""

    def once(_: int) -> Transfer:
        with lab(ipv6=ipv6) as own:
            return transfer(own)

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(once, range(3)))


def median_ratio(transfers: list[Transfer], rate: Rate, seconds: float) -> float:
    """The median of their ratios."""
    return statistics.median(transfer.ratio(rate, seconds) for transfer in transfers)


def median_windows(transfers: list[Transfer], rate: Rate, seconds: int) -> list[float]:
    """For each whole second the median of their ratios."""
    return [
        statistics.median(column)
        for column in zip(*(transfer.windows(rate, seconds) for transfer in transfers))
    ]


PACKETS = (AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS)
# Hooks that not all kernels have; others are as old as the question what is attached to them.
_HOOKS_SINCE = {AttachType.CGROUP_SETSOCKOPT: "5.3"}


def attached(target: Cgroup, hooks: Sequence[AttachType] = PACKETS) -> list[int]:
    """The programs at hooks of a cgroup that this kernel has."""
    known = [hook for hook in hooks if running() >= parse(_HOOKS_SINCE.get(hook, "4.15"))]
    fd = target.open()
    try:
        return [program for hook in known for program in links.query(fd, hook).program_ids]
    finally:
        os.close(fd)
