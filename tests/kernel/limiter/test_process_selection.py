"""Which processes are limited, how a limit for them ends, and moving them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL, attached, lab
from targets import (
    NEXT_PASS_S,
    PATIENCE_S,
    Target,
    as_user,
    eventually,
    followed,
    marked,
    pacing,
    programs_of,
    target,
    tool,
)

from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Rate

STREAM = "make(AF_INET, SOCK_STREAM)"
UNLIMITED = (1 << 64) - 1
AT_ONCE_S = 0.5  # much less than the time between two passes
USER = 1_000_000 + os.getpid()  # nobody else, nor a test beside this one


@pytest.fixture
def own(scratch: Cgroup) -> Iterator[Target]:
    """A process to be limited."""
    with target(scratch) as one:
        yield one


class Kind:
    """Processes that can be told from all others: how to start one, and how to select them."""

    def __init__(self, way: str, directory: Path) -> None:
        name = f"pbt{os.getpid()}"
        path = directory / name
        if way == "name":
            path.symlink_to(sys.executable)
        elif way == "exe":
            shutil.copy(os.path.realpath(sys.executable), path)
        self.options = {
            "name": ["--name", name],
            "exe": ["--exe", str(path)],
            "user": ["--user", str(USER)],
        }[way]
        self._way = way
        self._python = sys.executable if way == "user" else str(path)

    def inside(self, *command: str) -> list[str]:
        """The command line, for ``target``."""
        changed = [self._python if part == sys.executable else part for part in command]
        home = ["env", f"PYTHONHOME={sys.base_prefix}", *changed]
        return as_user(USER, *home) if self._way == "user" else home


WAYS = ["name", "exe", "user"]


@pytest.fixture(params=WAYS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    """Processes by each of the ways to select them."""
    return Kind(request.param, tmp_path)


def test_what_matches_is_limited_now_and_later(kind: Kind, scratch: Cgroup, own: Target) -> None:
    """Those that run already, those that are started while others are limited, nobody else."""
    with target(scratch, kind.inside) as first:
        fds = [first.do(STREAM)]
        with tool(*kind.options) as (running, event):
            assert event["pids"] == []
            assert followed(running.pid) == {first.pid}
            fds.append(first.do(STREAM))
            assert marked(first.pid, fds, running.pid) == [True, True]
            for _ in range(3):
                with target(scratch, kind.inside) as later:
                    fd = later.do(STREAM)
                    eventually(
                        lambda later=later, fd=fd: marked(later.pid, [fd], running.pid) == [True],
                        within_s=AT_ONCE_S,
                    )
                    assert marked(later.pid, [later.do(STREAM)], running.pid) == [True]
            assert marked(own.pid, [own.do(STREAM)], running.pid) == [False]


def test_it_waits_for_what_matches(kind: Kind, scratch: Cgroup) -> None:
    """With nobody there, and between one process and the next; children count as well."""
    with tool(*kind.options) as (running, _):
        for _ in range(2):
            assert followed(running.pid) == set()
            with target(scratch, kind.inside) as one:
                eventually(lambda one=one: one.pid in followed(running.pid), within_s=AT_ONCE_S)
                child = one.do("child()")
                assert followed(running.pid) == {one.pid, child}
            eventually(lambda: not followed(running.pid), within_s=AT_ONCE_S)
            time.sleep(1.2)
            assert running.poll() is None


def test_a_zombie_does_not_match(scratch: Cgroup, tmp_path: Path) -> None:
    """One that has ended, and waits for its parent, is nobody to be limited."""
    kind = Kind("name", tmp_path)
    with target(scratch, kind.inside) as one, tool(*kind.options) as (running, _):
        one.process.kill()
        os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
        time.sleep(1.5)
        assert followed(running.pid) == set()


def test_each_that_matches_has_its_own_limit(scratch: Cgroup, tmp_path: Path) -> None:
    """Later ones too, when they are started; each ends for itself, and the tool waits for more."""
    kind = Kind("name", tmp_path)

    def next_pid(event: str) -> int:
        assert running.stdout
        for line in running.stdout:
            found = json.loads(line)
            if found["event"] == event:
                return int(found["pid"])
        raise AssertionError("it has ended")

    with target(scratch, kind.inside) as first, tool("--each", *kind.options) as (running, event):
        assert event["pid"] == first.pid
        with target(scratch, kind.inside) as second:
            begin = time.monotonic()
            assert next_pid("start") == second.pid
            assert time.monotonic() - begin < NEXT_PASS_S
            at_the_top = set(attached(cgroup.root(), HOOKS))
            assert len(programs_of(running.pid) & at_the_top) >= 4
        assert next_pid("end") == second.pid
        first.end()
        assert next_pid("end") == first.pid
        eventually(lambda: not programs_of(running.pid) & set(attached(cgroup.root(), HOOKS)))
        assert running.poll() is None


class Flood:
    """A server that sends whatever is taken, and programs that take it from their start on."""

    def __init__(self, directory: Path) -> None:
        self.program = str(directory / f"flood{os.getpid()}")
        shutil.copy(str(shutil.which("cat")), self.program)
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._send, args=self._server.accept()[:1]).start()

    @staticmethod
    def _send(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while True:
                connection.sendall(bytes(1 << 16))

    def taken(self, seconds: float) -> int:
        """Return what a new program has taken in this time; it finds its connection open."""
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
            own.connect(self._server.getsockname())
            end = time.monotonic() + seconds
            with subprocess.Popen(
                ["timeout", str(seconds), self.program], stdin=own, stdout=subprocess.PIPE
            ) as process:
                assert process.stdout
                total = 0
                while chunk := os.read(process.stdout.fileno(), 1 << 20):
                    total += len(chunk) if time.monotonic() < end else 0
                return total

    def close(self) -> None:
        """Serve nobody any more."""
        self._server.close()


@pytest.fixture
def flood(tmp_path: Path) -> Iterator[Flood]:
    """A server, and programs that take all it sends."""
    one = Flood(tmp_path)
    yield one
    one.close()


@pytest.mark.timed
def test_each_is_limited_from_its_start_on(flood: Flood, own: Target) -> None:
    """What passes before is a small part of what it could have had in three tenths of a second."""
    seconds, rate = 0.3, Rate.parse("500K")
    unlimited = statistics.median(flood.taken(seconds) for _ in range(3))
    options = ("--exe", flood.program, "--download-limit", str(rate.bytes_per_s), "--loopback")
    with tool("--each", *options, "--pid", str(own.pid)):
        limited = statistics.median(flood.taken(seconds) for _ in range(5))
    assert limited < unlimited / 5


def test_each_short_lived_one_has_its_limit(flood: Flood, own: Target) -> None:
    """Of several, one after another, each is told of, with what it had."""
    options = ("--exe", flood.program, "--loopback", "--pid", str(own.pid))
    with tool("--each", *options) as (running, _):
        for _ in range(5):
            assert flood.taken(0.3) > 0
        time.sleep(1.5)  # so that their ends are told before that of the last one
        own.end()
        assert running.stdout
        ended: dict[int, int] = {}
        for event in map(json.loads, running.stdout):
            if event["event"] == "end":
                ended[event["pid"]] = event["download"]["packets_total"]
                if event["pid"] == own.pid:
                    break
    # One may have ended before a busy machine came to it.
    assert len(ended) >= 1 + 4
    assert sum(map(bool, ended.values())) >= 4


@pytest.mark.alone  # It limits everything else that this user runs.
def test_this_session_is_not_selected(scratch: Cgroup) -> None:
    """--user of the one who types it is not for the shell and what else it runs below."""
    with tool("--user", str(os.geteuid()), "--no-children") as (running, _):
        assert os.getpid() not in followed(running.pid)
        assert running.pid not in followed(running.pid)


# How it ends.


def test_the_end_of_the_process_is_the_end(own: Target) -> None:
    """With status 0, a summary, and the reason; nothing of it is attached then."""
    with tool("--pid", str(own.pid)) as (running, _):
        ours = programs_of(running.pid)
        assert ours & set(attached(cgroup.root(), HOOKS))
        own.end()
        out, err = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, err) == (0, "")
    end = json.loads(out.splitlines()[-1])
    assert (end["event"], end["reason"]) == ("end", "exited")
    assert not ours & set(attached(cgroup.root(), HOOKS))


@pytest.mark.timed
@pytest.mark.parametrize("how", ["open before", "new"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_nothing_is_left(scratch: Cgroup, number: signal.Signals, how: str) -> None:
    """Neither programs at the top cgroup nor a pacing rate; what was marked is fast again."""
    with lab() as wire, target(scratch, wire.inside) as one:
        upload = f"upload({wire.wire.server.address!r}, 8080)"
        if how == "open before":
            one.do(upload)
            time.sleep(0.3)
        with tool("--pid", str(one.pid), "--upload-limit", "1M") as (running, event):
            if how == "new":
                one.do(upload)
            if event["how"]["upload"]["shape"] != "police":
                eventually(lambda: pacing(one.pid) != [UNLIMITED])
            ours = programs_of(running.pid)
            running.send_signal(number)
            running.wait()
            eventually(lambda: pacing(one.pid) == [UNLIMITED], within_s=2)
            assert running.returncode == (0 if number != signal.SIGKILL else -number)
        assert not ours & set(attached(cgroup.root(), HOOKS))


def test_a_second_limit_begins_where_the_first_was_killed(own: Target) -> None:
    """The claim on a process ends with who had it."""
    for _ in range(2):
        with tool("--pid", str(own.pid)) as (running, _):
            assert marked(own.pid, [own.do(STREAM)], running.pid) == [True]
            running.kill()
            running.wait()


# Moving.


def made_below(scratch: Cgroup) -> list[Cgroup]:
    """The cgroups below another one."""
    return [each for each in cgroup.walk() if each in scratch and each != scratch]


def test_a_process_is_moved_with_its_threads_and_children(own: Target, scratch: Cgroup) -> None:
    """What is open gets marks, what it starts and opens later is of the new cgroup; then back."""
    before = own.do(STREAM)
    own.do(f"thread({STREAM!r})")
    child = own.do("child()")
    fd = own.do(f"tell({child}, {STREAM!r})")
    with target(scratch) as other, tool("--move-cgroup", "--pid", str(own.pid)) as (running, _):
        [made] = made_below(scratch)
        later = own.do("child('double fork exec')")
        assert sorted(made.pids()) == sorted([own.pid, child, later])
        assert scratch.pids() == [other.pid]
        assert marked(own.pid, [before, own.do(STREAM)], running.pid) == [True, False]
        assert marked(child, [fd], running.pid) == [True]
        running.terminate()
        running.wait()
        assert sorted(scratch.pids()) == sorted([own.pid, child, later, other.pid])
    assert made_below(scratch) == []


def test_a_process_of_a_threaded_cgroup_is_moved(own: Target, scratch: Cgroup) -> None:
    """The cgroup below is made threaded too."""
    threaded = scratch.create_child("threaded")
    try:
        (Path(threaded.path) / "cgroup.type").write_text("threaded")
        threaded.move_in(own.pid)
        own.do(f"thread({STREAM!r})")
        with tool("--move-cgroup", "--pid", str(own.pid)):
            [made] = made_below(threaded)
            assert made.pids() == [own.pid]
        assert threaded.pids() == [own.pid]
        assert made_below(threaded) == []
    finally:
        own.end()
        threaded.remove(patience_s=5)


def test_the_next_start_moves_back_what_a_crash_has_left(own: Target, scratch: Cgroup) -> None:
    """After kill -9: any start of the tool does it, here that of the same limit again."""
    child = own.do("child()")
    with tool("--move-cgroup", "--pid", str(own.pid)) as (running, _):
        running.kill()
        running.wait()
    assert scratch.pids() == []
    with target(scratch) as other, tool("--pid", str(other.pid)):
        eventually(lambda: len(scratch.pids()) == 3)
    assert sorted(scratch.pids()) == sorted([own.pid, child])
    assert made_below(scratch) == []


def test_a_moved_process_that_crashed_is_moved_again(own: Target, scratch: Cgroup) -> None:
    """After kill -9 the same command again: in the end the process is where it was first."""
    for _ in range(2):
        with tool("--move-cgroup", "--pid", str(own.pid)) as (running, _):
            running.kill()
            running.wait()
    with tool("--move-cgroup", "--pid", str(own.pid)):
        pass
    subprocess.run([*TOOL, "cleanup"], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    assert scratch.pids() == [own.pid]
    assert made_below(scratch) == []


def test_moved_processes_that_end_are_the_end(own: Target, scratch: Cgroup) -> None:
    """All of them: a child that goes on keeps the limit."""
    child = own.do("child('fork setsid')")
    own.do(f"order({child}, 'time.sleep(60)')")
    with tool("--move-cgroup", "--pid", str(own.pid)) as (running, _):
        own.end()
        time.sleep(1.5)
        assert running.poll() is None
        os.kill(child, signal.SIGKILL)
        assert running.wait(PATIENCE_S) == 0
    assert made_below(scratch) == []
