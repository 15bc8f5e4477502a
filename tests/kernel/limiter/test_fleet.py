"""Three machines, which are network namespaces, share a total through a Redis in a fourth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Iterator

import pytest
from lab import ENVIRONMENT
from redis_server import redis, until

from pybpfthrottle.demo.wire import Namespace

TOTAL = 125_000_000  # 1 Gbit/s
HUB = "10.98.0.1"
# Tells its part whenever it is told what it wants; everything is quicker than it really is.
DAEMON = """
import json, sys
from pybpfthrottle.fleet import share
from pybpfthrottle.model import Rate
share._PERIOD_S, share._KEEP_S, share._LONGEST_PAUSE_S = 0.1, float(sys.argv[2]), 0.2
share._PATIENCE_S, share._GONE_S = 1.0, 1.0
with share.FleetShare(sys.argv[1], "backups", Rate(int(sys.argv[3])), machines=3) as fleet:
    for line in sys.stdin:
        part = fleet.part(json.loads(line))
        print(json.dumps([part.bytes_per_s, fleet.notes()]), flush=True)
"""


def ip(arguments: str, namespace: Namespace | None = None) -> None:
    """Run ip, in a namespace or here."""
    command = ["ip", *arguments.split()]
    subprocess.run(namespace.inside(*command) if namespace else command, check=True)


class Machine:
    """A daemon in a network namespace."""

    def __init__(self, namespace: Namespace, url: str, keep_s: float) -> None:
        self.wanted: int | None = None
        self.process = subprocess.Popen(
            namespace.inside(sys.executable, "-c", DAEMON, url, str(keep_s), str(TOTAL)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )

    def ask(self) -> tuple[int, list[str]]:
        """Its part in percent, and its notes."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(self.wanted), file=self.process.stdin, flush=True)
        part, notes = json.loads(self.process.stdout.readline())
        return round(100 * part / TOTAL), notes

    def close(self) -> None:
        """End it at once, and without a farewell."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def site() -> Iterator[tuple[Namespace, list[Namespace]]]:
    """A hub, and three namespaces with a cable each to its bridge."""
    with ExitStack() as stack:
        hub, *others = [Namespace(f"10.98.0.{number}", "") for number in range(1, 5)]
        for each in (hub, *others):
            stack.callback(each.close)
        for each in (hub, *others):
            each.wait()
        ip("link add bridge type bridge", hub)
        ip(f"address add {HUB}/24 dev bridge", hub)
        ip("link set bridge up", hub)
        for number, each in enumerate(others):
            peer = f"netns {hub.process.pid}"
            ip(
                f"link add cable netns {each.process.pid} type veth peer name to{number} {peer}",
            )
            ip(f"link set to{number} master bridge up", hub)
            ip(f"address add {each.address}/24 dev cable", each)
            ip("link set cable up", each)
        yield hub, others


def test_three_daemons_share_a_total(site):
    """Fair parts; those of one that dies; the last ones while Redis is stopped, then safe ones."""
    hub, others = site
    with ExitStack() as stack:
        server, _ = stack.enter_context(
            redis("--protected-mode", "no", inside=hub.inside(), host=HUB, port=6379)
        )
        url = f"redis://{HUB}:6379/0"
        machines = [Machine(each, url, 3.0) for each in others]
        for each in machines:
            stack.callback(each.close)
        machines[1].wanted = TOTAL // 25

        def parts() -> list[int]:
            return [each.ask()[0] for each in machines]

        until(lambda: parts() == [48, 4, 48])
        assert [each.ask()[1] for each in machines] == [[], [], []]
        machines.pop().close()
        until(lambda: parts() == [96, 4])
        # It hangs: nothing is refused, nothing answered.
        server.send_signal(signal.SIGSTOP)
        until(lambda: all("time" in str(each.ask()[1]) for each in machines))
        until(lambda: parts() == [33, 33])
        server.send_signal(signal.SIGCONT)
        until(lambda: parts() == [96, 4])
