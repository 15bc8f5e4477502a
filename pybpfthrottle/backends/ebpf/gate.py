"""The gate of a throttle: the program that diverts acknowledgements, and its keeper."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any, Callable, Iterable, Mapping, Optional

from pybpfthrottle.backends.ebpf.records import ThrottleGate, ThrottleGateBounds
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.linux import netns

log = logging.getLogger(__name__)

GATE, _RING = "GATE", "GATE_RING"
_MAPS = (GATE, "CGROUP_BUCKETS", "CGROUP_CONFIGS")
_READY_S, _END_S = 1.0, 2.0
_MOST_STARTS = 5
_KEEPER = "from pybpfthrottle.backends.ebpf import keeper; keeper.main(%d)"
# Where this package is; the keeper needs no other package.
_ROOT = os.path.abspath(__file__)
for _ in ("gate.py", "ebpf", "backends", "pybpfthrottle"):
    _ROOT = os.path.dirname(_ROOT)

Pids = Callable[[], Iterable[int]]


class Gate:
    """A keeper process and what it works on. ``close`` opens all windows and ends it.

    As a chore it replaces a keeper that has died, and gives the keeper sockets in each network
    namespace where connections have begun.
    """

    def __init__(self, pids: Pids) -> None:
        """Begin to start the keeper. Raises OSError if that is impossible."""
        self._pids = pids
        self._maps: Mapping[str, Map[Any, Any]] = {}
        self._starts = self._ungated = 0
        self._ended: Optional[str] = None
        self._networks: set[int] = set()
        self.due_s = math.inf
        for one in _raw_sockets():  # fail now if raw sockets are not permitted
            one.close()
        self._start()

    def open(self, maps: Mapping[str, Map[Any, Any]]) -> None:
        """Have the keeper serve the gate; ``maps`` are the throttle's and the gate's."""
        self._maps = maps
        self._serve()

    def wait(self) -> None:
        """Wait until the keeper serves the gate; connections that begin earlier would stall."""
        select.select([self._socket], [], [], _READY_S)

    def fileno(self) -> int:
        """Return the descriptor of the socket that the keeper reports on."""
        return self._socket.fileno() if self._ended is None else -1

    def run(self) -> None:
        """Do what the keeper asks for, or replace it if it has died."""
        if self._ended is None and not self._listen():
            self._restart()

    def notes(self) -> list[str]:
        """Return which connections the gate does not cover, a line each."""
        found = []
        if self._ended is not None:
            found.append(
                f"downloads are policed, because the gate's keeper has ended: {self._ended}"
            )
        if self._ungated:
            found.append(
                f"{self._ungated} connections were left to the policer: acknowledgements that the"
                " gate's keeper sent did not reach their senders (a firewall or a policy route may"
                " stop packets of raw sockets)"
            )
        return found

    def close(self) -> None:
        """Have the keeper open all windows, then end it."""
        if self._ended is None:
            self._end_keeper()
            self._ended = "the limit has ended"

    def _start(self) -> None:
        self._starts += 1
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": _ROOT}
        with other:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-S", "-c", _KEEPER % other.fileno()],
                    pass_fds=[other.fileno()],
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except (OSError, ValueError):
                self._socket.close()
                raise
        self._socket.setblocking(False)

    def _serve(self) -> None:
        self._networks.clear()
        self._serve_networks()
        ring = self._maps[_RING]
        kept = [self._maps[name].fd for name in _MAPS]
        self._tell({"ring": ring.info().max_entries}, [ring.fd, *kept])

    def _restart(self) -> None:
        code = self._end_keeper()
        log.warning("The gate's keeper has ended (exit status %s)", code)
        if self._starts >= _MOST_STARTS:
            self._ended = f"{self._starts} times, at last with exit status {code}"
            return
        try:
            self._start()
            self._serve()
        except (OSError, ValueError) as error:
            self._ended = str(error)

    def _end_keeper(self) -> Optional[int]:
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # The keeper has done so itself if it could.
        if self._maps:
            records = self._maps[GATE].typed(U32, StructureCodec(ThrottleGate))
            shared = records[0]
            if shared.alive:
                shared.alive = 0
                records[0] = shared
        return self._process.returncode

    def _listen(self) -> bool:
        """Read the keeper's messages; return False if it is gone."""
        with suppress(BlockingIOError):
            while True:
                try:
                    data = self._socket.recv(4096)
                except ConnectionError:
                    return False
                if not data:
                    return False
                message = json.loads(data)
                self._ungated += "ungated" in message
                if "unserved" in message:
                    self._serve_networks()
        return True

    def _serve_networks(self) -> None:
        """Give the keeper sockets in the namespaces of limited processes, and of this one."""
        for pid in [os.getpid(), *self._pids()]:
            path = f"/proc/{pid}/ns/net"
            # It has ended, or may not be looked into: the gate does not cover its connections.
            with suppress(OSError):
                inode = os.stat(path).st_ino
                is_full = len(self._networks) == ThrottleGateBounds.GATE_NAMESPACES
                if inode in self._networks or is_full:
                    continue
                namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    opened = netns.inside(namespace, _raw_sockets)
                finally:
                    os.close(namespace)
                self._networks.add(inode)
                with contextlib.ExitStack() as closing:
                    for one in opened:
                        closing.enter_context(one)
                    self._tell({"network": inode}, [one.fileno() for one in opened])

    def _tell(self, message: Mapping[str, int], fds: Iterable[int]) -> None:
        with suppress(ConnectionError):  # it has died: the next run replaces it
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))


def _raw_sockets() -> list[socket.socket]:
    """Return raw sockets for whole IP packets: IPv4, and IPv6 if the kernel has it."""
    found = [socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)]
    with suppress(OSError):
        found.append(socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW))
    return found
