"""Query and change the kernel's network configuration by netlink, without ip, tc or nft.

Source: man 7 netlink; include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Iterator

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_REQUEST, _ACK, _DUMP = 0x001, 0x004, 0x300
_EXCLUSIVE, _CREATE = 0x200, 0x400
_ERROR, _DONE = 2, 3
_TYPE_MASK = 0x3FFF
_BUFFER_BYTES = 1 << 18
_PATIENCE_S = 2.0


def dump(protocol: int, message_type: int, header: bytes) -> Iterator[bytes]:
    """Yield the body of each message that answers a dump request. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as own:
        own.settimeout(_PATIENCE_S)
        own.bind((0, 0))
        length = _HEADER.size + len(header)
        own.send(_HEADER.pack(length, message_type, _REQUEST | _DUMP, 1, 0) + header)
        while True:
            for kind, body in _messages(own.recv(_BUFFER_BYTES)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, os.strerror(number), "netlink")
                yield body


def change(message_type: int, body: bytes, *, creates: bool = False) -> None:
    """Have the kernel change something of this thread's network namespace (NETLINK_ROUTE).

    Raises OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as own:
        own.settimeout(_PATIENCE_S)
        flags = _REQUEST | _ACK | (_EXCLUSIVE | _CREATE if creates else 0)
        own.send(_HEADER.pack(_HEADER.size + len(body), message_type, flags, 1, 0) + body)
        for kind, answer in _messages(own.recv(_BUFFER_BYTES)):
            number = -struct.unpack_from("=i", answer)[0] if kind == _ERROR else 0
            if number:
                raise OSError(number, os.strerror(number), "netlink")


def attribute(kind: int, data: bytes) -> bytes:
    """Return an attribute of a message, padded."""
    return (_ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data).ljust(
        _aligned(_ATTRIBUTE.size + len(data)), b"\0"
    )


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes after a message's fixed part, by type."""
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
