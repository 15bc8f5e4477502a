"""The two ends of a transfer for the demo: a small HTTP server, and a client.

``python -m pybpfthrottle.demo.peer serve ADDRESS | get URL SECONDS | put URL SECONDS``

The server prints ``ready`` when it listens. The receiving end of each transfer prints one JSON
object: ``{"bytes": N, "timeline": [bytes in each 0.1 s]}``.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PORT = 8080
READY = "ready"
STEP_S = 0.1
_CHUNK = bytes(1 << 16)


class Timeline:
    """How many bytes arrived in each time step since this was made."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.steps: list[int] = []

    def add(self, count: int) -> None:
        """Count bytes that have just arrived."""
        step = int((time.monotonic() - self._begin) / STEP_S)
        self.steps.extend([0] * (step + 1 - len(self.steps)))
        self.steps[step] += count

    def print(self) -> None:
        """Print one JSON object to standard output."""
        print(json.dumps({"bytes": sum(self.steps), "timeline": self.steps}), flush=True)


class Handler(BaseHTTPRequestHandler):
    """GET sends zeros for as long as the client reads; PUT counts what arrives."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send zeros until the client stops reading."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(_CHUNK)
        except OSError:  # the client has had enough
            self.close_connection = True

    def do_PUT(self) -> None:
        """Count what arrives, and print the result."""
        timeline = Timeline()
        try:
            while chunk := self.connection.recv(1 << 18):
                timeline.add(len(chunk))
        except OSError:  # a client that is cut off is as good as one that closes
            pass
        self.close_connection = True
        timeline.print()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: standard error belongs to the demo."""


class Server(ThreadingHTTPServer):
    """A server on IPv4 or IPv6, according to the address."""

    daemon_threads = True

    def __init__(self, address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, PORT), Handler)


def get(url: str, seconds: float) -> None:
    """Download for this many seconds."""
    connection, path = _connect(url)
    connection.request("GET", path)
    response = connection.getresponse()
    timeline = Timeline()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        timeline.add(len(response.read1(1 << 16)))
    connection.close()
    timeline.print()


def put(url: str, seconds: float) -> None:
    """Upload for this many seconds."""
    connection, path = _connect(url)
    connection.putrequest("PUT", path)
    connection.endheaders()
    end = time.monotonic() + seconds
    connection.sock.settimeout(seconds)
    try:
        while time.monotonic() < end:
            connection.sock.send(_CHUNK)
    except OSError:
        pass
    # Data still in the socket's buffer is not part of the measurement.
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def _connect(url: str) -> tuple[HTTPConnection, str]:
    parts = urlsplit(url)
    return HTTPConnection(parts.hostname or "", parts.port, timeout=30), parts.path or "/"


def main(argv: list[str]) -> None:
    """Run one of this module's three commands."""
    if argv[0] == "serve":
        server = Server(argv[1])
        print(READY, flush=True)
        # The parent holds the other end: the server ends with the parent, however that ends.
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
    elif argv[0] == "get":
        get(argv[1], float(argv[2]))
    else:
        put(argv[1], float(argv[2]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
