"""Show which programs are started, with their arguments.

Compile it first:

clang -target bpf -O2 -g -c execsnoop.bpf.c -o execsnoop.o
"""

from __future__ import annotations

import argparse
import errno
import itertools
import shlex
import sys
from pathlib import Path
from typing import Optional, Sequence

from pybpfthrottle import bpf


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Show what is started, until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Show which programs are started.")
    parser.add_argument("--count", type=int, help="end after so many")
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    with bpf.load(options.object) as loaded, loaded.attach():
        record = loaded.record("event")
        with bpf.PerfBuffer(loaded.maps["events"], record, on_lost=tell_lost) as events:
            print(f"{'PID':>7} {'COMMAND':16} {'RESULT':>8} ARGUMENTS", flush=True)
            for event in itertools.islice(events, options.count):
                result = errno.errorcode.get(-event.result, event.result)
                words = shlex.join(word for word in event.arguments if word)
                print(f"{event.pid:7} {event.command:16} {result:>8} {words}", flush=True)


def tell_lost(cpu: int, count: int) -> None:
    """Tell that events did not fit into the buffer."""
    print(f"{count} events of CPU {cpu} were lost", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"execsnoop: {error}")
    except KeyboardInterrupt:
        pass
