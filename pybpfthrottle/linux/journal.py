"""Messages to the journal, or to syslog where there is none. Sending never waits."""

from __future__ import annotations

import os
import socket
import struct
from typing import Mapping, Optional

WARNING, NOTICE, INFO = 4, 5, 6  # of syslog(3)

_JOURNAL = "/run/systemd/journal/socket"
_SYSLOG = "/dev/log"
_DAEMON = 3 << 3  # LOG_DAEMON
_NAME = "pybpfthrottle"
# A datagram of this size fits into the socket's buffer.
_LONGEST = 4096


def send(text: str, priority: int = WARNING, fields: Optional[Mapping[str, str]] = None) -> bool:
    """Send a message, with fields whose names are in upper case; return whether it was taken.

    Only the journal keeps the fields.
    """
    text = text[:_LONGEST]
    entry = {"MESSAGE": text, "PRIORITY": str(priority), "SYSLOG_IDENTIFIER": _NAME}
    entry.update(fields or {})
    line = f"<{_DAEMON | priority}>{_NAME}[{os.getpid()}]: {text}".replace("\n", " ")
    return _datagram(_JOURNAL, b"".join(_field(*one) for one in entry.items())) or _datagram(
        _SYSLOG, line.encode(errors="backslashreplace")
    )


def _field(name: str, value: str) -> bytes:
    """Return a field as systemd.journal-fields(7) has it: a newline in it needs its length."""
    data = value[:_LONGEST].encode(errors="backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)
    return b"%s=%s\n" % (name.encode(), data)


def _datagram(path: str, data: bytes) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            sender.sendto(data, path)
    except OSError:
        return False
    return True
