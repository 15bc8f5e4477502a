"""The sockets that other processes have open, borrowed by pidfd_getfd(2) (Linux 5.6)."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import suppress
from functools import cache
from typing import Any, Iterable, Iterator

# The same on all machines: include/uapi/asm-generic/unistd.h.
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438

# include/uapi/asm-generic/socket.h, include/uapi/linux/tcp.h
SO_MAX_PACING_RATE = 47


def tcp_of(pids: Iterable[int]) -> Iterator[socket.socket]:
    """Each TCP connection that some processes have open, once, until the next is asked for.

    Needs CAP_SYS_PTRACE for processes of other users; those that may not be looked into, and what
    ends in between, are passed over.
    """
    seen: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            pidfd = _system_call(_PIDFD_OPEN, pid, 0)
            try:
                for number, inode in _descriptors(pid):
                    if inode not in seen:
                        seen.add(inode)
                        yield from _borrowed(pidfd, number)
            finally:
                os.close(pidfd)


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        with suppress(OSError):
            target = os.readlink(f"{directory}/{name}")
            if target.startswith("socket:"):
                yield int(name), target


def _borrowed(pidfd: int, number: int) -> Iterator[socket.socket]:
    try:
        descriptor = _system_call(_PIDFD_GETFD, pidfd, number, 0)
    except OSError:
        return
    with socket.socket(fileno=descriptor) as own:
        if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
            yield own


@cache
def _syscall() -> Any:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def _system_call(number: int, *arguments: int) -> int:
    result = int(_syscall()(*map(ctypes.c_long, (number, *arguments))))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
