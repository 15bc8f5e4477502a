"""Show where processes spend their time, as flame graphs take it.

Compile it first:

clang -target bpf -O2 -g -c profile.bpf.c -o profile.o
python3 profile.py --seconds 10 > stacks.txt    # for flamegraph.pl, or speedscope.app
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
    """Count for some seconds, or until Ctrl-C, and show the stacks."""
    parser = argparse.ArgumentParser(description="Show where processes spend their time.")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--frequency", type=int, default=99, help="samples a second (99)")
    parser.add_argument("--pid", type=int, help="only this process")
    parser.add_argument("--object", default=Path(__file__).with_suffix(".o"))
    options = parser.parse_args(arguments)

    spec = bpf.read_file(options.object)
    spec.variables["pid"].set(options.pid or 0)
    with bpf.load(spec) as loaded:
        sample = loaded.programs["sample"]
        with sample.attach(frequency_hz=options.frequency, pid=options.pid):
            wait(options.seconds)
        for line in bpf.folded(stacks(loaded)):
            print(line)


def stacks(loaded: bpf.Object) -> dict[tuple[str, ...], int]:
    """Return how often each stack was found, the innermost function first."""
    addresses, names = bpf.StackMap(loaded.maps["stacks"]), bpf.Symbolizer()
    found: dict[tuple[str, ...], int] = {}
    for key, count in loaded.maps["counts"].typed_by_btf().items():
        kernel = names.kernel(addresses.get(key["kernel"]))
        user = names.process(key["pid"], addresses.get(key["user"]))
        command = key["command"] if isinstance(key["command"], str) else "?"
        frames = (*(f"{frame}_[k]" for frame in kernel), *map(str, user), command)
        found[frames] = found.get(frames, 0) + count
    return found


def wait(seconds: float) -> None:
    """Wait for some seconds, or until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        time.sleep(seconds)


if __name__ == "__main__":
    try:
        main()
    except (bpf.Error, OSError) as error:
        sys.exit(f"profile: {error}")
