"""The owner's side of the gate's keeper: one keeper process for all gates of this process."""

from __future__ import annotations

import json
import math
import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.records import ThrottleGate, ThrottleGateBounds
from pybpfthrottle.bpf import maps
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.linux import netns, process
from pybpfthrottle.logger import Logger

log = Logger(__name__)

# The map that all gates of a process write acknowledgements into.
RING = "GATE_RING"

_READY_S, _END_S = 1.0, 2.0
_MOST_STARTS = 5
_KEEPER = "from pybpfthrottle.backends.ebpf import keeper; keeper.main(%d)"

Pids = Callable[[], Iterable[int]]


class Kept:
    """A gate that a keeper serves: its maps, and what the keeper has told of it.

    ``gate`` is the map of its ThrottleGate, ``limits`` the maps of its buckets and rates, ``slot``
    where they have it, and ``pids`` returns the processes whose connections it has.
    """

    def __init__(
        self,
        number: int,
        gate: Map[Any, Any],
        limits: Sequence[Map[Any, Any]],
        pids: Pids,
        slot: int,
    ) -> None:
        self.number = number
        self.slot = slot
        self.maps = [gate, *limits]
        self.pids = pids
        self.networks: set[int] = set()
        self.is_served = False
        self.ungated: Counter[str] = Counter()
        self._shared = gate.typed(U32, StructureCodec(ThrottleGate))
        self._shared[slot] = ThrottleGate(id=number)

    def abandon(self) -> None:
        """Have all acknowledgements pass, even if the keeper cannot say so itself."""
        shared = self._shared[self.slot]
        if shared.alive:
            shared.alive = 0
            self._shared[self.slot] = shared


