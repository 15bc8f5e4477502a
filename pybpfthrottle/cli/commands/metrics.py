"""pybpfthrottle metrics: the throttles for Prometheus."""

from __future__ import annotations

import sys
from typing import Optional

import click


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
