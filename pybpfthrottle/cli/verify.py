"""pybpfthrottle verify-setup: the examination of this machine, shown."""

from __future__ import annotations

import json
import signal
import sys
from typing import Optional, TextIO

import click
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pybpfthrottle.diagnostics import examine, report
from pybpfthrottle.diagnostics.check import Outcome
from pybpfthrottle.diagnostics.examine import Examination

_STYLES = {
    Outcome.PASS: "green",
    Outcome.WARN: "yellow",
    Outcome.FAIL: "bold red",
    Outcome.SKIP: "dim",
}


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
    console = Console(highlight=False, soft_wrap=True)
    wanted = root_cgroup or examine.root_cgroup_wanted()
    with console.status("Examining") as status:
        if as_json or quiet:
            status.stop()
        found = examine.examine(
            pid=pid,
            cgroup=cgroup,
            unit=unit,
            root_cgroup=wanted,
            progress=lambda check: status.update(f"Examining: {check.title}"),
        )
    if report_file:
        report_file.write(report.for_bug_report(found))
    if as_json:
        click.echo(json.dumps(report.to_json(found), indent=2))
    elif quiet:
        pass
    elif console.is_terminal and not console.no_color:
        _show(console, found, evidence=verbose)
    else:
        click.echo("\n".join(report.lines(found, evidence=verbose)))
    return 0 if found.conclusion.works else 1


def _show(console: Console, found: Examination, *, evidence: bool) -> None:
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
    colour = "green" if found.conclusion.works else "red"
    console.print(Panel("\n".join([f"[bold]{title}[/]", *rest]), border_style=colour))
