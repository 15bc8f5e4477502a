"""pybpfthrottle metrics: for node_exporter's textfile collector, or served to Prometheus."""

from __future__ import annotations

import math
import signal
import sys
from contextlib import ExitStack
from typing import Optional

from pybpfthrottle import metrics, traffic
from pybpfthrottle.cli.say import echo, echo_json, say
from pybpfthrottle.endpoint import Address, Endpoint
from pybpfthrottle.errors import Error
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.metrics import Collector
from pybpfthrottle.supervisor import Supervisor

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def write(output: Optional[str], *, openmetrics: bool) -> int:
    """Write the metrics of this moment to a file, or to standard output; return the exit status."""
    page = Collector().collect()
    text = page.text(openmetrics=openmetrics)
    if output is None or output == "-":
        echo_json(text.rstrip("\n"))
    else:
        metrics.write(output, text)
    for name, problem in page.problems.items():
        say(f"error: cannot read the {name}: {problem}")
    return 1 if page.problems else 0


def serve(address: Address) -> None:
    """Serve them, and the traffic, until a signal comes. Raises SettingsError."""
    with SignalQueue(_STOP) as signals, Supervisor() as supervisor, ExitStack() as stack:
        watch = None
        try:
            watch = stack.enter_context(traffic.watch())
        except (Error, OSError) as error:
            say(f"traffic is not counted: {error}")
        endpoint = stack.enter_context(Endpoint(address, Collector(watch)))
        supervisor.add(lambda: [*([watch] if watch else []), *endpoint.chores()])
        supervisor.add(lambda: [signals], strict=True)
        echo(f"Serving http://{endpoint.address}/metrics. Ctrl-C ends it.")
        sys.stdout.flush()
        while not signals.take():
            supervisor.step(math.inf)
