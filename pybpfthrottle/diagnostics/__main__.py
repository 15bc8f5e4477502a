"""verify-setup without click and rich: ``python -m pybpfthrottle.diagnostics``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Callable, Optional


def main(argv: Optional[list[str]] = None) -> int:
    """The exit status: 0 this machine can limit, 1 it cannot, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        from pybpfthrottle.diagnostics import examine, report
    except ImportError as error:
        print(f"✗ This Python lacks what the examination needs: {error}", file=sys.stderr)
        print("  Remedy: use a Python with ctypes, such as your distribution's", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        found = examine.examine(
            pid=arguments.pid,
            cgroup=arguments.cgroup,
            unit=arguments.unit,
            root_cgroup=arguments.root_cgroup or examine.root_cgroup_wanted(),
        )
        if arguments.report:
            with open(arguments.report, "w", encoding="utf-8") as file:
                file.write(report.for_bug_report(found))
        if arguments.json:
            print(json.dumps(report.to_json(found), indent=2))
        elif not arguments.quiet:
            print(*report.lines(found, evidence=arguments.verbose), sep="\n")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if found.conclusion.works else 1


def parser() -> argparse.ArgumentParser:
    """The options, as those of pybpfthrottle verify-setup."""
    found = argparse.ArgumentParser(
        prog="python -m pybpfthrottle.diagnostics",
        description="Find out whether this machine can limit, if not exactly why, and what to do.",
    )
    target = found.add_mutually_exclusive_group()
    target.add_argument("--pid", type=int, help="examine the cgroup of this process")
    target.add_argument("--cgroup", metavar="PATH", help="examine this cgroup")
    target.add_argument("--unit", metavar="NAME", help="examine the cgroup of this systemd unit")
    found.add_argument("--root-cgroup", action="store_true", help="try the root cgroup as well")
    add: Callable[..., object] = found.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--report", metavar="FILE", help="write a text file for a bug report, without names")
    add("-v", "--verbose", action="store_true", help="print the evidence of what passed, too")
    add("-q", "--quiet", action="store_true", help="print nothing; the exit status tells")
    return found


if __name__ == "__main__":
    sys.exit(main())
