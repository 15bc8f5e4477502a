"""pybpfthrottle top and monitor: which processes use the line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.cli.values import ProcessId, record_option

if TYPE_CHECKING:
    from pybpfthrottle.cli.records import Output


def _traffic_options(command: Any) -> Any:
    """Add the options that top and monitor share."""
    options = (
        click.option(
            "--interval",
            type=click.FloatRange(min=0.1, max=3600),
            default=1.0,
            metavar="SECONDS",
            help="How often to measure. [default: 1]",
        ),
        click.option(
            "--scope",
            type=click.Choice(["network", "internet", "local", "loopback", "all"]),
            default="network",
            help="Which traffic to show; network is all but loopback. [default: network]",
        ),
        click.option(
            "--by",
            "group",
            type=click.Choice(
                [
                    *("process", "name", "user", "cgroup", "unit", "container"),
                    *("interface", "remote"),
                ]
            ),
            default="process",
            help="Add up what belongs together; remote is the address. [default: process]",
        ),
        click.option(
            "--interface",
            "interfaces",
            multiple=True,
            metavar="NAME",
            shell_complete=completing.interfaces,
            help="Only what passes this interface of a process's network namespace.",
        ),
        click.option(
            "--sort",
            "order",
            type=click.Choice(["rate", "down", "up", "total", "name"]),
            default="rate",
            help="The order of the lines. [default: rate]",
        ),
        click.option("--lines", type=click.IntRange(min=1), help="Show at most so many lines."),
        click.option("--pid", "pids", type=ProcessId(), multiple=True, help="Only this process."),
        click.option(
            "--name",
            "names",
            multiple=True,
            shell_complete=completing.names,
            help="Only processes of this name.",
        ),
        click.option(
            "--user",
            "users",
            multiple=True,
            shell_complete=completing.users,
            help="Only processes of this user.",
        ),
        click.option(
            "--cgroup",
            "cgroups",
            multiple=True,
            shell_complete=completing.cgroups,
            help="Only what is in this cgroup.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _traffic(given: dict[str, Any]) -> Any:
    from pybpfthrottle.cli import top as top_command

    keeps = top_command.kept(*(given.pop(name) for name in ("pids", "names", "users", "cgroups")))
    return top_command.Options(interval_s=given.pop("interval"), keeps=keeps, **given)


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle top
  sudo pybpfthrottle top --by user --scope internet
  sudo pybpfthrottle top --plain --name rsync
  sudo pybpfthrottle top --once --json | jq '.processes[0]'
""",
)
@click.option("--once", is_flag=True, help="Show one interval and end.")
@click.option("--plain", is_flag=True, help="Show a table without keys, until Ctrl-C.")
@_traffic_options
def top(**options: Any) -> None:
    """Show which processes use the line, and how much; limit them by keys.

    The kernel counts the packets of every process in every network namespace from the start of
    this command, with their headers. What belongs to no process has a line of its own.

    On a terminal this takes the whole screen, and ? shows its keys: t limits the selected process,
    or changes its limit, r removes a limit, q quits. A limit that is made here ends with this.
    Where Textual is missing (pip install 'pybpfthrottle[tui]') there is a table without keys.
    """
    from pybpfthrottle.cli import top as top_command

    top_command.top(_traffic(options))


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle monitor --pid 1234
  sudo pybpfthrottle monitor --name rsync --by name --record rsync.csv
""",
)
@_traffic_options
@record_option
def monitor(record: Optional[Output], **options: Any) -> None:
    """Print a line every second for each process that uses the line, until Ctrl-C.

    With --json each line is a JSON object; --record writes the same to a file. See pybpfthrottle
    top for what is counted.
    """
    from pybpfthrottle.cli import top as top_command
    from pybpfthrottle.cli.records import BOTH_ON_STDOUT

    if options["as_json"] and record is not None and record.on_stdout:
        raise click.UsageError(BOTH_ON_STDOUT)
    top_command.monitor(_traffic(options), record)
