"""pybpfthrottle verify-setup: the examination of this machine, shown."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Callable, Optional, TextIO

import click

from pybpfthrottle.diagnostics import examine, report
from pybpfthrottle.diagnostics.check import Check, Outcome
from pybpfthrottle.diagnostics.examine import Examination

_STYLES = {
    Outcome.PASS: "green",
    Outcome.WARN: "yellow",
    Outcome.FAIL: "bold red",
    Outcome.SKIP: "dim",
}

Examine = Callable[[Callable[[Check], None]], Examination]


def verify(
    *,
    pid: Optional[int],
    cgroup: Optional[str],
    unit: Optional[str],
    root_cgroup: bool,
    as_json: bool,
    report_file: Optional[TextIO],
    verbose: bool,
    quiet: bool,
) -> int:
    """Examine, show, and tell by the exit status: 0 this machine can limit, 1 it cannot."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    root_cgroup = root_cgroup or examine.root_cgroup_wanted()

    def run(progress: Callable[[Check], None] = lambda check: None) -> Examination:
        return examine.examine(
            pid=pid, cgroup=cgroup, unit=unit, root_cgroup=root_cgroup, progress=progress
        )

    if as_json or quiet or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        found = run()
        if as_json:
            click.echo(json.dumps(report.to_json(found), indent=2))
        elif not quiet:
            click.echo("\n".join(report.lines(found, evidence=verbose)))
    else:
        found = _on_terminal(run, evidence=verbose)
    if report_file:
        report_file.write(report.for_bug_report(found))
    return 0 if found.conclusion.works else 1


def _on_terminal(run: Examine, *, evidence: bool) -> Examination:
    """With progress, colours and a panel; rich is imported here alone."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    with console.status("Examining") as status:
        found = run(lambda check: status.update(f"Examining: {check.title}"))
    for section, results in found.sections().items():
        console.print(Text(section, style="bold"))
        for check, result in results:
            console.print(Text("  " + report.headline(check, result), _STYLES[result.outcome]))
            for line in report.details(check, result, evidence=evidence):
                console.print(Text("      " + line, style="dim"))
    console.print(Text("Decision", style="bold"))
    for told, other in report.steps(found.path):
        console.print(Text(f"  {told} ").append(other, style="dim"))
    title, *rest = report.conclusion_lines(found)
    text = Text(title, style="bold").append("".join(f"\n{line}" for line in rest), "not bold")
    console.print(Panel(text, border_style="green" if found.conclusion.works else "red"))
    return found
