"""Show which files are opened, and by whom.

Compile it first:

clang -target bpf -O2 -g -c opensnoop.bpf.c -o opensnoop.o
"""

from __future__ import annotations

import argparse
import errno
import itertools
import sys
from pathlib import Path
from typing import Optional, Sequence

from pybpfthrottle import bpf


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Show what is opened, until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Show which files are opened.")
    parser.add_argument("--pid", type=int, default=0, help="only this process")
    parser.add_argument("--count", type=int, help="end after so many")
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    spec = bpf.read_file(options.object)
    spec.variables["pid"].set(options.pid)
    with bpf.load(spec) as loaded, loaded.attach(), bpf.RingBuffer(loaded.maps["events"]) as events:
        print(f"{'PID':>7} {'COMMAND':16} {'RESULT':>8} PATH", flush=True)
        for event in itertools.islice(events, options.count):
            result = errno.errorcode.get(-event.result) or f"fd {event.result}"
            print(f"{event.pid:7} {event.command:16} {result:>8} {event.path}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"opensnoop: {error}")
    except KeyboardInterrupt:
        pass
