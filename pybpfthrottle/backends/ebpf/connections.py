"""TCP connections that a throttle shapes: those that were open are adopted, all are restored."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import suppress
from typing import Any, Iterable, Optional

from pybpfthrottle.backends.ebpf.records import ThrottleLevel, ThrottleSocket
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.linux import sockets
from pybpfthrottle.linux.cgroup import Cgroup

# The map of the socket storage; by a descriptor of a socket it has a ThrottleSocket.
SOCKETS = "SOCKETS"


def ask(own: socket.socket, window: int) -> Optional[bool]:
    """What the program at the setsockopt hook says of a connection, which has a receive window.

    None if no program answers: it belongs to another cgroup, and is neither limited nor shaped.
    """
    try:
        # It may move before the program has it in hand.
        own.setsockopt(ThrottleLevel.ADOPT, window + window // 4, 0)
    except OSError as error:
        return False if error.errno == errno.EPERM else None
    return True


def restore(pids: Iterable[int], shaped: Map[Any, Any]) -> None:
    """Give the connections of processes back the pacing and window they had.

    ``shaped`` is the map SOCKETS, by descriptor. What nobody has open any more needs nothing.
    """
    records: Map[int, ThrottleSocket] = shaped.typed(U32, StructureCodec(ThrottleSocket))
    for own in sockets.tcp_of(pids):
        with suppress(KeyError, OSError):
            _restore(own, records[own.fileno()])


def _restore(own: socket.socket, record: ThrottleSocket) -> None:
    if record.pacing:
        pacing = record.original_pacing.to_bytes(4, sys.byteorder)
        own.setsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE, pacing)
    if record.clamp and record.original_clamp:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, record.original_clamp)


def pids(cgroups: Iterable[Cgroup]) -> list[int]:
    """The processes in cgroups and below them, but for this one."""
    found: set[int] = set()
    for cgroup in cgroups:
        with suppress(OSError):
            found.update(cgroup.pids_below())
    # 0 stands for a process of another pid namespace; our own sockets are nobody's traffic.
    return sorted(found - {0, os.getpid()})
