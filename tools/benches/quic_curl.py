"""QUIC downloads by curl: counts what all of them receive together until standard input ends.

Then it reports, as JSON, the bytes in each ``BIN_S`` since it began, and the round trip of a small
flow of another process beside them, its 95th percentile in ms.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter

from benches.figures import BIN_S
from benches.quic_ping import Ping
from benches.surroundings import READY

_F_SETPIPE_SZ = 1031  # fcntl has it since Python 3.10
_PIPE_BYTES = _READ_BYTES = 1 << 20


def download(command: list[str], connections: int) -> Counter[int]:
    """Return the bytes in each bin."""
    bins: Counter[int] = Counter()
    begin_s = time.monotonic()
    running = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        for _ in range(connections)
    ]
    outputs = [one.stdout.fileno() for one in running if one.stdout]
    for output in outputs:
        # A curl that waits for this process reads no packets, and they get lost.
        fcntl.fcntl(output, _F_SETPIPE_SZ, _PIPE_BYTES)
    while sys.stdin.fileno() not in (ready := _readable(outputs)):
        for output in ready:
            count = len(os.read(output, _READ_BYTES))
            if not count:  # it has told why
                sys.exit("a download has ended")
            bins[int((time.monotonic() - begin_s) / BIN_S)] += count
    for one in running:
        one.terminate()
        one.wait()
    return bins


def _readable(outputs: list[int]) -> list[int]:
    return select.select([sys.stdin.fileno(), *outputs], [], [])[0]


def main() -> None:
    """Download by a command that writes to its standard output."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("address")
    parser.add_argument("port", type=int, help="where pings are answered")
    parser.add_argument("connections", type=int)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    ping = Ping(arguments.address, arguments.port)
    print(READY, flush=True)
    bins = sorted(download(arguments.command, arguments.connections).items())
    print(json.dumps({"bins": bins, "ping_ms": ping.end()}), flush=True)


if __name__ == "__main__":
    main()
