"""pybpfthrottle demo: transfers with and without a limit."""

from __future__ import annotations

import sys

import click

from pybpfthrottle.cli.values import parse_rate
from pybpfthrottle.model import Rate


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle demo
  sudo pybpfthrottle demo --download-limit 2M --seconds 2
  sudo pybpfthrottle demo --loopback
""",
)
@click.option(
    "-d", "--download-limit", metavar="RATE", default="10M", show_default=True, callback=parse_rate
)
@click.option(
    "-u", "--upload-limit", metavar="RATE", default="5M", show_default=True, callback=parse_rate
)
@click.option(
    "--seconds",
    type=click.IntRange(2, 60),
    default=4,
    show_default=True,
    help="How long each limited transfer takes.",
)
@click.option("--loopback", is_flag=True, help="Use the loopback device instead of namespaces.")
def demo(download_limit: Rate, upload_limit: Rate, seconds: int, loopback: bool) -> None:
    """Show real transfers with and without a limit, between two network namespaces.

    The exit status is 0 only if the limits held.
    """
    from pybpfthrottle.cli import demo as demo_command

    sys.exit(demo_command.demo(download_limit, upload_limit, seconds, loopback=loopback))
