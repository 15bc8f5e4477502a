"""What the TCP connections of processes have carried, by what the kernel tells of each."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from typing import Collection, Iterable, Mapping, NamedTuple, Optional

from pybpfthrottle.linux import netns, sockets
from pybpfthrottle.linux.netns import Connection
from pybpfthrottle.linux.sockets import TcpInfo


class Look(NamedTuple):
    """Connections at one moment, by their cookies, and those of them that use loopback."""

    connections: Mapping[int, Connection]
    on_loopback: frozenset[int]


class Moved(NamedTuple):
    """What a connection has carried between two looks. ``sent`` is without retransmissions.

    ``retransmitted`` is 0 before Linux 4.19; there ``sent`` is what was acknowledged.
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
    places = {one: pid for pid in pids if (one := _namespace(pid))}
    inodes = frozenset(sockets.places(pids))
    found: dict[int, Connection] = {}
    local: set[int] = set()
    for pid in places.values():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                here, addresses = netns.inside(
                    fd,
                    lambda: (list(netns.connections(inodes, cgroup_ids)), netns.own_addresses()),
                )
            finally:
                os.close(fd)
            found.update((one.cookie, one) for one in here)
            local.update(one.cookie for one in here if _is_local(one, addresses))
    return Look(found, frozenset(local))


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

    # Of a new connection the SYN is acknowledged too.
    retransmitted = grown("bytes_retransmitted")
    sent = grown("bytes_sent") - retransmitted if info.bytes_sent else grown("bytes_acked", 1)
    return Moved(now, grown("bytes_received"), max(0, sent), retransmitted)


def _namespace(pid: int) -> int:
    with suppress(OSError):
        return netns.number(pid)
    return 0


def _is_local(one: Connection, addresses: Collection[str]) -> bool:
    """Whether a connection's packets use the loopback device, as those to local addresses do."""
    remote = one.ends[1][0]
    return remote in addresses or ipaddress.ip_address(remote).is_loopback
