"""A flow of 64 bytes there and back, again and again: the time that each round trip takes."""

from __future__ import annotations

import argparse
import json
import select
import selectors
import socket
import sys
import time
from typing import Any, NamedTuple

from benches.surroundings import READY

BYTES = 64
_PAUSE_S = 0.02
_PATIENCE_S = 15.0


class Sample(NamedTuple):
    """A round trip: when it began (CLOCK_MONOTONIC), and how long it took.

    The last may have had no answer: it took so long at least.
    """

    begin_s: float
    took_s: float


def ping(connection: socket.socket) -> list[Sample]:
    """Round trips until standard input ends."""
    samples = []
    over = False
    while not over:
        begin_s = time.monotonic()
        connection.sendall(bytes(BYTES))
        over = not _answered(connection)
        samples.append(Sample(begin_s, time.monotonic() - begin_s))
        over = over or bool(select.select([sys.stdin], [], [], _PAUSE_S)[0])
    return samples


def _answered(connection: socket.socket) -> bool:
    """Wait for the whole answer; False if standard input ends before."""
    missing = BYTES
    while missing:
        ready, _, _ = select.select([connection, sys.stdin], [], [])
        if connection not in ready:
            return False
        came = len(connection.recv(missing))
        if not came:
            return False
        missing -= came
    return True


def echo(address: str, ports: list[int]) -> None:
    """Send back what comes, on all connections to these ports, until standard input ends."""
    with selectors.DefaultSelector() as selector:
        for port in ports:
            server = socket.create_server((address, port))
            selector.register(server, selectors.EVENT_READ, _accept)
        selector.register(sys.stdin, selectors.EVENT_READ, None)
        print(READY, flush=True)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    return
                key.data(selector, key.fileobj)


def _accept(selector: selectors.BaseSelector, server: Any) -> None:
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(connection, selectors.EVENT_READ, _answer)


def _answer(selector: selectors.BaseSelector, connection: Any) -> None:
    try:
        data = connection.recv(BYTES)
        connection.sendall(data)
    except OSError:
        data = b""
    if not data:
        selector.unregister(connection)
        connection.close()


def main() -> None:
    """Ping one port, or answer on some."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--echo", action="store_true")
    parser.add_argument("address")
    parser.add_argument("ports", type=int, nargs="+")
    arguments = parser.parse_args()
    if arguments.echo:
        return echo(arguments.address, arguments.ports)
    port = arguments.ports[0]
    with socket.create_connection((arguments.address, port), timeout=_PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(json.dumps(ping(connection)), flush=True)
    return None


if __name__ == "__main__":
    main()
