"""pybpfthrottle supervise: a process for the throttles that have lost theirs."""

from __future__ import annotations

import sys

import click

from pybpfthrottle.cli import completing


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle supervise
  sudo pybpfthrottle supervise k3x9fd

\b
Exit status: 0 done, or nothing to do; 1 no throttle could be kept; 2 wrong usage.
""",
)
@click.argument("ids", metavar="[ID]...", nargs=-1, shell_complete=completing.throttles)
def supervise(ids: tuple[str, ...]) -> None:
    """Keep the throttles of --detach whose process was killed, until they end.

    Any command that limits starts this by itself where it is needed. Without an ID it keeps all of
    them. It counts anew.
    """
    from pybpfthrottle.cli import background

    sys.exit(background.supervise(ids))
