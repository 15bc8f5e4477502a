"""pybpfthrottle usage and metrics: what was counted, for people and for Prometheus."""

from __future__ import annotations

import sys
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


@click.command(
    epilog="""
\b
Examples:
  sudo pybpfthrottle metrics
  sudo pybpfthrottle metrics --output /var/lib/prometheus/node-exporter/pybpfthrottle.prom
  sudo pybpfthrottle metrics --listen 9853

\b
Exit status: 0 done, 1 the throttles could not be read (the metrics say so as well), 2 wrong usage.
""",
)
@click.option(
    *("-o", "--output"),
    metavar="FILE",
    help="Write them to FILE in one step, for node_exporter's textfile collector.",
)
@click.option(
    "--openmetrics", is_flag=True, help="Write OpenMetrics, which node_exporter cannot read."
)
@click.option(
    "--listen",
    metavar="[ADDRESS:]PORT",
    help="Serve them and the traffic by HTTP, until Ctrl-C; on this machine only if there is no"
    " ADDRESS.",
)
def metrics(output: Optional[str], openmetrics: bool, listen: Optional[str]) -> None:
    """Print metrics for Prometheus: the throttles in force, their limits and counters.

    With --listen, also what processes, units, containers and users send and receive.
    """
    from pybpfthrottle.cli import metrics as metrics_command
    from pybpfthrottle.endpoint import Address

    if listen is not None:
        if output is not None or openmetrics:
            raise click.UsageError("--listen serves what is asked for; it has no other options")
        metrics_command.serve(Address.parse(listen))
        return
    sys.exit(metrics_command.write(output, openmetrics=openmetrics))
