"""pybpfthrottle verify-setup: the examination of this machine, shown."""

from __future__ import annotations

import os
import sys

from pybpfthrottle.cli.say import is_terminal
from pybpfthrottle.diagnostics import command, report
from pybpfthrottle.diagnostics.check import Outcome
from pybpfthrottle.diagnostics.command import Options, Run
from pybpfthrottle.diagnostics.examine import Examination

_STYLES = {
    Outcome.PASS: "green",
    Outcome.WARN: "yellow",
    Outcome.FAIL: "bold red",
    Outcome.SKIP: "dim",
}


def verify(options: Options) -> int:
    """Examine the machine and show the results; return the exit status."""
    terminal = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    show = _on_terminal if terminal else command.show_plain
    return command.run(options, lambda run: show(run, evidence=options.verbose))


def _on_terminal(run: Run, *, evidence: bool) -> Examination:
    """Show results with progress, colours and a panel; rich is imported only here."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    with console.status("Examining") as status:
        found = run(lambda check: status.update(f"Examining: {check.title}"))

    def line(text: Text) -> None:
        console.print(text, soft_wrap=True)

    for section, results in found.sections().items():
        line(Text(section, style="bold"))
        for check, result in results:
            line(Text("  " + report.headline(check, result), _STYLES[result.outcome]))
            for detail in report.details(check, result, evidence=evidence):
                line(Text("      " + detail, style="dim"))
    line(Text("Decision", style="bold"))
    for told, other in report.steps(found.path):
        line(Text(f"  {told} ").append(other, style="dim"))
    title, *rest = report.conclusion_lines(found)
    text = Text(title, style="bold").append("".join(f"\n{line}" for line in rest), "not bold")
    console.print(Panel(text, border_style="green" if found.conclusion.works else "red"))
    return found
