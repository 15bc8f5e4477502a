"""The connections of processes, and how much each has moved."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import Iterable, Iterator, Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import endpoints, sockets
from pybpfthrottle.linux.endpoints import Description

# include/uapi/linux/tcp.h: the smoothed round-trip time (us), and how many bytes were acknowledged
# and received. Linux 4.1.
_TCP_INFO = struct.Struct("=68xI48xQQ")


class Connection(NamedTuple):
    """An IP socket of a process. What it has moved, and its round trip, are None unless TCP."""

    pid: int
    inode: int
    description: Description
    received_bytes: Optional[int] = None
    sent_bytes: Optional[int] = None
    round_trip_s: Optional[float] = None

    @property
    def open(self) -> bool:
        """Whether it is connected to another end."""
        return self.description.remote is not None


def of(pids: Iterable[int]) -> list[Connection]:
    """Return the IP sockets of some processes, each once, connected ones first.

    Those of processes that may not be inspected, and whatever ends meanwhile, are left out. Linux
    5.6; needs CAP_SYS_PTRACE for processes of other users.
    """
    found: dict[int, Connection] = {}
    for pid in pids:
        with suppress(OSError):
            found.update((one.inode, one) for one in _of(pid, found))
    return sorted(found.values(), key=lambda one: (not one.open, one.inode))


def _of(pid: int, known: Iterable[int]) -> Iterator[Connection]:
    with sockets.Lender(pid) as lender:
        for number, inode in sockets.descriptors(pid):
            if inode in known:
                continue
            with suppress(OSError):  # it was closed meanwhile
                own = lender.borrow(number)
                try:
                    description = endpoints.describe(own)
                    if description.kind.is_ip():
                        yield _connection(pid, inode, own, description)
                finally:
                    os.close(own)


def _connection(pid: int, inode: int, own: int, description: Description) -> Connection:
    found = Connection(pid, inode, description)
    if description.state is None or description.remote is None:
        return found
    with socket.socket(fileno=os.dup(own)) as borrowed:
        data = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    if len(data) < _TCP_INFO.size:
        return found
    round_trip_us, sent, received = _TCP_INFO.unpack(data)
    return found._replace(
        received_bytes=received, sent_bytes=sent, round_trip_s=round_trip_us / 1e6
    )
