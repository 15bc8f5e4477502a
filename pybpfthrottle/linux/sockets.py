"""The sockets that other processes have open, borrowed by pidfd_getfd(2) (Linux 5.6)."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
import time
from contextlib import suppress
from ipaddress import ip_address
from typing import Iterable, Iterator, Mapping, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import libc, process

_PIDFD_THREAD = os.O_EXCL  # include/uapi/linux/pidfd.h

_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h
_PTRACE_SCOPE, _NO_ATTACH = "/proc/sys/kernel/yama/ptrace_scope", 3

# include/uapi/asm-generic/socket.h, include/uapi/linux/tcp.h
SO_MAX_PACING_RATE = 47

# include/net/tcp_states.h: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_CONNECTED = (1, 4, 5, 8, 9, 11)


class Refusal(NamedTuple):
    """Why a process may not be inspected; ``capability``: CAP_SYS_PTRACE would suffice."""

    text: str
    capability: bool = False


def why_refused(error: OSError) -> Refusal:
    """Return the reason for an EPERM or EACCES when inspecting a process.

    Sources: man 2 ptrace, "Ptrace access mode checking"; Documentation/admin-guide/LSM/Yama.rst.
    """
    call = str(error.filename or "")
    call = call if call.startswith("pidfd_") else "access to its descriptors"
    status = process.own_status()
    with suppress(OSError), open(_PTRACE_SCOPE) as file:
        if int(file.read()) == _NO_ATTACH and call == "pidfd_getfd":
            return Refusal(
                "kernel.yama.ptrace_scope is 3, which forbids this to everyone until the next boot"
            )
    if not may_borrow_all():
        return Refusal("this needs CAP_SYS_PTRACE", capability=True)
    held = "although this process has CAP_SYS_PTRACE"
    if status.get("Seccomp", "0") != "0" and call.startswith("pidfd_"):
        return Refusal(f"a seccomp filter, such as a container's, refuses {call}, {held}")
    if process.in_own_user_namespace():
        return Refusal("CAP_SYS_PTRACE is held in this user namespace, not in the process's own")
    return Refusal(f"a security module refuses {call}, {held}; the kernel log may name it")


def may_borrow_all() -> bool:
    """Whether this process has CAP_SYS_PTRACE; without it, it may only borrow from its own user."""
    return bool(int(process.own_status().get("CapEff", "0"), 16) >> _CAP_SYS_PTRACE & 1)


class Descriptor(NamedTuple):
    """Another process's descriptor of a socket, and the socket's inode."""

    number: int
    inode: int


class Place(NamedTuple):
    """Where a socket is open: a process's descriptor, and what identifies the socket."""

    pid: int
    number: int
    inode: int


# struct tcp_info of include/uapi/linux/tcp.h, as far as we read it.
_TCP_INFO = struct.Struct("=B43xI4xI12xI28xI16xQQ64xQQ16xI")


class TcpInfo(NamedTuple):
    """The part of struct tcp_info that we read. Linux 4.6; what is newer is 0 before."""

    state: int
    last_data_sent_ms: int
    last_data_received_ms: int
    round_trip_us: int  # smoothed, of what this side sends
    retransmitted_packets: int
    bytes_acked: int
    bytes_received: int
    bytes_sent: int  # with retransmissions; Linux 4.19
    bytes_retransmitted: int  # Linux 4.19
    receive_window: int  # bytes; Linux 6.2

    @property
    def is_connected(self) -> bool:
        """Whether the connection is established and can still send or receive.

        Not for a listener: accepted sockets inherit its settings. Not for SYN_SENT: programs are
        notified once it is established.
        """
        return self.state in _CONNECTED

    def moved_within(self, seconds: float) -> bool:
        """Whether the connection carried data within the last seconds."""
        # One acknowledged byte is the SYN.
        sent = self.bytes_acked > 1 and self.last_data_sent_ms < seconds * 1000
        return sent or (self.bytes_received > 0 and self.last_data_received_ms < seconds * 1000)

    @classmethod
    def of(cls, own: socket.socket) -> TcpInfo:
        """Return the state of a TCP connection. Raises OSError."""
        return cls.parse(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))

    @classmethod
    def parse(cls, data: bytes) -> TcpInfo:
        """Return what struct tcp_info has; it is shorter on older kernels."""
        return cls(*_TCP_INFO.unpack_from(data.ljust(_TCP_INFO.size, b"\0")))


