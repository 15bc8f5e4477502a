"""Programs at an interface by tc: filters of the qdisc clsact, as kernels before 6.6 have them.

Source: include/uapi/linux/rtnetlink.h, pkt_sched.h and pkt_cls.h of the kernel.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Iterator, Optional

from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.programs import Program

_HEADER, _TCMSG = struct.Struct("=IHHII"), struct.Struct("=BxxxiIII")
_NEWQDISC, _DELQDISC, _NEWFILTER, _DELFILTER, _GETFILTER = 36, 37, 44, 45, 46
_NAMES = {
    _NEWQDISC: "RTM_NEWQDISC",
    _DELQDISC: "RTM_DELQDISC",
    _NEWFILTER: "RTM_NEWTFILTER",
    _DELFILTER: "RTM_DELTFILTER",
    _GETFILTER: "RTM_GETTFILTER",
}
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _ECHO, _EXCL, _CREATE, _DUMP = 1, 4, 8, 0x200, 0x400, 0x300
_CLSACT = 0xFFFFFFF1
_CLSACT_HANDLE = 0xFFFF0000
_PARENTS = {AttachType.TCX_INGRESS: 0xFFFFFFF2, AttachType.TCX_EGRESS: 0xFFFFFFF3}
_KIND, _OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1
_ETH_P_ALL = 3


class _Filter(NamedTuple):
    """A filter's address: the interface, and the numbers that tc shows."""

    ifindex: int
    handle: int
    parent: int
    info: int


class TcFilter(Link):
    """A program that tc runs: no link, so it stays at its interface unless it is detached.

    ``fd`` is -1, and what needs a link raises OSError.
    """

    def __init__(self, filter: _Filter, *, made_qdisc: bool) -> None:
        super().__init__(-1)
        self._filter: Optional[_Filter] = filter
        self._made_qdisc = made_qdisc

    def detach(self) -> None:
        """Remove the filter, and the qdisc if it was made for it and has no other filters."""
        one, self._filter = self._filter, None
        if one is None:
            return
        try:
            _request(_DELFILTER, 0, _TCMSG.pack(0, *one) + _attribute(_KIND, b"bpf\0"))
            _delete_qdisc(one.ifindex, made=self._made_qdisc)
        except OSError as error:
            # The filter, the qdisc or the interface is gone.
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
                raise

    def __repr__(self) -> str:
        return f"<TcFilter {self._filter}>"


def attach(program: Program, ifindex: int, attach_type: AttachType, priority: int = 0) -> TcFilter:
    """Attach by tc, behind the filters of lower priority. Linux 4.5. Raises OSError.

    The program's return value is the verdict (direct action). With 0 the kernel chooses a
    priority. The network namespace is that of this thread.
    """
    made = _make_qdisc(ifindex)
    options = b"".join(
        (
            _attribute(_BPF_FD, struct.pack("=I", program.fd)),
            _attribute(_BPF_NAME, program.name.encode() + b"\0"),
            _attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION)),
        )
    )
    info = priority << 16 | socket.htons(_ETH_P_ALL)
    message = _TCMSG.pack(0, ifindex, 0, _PARENTS[attach_type], info)
    message += _attribute(_KIND, b"bpf\0") + _attribute(_OPTIONS, options)
    try:
        echoed = _request(_NEWFILTER, _CREATE | _EXCL | _ECHO, message)
    except OSError as error:
        _delete_qdisc(ifindex, made=made)
        if error.errno == errno.ENOENT:
            error.strerror = "this kernel has no filters for BPF (CONFIG_NET_CLS_BPF)"
        raise
    added = [_filter_of(data) for kind, data in echoed if kind == _NEWFILTER]
    if not added:
        raise OSError(errno.EIO, "the kernel did not tell which filter it made", "RTM_NEWTFILTER")
    return TcFilter(added[0], made_qdisc=made)


def _make_qdisc(ifindex: int) -> bool:
    """Make the qdisc that such filters are in. Return False where it is there already."""
    message = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT, 0)
    try:
        _request(_NEWQDISC, _CREATE | _EXCL, message + _attribute(_KIND, b"clsact\0"))
    except FileExistsError:
        return False
    return True


def _delete_qdisc(ifindex: int, *, made: bool) -> None:
    """Delete the qdisc if it was made here, and has no filters."""
    if made and not any(_filters(ifindex)):
        _request(_DELQDISC, 0, _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT, 0))


def _filters(ifindex: int) -> Iterator[_Filter]:
    for parent in _PARENTS.values():
        message = _TCMSG.pack(0, ifindex, 0, parent, 0)
        for kind, data in _request(_GETFILTER, _DUMP, message):
            if kind == _NEWFILTER:
                yield _filter_of(data)


def _filter_of(data: bytes) -> _Filter:
    _, *address = _TCMSG.unpack_from(data)
    return _Filter(*address)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def _request(kind: int, flags: int, message: bytes) -> list[tuple[int, bytes]]:
    """Ask the kernel. Return the messages that it answers with. Raises OSError."""
    answers: list[tuple[int, bytes]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        size = _HEADER.size + len(message)
        flags |= _REQUEST | (0 if flags & _DUMP == _DUMP else _ACK)
        netlink.send(_HEADER.pack(size, kind, flags, 1, 0) + message)
        while True:
            data = netlink.recv(1 << 16)
            while data:
                length, answer, *_ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[(length + 3) // 4 * 4 :]
                if answer == _DONE:
                    return answers
                if answer == _ERROR:
                    (number,) = struct.unpack_from("=i", body)
                    if number:
                        raise OSError(-number, os.strerror(-number), _NAMES[kind])
                    return answers
                answers.append((answer, body))
