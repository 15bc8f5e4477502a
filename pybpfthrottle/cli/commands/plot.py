"""pybpfthrottle plot: what was recorded, as a picture."""

from __future__ import annotations

from typing import Optional, TextIO

import click

from pybpfthrottle.model import Direction


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle run --download-limit 2M --record rates.csv -- apt-get upgrade
  pybpfthrottle plot rates.csv
  pybpfthrottle plot rates.csv -o rates.svg
  sudo pybpfthrottle --pid 1234 -d 2M --duration 1m --record - | pybpfthrottle plot -
""",
)
@click.argument("file", type=click.File(errors="replace"))
@click.option(
    *("-o", "--output"),
    metavar="PICTURE",
    help="Draw a picture, .svg, .png or .pdf. Needs matplotlib.",
)
@click.option(
    "--direction",
    type=click.Choice([str(direction) for direction in Direction]),
    help="Show only downloads, or only uploads.",
)
def plot(file: TextIO, output: Optional[str], direction: Optional[str]) -> None:
    """Show the rates, limits, drops and round trips that were recorded in FILE.

    FILE is what --record, --json-file, a limit's --json or monitor --json has written; - is
    standard input.
    """
    from pybpfthrottle.cli import plot as plot_command

    plot_command.plot(file, output, direction)
