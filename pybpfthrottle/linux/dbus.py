"""Read properties over D-Bus, without its library: enough to ask a system service what it knows.

Source: D-Bus Specification, "Message Protocol" and "Authentication Protocol".
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from contextlib import suppress
from functools import partial
from typing import Any, Callable

_ADDRESS = "unix:path=/run/dbus/system_bus_socket"
_VARIABLE = "DBUS_SYSTEM_BUS_ADDRESS"
# Services on the same machine answer within milliseconds.
_PATIENCE_S = 0.25
_LARGEST_MESSAGE = 1 << 20
_DEEPEST = 16

_CALL, _ERROR = 1, 3
_NO_AUTO_START = 2
_PATH, _INTERFACE, _MEMBER, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 5, 6, 8
_NUMBERS = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d"}
_NUMBERS |= {"b": "I", "h": "I"}
_ALIGNMENT = {"s": 4, "o": 4, "a": 4, "(": 8, "{": 8, "g": 1, "v": 1}
_ALIGNMENT |= {code: struct.calcsize(layout) for code, layout in _NUMBERS.items()}


class Bus:
    """A connection to the system's bus. All methods raise OSError; none waits long."""

    def __init__(self) -> None:
        self._deadline_s = time.monotonic() + _PATIENCE_S
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def property(self, service: str, path: str, interface: str, name: str) -> Any:
        """Return a property of an object; the service is not started for it."""
        return self._call(
            service, path, "org.freedesktop.DBus.Properties", "Get", (interface, name)
        )

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> None:
        self._wait(partial(self._socket.connect, _path()))
        user = str(os.geteuid()).encode().hex()
        self._send(f"\0AUTH EXTERNAL {user}\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n"):
            answer += self._receive(1)
        if not answer.startswith(b"OK "):
            raise PermissionError(errno.EACCES, "the bus does not accept this user", "D-Bus")
        self._send(b"BEGIN\r\n")
        self._call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")

    def _call(
        self, service: str, path: str, interface: str, member: str, texts: tuple[str, ...] = ()
    ) -> Any:
        """Call a method whose arguments are texts; return the first value of the answer."""
        self._serial += 1
        self._send(_call_message(self._serial, service, path, interface, member, texts))
        while True:
            kind, fields, body = self._message()
            if fields.get(_REPLY_SERIAL) != self._serial:
                continue  # a signal
            values = _Reader(body).values(str(fields.get(_SIGNATURE, "")))
            if kind == _ERROR:
                raise OSError(errno.EREMOTEIO, str(values[0]) if values else "refused", service)
            return values[0] if values else None

    def _message(self) -> tuple[int, dict[int, Any], bytes]:
        """Return the type, header fields and body of the next message."""
        start = self._receive(16)
        order = {108: "<", 66: ">"}.get(start[0], "<")  # l and B
        length, _, fields_length = struct.unpack_from(f"{order}III", start, 4)
        rest = -(-fields_length // 8) * 8 + length
        if rest > _LARGEST_MESSAGE:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE), "D-Bus")
        data = start + self._receive(rest)
        [fields] = _Reader(data[: 16 + fields_length], order, 12).values("a(yv)")
        return start[1], dict(fields), data[len(data) - length :]

    def _send(self, data: bytes) -> None:
        self._wait(partial(self._socket.sendall, data))

    def _receive(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            missing = count - len(found)
            part: bytes = self._wait(partial(self._socket.recv, missing))
            if not part:
                raise ConnectionResetError(errno.ECONNRESET, "the bus has hung up", "D-Bus")
            found += part
        return found

    def _wait(self, step: Callable[[], Any]) -> Any:
        """Do one step with the socket, within what is left of all the time there is."""
        left_s = self._deadline_s - time.monotonic()
        if left_s > 0:
            self._socket.settimeout(left_s)
            with suppress(socket.timeout):  # which is no TimeoutError before Python 3.10
                return step()
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), "D-Bus")


