"""A small UDP flow: one end asks again and again, the other answers, until standard input ends."""

from __future__ import annotations

import argparse
import select
import socket
import subprocess
import sys
import time

from benches.surroundings import READY, python

_BYTES = 64
_PAUSE_S, _PATIENCE_S = 0.05, 1.0


class Ping:
    """The end that asks, in a process of its own."""

    def __init__(self, address: str, port: int) -> None:
        self._process = subprocess.Popen(
            python("benches.quic_ping", "ask", address, str(port)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self) -> float:
        """Return the 95th percentile of the round trips in ms."""
        return float(self._process.communicate()[0])


def _answer(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind((address, port))
        print(READY, flush=True)
        while sys.stdin not in select.select([own, sys.stdin], [], [])[0]:
            own.sendto(*own.recvfrom(_BYTES))


def _ask(address: str, port: int) -> None:
    """Print the 95th percentile; what has no answer took as long as it was waited for."""
    took_ms = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.connect((address, port))
        while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
            begin_s = time.monotonic()
            own.send(str(begin_s).encode().ljust(_BYTES))
            while select.select([own], [], [], _PATIENCE_S)[0]:
                if float(own.recv(_BYTES)) == begin_s:
                    break
            took_ms.append(1000 * (time.monotonic() - begin_s))
    print(sorted(took_ms)[len(took_ms) * 95 // 100])


def main() -> None:
    """Be the end that was asked for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("role", choices=("ask", "answer"))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    role = _ask if arguments.role == "ask" else _answer
    role(arguments.address, arguments.port)


if __name__ == "__main__":
    main()
