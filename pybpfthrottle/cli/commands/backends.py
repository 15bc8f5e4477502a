"""pybpfthrottle backends: the ways to limit."""

from __future__ import annotations

import sys

import click


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle backends
  sudo pybpfthrottle backends --try
  sudo pybpfthrottle backends --json | jq '.backends[] | select(.download.available) | .name'

\b
Exit status: 0 done, 1 a packet passed an available backend uncounted (--try), 2 wrong usage.
"""
)
@click.option(
    "--try",
    "try_them",
    is_flag=True,
    help="Also limit a packet by each, between two network namespaces.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends(try_them: bool, as_json: bool) -> None:
    """List the ways to limit, whether they work here, and if not, why.

    The best one that can do what was asked is used, unless --download-backend or --upload-backend
    names another one.
    """
    from pybpfthrottle.cli import backends as backends_command

    sys.exit(backends_command.show(as_json=as_json, try_them=try_them))
