"""One packet between two network namespaces, limited by a backend: whether that has counted it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from pybpfthrottle import throttle
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.errors import DemoError
from pybpfthrottle.linux import cgroup, netns, own_cgroups
from pybpfthrottle.model import Direction, Rate

_PORT = 5300
_PATIENCE_S = 5.0
# How often to answer, and the pause before the next answer.
_ANSWERS, _PAUSE_S = 20, 0.1
_RATE = Rate.parse("1M")
# It waits until it is in its cgroup: a socket belongs for ever to the one it was created in.
_CLIENT = f"""
import socket, sys
sys.stdin.readline()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout({_PATIENCE_S})
    client.sendto(b"question", (sys.argv[1], {_PORT}))
    while client.recv(64):
        pass
"""


class Packet:
    """A UDP packet and its answer."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction

    def is_counted_by(self, backend: str) -> bool:
        """Send it, limited by a backend in this direction. Raises an error of this package."""
        own = own_cgroups.create_empty(cgroup.root())
        try:
            with Wire() as wire:
                return self._exchange(wire, own.cgroup, backend)
        finally:
            own.remove()

    def _exchange(self, wire: Wire, target: cgroup.Cgroup, backend: str) -> bool:
        client = subprocess.Popen(
            wire.client.inside(sys.executable, "-c", _CLIENT, wire.server.address),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            target.move_in(client.pid)
            limits = {self._direction: _RATE}
            chosen = {self._direction: backend}
            with throttle.apply([target], limits, backends=chosen) as limited, _server(wire) as own:
                assert client.stdin is not None  # noqa: S101 - for mypy
                client.stdin.write(b"\n")
                client.stdin.flush()
                _, sender = own.recvfrom(64)
                # A backend that follows sockets has to notice this one first.
                for _ in range(_ANSWERS):
                    own.sendto(b"answer", sender)
                    if limited.counters()[self._direction].packets_total > 0:
                        return True
                    time.sleep(_PAUSE_S)
                return False
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DemoError(f"the packet did not arrive: {error}") from error
        finally:
            client.kill()
            client.communicate()


def _server(wire: Wire) -> socket.socket:
    """Return a socket in the server's network namespace."""
    namespace = os.open(f"/proc/{wire.server.process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        own = netns.inside(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    finally:
        os.close(namespace)
    own.settimeout(_PATIENCE_S)
    own.bind((wire.server.address, _PORT))
    return own
