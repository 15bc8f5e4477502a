"""What the kernel tells of the connections of processes."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import Iterator

from pybpfthrottle.linux import tcp
from pybpfthrottle.linux.sockets import TcpInfo

COUNT = 50_000


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of this process with itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as one:
            other, _ = listener.accept()
            with other:
                yield one, other


def move(one: socket.socket, other: socket.socket) -> None:
    """So many bytes from one to the other."""
    one.sendall(bytes(COUNT))
    rest = COUNT
    while rest:
        rest -= len(other.recv(rest))


def test_what_has_moved_is_told_by_both_ends():
    """Bytes of payload, a round trip, and that it was the loopback device."""
    with pair() as (one, other):
        before = tcp.look([os.getpid()])
        move(one, other)
        after = tcp.look([os.getpid()])
        port = one.getsockname()[1]
        sender, receiver = sorted(
            (each for each in tcp.between(before, after) if port in ports(each)),
            key=lambda each: each.received,
        )
    assert (sender.received, receiver.received, receiver.sent) == (0, COUNT, 0)
    assert sender.sent == COUNT
    assert {each.connection.cookie for each in (sender, receiver)} <= after.on_loopback
    trip = tcp.round_trip_ms([sender])
    assert trip is not None
    assert 0 < trip < 1000


def ports(moved: tcp.Moved) -> list[int]:
    """Of both ends."""
    return [port for _, port in moved.connection.ends]


def test_a_new_connection_counts_from_its_beginning():
    """Which no look has seen."""
    before = tcp.look([os.getpid()])
    with pair() as (one, other):
        move(one, other)
        moved = tcp.between(before, tcp.look([os.getpid()]))
        port = one.getsockname()[1]
        mine = [each for each in moved if port in ports(each)]
    assert sorted((each.received, each.sent) for each in mine) == [(0, COUNT), (COUNT, 0)]


def test_connections_that_rest_have_moved_nothing():
    """Nor do processes that are gone or belong to nobody."""
    with pair() as (one, _):
        look = tcp.look([os.getpid(), 2**22 + 1])
        assert any(one.getsockname() in each.ends for each in look.connections.values())
        again = tcp.look([os.getpid()])
        port = one.getsockname()[1]
        assert [each for each in tcp.between(look, again) if port in ports(each)] == []
    assert tcp.round_trip_ms([]) is None


def test_older_kernels_tell_less():
    """What is missing is 0."""
    info = TcpInfo.parse(bytes([1]) + bytes(135))
    assert (info.state, info.bytes_sent, info.receive_window) == (1, 0, 0)
