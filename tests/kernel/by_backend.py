"""What the tests of all backends share: the tool in a lab, and the lab's configuration."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager, suppress
from typing import Iterator, NamedTuple

from lab import ENVIRONMENT, TOOL, Lab
from targets import eventually

from pybpfthrottle.backends import files
from pybpfthrottle.linux import netns, process
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import BACKENDS

RATE = Rate.parse("1M")
# Of what is not limited.
FAST = Rate.parse("20M")


class Case(NamedTuple):
    """A backend and a direction that it can limit."""

    backend: str
    direction: Direction

    @property
    def options(self) -> list[str]:
        """What asks the tool for it."""
        limit, backend = f"--{self.direction}-limit", f"--{self.direction}-backend"
        return [limit, str(RATE.bytes_per_s), backend, self.backend]


def answer(lab: Lab, *command: str) -> str:
    """What a command prints in the client's namespace."""
    return subprocess.run(
        lab.inside(*command), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def configuration(lab: Lab) -> list[str]:
    """All that a backend may change in the client's namespace."""
    filters = [f"tc -j filter show dev wire {hook}" for hook in ("ingress", "egress")]
    classes = "tc -j class show dev wire"
    commands = ("nft list ruleset", "tc -j qdisc show", classes, *filters, "ip -j link")
    return [answer(lab, *command.split()) for command in commands]


@contextmanager
def unchanged(lab: Lab) -> Iterator[None]:
    """Within it the configuration may be another one, afterwards it is what it was."""
    mine = 'table inet mine { chain c { type filter hook input priority 0; iif "lo" accept; }; }'
    subprocess.run(lab.inside("nft", "-f", "-"), input=mine, text=True, check=True)
    before = configuration(lab)
    try:
        yield
    finally:
        assert configuration(lab) == before
        assert [name for backend in BACKENDS for name in recorded_in(lab, backend)] == []


def recorded_in(lab: Lab, backend: str) -> list[str]:
    """The ids of what a backend has recorded for the client's namespace."""
    own = netns.number(lab.wire.client.process.pid)
    found = files.records(backend)
    return [record.id for record in found if record.handles["network_namespace"] == own]


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tool, outside of all these namespaces."""
    return subprocess.run(
        [*TOOL, *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.terminate()


def throttles(pid: int) -> list[dict]:
    """What is listed of a tool."""
    listed = json.loads(tool("list", "--json").stdout)["throttles"]
    return [one for one in listed if one["owner_pid"] == pid]


def running_with(own: Lab, case: Case, *command: str) -> list[str]:
    """The tool that runs a command with a limit."""
    return own.inside(*TOOL, "run", *case.options, "--", *(command or ("sleep", "60")))


def limiting(running: subprocess.Popen[str], command: str = "sleep") -> list[dict]:
    """The throttles of a tool that runs a command, once that has begun: then they are in force.

    They are listed before: their records come first, in case that they are killed meanwhile.
    """

    def name(pid: int) -> str:
        with suppress(OSError), open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
        return ""

    def has_begun() -> bool:
        return command in map(name, process.families().get(running.pid, ()))

    eventually(has_begun)
    return throttles(running.pid)
