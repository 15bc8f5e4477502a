"""The sockets that other processes have open, borrowed by pidfd_getfd(2) (Linux 5.6)."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import suppress
from functools import cache
from typing import Any, Iterable, Iterator, NamedTuple

# The same on all machines: include/uapi/asm-generic/unistd.h.
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438

# include/uapi/asm-generic/socket.h, include/uapi/linux/tcp.h
SO_MAX_PACING_RATE = 47


class Scan:
    """Looks through processes again and again, and lends each of their sockets once.

    ``refused`` holds why processes could not be looked into in the last pass (CAP_SYS_PTRACE is
    needed for those of other users).
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self.refused: dict[int, OSError] = {}

    def new(self, pids: Iterable[int]) -> Iterator[Borrowed]:
        """The sockets that earlier passes did not meet, each until the next is asked for.

        What ends in between is passed over.
        """
        met: set[int] = set()
        self.refused = {}
        for pid in pids:
            try:
                pidfd = _system_call(_PIDFD_OPEN, pid, 0)
            except OSError as error:
                self._note(pid, error)
                continue
            try:
                for number, inode in descriptors(pid):
                    if inode not in met and inode not in self._known:
                        yield from self._borrowed(pid, pidfd, number, inode)
                    met.add(inode)
            except OSError as error:
                self._note(pid, error)
            finally:
                os.close(pidfd)
        self._known = met

    def _borrowed(self, pid: int, pidfd: int, number: int, inode: int) -> Iterator[Borrowed]:
        try:
            descriptor = _system_call(_PIDFD_GETFD, pidfd, number, 0)
        except OSError as error:
            self._note(pid, error)
            return
        with socket.socket(fileno=descriptor) as own:
            yield Borrowed(own, pid, number, inode)

    def _note(self, pid: int, error: OSError) -> None:
        # ESRCH, ENOENT: the process has ended; EBADF: it has closed the descriptor.
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            self.refused[pid] = error


class Borrowed(NamedTuple):
    """A socket of another process: the same one, by a descriptor of ours for the moment."""

    socket: socket.socket
    pid: int
    number: int
    inode: int

    @property
    def is_ip(self) -> bool:
        """Whether it is of TCP, UDP or another protocol above IP."""
        return self.socket.family in (socket.AF_INET, socket.AF_INET6)

    @property
    def is_tcp(self) -> bool:
        """Whether it is of TCP."""
        return self.is_ip and self.socket.proto == socket.IPPROTO_TCP


def tcp_of(pids: Iterable[int]) -> Iterator[socket.socket]:
    """Each TCP socket that some processes have open, once, until the next is asked for.

    Needs CAP_SYS_PTRACE for processes of other users; those that may not be looked into, and what
    ends in between, are passed over.
    """
    return (found.socket for found in Scan().new(pids) if found.is_tcp)


def descriptors(pid: int) -> Iterator[tuple[int, int]]:
    """The descriptors of a process that are sockets, each with its inode. Raises OSError."""
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        with suppress(OSError):
            target = os.readlink(f"{directory}/{name}")
            if target.startswith("socket:["):
                yield int(name), int(target[8:-1])


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