def _path() -> str:
    """Return the path of the bus's socket."""
    for address in os.environ.get(_VARIABLE, _ADDRESS).split(";"):
        transport, _, rest = address.partition(":")
        options = dict(option.partition("=")[::2] for option in rest.split(","))
        if transport == "unix" and "path" in options:
            return options["path"]
    raise OSError(errno.EAFNOSUPPORT, f"no path of a socket in {_VARIABLE}", "D-Bus")


def _call_message(
    serial: int, service: str, path: str, interface: str, member: str, texts: tuple[str, ...]
) -> bytes:
    body = b""
    for text in texts:
        body = _aligned(body, 4) + _text(text)
    named = [
        (_PATH, "o", path),
        (_DESTINATION, "s", service),
        (_INTERFACE, "s", interface),
        (_MEMBER, "s", member),
    ]
    fields = b""
    for code, kind, text in named:
        fields = _aligned(fields, 8) + bytes([code]) + _signature(kind) + _text(text)
    if texts:
        fields = _aligned(fields, 8) + bytes([_SIGNATURE]) + _signature("g")
        fields += _signature("s" * len(texts))
    start = struct.pack("<4B3I", 108, _CALL, _NO_AUTO_START, 1, len(body), serial, len(fields))
    return _aligned(start + fields, 8) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\0"


def _signature(text: str) -> bytes:
    return bytes([len(text)]) + text.encode() + b"\0"


def _aligned(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)


class _Reader:
    """Reads values by their signature. What does not fit it raises OSError."""

    def __init__(self, data: bytes, order: str = "<", at: int = 0) -> None:
        self._data = data
        self._order = order
        self._at = at
        self._depth = 0

    def values(self, signature: str) -> list[Any]:
        """Return a value for each complete type of a signature."""
        try:
            return [self._value(kind) for kind in _split(signature)]
        except (struct.error, IndexError, ValueError, TypeError, KeyError) as error:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG), "D-Bus") from error

    def _value(self, kind: str) -> Any:
        code = kind[0]
        self._at += -self._at % _ALIGNMENT[code]
        if code in _NUMBERS:
            number = self._number(_NUMBERS[code])
            return bool(number) if code == "b" else number
        if code in "so":
            return self._bytes(self._number("I")).decode(errors="replace")
        if code == "g":
            return self._bytes(self._number("B")).decode()
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("nested too deeply")
        found = self._container(kind)
        self._depth -= 1
        return found

    def _container(self, kind: str) -> Any:
        if kind[0] == "v":
            [inner] = _split(self._value("g"))
            return self._value(inner)
        if kind[0] in "({":
            return tuple(self._value(one) for one in _split(kind[1:-1]))
        length = self._number("I")
        self._at += -self._at % _ALIGNMENT[kind[1]]
        end = self._at + length
        if end > len(self._data):
            raise ValueError("longer than the message")
        found = []
        while self._at < end:
            found.append(self._value(kind[1:]))
        return bytes(found) if kind == "ay" else found

    def _number(self, layout: str) -> Any:
        [number] = struct.unpack_from(self._order + layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return number

    def _bytes(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        self._at += length + 1  # a NUL is behind it
        if len(found) < length:
            raise ValueError("longer than the message")
        return found


def _split(signature: str) -> list[str]:
    """Return the complete types of a signature."""
    found = []
    while signature:
        length = _length(signature)
        found.append(signature[:length])
        signature = signature[length:]
    return found


def _length(signature: str) -> int:
    """Return the length of the first complete type. Raises ValueError or IndexError."""
    arrays = len(signature) - len(signature.lstrip("a"))
    if signature[arrays] not in "({":
        return arrays + 1
    depth = 0
    for at in range(arrays, len(signature)):
        depth += (signature[at] in "({") - (signature[at] in ")}")
        if depth == 0:
            return at + 1
    raise ValueError(f"{signature!r} does not end")