class Lender:
    """A process to borrow sockets from; ``close`` or ``with`` ends it."""

    def __init__(self, pid: int) -> None:
        """Raises OSError: ESRCH for a process that is gone, ENOSYS before Linux 5.3.

        EOPNOTSUPP before Linux 6.9 for one whose first thread has ended before others.
        """
        self.pid = pid
        self._pidfd = _open_thread(pid, _holder(pid))

    def borrow(self, number: int) -> int:
        """Return a copy of the process's descriptor ``number``; the caller closes it. Linux 5.6.

        Needs CAP_SYS_PTRACE for processes of other users. Raises OSError: EBADF if it was closed
        meanwhile, ESRCH if the process has ended.
        """
        return libc.pidfd_getfd(self._pidfd, number)

    def close(self) -> None:
        """Close the descriptor of the process."""
        if self._pidfd >= 0:
            pidfd, self._pidfd = self._pidfd, -1
            os.close(pidfd)

    def __enter__(self) -> Lender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _holder(pid: int) -> int:
    """Return the thread with a process's descriptors: the first, or one that outlives it."""
    with suppress(OSError):
        if _holds(pid, pid):
            return pid
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            if _holds(pid, thread):
                return thread
    return pid


def _holds(pid: int, thread: int) -> bool:
    with os.scandir(f"/proc/{pid}/task/{thread}/fd") as entries:
        return next(entries, None) is not None


