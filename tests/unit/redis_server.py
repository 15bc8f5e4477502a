"""A Redis of the test's own, and servers that only look like one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from typing import Iterator, Sequence

# Debian and Ubuntu ship the server under this name too, in a package that starts no service.
PROGRAM = "redis-check-rdb"
_PATIENCE_S = 30.0


@contextmanager
def redis(
    *options: str, inside: Sequence[str] = (), host: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a server that keeps nothing; yield it and its port. ``inside`` begins its command."""
    port = port or free_port()
    executable = shutil.which(PROGRAM)
    assert executable
    with tempfile.TemporaryDirectory() as directory:
        ports = () if "--port" in options else ("--port", str(port))
        arguments = [*ports, "--bind", host, "--save", "", "--dir", directory, *options]
        # By this name the program is the server.
        named = ["sh", "-c", 'ln -sf "$0" redis-server; exec ./redis-server "$@"', executable]
        with subprocess.Popen(
            [*inside, *named, *arguments], stdout=subprocess.PIPE, cwd=directory
        ) as server:
            try:
                assert server.stdout
                lines = iter(server.stdout.readline, b"")
                assert any(b"Ready to accept connections" in line for line in lines)
                yield server, port
            finally:
                server.kill()


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


@contextmanager
def fake(answer: bytes, *, hang_up: bool = False, endless: bool = False) -> Iterator[int]:
    """Run a server that answers whatever it is asked with these bytes; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()
        listening.settimeout(0.05)

        def serve() -> None:
            while not ended.is_set():
                with suppress(TimeoutError, socket.timeout):
                    connection, _ = listening.accept()
                    threading.Thread(target=talk, args=(connection,), daemon=True).start()

        def talk(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                while connection.recv(4096) and not ended.is_set():
                    connection.sendall(answer)
                    while endless and not ended.is_set():
                        connection.sendall(answer)
                    if hang_up:
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def until(condition, patience_s: float = _PATIENCE_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)
