"""TCP connections that a throttle shapes: those that were open are adopted, all are restored."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import suppress
from typing import Any, Iterable, Sequence

from pybpfthrottle import sockets
from pybpfthrottle.backends.records import THROTTLE_ADOPT, ThrottleSocket
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.cgroup import Cgroup

# The map of the socket storage; by a descriptor of a socket it has a ThrottleSocket.
SOCKETS = "SOCKETS"


def adopt(own: socket.socket) -> bool:
    """Have a connection shaped; false if that cannot be.

    The program at the setsockopt hook has to be attached. It answers for sockets that belong to
    its cgroups alone: another is not limited there, nor shaped, and gives true.
    """
    try:
        own.setsockopt(THROTTLE_ADOPT, 0, 0)
    except OSError as error:
        # ENOPROTOOPT: no program answered, so it belongs to another cgroup.
        return error.errno != errno.EPERM
    return True


def restore(cgroups: Sequence[Cgroup], shaped: Map[Any, Any]) -> None:
    """Give the connections of the processes in cgroups back the pacing and window they had.

    ``shaped`` is the map SOCKETS, by descriptor. What nobody has open any more needs nothing.
    """
    records: Map[int, ThrottleSocket] = shaped.typed(U32, StructureCodec(ThrottleSocket))
    for own in sockets.tcp_of(pids_of(cgroups)):
        with suppress(KeyError, OSError):
            _restore(own, records[own.fileno()])


def _restore(own: socket.socket, record: ThrottleSocket) -> None:
    if record.pacing:
        pacing = record.original_pacing.to_bytes(4, sys.byteorder)
        own.setsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE, pacing)
    if record.clamp and record.original_clamp:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, record.original_clamp)


def pids_of(cgroups: Iterable[Cgroup]) -> list[int]:
    """The processes in cgroups and below them."""
    found: set[int] = set()
    for cgroup in cgroups:
        with suppress(OSError):
            found.update(cgroup.pids_below())
    # 0 stands for a process of another pid namespace; our own sockets are nobody's traffic.
    return sorted(found - {0, os.getpid()})
