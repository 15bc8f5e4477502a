"""The pytest plugin, in a run of pytest of its own; and the helper for whoever is not root."""

from __future__ import annotations

import json
import math
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

import pytest
from lab import ENVIRONMENT, ROOT, TOOL
from targets import PATIENCE_S, Target, as_user, eventually, target

from pybpfthrottle.backends.ebpf.marks import Marks, Tracing
from pybpfthrottle.conditions.helper import Helper, Peer, Watch
from pybpfthrottle.conditions.network import Network
from pybpfthrottle.conditions.remote import RemoteNetwork
from pybpfthrottle.errors import LimitError, ProcessError, ThrottleError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction

NOBODY = 65534

TESTS = """
import socket
import pytest

def arrives(times=1):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        count = 0
        for _ in range(times):
            own.sendto(b"x", own.getsockname())
            try:
                count += len(own.recv(9))
            except BlockingIOError:
                pass
        return count

@pytest.mark.network("offline", loopback=True)
def test_marked():
    assert arrives() == 0

def test_good_again():
    assert arrives() == 1

def test_fixture(network):
    network.loopback()
    assert arrives() == 1
    with network.offline():
        assert arrives() == 0
    assert arrives() == 1
    network.set(upload_loss="every:2")
    assert arrives(10) == 5
    assert sum(one.dropped for one in network.injected().values()) == 6

@pytest.mark.network(upload_loss="every:2", loopback=True)
def test_red():
    assert arrives(10) == 10
"""


