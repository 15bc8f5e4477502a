"""pybpfthrottle cleanup: what a crash has left."""

from __future__ import annotations

import click


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle cleanup --dry-run
  sudo pybpfthrottle cleanup
""",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cleanup(dry_run: bool, as_json: bool) -> None:
    """Remove leftovers of a crash: programs, tables of nftables, tc's classes and devices, cgroups.

    Starting a limit does this too. It leaves what other tools have made and running throttles
    alone.
    """
    from pybpfthrottle.cli import cleanup as cleanup_command

    cleanup_command.cleanup(dry_run=dry_run, as_json=as_json)
