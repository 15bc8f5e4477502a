"""verify-setup as a command, whoever reads its options and shows its results."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Callable, NamedTuple, Optional

from pybpfthrottle.diagnostics import examine, report
from pybpfthrottle.diagnostics.check import Check
from pybpfthrottle.diagnostics.examine import Examination

# All signals that would end this process and can be handled.
_ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF")

Run = Callable[[Callable[[Check], None]], Examination]


class Options(NamedTuple):
    """The options given: at most one of the first three, and no empty strings."""

    pid: Optional[int]
    cgroup: Optional[str]
    unit: Optional[str]
    root_cgroup: bool
    as_json: bool
    report: Optional[str]
    verbose: bool
    quiet: bool


def mistake(options: Options) -> Optional[str]:
    """Return what is wrong with the options, before anything is tried; None if nothing is."""
    if sum(value is not None for value in options[:3]) > 1:
        return "give one of --pid, --cgroup and --unit"
    for name in ("cgroup", "unit", "report"):
        if getattr(options, name) == "":
            return f"--{name} is empty"
    if options.report in (None, "-"):
        return None
    try:
        # Nothing of it is lost if the examination is interrupted.
        with open(options.report or "", "a"):
            return None
    except OSError as error:
        return f"--report: {options.report}: {error.strerror}"


def run(options: Options, show: Callable[[Run], Examination]) -> int:
    """Examine and show; return the exit status: 0 this machine can limit, 1 it cannot.

    ``show`` runs the examination and shows it to people; it is not called for --json and --quiet.
    Raises OSError if the report cannot be written.
    """
    for name in _ENDING:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))

    def examined(progress: Callable[[Check], None] = lambda check: None) -> Examination:
        return examine.examine(
            pid=options.pid,
            cgroup=options.cgroup,
            unit=options.unit,
            root_cgroup=options.root_cgroup
            or os.environ.get("PYBPFTHROTTLE_TEST_ROOT_CGROUP") == "1",
            progress=progress,
        )

    if options.quiet or options.as_json:
        found = examined()
        if not options.quiet:
            print(json.dumps(report.to_json(found), indent=2))
    else:
        found = show(examined)
    if options.report:
        report.write(options.report, found)
    return 0 if found.conclusion.works else 1


def show_plain(run: Run, *, evidence: bool) -> Examination:
    """Examine, and show the results as plain text."""
    found = run(lambda check: None)
    print(*report.lines(found, evidence=evidence), sep="\n")
    return found
