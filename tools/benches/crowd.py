"""Many processes with many connections that move a little; or the server that reads from them.

``serve ADDRESS PORT`` and ``talk ADDRESS PORT PROCESSES SOCKETS`` go on until standard input ends.
"""

from __future__ import annotations

import os
import resource
import select
import selectors
import socket
import sys
from contextlib import suppress

from benches.surroundings import READY

_PERIOD_S = 1.0
_MESSAGE = bytes(100)


def serve(address: str, port: int) -> None:
    """Read what comes, from whomever."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = socket.create_server((address, port), backlog=4096)
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        print(READY, flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                with suppress(OSError):
                    if key.fileobj.recv(1 << 16):
                        continue
                selector.unregister(key.fileobj)
                key.fileobj.close()


def talk(address: str, port: int, processes: int, sockets: int) -> None:
    """Start the processes, tell when all are connected, and wait."""
    connected, ended = os.pipe(), os.pipe()
    for number in range(processes):
        share = sockets // processes + (number < sockets % processes)
        if os.fork() == 0:
            os.close(ended[1])
            open_sockets = [socket.create_connection((address, port), 30) for _ in range(share)]
            os.write(connected[1], b".")
            while not select.select([ended[0]], [], [], _PERIOD_S)[0]:
                for one in open_sockets:
                    one.send(_MESSAGE)
            os._exit(0)
    left = processes
    while left:
        left -= len(os.read(connected[0], left))
    print(READY, flush=True)
    sys.stdin.read()


def main(what: str, address: str, *numbers: str) -> None:
    """Run one of the two."""
    port, *counts = map(int, numbers)
    with suppress(BrokenPipeError, KeyboardInterrupt):
        if what == "serve":
            serve(address, port)
        else:
            talk(address, port, *counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
