"""A client for Redis and Valkey that trusts neither: bounded in time, size and depth.

Source: Redis serialization protocol specification, RESP2.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import time
from typing import Any, NamedTuple, Optional, Union
from urllib.parse import parse_qs, unquote, urlsplit

from pybpfthrottle.errors import SettingsError

Value = Union[None, int, bytes, list["Value"]]

_PORT = 6379
_EXAMPLE = "redis://host:6379/0, or rediss://user:password@host/0 for TLS"
# Some thousand machines. Reading more would take a noticeable share of a CPU.
_LARGEST_ANSWER = 1 << 19
_MOST_VALUES = 1 << 14
_LONGEST_LINE = 128
_DEEPEST = 2
# What an error may begin with. Anything else is the server's text, which belongs into no log.
_CODES = (
    "DENIED",
    "LOADING",
    "MISCONF",
    "NOAUTH",
    "NOPERM",
    "OOM",
    "READONLY",
    "WRONGPASS",
    "WRONGTYPE",
)


class Server(NamedTuple):
    """Where a server is, and how to log in. Its text has no password."""

    host: str
    port: int = _PORT
    database: int = 0
    user: str = ""
    password: str = ""
    tls: bool = False
    authorities: Optional[str] = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' * self.tls}://{host}:{self.port}/{self.database}"


def parse(url: str) -> Server:
    """Return the server at an address. Raises SettingsError, which does not quote a password.

    With ``?ssl_ca_certs=FILE`` a server's certificate is from one of these authorities.
    """
    try:
        found = urlsplit(url)
        port, database = found.port or _PORT, int(found.path.strip("/") or 0)
        options = parse_qs(found.query, strict_parsing=bool(found.query))
    except ValueError:
        raise SettingsError(f"shared is no address of a Redis: write {_EXAMPLE}") from None
    authorities = options.pop("ssl_ca_certs", [None])[0]
    if authorities is not None and not os.path.isfile(authorities):
        raise SettingsError(f"shared names ssl_ca_certs={authorities}: there is no such file")
    if found.scheme not in ("redis", "rediss") or not found.hostname or options or database < 0:
        raise SettingsError(f"shared is no address of a Redis: write {_EXAMPLE}")
    return Server(
        found.hostname,
        port,
        database,
        unquote(found.username or ""),
        unquote(found.password or ""),
        found.scheme == "rediss",
        authorities,
    )


class Connection:
    """A connection, logged in. All methods raise OSError, and none takes longer than it may."""

    def __init__(self, server: Server, patience_s: float) -> None:
        self._patience_s = patience_s
        self._bounded = _Bounded(_connected(server, patience_s))
        self._answers = io.BufferedReader(self._bounded, 1 << 16)
        try:
            if server.password:
                self.ask(("AUTH", *filter(None, [server.user]), server.password))
            if server.database:
                self.ask(("SELECT", str(server.database)))
        except BaseException:
            self.close()
            raise

    def ask(self, *commands: tuple[str, ...]) -> list[Value]:
        """Return the answers to some commands."""
        self._bounded.allow(self._patience_s, _LARGEST_ANSWER)
        self._values = 0
        self._bounded.send(b"".join(map(_request, commands)))
        return [self._value(0) for _ in commands]

    def close(self) -> None:
        """Disconnect."""
        self._answers.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _value(self, depth: int) -> Value:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise _refused(rest)
        if kind == b"+":
            return rest
        number = _number(rest)
        if kind == b":":
            return number
        if number == -1 and kind in b"$*":
            return None
        if number < 0 or kind not in (b"$", b"*") or depth >= _DEEPEST:
            raise _nonsense()
        if kind == b"*":
            return [self._value(depth + 1) for _ in range(number)]
        return self._bytes(number + 2)[:-2]

    def _line(self) -> bytes:
        self._values += 1
        line = self._answers.readline(_LONGEST_LINE)
        if self._values > _MOST_VALUES or not line.endswith(b"\n"):
            raise _nonsense()
        return line.rstrip(b"\r\n")

    def _bytes(self, count: int) -> bytes:
        found = self._answers.read(min(count, _LARGEST_ANSWER))
        if len(found) < count:
            raise _nonsense()
        return found


class _Bounded(io.RawIOBase):
    """What comes from a socket, as much as is allowed and in the time that is."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def allow(self, seconds: float, most: int) -> None:
        """Read so much at most from now on, in so many seconds."""
        self._deadline_s = time.monotonic() + seconds
        self._left = most

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.settimeout(self._left_s())
        self._socket.sendall(data)

    def readable(self) -> bool:
        """Return True: it is read only."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what there is. Raises OSError at the end, and if it is too much or too late."""
        self._socket.settimeout(self._left_s())
        count = self._socket.recv_into(buffer)
        self._left -= count
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "it has hung up")
        if self._left < 0:
            raise OSError(errno.EMSGSIZE, "its answer is too long")
        return count

    def close(self) -> None:
        """Disconnect."""
        super().close()
        self._socket.close()

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "it does not answer in time")
        return left_s


def _connected(server: Server, patience_s: float) -> socket.socket:
    plain = socket.create_connection((server.host, server.port), patience_s)
    if not server.tls:
        return plain
    # Few servers need it, and rules are read more often than any server is asked.
    import ssl

    try:
        context = ssl.create_default_context(cafile=server.authorities)
        return context.wrap_socket(plain, server_hostname=server.host)
    except BaseException:
        plain.close()
        raise


def _request(command: tuple[str, ...]) -> bytes:
    words = [word.encode(errors="surrogateescape") for word in command]
    parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
    return b"*%d\r\n%s" % (len(words), b"".join(parts))


def _number(text: bytes) -> int:
    if len(text) > 20 or not text.lstrip(b"-").isdigit():
        raise _nonsense()
    try:
        return int(text)
    except ValueError:
        raise _nonsense() from None


def _refused(text: bytes) -> OSError:
    code = text.partition(b" ")[0].decode(errors="replace")
    return OSError(errno.EACCES, f"it refuses ({code if code in _CODES else 'ERR'})")


def _nonsense() -> OSError:
    return OSError(errno.EPROTO, "it does not answer as Redis does")


def name_of_this_machine() -> str:
    """Return a name that no other instance has, not even one on the same machine."""
    return f"{socket.gethostname()[:64]}-{os.urandom(6).hex()}"
