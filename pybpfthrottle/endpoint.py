"""A small HTTP server for one page, as a chore of a supervisor: nobody who connects holds it up.

It answers GET and HEAD of /metrics and /healthz, one request a connection. Who is slow, or says too
much, is cut off; of too many connections the oldest one is.
"""

from __future__ import annotations

import logging
import math
import re
import select
import socket
import time
from contextlib import ExitStack, suppress
from typing import Callable, NamedTuple, Optional, Sequence

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.metrics import OPENMETRICS, TEXT, Collector, Page
from pybpfthrottle.supervisor import Chore

log = logging.getLogger(__name__)

_LONGEST_REQUEST = 8192
_MOST_CONNECTIONS = 16
_MOST_WAITING = 128
# So many are accepted before other chores have their turn.
_MOST_AT_ONCE = 8
_PATIENCE_S = 5.0
# After that a client has the answer, or will never have it; and descriptors may be there again.
_PAUSE_S = 1.0
# Making a page takes at most this part of one CPU's time, however often it is asked for.
_MOST_OF_TIME = 0.05
_YOUNGEST_S = 1.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
}


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``9853``, ``127.0.0.1:9853`` or ``[::1]:9853``. Raises SettingsError."""
        host, colon, port = text.strip().rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            port = ""
        number = int(port) if re.fullmatch("[0-9]{1,5}", port) else -1
        if not 0 <= number <= 65535 or (colon and not host):
            raise SettingsError(
                f"{text!r} is not where to listen: give a port such as 9853, for this machine"
                " alone, or ADDRESS:PORT, such as 192.0.2.1:9853 or [::]:9853"
            )
        return cls(host or "127.0.0.1", number)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class _Answer(NamedTuple):
    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"

    def written(self, *, with_body: bool) -> bytes:
        """Return it as it is sent."""
        allow = "Allow: GET, HEAD\r\n" if self.status == 405 else ""
        head = (
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}\r\n"
            f"Content-Type: {self.kind}\r\nContent-Length: {len(self.body)}\r\n"
            f"{allow}Connection: close\r\n\r\n"
        )
        return head.encode() + (self.body if with_body else b"")


class _Connection:
    """One client, who has so long for a request, and so long to take the answer."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.deadline_s = time.monotonic() + _PATIENCE_S
        self._received = b""
        self._unsent: Optional[bytes] = None

    def go_on(self, answer: Callable[[bytes], bytes]) -> bool:
        """Receive and send what is possible now; return whether more is to come."""
        if self._unsent is None:
            received = self.stream.recv(_LONGEST_REQUEST + 1 - len(self._received))
            self._received += received
            if not received:
                return False
            is_whole = b"\r\n\r\n" in self._received or b"\n\n" in self._received
            if not is_whole and len(self._received) <= _LONGEST_REQUEST:
                return True
            self._unsent = answer(self._received if is_whole else b"")
            self.deadline_s = time.monotonic() + _PATIENCE_S
        if not self._unsent:
            return bool(self.stream.recv(_LONGEST_REQUEST))
        self._unsent = self._unsent[self.stream.send(self._unsent) :]
        if not self._unsent:
            # To close it while more of the request is to come would take the answer back.
            self.stream.shutdown(socket.SHUT_WR)
            self.deadline_s = time.monotonic() + _PAUSE_S
        return True

    @property
    def events(self) -> int:
        """What it waits for."""
        return select.EPOLLOUT if self._unsent else select.EPOLLIN


