"""pybpfthrottle usage: what was sent and received on the last days."""

from __future__ import annotations

from typing import Any, Optional

import click


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle usage --record
  sudo pybpfthrottle usage --last 30d
  sudo pybpfthrottle usage --last 4w --by unit
  sudo pybpfthrottle usage --by day --csv
""",
)
@click.option(
    "--last",
    metavar="DAYS",
    default="7d",
    help="How many days, such as 30d or 4w. [default: 7d]",
)
@click.option(
    "--by",
    type=click.Choice(["name", "unit", "container", "user", "rule", "day"]),
    default="name",
    help="What to add up: what processes of a name moved, or what a rule or a throttle has passed."
    " [default: name]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: a row for each day.")
@click.option("--record", "records", is_flag=True, help="Record the usage, until Ctrl-C.")
@click.option(
    "--file", "path", metavar="FILE", help="The file. [default: /var/lib/pybpfthrottle/usage.db]"
)
def usage(path: Optional[str], **options: Any) -> None:
    """Show what was sent and received on the last days, today included.

    The usage is recorded by pybpfthrottle daemon --usage, or by usage --record, which count the
    packets of every process in every network namespace, with their headers, loopback excluded. Days
    are those of local time. 400 of them are kept, and on each at least the hundred that have moved
    the most.
    """
    from pybpfthrottle.cli import usage as usage_command

    usage_command.usage(path, **options)
