"""Short connections, some hundred a second: a pre-forking server, and a client.

``serve ADDRESS PORT WORKERS`` and ``get ADDRESS PORT PER_SECOND`` go on until standard input ends.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

from benches.surroundings import READY

ANSWER_BYTES = 2000


def serve(address: str, port: int, workers: int) -> None:
    """Answer from processes that inherit the listener."""
    listener = socket.create_server((address, port), backlog=1024)
    pids = []
    for _ in range(workers):
        pids.append(os.fork())
        if not pids[-1]:
            while True:
                with listener.accept()[0] as accepted:
                    accepted.recv(100)
                    accepted.sendall(bytes(ANSWER_BYTES))
    print(READY, flush=True)
    sys.stdin.read()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def get(address: str, port: int, per_second: int) -> None:
    """Ask at this rate, one after the other."""
    begin_s, count = time.monotonic(), 0
    print(READY, flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        with socket.create_connection((address, port), 10) as one:
            one.sendall(b"please")
            while one.recv(1 << 16):
                pass
        count += 1
        time.sleep(max(0.0, begin_s + count / per_second - time.monotonic()))


def main(what: str, address: str, *numbers: str) -> None:
    """Run one of the two."""
    with suppress(KeyboardInterrupt):
        (serve if what == "serve" else get)(address, *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
