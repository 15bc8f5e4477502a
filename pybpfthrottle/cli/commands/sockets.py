"""pybpfthrottle sockets: which sockets are limited, and why others are not."""

from __future__ import annotations

import sys

import click

from pybpfthrottle.cli.values import ProcessId


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle sockets --pid 1234
  sudo pybpfthrottle sockets --pid 1234 --pid 1240
  sudo pybpfthrottle sockets --pid 1234 --json | jq '.processes[].sockets[] | select(.covered)'

\b
Exit status: 0 done, 1 a process could not be inspected, 2 wrong usage.
""",
)
@click.option(
    "--pid",
    "pids",
    type=ProcessId(),
    multiple=True,
    required=True,
    help="Inspect this process. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sockets(pids: tuple[int, ...], as_json: bool) -> None:
    """Show a process's sockets, and which throttles limit each one, or why none does."""
    from pybpfthrottle.cli import sockets as sockets_command

    sys.exit(sockets_command.sockets(pids, as_json=as_json))
