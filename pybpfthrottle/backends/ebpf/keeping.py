"""The owner's side of the gate's keeper: one keeper process for all gates of this process."""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.records import ThrottleGate, ThrottleGateBounds
from pybpfthrottle.bpf import maps
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.linux import netns
from pybpfthrottle.linux.helper import SharedHelper

# The map that all gates of a process write acknowledgements into.
RING = "GATE_RING"

_READY_S = 1.0

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
        # Called once a large datagram has left.
        self.on_datagram: Callable[[], object] = lambda: None
        self.is_shared = False
        self._shared = gate.typed(U32, StructureCodec(ThrottleGate))
        self._shared[slot] = ThrottleGate(id=number)

    @property
    def way_us(self) -> Optional[int]:
        """The longest round trip that the keeper has seen; None if it does not serve the gate."""
        shared = self._shared[self.slot]
        return shared.round_trip_ns // 1000 if shared.alive else None

    def abandon(self) -> None:
        """Have all acknowledgements pass, even if the keeper cannot say so itself."""
        shared = self._shared[self.slot]
        if shared.alive:
            shared.alive = 0
            self._shared[self.slot] = shared


class KeeperProcess(SharedHelper):
    """The keeper process of this process's gates.

    As a chore it also gives the keeper sockets in each network namespace where connections have
    begun.
    """

    title = "The gate's keeper"
    module = "pybpfthrottle.backends.ebpf.keeper"

    def __init__(self) -> None:
        """Begin to start the process. Raises OSError if that is impossible."""
        self._numbers = 0
        self._ring: Optional[Map[Any, Any]] = None
        self._kept: dict[int, Kept] = {}
        self._networks: set[int] = set()
        for one in _raw_sockets():  # fail now if raw sockets are not permitted
            one.close()
        super().__init__()
        self.start()

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
        """Have the keeper serve a gate, whose program is to be loaded with the keeper's ring."""
        with self._busy:
            self._numbers += 1
            kept = self._kept[self._numbers] = Kept(self._numbers, gate, limits, pids, slot)
            self._serve(kept)
        return kept

    def wait(self, kept: Kept) -> None:
        """Wait until a gate is served: connections that begin earlier would stall."""
        self.wait_until(lambda: kept.is_served, _READY_S)

    def share(self, kept: Kept) -> None:
        """Have a gate get its part beside connections that are policed."""
        with self._busy:
            kept.is_shared = True
            self._serve_networks(kept)

    def drop(self, kept: Kept) -> None:
        """Have the keeper open all windows of a gate, and forget it."""
        with self._busy:
            del self._kept[kept.number]
            self.tell({"close": kept.number})
            if self.ended is not None:
                kept.abandon()

    def _introduce(self) -> None:
        self._networks.clear()
        self._tell_ring()
        for kept in self._kept.values():
            kept.networks.clear()
            self._serve(kept)

    def _abandon(self) -> None:
        for kept in self._kept.values():
            kept.abandon()

    def _close(self) -> None:
        if self._ring is not None:
            self._ring.close()

    def _hear(self, message: Mapping[str, Any]) -> None:
        kept = self._kept.get(message["gate"])
        if kept is None:
            return
        kept.is_served = kept.is_served or "serves" in message
        if "ungated" in message:
            kept.ungated[message["ungated"]] += 1
        if "datagram" in message:
            kept.on_datagram()
        if "unserved" in message:
            self._serve_networks(kept)

    def _serve(self, kept: Kept) -> None:
        self._tell_of(kept, [one.fd for one in kept.maps])

    def _serve_networks(self, kept: Kept) -> None:
        """Give the keeper sockets in the namespaces of limited processes, and of this one."""
        self._tell_of(kept)

    def _tell_of(self, kept: Kept, fds: Sequence[int] = ()) -> None:
        networks = self._find_networks(kept)
        message = {"gate": kept.number, "slot": kept.slot, "networks": networks}
        self.tell({**message, "shared": kept.is_shared}, fds)

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
            self.tell({"network": inode}, [one.fileno() for one in opened])
        self._networks.add(inode)

    def _tell_ring(self) -> None:
        if self._ring is not None:
            self.tell({"ring": self._ring.info().max_entries}, [self._ring.fd])


def _raw_sockets() -> list[socket.socket]:
    """Return raw sockets for whole IP packets: IPv4, and IPv6 if the kernel has it."""
    found = [socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)]
    with suppress(OSError):
        found.append(socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW))
    return found
