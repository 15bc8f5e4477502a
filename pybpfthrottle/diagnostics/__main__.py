"""verify-setup without click and rich: ``python -m pybpfthrottle.diagnostics``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Optional


def main(argv: Optional[list[str]] = None) -> int:
    """Return the exit status: 0 this machine can limit, 1 it cannot, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = _parser().parse_args(argv)
    try:
        from pybpfthrottle.diagnostics import command
        from pybpfthrottle.model import printable
    except ImportError as error:
        print(f"✗ This Python lacks what the checks need: {error}", file=sys.stderr)
        print("  Remedy: use a Python with ctypes, such as your distribution's", file=sys.stderr)
        return 1
    options = command.Options(**vars(arguments))
    wrong = command.mistake(options)
    if wrong:
        _parser().error(wrong)
    try:
        status = command.run(options, lambda run: command.show_plain(run, evidence=options.verbose))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        # Python would flush again at exit, and fail with a status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    """Return a parser with the options of pybpfthrottle verify-setup."""
    parser = argparse.ArgumentParser(
        prog="python -m pybpfthrottle.diagnostics",
        description="Check whether limits work on this machine; if not, say why and how to fix it.",
    )
    add = parser.add_argument
    add("--pid", type=_pid, help="examine the cgroup of this process")
    add("--cgroup", metavar="PATH", help="examine this cgroup")
    add("--unit", metavar="NAME", help="examine the cgroup of this systemd unit")
    add("--root-cgroup", action="store_true", help="also try the root cgroup")
    add("--json", action="store_true", dest="as_json", help="print JSON")
    add("--report", metavar="FILE", help="write a text file for a bug report, without names")
    add(
        "-v", "--verbose", action="store_true", help="also print the evidence of checks that passed"
    )
    add("-q", "--quiet", action="store_true", help="print nothing; only set the exit status")
    return parser


def _pid(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a process id")
    return number


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
