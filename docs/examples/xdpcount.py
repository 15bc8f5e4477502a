"""Count the packets that reach an interface, by protocol.

Compile it first:

clang -target bpf -O2 -g -c xdpcount.bpf.c -o xdpcount.o
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Optional, Sequence

from pybpfthrottle import bpf

NAMES = {
    number: name[8:].lower() for name, number in vars(socket).items() if name.startswith("IPPROTO_")
}


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Count for some seconds, or until Ctrl-C, and show what has come."""
    parser = argparse.ArgumentParser(description="Count packets by protocol.")
    parser.add_argument("interface")
    parser.add_argument("--mode", choices=["native", "generic"], help="who runs the program")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    with bpf.load(options.object) as loaded:
        with loaded.programs["count"].attach(interface=options.interface, mode=options.mode):
            wait(options.seconds)
        print(f"{'PROTOCOL':12} {'PACKETS':>10} {'BYTES':>12}")
        for protocol, cpus in loaded.maps["protocols"].typed(int, "QQ").items():
            packets, size = (sum(numbers) for numbers in zip(*cpus))
            if packets:
                print(f"{NAMES.get(protocol, protocol):12} {packets:10} {size:12}")


def wait(seconds: float) -> None:
    """Wait for some seconds, or until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        time.sleep(seconds)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"xdpcount: {error}")
