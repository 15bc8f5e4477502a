"""Processes that own no connection: who has it is told when they are limited."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import Iterator

import pytest
from targets import Target, limited, selected, target
from targets import tool as running

from pybpfthrottle import throttle
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.idle import why
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate, Traffic

RATES = {Direction.UPLOAD: Rate.parse("1M")}
TCP = 6
NO_CONNECTION = ("no-connection", "no connection leaves this machine")
# Connects to a server of ours when it is told to, and has the ends that it inherits open.
CARRIER = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
CARRIER += "print('ready', flush=True); sys.stdin.read()"


class Ends:
    """A namespace with a server beyond, for carriers of a connection."""

    def __init__(self, wire: Wire, server: Target) -> None:
        self.wire = wire
        listener = server.do(f"stream_server({wire.server.address!r}, {TCP}, sends=False)")
        self.arguments = (wire.server.address, str(server.do(f"port({listener})")))

    @contextmanager
    def carrier(self, *handed: int) -> Iterator[subprocess.Popen[str]]:
        """A process with a connection that leaves the machine, and these descriptors."""
        with subprocess.Popen(
            self.wire.client.inside(sys.executable, "-c", CARRIER, *self.arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=handed,
            text=True,
        ) as process:
            assert process.stdout
            assert process.stdout.readline()
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def silent(self, *handed: int) -> Iterator[subprocess.Popen[bytes]]:
        """A process without a connection, with these descriptors."""
        command = self.wire.client.inside("sleep", "60")
        with subprocess.Popen(command, pass_fds=handed, stdin=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def ends(scratch: Cgroup) -> Iterator[Ends]:
    """Two namespaces, with a server in one of them."""
    with Wire() as wire, target(scratch, wire.server.inside) as server:
        yield Ends(wire, server)


def test_the_other_end_of_a_pipe_is_told(ends: Ends) -> None:
    """As of rsync, whose ssh has the connection."""
    reading, writing = os.pipe()
    try:
        with (
            ends.carrier(reading) as carrier,
            ends.silent(writing) as own,
            limited(own.pid) as live,
        ):
            [note] = live.notes()
            assert note.startswith(f"{own.pid} (sleep) has no connection")
            assert f"--pid {carrier.pid}" in note
    finally:
        os.close(reading)
        os.close(writing)


def test_the_other_end_of_a_unix_socket_is_told(ends: Ends) -> None:
    """As of git, which has a pair of sockets with its ssh."""
    one, other = socket.socketpair()
    with one, other:
        with (
            ends.carrier(one.fileno()) as carrier,
            ends.silent(other.fileno()) as own,
            limited(own.pid) as live,
        ):
            [note] = live.notes()
            assert f"--pid {carrier.pid}" in note


def test_who_carries_it_is_why_nothing_passes(ends: Ends) -> None:
    """In a few words; who comes later is found too, unlike by the note at the start."""
    one, other = socket.socketpair()
    with one, other, ends.silent(other.fileno()) as own, limited(own.pid) as live:
        assert why(live, own.pid, 3) == NO_CONNECTION
        with ends.carrier(one.fileno()) as carrier:
            reason = why(live, own.pid, 3)
            assert reason is not None
            assert reason.code == "carried"
            assert reason.text.startswith(f"{carrier.pid} (python")


def test_who_has_a_connection_is_not_told_of_others(ends: Ends) -> None:
    """Its own connection is limited, whatever it has to do with others."""
    reading, writing = os.pipe()
    try:
        with ends.carrier(reading), ends.carrier(writing) as own, limited(own.pid) as live:
            assert live.notes() == []
    finally:
        os.close(reading)
        os.close(writing)


def test_a_peer_without_a_connection_is_not_told(ends: Ends) -> None:
    """A pipe alone is no reason: it leads nowhere."""
    reading, writing = os.pipe()
    try:
        with ends.silent(reading), ends.silent(writing) as own, limited(own.pid) as live:
            assert live.notes() == []
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("loopback", [False, True])
def test_a_local_proxy_is_told(scratch: Cgroup, loopback: bool) -> None:
    """All connections go to it over the loopback device, unless that is limited too."""
    with target(scratch) as proxy, target(scratch) as own:
        listener = proxy.do("listen()")
        own.do(f"connect({proxy.do(f'port({listener})')})")
        proxy.do(f"accept({listener})")
        traffic = Traffic(loopback=loopback)
        how = {"processes": selected(own.pid), "traffic": traffic}
        with throttle.apply([], RATES, **how) as live:
            if loopback:
                assert live.notes() == []
            else:
                [note] = live.notes()
                assert "loopback" in note
                assert f"--pid {proxy.pid}" in note


TUN = """
import fcntl, struct, sys
device = open('/dev/net/tun', 'r+b', buffering=0)
fcntl.ioctl(device, 0x400454ca, struct.pack('16sH22x', b'tap-test', 0x1002))
print('ready', flush=True)
sys.stdin.read()
"""


def test_a_tap_device_is_told(ends: Ends) -> None:
    """As of a virtual machine: its packets belong to no socket."""
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("this kernel has no tun devices (CONFIG_TUN)")
    with subprocess.Popen(
        ends.wire.client.inside(sys.executable, "-c", TUN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as own:
        try:
            assert own.stdout
            assert own.stdout.readline()
            with limited(own.pid) as live:
                [note] = live.notes()
                assert "tap-test" in note
        finally:
            own.kill()


def test_json_has_it_too(ends: Ends) -> None:
    """It is a note, once."""
    reading, writing = os.pipe()
    try:
        with (
            ends.carrier(reading) as carrier,
            ends.silent(writing) as own,
            running("--pid", str(own.pid)) as (process, _),
        ):
            assert process.stdout
            events = [json.loads(process.stdout.readline()) for _ in range(3)]
        notes = [event["text"] for event in events if event["event"] == "note"]
        assert len(notes) == 1
        assert f"--pid {carrier.pid}" in notes[0]
    finally:
        os.close(reading)
        os.close(writing)
