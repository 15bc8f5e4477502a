"""What real transfers have moved, as it is recorded by day and as Prometheus gets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL, Lab, lab
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from since import since
from targets import eventually

from pybpfthrottle import Throttle, limit
from pybpfthrottle.cli.accounts import Accounts, StoreWhenNeeded
from pybpfthrottle.endpoint import Address
from pybpfthrottle.errors import StoreError
from pybpfthrottle.history import throttles_in_force
from pybpfthrottle.inforce import Cover
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.metrics import Collector
from pybpfthrottle.plan import Wish
from pybpfthrottle.rules.keeper import Keeper
from pybpfthrottle.store import Store
from pybpfthrottle.supervisor import Supervisor

SIZE = 400_000
ACCEPT = {"Accept": "application/openmetrics-text;version=1.0.0"}


@pytest.fixture(scope="module")
def own() -> Iterator[Lab]:
    """Two namespaces with a server."""
    with lab() as made:
        yield made


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the tool, which says when it is ready."""
    return subprocess.Popen([*TOOL, *arguments], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)


def ready(process: subprocess.Popen[str]) -> str:
    """The line that it says then."""
    assert process.stdout
    return process.stdout.readline()


def downloads(url: str) -> dict[str, float]:
    """What processes have received, as an endpoint serves it."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=ACCEPT)) as answer:  # noqa: S310
        text = answer.read().decode()
    return {
        sample.labels["name"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "pybpfthrottle_traffic_by_name_bytes_total"
        and sample.labels["direction"] == "download"
    }


@since("5.10")
def test_a_transfer_is_recorded_and_served(own: Lab, tmp_path: Path) -> None:
    """With its whole size, by both, under its own name; the recorder ends by a signal."""
    # Its name is its own, whatever else runs.
    name = f"curl{os.getpid()}"
    os.symlink(str(shutil.which("curl")), tmp_path / name)
    path = str(tmp_path / "state" / "usage.db")
    with ExitStack() as stack:
        records = stack.enter_context(start("usage", "--record", "--file", path))
        stack.callback(records.kill)
        serves = stack.enter_context(start("metrics", "--listen", "0"))
        stack.callback(serves.kill)
        assert path in ready(records)
        [url] = re.findall(r"http://\S+/metrics", ready(serves))
        script = f"{tmp_path / name} --globoff -sN {own.url} | head -c {SIZE} | wc -c"
        done = subprocess.run(own.inside("sh", "-c", script), capture_output=True, check=True)
        assert int(done.stdout) == SIZE
        eventually(lambda: downloads(url).get(name, 0) >= SIZE)
        for process in (records, serves):
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    shown = subprocess.run(
        [*TOOL, "usage", "--last", "2d", "--json", "--file", path],
        capture_output=True,
        check=True,
        env=ENVIRONMENT,
    )
    told = {one["name"]: one for one in json.loads(shown.stdout)["usage"]}
    assert told[name]["download_bytes"] >= SIZE
    assert sum(day["download_bytes"] for day in told[name]["days"]) == told[name]["download_bytes"]


@since("4.15")
def test_a_throttle_is_told_with_its_counters(own: Lab, scratch: Cgroup) -> None:
    """As a metric, and for the history; what is told of a paused one is that."""
    label = f"kept{os.getpid()}"
    with limit(cgroup=scratch.path, upload="50M", label=label) as throttle:
        script = "import socket; socket.socket(2, 2).sendto(bytes(900), ('%s', 9))"
        command = [sys.executable, "-c", script % own.wire.server.address]
        joins = f'echo $$ > {scratch.path}/cgroup.procs; exec "$@"'
        subprocess.run(own.inside("sh", "-c", joins, "sh", *command), check=True)
        [told] = [one for one in throttles_in_force() if one.rule == label]
        assert told.passed == (0, throttle.counters()[1].bytes_passed)
        assert told.passed.upload >= 900
        assert told.key.startswith(f"{throttle.id}-")
        throttle.pause()
        [found] = [one for one in Cover.now().throttles if one.id == throttle.id]
        page = Collector(throttles=lambda: [found]).collect().text()
        series = f'{{throttle="{throttle.id}",name="{label}"'
        passed = f'pybpfthrottle_throttle_passed_bytes_total{series},direction="upload"}}'
        assert f"{passed} {told.passed.upload}\n" in page
        assert f"pybpfthrottle_throttle_paused{series}}} 1\n" in page
        assert "limit_bytes_per_second{" not in page
    assert label not in [one.rule for one in throttles_in_force()]


class Owner(Keeper):
    """Keeps one throttle."""

    def __init__(self, throttle: Throttle) -> None:
        super().__init__(Wish(), pytest.fail)
        self.throttle = throttle
        self.asked = 0

    def throttles(self) -> dict[str, Throttle]:
        """As Keeper.throttles."""
        self.asked += 1
        return {self.throttle.id: self.throttle}


@since("5.10")
def test_a_daemon_keeps_account(scratch: Cgroup, tmp_path: Path, monkeypatch, capsys) -> None:
    """In its own loop: of its own throttles without opening them, and of the usage."""
    state = tmp_path / "state"
    monkeypatch.setenv("STATE_DIRECTORY", str(state))
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = Address(*found.getsockname())
    label = f"own{os.getpid()}"
    with limit(cgroup=scratch.path, upload="50M", label=label) as throttle:
        keeper = Owner(throttle)
        with ExitStack() as stack:
            supervisor = stack.enter_context(Supervisor())
            file = stack.enter_context(StoreWhenNeeded(supervisor))
            Accounts(address, usage=True).begin(supervisor, stack, keeper, file)
            with pytest.raises(StoreError, match="another process records"):
                Store.open(str(state / "usage.db"))
            with ThreadPoolExecutor() as pool:
                page = pool.submit(downloads, f"http://{address}/metrics")
                while not page.done():
                    supervisor.step(time.monotonic() + 0.02)
            page.result()
        assert keeper.asked
    with Store.open(str(state / "usage.db")) as store:
        keys = [key for (key,) in store.rows("SELECT key FROM counter")]
        assert any(key.startswith(f"{throttle.id}-") for key in keys)
    assert capsys.readouterr().err == ""