class KeeperProcess:
    """The keeper process of this process's gates.

    It starts with the first gate and ends with the last. As a chore it replaces a keeper that has
    died, and gives the keeper sockets in each network namespace where connections have begun.
    """

    _sharing = threading.Lock()
    _shared: Optional[KeeperProcess] = None

    # Why it is not there any more.
    ended: Optional[str] = None

    @classmethod
    def join(cls) -> KeeperProcess:
        """Return the keeper of this process, begun to be started if there is none.

        Each call needs one of ``leave``. Raises OSError if no keeper can be started.
        """
        with cls._sharing:
            shared = cls._shared
            # A process that was forked has the handle of its parent's keeper.
            if shared is None or shared._owner != os.getpid() or shared.ended is not None:
                shared = cls._shared = cls()
            shared._users += 1
            return shared

    def leave(self) -> None:
        """Give up a keeper; without users it ends."""
        with self._sharing:
            self._users -= 1
            if self._users:
                return
            if KeeperProcess._shared is self:
                KeeperProcess._shared = None
        with self._busy:
            if self.ended is None:
                self.ended = "no limit needs it any more"
                self._end_process()
            if self._ring is not None:
                self._ring.close()

    def __init__(self) -> None:
        """Begin to start the process. Raises OSError if that is impossible."""
        self._owner = os.getpid()
        self._users = self._numbers = self._starts = 0
        self.due_s = math.inf
        self._ring: Optional[Map[Any, Any]] = None
        self._kept: dict[int, Kept] = {}
        self._networks: set[int] = set()
        # Changes and the chore may be in different threads.
        self._busy = threading.RLock()
        for one in _raw_sockets():  # fail now if raw sockets are not permitted
            one.close()
        self._start()

    def ring(self) -> Map[Any, Any]:
        """Return the ring for the programs of all gates. Raises BpfError or ObjectFileError."""
        with self._busy:
            if self._ring is None:
                self._ring = maps.create(programs.read("gate").maps[RING])
                self._tell_ring()
            return self._ring

    def serve(
        self, gate: Map[Any, Any], limits: Sequence[Map[Any, Any]], pids: Pids, slot: int = 0
    ) -> Kept:
        """Have the keeper serve a gate, whose program is loaded with the keeper's ring."""
        with self._busy:
            self._numbers += 1
            kept = self._kept[self._numbers] = Kept(self._numbers, gate, limits, pids, slot)
            self._serve(kept)
        return kept

    def wait(self, kept: Kept) -> None:
        """Wait until a gate is served: connections that begin earlier would stall."""
        deadline_s = time.monotonic() + _READY_S
        while not kept.is_served and self.ended is None:
            wait_s = deadline_s - time.monotonic()
            if wait_s <= 0 or not select.select([self._socket], [], [], wait_s)[0]:
                return
            self.run()

    def drop(self, kept: Kept) -> None:
        """Have the keeper open all windows of a gate, and forget it."""
        with self._busy:
            del self._kept[kept.number]
            self._tell({"close": kept.number})
            if self.ended is not None:
                kept.abandon()

    def fileno(self) -> int:
        """Return the descriptor of the socket that the keeper reports on."""
        return self._socket.fileno() if self.ended is None else -1

    def run(self) -> None:
        """Do what the keeper asks for, or replace it if it has died."""
        with self._busy:
            if self.ended is None and not self._listen():
                self._restart()

    def _start(self) -> None:
        import subprocess  # which takes a moment, and most limits need no keeper

        self._starts += 1
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The keeper needs no other package.
        environment = {**os.environ, "PYTHONPATH": process.PACKAGE_ROOT}
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

    def _restart(self) -> None:
        code = self._end_process()
        log.warning("The gate's keeper has ended (exit status %s)", code)
        if self._starts >= _MOST_STARTS:
            self.ended = f"{self._starts} times, at last with exit status {code}"
            return
        try:
            self._start()
        except (OSError, ValueError) as error:
            self.ended = str(error)
            return
        self._networks.clear()
        self._tell_ring()
        for kept in self._kept.values():
            kept.networks.clear()
            self._serve(kept)

    def _end_process(self) -> Optional[int]:
        from subprocess import TimeoutExpired

        self._socket.close()
        try:
            self._process.wait(_END_S)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for kept in self._kept.values():
            kept.abandon()
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
                kept = self._kept.get(message["gate"])
                if kept is not None:
                    self._hear(kept, message)
        return True

    def _hear(self, kept: Kept, message: Mapping[str, Any]) -> None:
        kept.is_served = kept.is_served or "serves" in message
        if "ungated" in message:
            kept.ungated[message["ungated"]] += 1
        if "unserved" in message:
            self._serve_networks(kept)

    def _serve(self, kept: Kept) -> None:
        networks = self._find_networks(kept)
        message = {"gate": kept.number, "slot": kept.slot, "networks": networks}
        self._tell(message, [one.fd for one in kept.maps])

    def _serve_networks(self, kept: Kept) -> None:
        """Give the keeper sockets in the namespaces of limited processes, and of this one."""
        self._tell({"gate": kept.number, "networks": self._find_networks(kept)})

    def _find_networks(self, kept: Kept) -> list[int]:
        """Return the namespaces that a gate is served in, once the keeper has sockets there."""
        for pid in [os.getpid(), *kept.pids()]:
            path = f"/proc/{pid}/ns/net"
            # It has ended, or may not be looked into: the gate does not cover its connections.
            with suppress(OSError):
                inode = os.stat(path).st_ino
                is_full = len(kept.networks) == ThrottleGateBounds.GATE_NAMESPACES
                if inode in kept.networks or is_full:
                    continue
                if inode not in self._networks:
                    self._open_network(inode, path)
                kept.networks.add(inode)
        return sorted(kept.networks)

    def _open_network(self, inode: int, path: str) -> None:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            opened = netns.inside(namespace, _raw_sockets)
        finally:
            os.close(namespace)
        with ExitStack() as closing:
            for one in opened:
                closing.enter_context(one)
            self._tell({"network": inode}, [one.fileno() for one in opened])
        self._networks.add(inode)

    def _tell_ring(self) -> None:
        if self._ring is not None:
            self._tell({"ring": self._ring.info().max_entries}, [self._ring.fd])

    def _tell(self, message: Mapping[str, Any], fds: Iterable[int] = ()) -> None:
        # It has died, and the next run replaces it; or it hangs, and its gates stand open.
        with suppress(ConnectionError, BlockingIOError):
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))


def _raw_sockets() -> list[socket.socket]:
    """Return raw sockets for whole IP packets: IPv4, and IPv6 if the kernel has it."""
    found = [socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)]
    with suppress(OSError):
        found.append(socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW))
    return found
