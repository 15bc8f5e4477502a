"""What the TCP connections of processes have carried, by what the kernel tells of each."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from typing import Callable, Collection, Iterable, Iterator, Mapping, Optional, TypeVar

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import netns, sockets
from pybpfthrottle.linux.endpoints import IPPROTO_MPTCP
from pybpfthrottle.linux.netns import Connection
from pybpfthrottle.linux.sockets import TcpInfo

T = TypeVar("T")


class Look(NamedTuple):
    """Connections at one moment, by their cookies, and those of them that use loopback."""

    connections: Mapping[int, Connection]
    on_loopback: frozenset[int]


class Moved(NamedTuple):
    """What a connection has carried between two looks. ``sent`` is without retransmissions.

    What waits in a queue was not ``sent`` yet, as far as acknowledgements tell. ``retransmitted``
    is 0 before Linux 4.19.
    """

    connection: Connection
    received: int
    sent: int
    retransmitted: int


def look(pids: Collection[int], cgroup_ids: Collection[int] = ()) -> Look:
    """Return the connections that processes have open, and those made in some cgroups.

    In the network namespaces of these processes. Raises OSError: ENOENT if the kernel cannot list
    them.
    """
    inodes = frozenset(sockets.places(pids))
    found: dict[int, Connection] = {}
    local: set[int] = set()

    def look_here() -> tuple[list[Connection], set[str]]:
        return list(netns.connections(inodes, cgroup_ids)), netns.own_addresses()

    for here, addresses in _in_namespaces(pids, look_here):
        found.update((one.cookie, one) for one in here)
        local.update(one.cookie for one in here if _is_local(one, addresses))
    return Look(found, frozenset(local))


def multipath(pids: Iterable[int]) -> set[int]:
    """Return the inodes of the Multipath TCP sockets in processes' network namespaces."""
    kinds = [(family, IPPROTO_MPTCP) for family in (socket.AF_INET, socket.AF_INET6)]
    with suppress(OSError):
        found = _in_namespaces(pids, lambda: list(netns.listed(kinds)))
        return {one.inode for here in found for one in here}
    return set()


def _in_namespaces(pids: Iterable[int], ask: Callable[[], T]) -> Iterator[T]:
    """Yield the answer in each network namespace of some processes."""
    for pid in {one: pid for pid in pids if (one := _namespace(pid))}.values():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield netns.inside(fd, ask)
            finally:
                os.close(fd)


def between(before: Look, after: Look) -> list[Moved]:
    """Return what each connection of the later look has carried since the first, if anything."""
    found = []
    for cookie, now in after.connections.items():
        then = before.connections.get(cookie)
        moved = _moved(now, then.info if then is not None else None)
        if moved.received or moved.sent:
            found.append(moved)
    return found


def round_trip_ms(moved: Iterable[Moved]) -> Optional[float]:
    """Return the median round trip of connections; None if none of them has measured one."""
    found = sorted(us for one in moved if (us := one.connection.info.round_trip_us))
    return found[len(found) // 2] / 1000 if found else None


def _moved(now: Connection, before: Optional[TcpInfo]) -> Moved:
    info, zero = now.info, before is None
    before = info if before is None else before

    def grown(field: str, first: int = 0) -> int:
        """Return by how much a counter has grown, of a new connection since its beginning."""
        count: int = getattr(info, field)
        return max(0, count - (first if zero else getattr(before, field)))

    retransmitted = grown("bytes_retransmitted")
    # Of a new connection the SYN is acknowledged too.
    sent = grown("bytes_acked", 1)
    if info.bytes_sent:
        # What was acknowledged may have been sent before; what was sent may be in a queue still.
        sent = min(sent, max(0, grown("bytes_sent") - retransmitted))
    return Moved(now, grown("bytes_received"), sent, retransmitted)


def _namespace(pid: int) -> int:
    with suppress(OSError):
        return netns.number(pid)
    return 0


def _is_local(one: Connection, addresses: Collection[str]) -> bool:
    """Whether a connection's packets use the loopback device, as those to local addresses do."""
    remote = one.ends[1][0]
    return remote in addresses or ipaddress.ip_address(remote).is_loopback
