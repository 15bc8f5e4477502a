"""pybpfthrottle run: a command with its bandwidth limited."""

from __future__ import annotations

import sys
from typing import Any

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.cli.options import limit_options, request_from, start_logging


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""
\b
Examples:
  pybpfthrottle run --upload-limit 500K -- rsync -a /home backup:
  pybpfthrottle run --download-limit 8mbit --user www-data -- ./crawl
  pybpfthrottle run --download-limit 2M --prove --record rates.csv -- apt-get upgrade
  pybpfthrottle run --netns --delay 80ms --loss 1% -- ./upload
""",
)
@limit_options
@click.option(
    "--user",
    metavar="NAME[:GROUP]",
    shell_complete=completing.users,
    help="Run the command as this user instead of this one.",
)
@click.option(
    "--wait", is_flag=True, help="Keep the limit while processes of the command outlive it."
)
@click.option(
    "--netns",
    is_flag=True,
    help="Give the command a network namespace, so that a bad network impairs what it sends as well"
    " as what it receives. Its addresses are others then.",
)
@click.option(
    "--json-file",
    type=click.File("w", lazy=False),
    help="Write one JSON object per line to this file.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(**options: Any) -> None:
    """Run COMMAND with its bandwidth limited, and exit with its exit status.

    The command gets a cgroup of its own, and has the terminal and standard output to itself; the
    live line and the summary go to standard error.
    """
    from pybpfthrottle.cli import run as run_command

    request = request_from(options)
    start_logging(request.verbose)
    sys.exit(run_command.run(request, **options))
