"""pybpfthrottle list: the throttles that are in force."""

from __future__ import annotations

import click


@click.command(
    "list",
    epilog="""
\b
Examples:
  sudo pybpfthrottle list
  sudo pybpfthrottle list --json | jq -r '.throttles[].id'
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_throttles(as_json: bool) -> None:
    """List the throttles that are in force, whoever made them."""
    from pybpfthrottle.cli import throttles

    throttles.show_all(as_json=as_json)
