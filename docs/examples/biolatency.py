"""Show how long requests to block devices take, as a histogram.

Compile it first:

clang -target bpf -O2 -g -c biolatency.bpf.c -o biolatency.o
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Mapping, Optional, Sequence

from pybpfthrottle import bpf

BAR = 40


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Count for some seconds, or until Ctrl-C, and show the histogram."""
    parser = argparse.ArgumentParser(description="Show how long requests to block devices take.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    with bpf.load(options.object) as loaded:
        with loaded.attach(), suppress(KeyboardInterrupt):
            time.sleep(options.seconds)
        # A number for each CPU.
        counts = loaded.maps["buckets"].typed(int, int)
        print(histogram({bucket: sum(cpus) for bucket, cpus in counts.items()}))


def histogram(counts: Mapping[int, int]) -> str:
    """Return the lines from the first bucket that has a count to the last."""
    used = [bucket for bucket, count in counts.items() if count]
    lines = [f"{'MICROSECONDS':>22} {'COUNT':>8}"]
    for bucket in range(min(used, default=0), max(used, default=-1) + 1):
        begin, count = 1 << bucket if bucket else 0, counts[bucket]
        bar = "#" * round(BAR * count / max(counts.values()))
        lines.append(f"{begin:>9} -> {(1 << bucket + 1) - 1:>9} {count:>8} {bar}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"biolatency: {error}")
