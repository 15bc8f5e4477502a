"""A UDP flow at a constant rate, beside the TCP flows of a transfer: one of its ends.

Both ends go on until standard input ends, and then report what came, as JSON: pairs of a time
(CLOCK_MONOTONIC, in units of ``BIN_S``) and the bytes that came in it; none at the sender.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time
from collections import Counter
from contextlib import suppress

from benches.figures import BIN_S
from benches.surroundings import READY

_PAYLOAD_BYTES = 1200
_LARGEST_BYTES = 1 << 16
# How often the receiving client tells that it is there, until something comes.
_HELLO_S = 0.1


def send(flow: socket.socket, rate_bytes_per_s: int) -> list[tuple[int, int]]:
    """Send at this rate; what is refused is lost, and nothing comes."""
    gap_s = _PAYLOAD_BYTES / rate_bytes_per_s
    payload = bytes(_PAYLOAD_BYTES)
    due_s = time.monotonic()
    while not _stopped(due_s - time.monotonic()):
        # What was held up is sent at once, as by a program that has a clock.
        while due_s <= time.monotonic():
            with suppress(OSError):
                flow.send(payload)
            due_s += gap_s
    return []


def receive(flow: socket.socket, *, hello: bool) -> list[tuple[int, int]]:
    """Count what comes; with ``hello`` the other end waits to learn our address."""
    bins: Counter[int] = Counter()
    while True:
        if hello and not bins:
            flow.send(b"")
        ready, _, _ = select.select([flow, sys.stdin], [], [], _HELLO_S)
        if sys.stdin in ready:
            return sorted(bins.items())
        if flow in ready:
            bins[int(time.monotonic() / BIN_S)] += len(flow.recv(_LARGEST_BYTES))


def _stopped(timeout_s: float) -> bool:
    return bool(select.select([sys.stdin], [], [], max(0.0, timeout_s))[0])


def _flow(end: str, role: str, address: tuple[str, int]) -> socket.socket:
    flow = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if end == "connect":
        flow.connect(address)
        return flow
    flow.bind(address)
    print(READY, flush=True)
    if role == "send":
        select.select([flow, sys.stdin], [], [])
        with suppress(BlockingIOError):
            flow.connect(flow.recvfrom(1, socket.MSG_DONTWAIT)[1])
    return flow


def main() -> None:
    """Be one end of a UDP flow."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("end", choices=("accept", "connect"))
    parser.add_argument("role", choices=("send", "receive"))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("rate", type=int)
    arguments = parser.parse_args()
    flow = _flow(arguments.end, arguments.role, (arguments.address, arguments.port))
    if arguments.role == "send":
        report = send(flow, arguments.rate)
    else:
        report = receive(flow, hello=arguments.end == "connect")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