def _open_thread(pid: int, thread: int) -> int:
    if thread == pid:
        return libc.pidfd_open(pid)
    try:
        return libc.pidfd_open(thread, _PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        reason = "its first thread has ended, and borrowing from another thread needs Linux 6.9"
        raise OSError(errno.EOPNOTSUPP, reason) from error


def descriptors(pid: int) -> list[Descriptor]:
    """Return the descriptors of a process's sockets. Raises OSError if it may not be inspected."""
    directory = f"/proc/{pid}/fd"
    names = os.listdir(directory)
    if not names:  # as if its first thread had ended
        directory = f"/proc/{pid}/task/{_holder(pid)}/fd"
        names = os.listdir(directory)
    found = []
    for name in names:
        with suppress(FileNotFoundError):  # it was closed meanwhile
            target = os.readlink(f"{directory}/{name}")
            if target.startswith("socket:["):
                found.append(Descriptor(int(name), int(target[len("socket:[") : -1])))
    return sorted(found)


class _Shared:
    """Which sockets several processes have open, looked up once for all who ask."""

    def __init__(self) -> None:
        self._found: Mapping[int, Sequence[int]] = {}
        self._looked_s = -math.inf

    def since(self, when_s: float) -> Mapping[int, Sequence[int]]:
        if self._looked_s <= when_s:
            self._looked_s = time.monotonic()
            self._found = self._look()
        return self._found

    @staticmethod
    def _look() -> Mapping[int, Sequence[int]]:
        users: dict[int, list[int]] = {}
        for pid in process.running():
            with suppress(OSError):  # it has ended, or may not be inspected
                for inode in {one.inode for one in descriptors(pid)}:
                    users.setdefault(inode, []).append(pid)
        # Only those: they are few, and are kept.
        return {inode: pids for inode, pids in users.items() if len(pids) > 1}


_shared = _Shared()


def shared(since_s: float) -> Mapping[int, Sequence[int]]:
    """Return the sockets that several processes have open, by inode, with those processes.

    As they were at some time after ``since_s`` on time.monotonic().
    """
    return _shared.since(since_s)


class Scan:
    """Scans processes repeatedly, and lends each of their sockets once.

    ``refused`` holds why processes could not be inspected in the last pass (other users'
    processes need CAP_SYS_PTRACE).
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self.refused: dict[int, OSError] = {}

    def new(self, pids: Iterable[int]) -> Iterator[Borrowed]:
        """Yield the sockets that earlier passes did not meet, each open until the next request.

        Sockets and processes that end meanwhile are skipped.
        """
        met: set[int] = set()
        self.refused = {}
        for pid in pids:
            try:
                found = descriptors(pid)
                met.update(one.inode for one in found if one.inode in self._known)
                if all(one.inode in met for one in found):
                    continue
                with Lender(pid) as lender:
                    for number, inode in found:
                        if inode not in met:
                            yield from self._borrowed(lender, number, inode)
                        met.add(inode)
            except OSError as error:
                if error.errno not in (errno.ESRCH, errno.ENOENT):  # it has ended
                    self.refused[pid] = error
        self._known = met

    def _borrowed(self, lender: Lender, number: int, inode: int) -> Iterator[Borrowed]:
        try:
            fd = lender.borrow(number)
        except OSError as error:
            if error.errno == errno.EBADF:  # it was closed meanwhile
                return
            raise
        try:
            own = socket.socket(fileno=fd)
        except OSError:  # the number was reused for another file, or the family is one like AF_XDP
            os.close(fd)
            return
        with own:
            yield Borrowed(own, Place(lender.pid, number, inode))


class Borrowed(NamedTuple):
    """A socket of another process, through a temporary descriptor of ours."""

    socket: socket.socket
    place: Place

    @property
    def is_ip(self) -> bool:
        """Whether the socket is TCP, UDP or another protocol on IP."""
        return self.socket.family in (socket.AF_INET, socket.AF_INET6)

    @property
    def is_tcp(self) -> bool:
        """Whether the socket is TCP."""
        return self.is_ip and self.socket.proto == socket.IPPROTO_TCP

    @property
    def is_local(self) -> bool:
        """Whether the socket is connected to this machine itself."""
        try:
            remote = ip_address(self.socket.getpeername()[0].partition("%")[0])
        except OSError:
            return False
        mapped = getattr(remote, "ipv4_mapped", None) or remote
        return mapped.is_loopback or self.socket.getsockname()[0] == self.socket.getpeername()[0]


def places(pids: Iterable[int]) -> dict[int, Place]:
    """Return where each socket of some processes is open, whatever its kind, by inode."""
    found: dict[int, Place] = {}
    for pid in pids:
        with suppress(OSError):
            for number, inode in descriptors(pid):
                found.setdefault(inode, Place(pid, number, inode))
    return found


class Lenders:
    """Processes to borrow sockets from, each opened once. ``with`` closes them."""

    def __init__(self) -> None:
        self._opened: dict[int, Lender] = {}

    def borrow(self, place: Place) -> socket.socket:
        """Return the socket at a place. Close it soon: until then its owner cannot end it.

        Raises OSError if it is gone.
        """
        if place.pid not in self._opened:
            self._opened[place.pid] = Lender(place.pid)
        fd = self._opened[place.pid].borrow(place.number)
        try:
            if os.fstat(fd).st_ino != place.inode:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "pidfd_getfd")
            return socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise

    def __enter__(self) -> Lenders:
        return self

    def __exit__(self, *_: object) -> None:
        for lender in self._opened.values():
            lender.close()
        self._opened.clear()


def borrow(place: Place) -> socket.socket:
    """Return the socket at one place, as ``Lenders.borrow`` does."""
    with Lenders() as lenders:
        return lenders.borrow(place)


def tcp_of(pids: Iterable[int]) -> Iterator[socket.socket]:
    """Yield each TCP socket of some processes once, open until the next is requested.

    Needs CAP_SYS_PTRACE for processes of other users. Processes that may not be inspected, and
    whatever ends meanwhile, are skipped.
    """
    return (found.socket for found in Scan().new(pids) if found.is_tcp)