def run(directory: Path, tests: str = TESTS) -> subprocess.CompletedProcess[str]:
    """A run of pytest that has the plugin, whether or not the package is installed."""
    (directory / "test_it.py").write_text(tests)
    return subprocess.run(
        [*(sys.executable, "-m", "pytest", "-p", "pybpfthrottle.pytest_plugin"), "-rs"],
        cwd=directory,
        env={**ENVIRONMENT, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        check=False,
    )


def test_a_marked_test_has_a_bad_network_and_the_next_has_not(tmp_path: Path) -> None:
    """A test that fails tells what was done to its packets."""
    done = run(tmp_path)
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    assert "network: upload loss of one packet in 2" in done.stdout
    assert "upload: dropped 5 of 10" in done.stdout


@pytest.mark.since("5.10")
def test_the_example_of_the_guide_passes(tmp_path: Path) -> None:
    """As it stands there, with a server of its own."""
    guide = (ROOT / "docs" / "guides" / "test-on-bad-networks.md").read_text()
    (example,) = re.findall(r"```python\n(import socket\n.*?)```", guide, re.DOTALL)
    done = run(tmp_path, example)
    assert "3 passed" in done.stdout, done.stdout


@contextmanager
def helping(path: Path, uid: int) -> Iterator[subprocess.Popen[str]]:
    """A helper for a user."""
    command = [*TOOL, "network-helper", "--socket", str(path), "--user", str(uid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) as process:
        try:
            assert process.stdout
            assert "Ctrl-C ends it" in process.stdout.readline()
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def test_the_helper_is_for_a_user_without_a_name_too(tmp_path: Path) -> None:
    """Users of containers may have a number only."""
    with helping(tmp_path / "socket", 1_234_567):
        pass


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to have a bad network."""
    with target(scratch) as one:
        yield one


def test_the_helper_has_a_network_for_a_process_until_its_client_ends(
    own: Target, tmp_path: Path
) -> None:
    """It can be changed and asked as one of one's own."""
    path = tmp_path / "socket"
    with helping(path, os.getuid()) as helper:
        with RemoteNetwork(own.pid, path=str(path), loopback=True, upload_loss="every:2") as remote:
            assert own.do("echoes(4)") == [0, 2]
            with remote.offline():
                assert own.do("echoes(4)") == []
            remote.set(upload_loss="every:4")
            assert own.do("echoes(4)") == [0, 1, 2]
            assert remote.injected()[Direction.UPLOAD].dropped == 7
            with pytest.raises(LimitError, match="is not a time"):
                remote.set(delay="80")
            with pytest.raises(OSError, match="another helper listens"):
                Helper(str(path), uid=0)
        assert eventually(lambda: own.do("echoes(4)") == [0, 1, 2, 3])
        assert helper.poll() is None
    assert not path.exists()


def asks(uid: int, path: Path, pid: int, **given: str) -> str:
    """What the helper answers to a user who asks for a process of this number."""
    request = {"do": "begin", "pid": pid, "given": {"loss": "100%", **given}, "loopback": True}
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_S)
        os.seteuid(uid)
        try:
            client.connect(str(path))
        finally:
            os.seteuid(0)
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(json.dumps(request).encode() + b"\n")
            return client.recv(9999).decode()
    return ""


def test_the_helper_does_nothing_to_what_is_not_the_callers_own(
    own: Target, scratch: Cgroup
) -> None:
    """Neither to root's process, nor for a user whom it is not for."""
    # Where each of them may connect.
    path = Path(tempfile.gettempdir(), f"{uuid.uuid4()}.sock")
    with helping(path, NOBODY):
        assert "is not one of user 65534" in asks(NOBODY, path, own.pid)
        assert asks(NOBODY - 1, path, own.pid) == ""
        assert len(own.do("echoes(4)")) == 4
        with target(scratch, lambda *command: as_user(NOBODY, *command)) as theirs:
            assert '"asked": "loss 100% each way' in asks(NOBODY, path, theirs.pid)
            # Which would be settings of the whole machine.
            for wrong in ({"delay": "1ms"}, {"dns": "servfail"}):
                assert "delays nothing on the loopback" in asks(NOBODY, path, theirs.pid, **wrong)


def as_nobody(*command: str) -> list[str]:
    """The command that runs another one as nobody, who may become another user all the same."""
    rights = [f"--{kind}-caps=+dac_read_search,+setuid" for kind in ("inh", "ambient")]
    return ["setpriv", f"--reuid={NOBODY}", *rights, *command]


@contextmanager
def helped(theirs: Target) -> Iterator[tuple[Watch, Network]]:
    """A helper of this process, with a network for a process of nobody."""
    path = Path(tempfile.gettempdir(), f"{uuid.uuid4()}.sock")
    with Helper(str(path), uid=NOBODY) as helper, ThreadPoolExecutor(1) as client:
        with socket.socket(socket.AF_UNIX) as own:
            os.seteuid(NOBODY)
            try:
                own.connect(str(path))
            finally:
                os.seteuid(0)
            helper.run()
            request = {"do": "begin", "pid": theirs.pid, "given": {"loss": "50%"}}
            own.sendall(json.dumps(request).encode() + b"\n")
            answer = client.submit(own.recv, 9999)
            _, watch, peer = helper.chores()[:3]
            peer.run()
            assert b"asked" in answer.result(PATIENCE_S)
            assert isinstance(peer, Peer)
            assert isinstance(watch, Watch)
            assert peer.network is not None
            yield watch, peer.network


@pytest.mark.since("5.10")
def test_a_set_uid_program_is_let_go_once_it_is_executed(scratch: Cgroup) -> None:
    """Without waiting for the next look; its parent keeps the network."""
    with tempfile.TemporaryDirectory() as directory, target(scratch, as_nobody) as theirs:
        Path(directory).chmod(0o711)
        program = Path(directory, "sleep")
        shutil.copy(shutil.which("sleep") or "", program)
        program.chmod(0o4755)
        with helped(theirs) as (watch, network):
            assert network.throttle.processes() == [theirs.pid]
            watch.due_s = math.inf
            pid = theirs.do(f"os.spawnv(os.P_NOWAIT, {str(program)!r}, ['sleep', '600'])")
            eventually(lambda: f"{NOBODY}\t0\t0\t0" in Path(f"/proc/{pid}/status").read_text())
            assert select.select([watch], [], [], PATIENCE_S)[0]
            watch.run()
            assert network.throttle.processes() == [theirs.pid]


@pytest.mark.since("5.10")
def test_who_becomes_another_user_is_let_go_at_the_next_look(scratch: Cgroup) -> None:
    """Also by a system call, which nobody reports; even if that is who the network is for."""
    with target(scratch, as_nobody) as theirs:
        child = theirs.do("child()")
        with helped(theirs) as (watch, network):
            assert sorted(network.throttle.processes()) == sorted([theirs.pid, child])
            assert watch.due_s <= time.monotonic() + 0.25
            theirs.do(f"tell({child}, 'os.setresuid(0, 0, 0)')")
            eventually(lambda: watch.run() or network.throttle.processes() == [theirs.pid])
            theirs.do("os.setresuid(-1, 0, -1)")
            eventually(lambda: watch.run() or network.throttle.processes() == [])


@pytest.mark.since("5.10")
def test_who_was_let_go_is_not_taken_in_again(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it is a child of who is limited, and the kernel cannot say what that starts."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Tracing, "begin", refuse)
    with target(scratch, as_nobody) as theirs:
        child = theirs.do("child()")
        with helped(theirs) as (watch, network):
            marks = next(one for one in network.chores() if isinstance(one, Marks))
            theirs.do(f"tell({child}, 'os.setresuid(0, 0, 0)')")
            eventually(lambda: watch.run() or network.throttle.processes() == [theirs.pid])
            further = theirs.do("child()")
            marks.due_s = 0
            marks.run()
            assert sorted(network.throttle.processes()) == sorted([theirs.pid, further])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x", "cannot be read"),
        ("[" * 9999, "cannot be read"),
        ("[]", "is a JSON object"),
        ('{"do": "tell"}', "begin one"),
        ('{"do": "begin", "pid": "1"}', "the id of a process"),
        ('{"do": "begin", "pid": 1, "given": 7}', "is a JSON object"),
        ('{"do": "begin", "pid": 999999999}', "999999999"),
        ('{"do": "begin", "pid": OWN, "given": {"replay": "/etc/shadow"}}', "no traces"),
    ],
)
def test_a_request_that_makes_no_sense_is_answered(tmp_path: Path, line: str, said: str) -> None:
    """With what is wrong; the connection goes on."""
    with Helper(str(tmp_path / "socket"), uid=os.getuid()) as helper:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(helper.path)
            helper.run()
            (_, _, peer) = helper.chores()
            client.settimeout(PATIENCE_S)
            for _ in range(2):
                client.sendall(line.replace("OWN", str(os.getpid())).encode() + b"\n")
                peer.run()
                assert said in json.loads(client.recv(9999))["error"]


def test_a_file_is_no_leftover_of_a_helper(tmp_path: Path) -> None:
    """Whatever is at the path of the socket stays, and the error says so."""
    path = tmp_path / "socket"
    path.write_text("mine")
    with pytest.raises(OSError, match="something else than a socket"):
        Helper(str(path), uid=os.getuid())
    assert path.read_text() == "mine"


def test_without_a_helper_the_error_says_where_one_would_be(tmp_path: Path) -> None:
    """The path, and why."""
    with pytest.raises(ThrottleError, match=r"no helper listens on .*No such file"):
        RemoteNetwork(1, "3g", path=str(tmp_path / "none"))


def test_whose_number_is_nobodys_is_told(tmp_path: Path) -> None:
    """A process that does not exist is an error of the process."""
    with helping(tmp_path / "socket", os.getuid()), pytest.raises(ProcessError):
        RemoteNetwork(2**22 + 5, "offline", path=str(tmp_path / "socket"))
