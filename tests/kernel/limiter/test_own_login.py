"""The limit that would strangle the login it is typed on is refused, wherever that has gone."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Iterator, Sequence

import pytest
from lab import ENVIRONMENT, TOOL
from targets import PATIENCE_S, eventually, followed

from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import name_of

FAKE = [sys.executable, str(Path(__file__).parents[1].joinpath("fake_login.py"))]
NAME = f"fake{os.getpid()}"
REFUSED = "this session"


class Host:
    """A machine to log in to: the cgroup of its service, and one for all sessions."""

    def __init__(self, scratch: Cgroup, stack: ExitStack) -> None:
        self.service, self.session, self.other = (
            scratch.create_child(name) for name in ("service", "session", "other")
        )
        for each in (self.service, self.session, self.other):
            stack.callback(_empty_and_remove, each)
        self._stack = stack

    def login(self, *command: str, service: Cgroup) -> socket.socket:
        """Log in by a connection that a service accepts, and run a command on a terminal."""
        server = self._stack.enter_context(
            subprocess.Popen(
                [*FAKE, "serve", self.session.path, *command],
                stdout=subprocess.PIPE,
                env={**ENVIRONMENT, "FAKE_NAME": NAME},
                preexec_fn=lambda: service.move_in(0),
            )
        )
        assert server.stdout
        client = self._stack.enter_context(socket.socket())
        client.settimeout(PATIENCE_S)
        client.connect(("127.0.0.1", int(server.stdout.readline())))
        return client

    def says(self, *way: str, target: Cgroup, options: Sequence[str] = ()) -> str:
        """Return what the tool says in a login, where it runs in some way, of a limit."""
        limit = [*TOOL, "--cgroup", target.path, "--upload-limit", "4K", "--duration", "0.3"]
        client = self.login(*way, *limit, *options, service=self.service)
        return heard(client)


def heard(client: socket.socket) -> str:
    """Return what is said until the login ends."""
    return "".join(iter(lambda: client.recv(4096).decode(), ""))


def _empty_and_remove(own: Cgroup) -> None:
    """End what a login has left, which is in the cgroups of the test."""
    for pid in own.pids():
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    own.remove(patience_s=5)


@pytest.fixture
def host(scratch: Cgroup) -> Iterator[Host]:
    """A machine to log in to."""
    with ExitStack() as stack:
        yield Host(scratch, stack)


WAYS = {
    "plain": [],
    "a shell": ["sh", "-c", '"$@"; true', "sh"],
    "a terminal of its own": ["python3", "-c", "import pty, sys; pty.spawn(sys.argv[1:])"],
    "detached": [*FAKE, "detach"],
    "detached, below a shell": [*FAKE, "detach", "sh", "-c", '"$@"; true', "sh"],
    "detached twice": [*FAKE, "detach", *FAKE, "detach"],
    "detached, without the variable": [*FAKE, "detach", "env", "-u", "SSH_CONNECTION"],
    "without a terminal": [*FAKE, "daemon"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_service_of_the_own_login_is_not_limited_by_accident(host: Host, way: str) -> None:
    """Its connection is of the cgroup that accepted it, though no process is there any more."""
    said = host.says(*WAYS[way], target=host.service)
    assert REFUSED in said
    assert "--whole-cgroup" in said
    assert "Limiting" not in said


@pytest.mark.parametrize("way", ["plain", "detached", "without a terminal"])
def test_another_service_is_limited(host: Host, way: str) -> None:
    """Whatever connections it has."""
    with host.login("sleep", "600", service=host.other):
        said = host.says(*WAYS[way], target=host.other)
    assert REFUSED not in said
    assert "Limiting" in said


@pytest.mark.parametrize("way", ["plain", "detached"])
def test_who_serves_the_own_login_does_not_match(host: Host, way: str) -> None:
    """As a process that this one runs below does not; another of the same name does."""
    limit = [*TOOL, "--name", NAME, "--no-children", "--upload-limit", "4K", "--duration", "2"]
    with host.login("sleep", "600", service=host.other):
        # Its child executes sleep, and has another name then.
        eventually(lambda: [name_of(pid) for pid in host.session.pids()].count("sleep") == 1)
        [other] = [pid for pid in host.session.pids() if name_of(pid) == NAME]
        client = host.login(*WAYS[way], *limit, service=host.service)
        eventually(lambda: followed_by_a_tool(host.session) == {other})
        while client.recv(4096):
            pass


def followed_by_a_tool(session: Cgroup) -> set[int]:
    """Return the processes that a tool in a login limits; none before it does."""
    found: set[int] = set()
    for pid in session.pids():
        with suppress(AssertionError, OSError):
            found |= followed(pid)
    return found


def test_it_may_be_asked_for(host: Host) -> None:
    """With --whole-cgroup."""
    said = host.says(*WAYS["detached"], target=host.service, options=["--whole-cgroup"])
    assert "Limiting" in said


def test_an_attached_session_has_the_login_that_it_is_shown_on(host: Host, tmp_path: Path) -> None:
    """It began in a login that has ended: its service is limited, that of the other one is not."""
    # Another login, whose terminal the session is shown on.
    shown = host.login("sh", "-c", "tty; sleep 600", service=host.other)
    terminal = shown.recv(4096).decode().strip()
    said = tmp_path / "said"
    for target, refused in ((host.other, True), (host.service, False)):
        said.write_text("")
        limit = [*TOOL, "--cgroup", target.path, "--upload-limit", "4K", "--duration", "0.3"]
        # The login that it began in ends before: the connection is closed by the client.
        wait = f"sleep 0.5; {shlex.join(limit)} >{said} 2>&1; echo done >>{said}"
        with host.login(*FAKE, "attach", terminal, "sh", "-c", wait, service=host.service):
            pass
        eventually(lambda: "done" in said.read_text())
        assert (REFUSED in said.read_text()) == refused
        assert ("Limiting" in said.read_text()) == (not refused)


def test_a_console_has_no_connection(host: Host) -> None:
    """A terminal that no connection shows: what others are connected to may be limited."""
    limit = [*TOOL, "--cgroup", host.other.path, "--upload-limit", "4K", "--duration", "0.3"]
    with host.login("sleep", "600", service=host.other):
        done = subprocess.run(
            [*FAKE, "daemon", *WAYS["a terminal of its own"], *limit],
            env={name: value for name, value in ENVIRONMENT.items() if name != "SSH_CONNECTION"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=PATIENCE_S,
        )
    said = os.fsdecode(done.stdout)
    assert REFUSED not in said
    assert "Limiting" in said


@pytest.mark.parametrize("options", ["", "--no-children"])
def test_a_limit_on_who_serves_the_own_login_is_told(host: Host, options: str) -> None:
    """It is asked for by its id, and slows down the terminal that it was typed on."""
    limit = [*TOOL, "--upload-limit", "1M", "--duration", "0.3"]
    for target, told in (("$PPID", True), ("$$", False)):
        script = f"{shlex.join(limit)} {options} --pid {target}; true"
        said = heard(host.login("sh", "-c", script, service=host.service))
        assert "Limiting" in said
        assert ("has this session's connection" in said) == told
