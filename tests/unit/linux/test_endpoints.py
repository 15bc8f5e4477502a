"""What is told of sockets and their addresses, without other processes' sockets."""

from __future__ import annotations

import os
import socket

import pytest

from pybpfthrottle.linux import endpoints
from pybpfthrottle.linux.endpoints import Endpoint


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (Endpoint("10.0.0.1", 80), "10.0.0.1:80"),
        (Endpoint("fd00::1", 80), "[fd00::1]:80"),
        (Endpoint("fe80::1%3", 80), "[fe80::1%3]:80"),
        (Endpoint("10.0.0.1", 0), "10.0.0.1:*"),
        (Endpoint("/run/a:b"), "/run/a:b"),
    ],
)
def test_an_address_is_shown_so_that_its_port_is_plain(end, text):
    """IPv6 addresses have brackets, and paths are shown as they are."""
    assert str(end) == text


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("fe80::1%1", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::", False),
    ],
)
def test_what_an_address_of_the_loopback_device_is(address, is_loopback):
    """127.0.0.0/8 in both spellings, and ::1."""
    assert Endpoint(address, 1).is_loopback() is is_loopback


def test_a_path_is_no_loopback_address():
    """A name that looks like an address is none without a port."""
    assert not Endpoint("127.0.0.1").is_loopback()


def test_describing_leaves_the_socket_open():
    """The descriptor is the caller's, before and after; what is no socket is an OSError."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as own:
        own.bind(("::1", 0))
        for _ in range(2):
            found = endpoints.describe(own.fileno())
            assert found.local == Endpoint("::1", own.getsockname()[1])
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="socket"):
        endpoints.describe(reading)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
@pytest.mark.parametrize("type", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_proc_tells_the_same_as_the_socket(family, address, type):
    """The tables of /proc and the socket itself agree on what is bound."""
    with socket.socket(family, type) as own:
        own.bind((address, 0))
        if type == socket.SOCK_STREAM:
            own.listen()
        told = endpoints.describe(own.fileno())
        assert endpoints.listed_in_proc(os.getpid())[os.fstat(own.fileno()).st_ino] == told


def test_a_connection_in_proc_has_both_ends():
    """Local and remote address and state of an open connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as own:
            found = endpoints.listed_in_proc(os.getpid())[os.fstat(own.fileno()).st_ino]
            assert found == endpoints.describe(own.fileno())
            assert found.remote == Endpoint(*server.getsockname())
            assert found.state == "established"
