"""A blocked direction: no byte of payload passes, all else does, and it goes on afterwards."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import Iterator

import pytest
from lab import Lab
from shells import Shell
from since import needs_command, since
from targets import eventually

from pybpfthrottle.demo import peer
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.meter import Meter
from pybpfthrottle.model import BLOCKED, Direction, Rate, Verdict
from pybpfthrottle.throttle import Throttle, apply

DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD
RATE = Rate.parse("2M")

# Transfers all the time. Tells on request how many bytes have arrived, here or there, and how often
# it has doubled the time until it tries again.
_CLIENT = """
import select, socket, struct, sys
host, method = sys.argv[1], sys.argv[2]
peer = socket.create_connection((host, int(sys.argv[3])))
peer.sendall(f"{method} / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
peer.setblocking(False)
received, zeros = 0, bytes(1 << 16)
while True:
    sends = [peer] if method == "PUT" else []
    readable, writable, _ = select.select([sys.stdin, peer], sends, [])
    if peer in readable:
        received += len(peer.recv(1 << 18))
    if writable:
        peer.send(zeros)
    if sys.stdin in readable:
        if not sys.stdin.readline():
            break
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        acknowledged = struct.unpack_from("Q", info, 120)[0]
        print(received if method == "GET" else acknowledged, info[4], flush=True)
"""


class Client:
    """A process that transfers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self) -> tuple[int, int]:
        """The bytes that have arrived, and how often it waits twice as long."""
        assert self._process.stdin
        assert self._process.stdout
        print(file=self._process.stdin, flush=True)
        arrived, backoff = map(int, self._process.stdout.readline().split())
        return arrived, backoff

    def arrived(self) -> int:
        """The bytes that have arrived."""
        return self.ask()[0]


@contextmanager
def transferring(lab: Lab, cgroup: Cgroup, direction: Direction) -> Iterator[Client]:
    """A process that transfers in a cgroup."""
    method = "GET" if direction is DOWN else "PUT"
    host = lab.url.split("/")[2].rpartition(":")[0]
    command = lab.inside(sys.executable, "-c", _CLIENT, host, method, str(peer.PORT))
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: cgroup.move_in(0),
    ) as process:
        try:
            yield Client(process)
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait(10)


def dropped(throttle: Throttle, direction: Direction) -> int:
    """How many packets it has dropped."""
    return throttle.counters()[direction].packets_dropped


@pytest.fixture(params=["ebpf", pytest.param("nftables", marks=since("5.13"))])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can block."""
    if request.param == "nftables":
        needs_command("nft")
    return str(request.param)


@pytest.mark.parametrize("direction", Direction, ids=str)
def test_nothing_passes_until_it_ends(shells_lab: Lab, scratch: Cgroup, backend, direction) -> None:
    """Not a byte of a connection that was open before, by either backend, in either direction."""
    with transferring(shells_lab, scratch, direction) as client:
        eventually(lambda: client.arrived() > 100_000)
        limits = dict.fromkeys(Direction, RATE)
        with apply([scratch], limits, backends=dict.fromkeys(Direction, backend)) as throttle:
            throttle.set_limit(direction, BLOCKED)
            before = dropped(throttle, direction)
            # What has passed by then has arrived once something was sent again, and dropped.
            eventually(lambda: dropped(throttle, direction) > before + 1)
            at_first, before = client.arrived(), dropped(throttle, direction)
            eventually(lambda: dropped(throttle, direction) > before)
            assert client.arrived() == at_first
            assert throttle.limits[direction] == BLOCKED
            assert throttle.how()[direction]["shape"] == "block"
            throttle.set_limit(direction, RATE)
            eventually(lambda: client.arrived() > at_first + 100_000)


def test_tcp_is_patient_with_what_is_blocked(shells_lab: Lab, scratch: Cgroup) -> None:
    """It waits ever longer, for a quarter of an hour: at a full queue it gives up after 8 s."""
    with transferring(shells_lab, scratch, UP) as client:
        eventually(client.arrived)
        with apply([scratch], {UP: BLOCKED}, backends={UP: "ebpf"}):
            eventually(lambda: client.ask()[1] >= 2)


def test_the_other_direction_and_other_processes_go_on(
    shells_lab: Lab, scratch: Cgroup, shell: Shell, backend: str
) -> None:
    """Acknowledgements pass, so a download goes on while uploads are blocked."""
    beside = scratch.create_child("beside")
    try:
        with transferring(shells_lab, beside, DOWN) as client:
            eventually(client.arrived)
            with apply([beside], {UP: BLOCKED}, backends={UP: backend}):
                before = client.arrived()
                eventually(lambda: client.arrived() > before + 1_000_000)
            with apply([beside], {DOWN: BLOCKED}, backends={DOWN: backend}) as throttle:
                assert shell.downloads() > 1_000_000
                eventually(lambda: dropped(throttle, DOWN) > 0)
                (reading,) = Meter(throttle).sample()
                assert (reading.verdict, reading.ratio) == (Verdict.BLOCKED, None)
    finally:
        beside.remove(patience_s=5)


def test_what_begins_while_it_is_blocked_gets_nothing(shells_lab: Lab, scratch: Cgroup) -> None:
    """It may connect, and has its connection afterwards."""
    with apply([scratch], dict.fromkeys(Direction, BLOCKED)) as throttle:
        with transferring(shells_lab, scratch, DOWN) as client:
            eventually(lambda: dropped(throttle, UP) > 1)
            assert client.arrived() == 0
            counters = throttle.counters()
            assert {one: counters[one].bytes_passed for one in Direction} == {DOWN: 0, UP: 0}
            throttle.set(download="2M", upload="2M")
            eventually(lambda: client.arrived() > 100_000)
            assert throttle.how()[DOWN]["shape"] != "block"
