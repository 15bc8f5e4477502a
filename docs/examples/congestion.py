"""Have a congestion control of one's own for TCP while this runs.

Compile it first, and choose it for connections:

clang -target bpf -O2 -g -c congestion.bpf.c -o congestion.o
python3 congestion.py --percent 85
sysctl net.ipv4.tcp_congestion_control=pybpf_example    # or setsockopt TCP_CONGESTION
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Optional, Sequence

from pybpfthrottle import bpf


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Have it for some seconds, or until Ctrl-C, and show what it has done."""
    parser = argparse.ArgumentParser(description="Have a congestion control of one's own.")
    parser.add_argument("--percent", type=int, default=70, help="what a loss leaves of the window")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    spec = bpf.read_file(options.object)
    spec.variables["percent"].set(options.percent)
    with bpf.load(spec) as loaded:
        with loaded.struct_ops["control"].attach():
            print("new connections may choose pybpf_example", flush=True)
            wait(options.seconds)
        for name in ("connections", "acknowledged", "losses"):
            print(f"{name:14} {loaded.variables[name].get():10}")


def wait(seconds: float) -> None:
    """Wait for some seconds, or until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        time.sleep(seconds)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"congestion: {error}")
