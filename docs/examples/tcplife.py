"""Show TCP connections as they end: whose, how long, how much.

Compile it first:

clang -target bpf -O2 -g -c tcplife.bpf.c -o tcplife.o
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from pybpfthrottle import bpf


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Show what has ended, until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Show TCP connections as they end.")
    parser.add_argument("--port", type=int, help="only those from or to this port")
    parser.add_argument("--count", type=int, help="end after so many")
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    with bpf.load(options.object) as loaded, loaded.attach():
        events = bpf.RingBuffer(loaded.maps["events"])
        asyncio.run(show(events, options.port, options.count))


async def show(events: bpf.RingBuffer, port: Optional[int], count: Optional[int]) -> None:
    """Show connections; a program may do other things on the same loop."""
    print(f"{'PID':>7} {'COMMAND':16} {'MS':>10} {'RECEIVED':>10} {'SENT':>10} FROM TO", flush=True)
    with events:
        async for event in events:
            if port in (None, event.source_port, event.target_port):
                print(line(event), flush=True)
                count = None if count is None else count - 1
            if count == 0:
                return


def line(event: Any) -> str:
    """Return what is shown of one connection; who accepted one is not known here."""
    begin = f"{event.pid or '-':>7} {event.command or '-':16} {event.duration_ns / 1e6:10.1f}"
    moved = f"{event.received:10} {event.sent:10}"
    places = f"{address(event.source)}:{event.source_port} {address(event.target)}"
    return f"{begin} {moved} {places}:{event.target_port}"


def address(data: Sequence[int]) -> str:
    """Return an address as it is written; IPv4 comes as part of IPv6."""
    found = ipaddress.IPv6Address(bytes(data))
    return str(found.ipv4_mapped or f"[{found}]")


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"tcplife: {error}")
    except KeyboardInterrupt:
        pass