class Endpoint:
    """Serves the metrics at an address. ``close`` or ``with`` ends it.

    A supervisor needs its ``chores``.
    """

    def __init__(self, address: Address, collector: Collector) -> None:
        """Listen. Raises SettingsError if that is impossible."""
        self._collector = collector
        self._connections: dict[int, _Connection] = {}
        self._page: Optional[Page] = None
        self._page_due_s = -math.inf
        self._bodies: dict[bool, bytes] = {}
        self._accepts_again_s = math.inf
        with ExitStack() as undo:
            self._listener = undo.enter_context(_listener(address))
            self._epoll = undo.enter_context(select.epoll())
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            self._resources = undo.pop_all()
        self.address = Address(*self._listener.getsockname()[:2])

    def chores(self) -> Sequence[Chore]:
        """Return what a supervisor has to do."""
        return [self]

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to do for a client."""
        return self._epoll.fileno()

    @property
    def due_s(self) -> float:
        """When the next client has used up its time."""
        deadlines = (one.deadline_s for one in self._connections.values())
        return min(self._accepts_again_s, *deadlines, math.inf)

    def run(self) -> None:
        """Do what is possible now, without waiting for anybody."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._connections:
                self._serve(fd)
        now = time.monotonic()
        if self._accepts_again_s <= now:
            self._accepts_again_s = math.inf
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        for fd in [fd for fd, one in self._connections.items() if one.deadline_s <= now]:
            self._end(fd)

    def close(self) -> None:
        """Stop listening, and end all connections."""
        for fd in list(self._connections):
            self._end(fd)
        self._resources.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                stream, _address = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError:  # no descriptor is left: until there is one this would be called always
                self._epoll.modify(self._listener.fileno(), 0)
                self._accepts_again_s = time.monotonic() + _PAUSE_S
                return
            stream.setblocking(False)
            if len(self._connections) >= _MOST_CONNECTIONS:
                self._end(next(iter(self._connections)))
            self._connections[stream.fileno()] = _Connection(stream)
            self._epoll.register(stream.fileno(), select.EPOLLIN)

    def _serve(self, fd: int) -> None:
        one = self._connections[fd]
        try:
            if one.go_on(self._answer):
                self._epoll.modify(fd, one.events)
                return
        except BlockingIOError:
            return
        except OSError:  # it has gone
            pass
        self._end(fd)

    def _end(self, fd: int) -> None:
        one = self._connections.pop(fd)
        with suppress(OSError):
            self._epoll.unregister(fd)
        one.stream.close()

    def _answer(self, request: bytes) -> bytes:
        """Return the answer to a request, which is empty if it was too long."""
        line, _, fields = request.decode("latin-1").partition("\n")
        found = re.fullmatch(r"([A-Z]+) (/[^ ?]*)(\?\S*)? HTTP/1\.[01]\r?", line)
        if not request:
            return _Answer(431, b"").written(with_body=True)
        if found is None:
            return _Answer(400, b"not an HTTP request\n").written(with_body=True)
        return self._of(found[1], found[2], fields).written(with_body=found[1] != "HEAD")

    def _of(self, method: str, path: str, fields: str) -> _Answer:
        if method not in ("GET", "HEAD"):
            return _Answer(405, b"only GET and HEAD\n")
        if path == "/healthz":
            return _Answer(200, b"ok\n")
        if path != "/metrics":
            return _Answer(404, b"see /metrics and /healthz\n")
        wants = _wants_openmetrics(fields)
        try:
            body = self._body(openmetrics=wants)
        except Exception:  # else one client after the other would see no answer at all
            log.exception("The metrics cannot be collected")
            return _Answer(500, b"the metrics cannot be collected; see the log\n")
        return _Answer(200, body, OPENMETRICS if wants else TEXT)

    def _body(self, *, openmetrics: bool) -> bytes:
        begin_s = time.monotonic()
        if self._page is None or begin_s >= self._page_due_s:
            self._page, self._bodies = self._collector.collect(), {}
            end_s = time.monotonic()
            self._page_due_s = end_s + max(_YOUNGEST_S, (end_s - begin_s) / _MOST_OF_TIME)
        if openmetrics not in self._bodies:
            self._bodies[openmetrics] = self._page.text(openmetrics=openmetrics).encode()
        return self._bodies[openmetrics]


def _listener(address: Address) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
        )[0]
        with ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(where)
            listener.listen(_MOST_WAITING)
            undo.pop_all()
            return listener
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {address}: {error.strerror}; give an address of this machine, and a"
            " port that no other program uses"
        ) from error


def _wants_openmetrics(fields: str) -> bool:
    """Whether a request asks for OpenMetrics, as Prometheus does unless it is too old."""
    found = re.search(r"^accept:(.*)$", fields, re.I | re.M)
    offers = found[1].lower().split(",") if found else []
    return any(
        offer.strip().startswith("application/openmetrics-text")
        and not re.search(r";\s*q=0(\.0*)?\s*(;|$)", offer)
        for offer in offers
    )
