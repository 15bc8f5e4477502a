"""Have a CPU scheduler of one's own while this runs: first come, first served.

Needs Linux 6.12 with CONFIG_SCHED_CLASS_EXT. If it forgets a task, the kernel goes back to its own
after five seconds. Compile it first:

clang -target bpf -O2 -g -c scheduler.bpf.c -o scheduler.o
python3 scheduler.py --slice-ms 20
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
    """Schedule for some seconds, or until Ctrl-C, and show how often tasks were queued."""
    parser = argparse.ArgumentParser(description="Have a CPU scheduler of one's own.")
    parser.add_argument("--slice-ms", type=float, default=5, help="the most at a time (5)")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    spec = bpf.read_file(options.object)
    spec.variables["slice_ns"].set(int(options.slice_ms * 1_000_000))
    with bpf.load(spec) as loaded:
        with loaded.struct_ops["scheduler"].attach():
            begin = time.monotonic()
            wait(options.seconds)
        queued = loaded.variables["queued"].get()
        print(f"queued tasks {queued} times in {time.monotonic() - begin:.1f} s")


def wait(seconds: float) -> None:
    """Wait for some seconds, or until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        time.sleep(seconds)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"scheduler: {error}")
