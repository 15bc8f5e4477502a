"""The full screen for real: in a terminal of tmux, with a transfer that its keys limit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import pytest
from lab import ENVIRONMENT, TOOL, Lab, attached, lab
from targets import programs_of

from pybpfthrottle.linux import cgroup

T = TypeVar("T")
PATIENCE_S = 60.0
PROMPT = "ready> "
# Arguments of their own: a shell between would take PS1 away.
SHELL = ("bash", "--norc", "--noprofile")


def eventually(ask: Callable[[], T], what: Callable[[], Any]) -> T:
    """Poll until there is an answer; ``what`` tells what there is instead."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := ask()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return found


class Tmux:
    """A shell in a terminal of 80x24, of a tmux server of its own."""

    def __init__(self, socket: Path) -> None:
        self._tmux = ["tmux", "-u", "-S", str(socket), "-f", "/dev/null"]
        environment = {**ENVIRONMENT, "PS1": PROMPT, "LC_ALL": "C.UTF-8"}
        environment.pop("TMUX", None)
        subprocess.run(
            [*self._tmux, "new-session", "-d", "-x", "80", "-y", "24", *SHELL],
            env=environment,
            check=True,
        )

    def close(self) -> None:
        """End the server, and all in it."""
        subprocess.run([*self._tmux, "kill-server"], check=True)

    def screen(self) -> str:
        """Return what the terminal shows."""
        return self._run("capture-pane", "-p")

    def keys(self, *keys: str) -> None:
        """Press keys, by the names that tmux has for them."""
        self._run("send-keys", *keys)

    def wait_for(self, *texts: str) -> str:
        """Wait until all of this is shown; return the screen."""

        def shown() -> str:
            screen = self.screen()
            return screen if all(text in screen for text in texts) else ""

        return eventually(shown, lambda: f"{texts} in:\n{self.screen()}")

    def settings(self) -> str:
        """Return the terminal's settings, by a command in its shell."""
        self.keys("clear; stty -a", "Enter")
        text = self.wait_for("-echoprt", f"\n{PROMPT.rstrip()}")
        return text[text.index("speed") :]

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            [*self._tmux, *command], stdout=subprocess.PIPE, check=True, text=True
        )
        return done.stdout


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    """A terminal; its shell, and what runs in it, end with the test."""
    made = Tmux(tmp_path / "s")
    try:
        made.wait_for(PROMPT.rstrip())
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def own() -> Iterator[Lab]:
    """Two namespaces with a server."""
    with lab() as made:
        yield made


@pytest.fixture
def curl(own: Lab) -> Iterator[int]:
    """The process id of a transfer."""
    command = ["curl", "-sN", "--limit-rate", "3M", "-o", "/dev/null", own.url]
    with subprocess.Popen(own.inside(*command)) as transfer:
        yield transfer.pid
        transfer.kill()


def limits_of(pid: int) -> dict[str, Any]:
    """The limits of a process and who keeps them, as list says."""
    done = subprocess.run(
        [*TOOL, "list", "--json"], stdout=subprocess.PIPE, env=ENVIRONMENT, check=True
    )
    for one in json.loads(done.stdout)["throttles"]:
        if one["target"].get("pids") == [pid]:
            return {**one["limits"], "owner_pid": one["owner_pid"]}
    return {}


def begin(tmux: Tmux, curl: int) -> None:
    """Start the bare command, and select the transfer."""
    tmux.keys("clear; echo before", "Enter")
    tmux.keys(shlex.join(TOOL), "Enter")
    tmux.wait_for("down/s", "quit")
    tmux.keys("/", str(curl), "Enter")
    tmux.wait_for(f"{curl} (curl): 1 connection", f"search: {curl}", "established")


def limit(tmux: Tmux, curl: int) -> int:
    """Limit the transfer in the dialog; return who keeps the limit."""
    tmux.keys("t")
    tmux.wait_for(f"Limit {curl} (curl)", "By ebpf")
    tmux.keys("1M", "Enter")
    found = eventually(lambda: limits_of(curl), tmux.screen)
    assert (found["download"], found["upload"]) == (1 << 20, None)
    tmux.wait_for("1.0M/-", "limit: download 1.0 MB/s (ebpf")
    return int(found["owner_pid"])


def is_as_before(tmux: Tmux, settings: str) -> None:
    """The terminal is as it was: what it showed, and how it is set."""
    screen = tmux.wait_for("before", f"\n{PROMPT.rstrip()}")
    assert "down/s" not in screen
    assert "Traceback" not in screen
    tmux.keys("echo status $?", "Enter")
    tmux.wait_for("status 0")
    assert tmux.settings() == settings


def test_a_transfer_is_limited_by_keys(tmux: Tmux, curl: int) -> None:
    """In the dialog, then changed, removed after a question, and the terminal is as it was."""
    settings = tmux.settings()
    begin(tmux, curl)
    limit(tmux, curl)
    tmux.keys("t")
    tmux.wait_for(f"Change the limit of {curl} (curl)", "download: 1M")
    tmux.keys("C-u")
    tmux.wait_for("download: no limit")
    tmux.keys("2M", "Enter")
    eventually(lambda: limits_of(curl).get("download") == 2 << 20, tmux.screen)
    tmux.wait_for("2.0M/-")
    tmux.keys("r")
    tmux.wait_for(f"Remove the limit of {curl} (curl)?")
    tmux.keys("y")
    eventually(lambda: not limits_of(curl), tmux.screen)
    tmux.keys("q")
    is_as_before(tmux, settings)


def test_a_signal_ends_it_and_its_limits(tmux: Tmux, curl: int) -> None:
    """SIGTERM asks nothing: the limit is gone, and so is all that counts."""
    settings = tmux.settings()
    begin(tmux, curl)
    owner = limit(tmux, curl)
    tmux.keys("q")
    tmux.wait_for("Quit?", f"process {curl} (curl)")
    tmux.keys("n")
    ours = set(attached(cgroup.root())) & programs_of(owner)
    assert ours
    os.kill(owner, signal.SIGTERM)
    is_as_before(tmux, settings)
    assert limits_of(curl) == {}
    assert not ours & set(attached(cgroup.root()))
