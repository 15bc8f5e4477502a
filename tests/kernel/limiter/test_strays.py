"""Sockets of a limited cgroup that were made in another one, and commands that leave theirs."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from typing import Any, Iterator

import pytest
from lab import ENVIRONMENT, TOOL, attached
from targets import PATIENCE_S, Target, eventually, marked, programs_of, target

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.bpf import programs
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Process
from pybpfthrottle.linux.sockets import Scan
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.throttle import Throttle

RATE = Rate.parse("1M")
BOTH = dict.fromkeys(Direction, RATE)
TCP = 6


@pytest.fixture
def elsewhere() -> Iterator[Cgroup]:
    """Another cgroup."""
    found = cgroups.root().create_child(f"test-{uuid.uuid4().hex[:12]}.service")
    yield found
    found.remove(patience_s=5)


def rate_of(receiving: Target, seconds: float) -> float:
    """Bytes per second that come in."""
    begin, before = time.monotonic(), receiving.do("received_in_all()")
    time.sleep(seconds)
    return float((receiving.do("received_in_all()") - before) / (time.monotonic() - begin))


@contextmanager
def moved(origin: Cgroup, into: Cgroup) -> Iterator[tuple[Target, Target, str, int]]:
    """A server whose listener was made in one cgroup and that is in another one, and a client."""
    with (
        Wire() as wire,
        target(origin, wire.server.inside) as server,
        target(cgroups.root(), wire.client.inside) as client,
    ):
        address = wire.server.address
        listener = server.do(f"stream_server({address!r}, {TCP}, sends=True)")
        into.move_in(server.pid)
        yield server, client, address, listener


def connect(server: Target, client: Target, address: str, listener: int) -> None:
    """One more connection, on which the server sends."""
    port = server.do(f"port({listener})")
    client.do(f"stream_client({address!r}, {port}, {TCP}, sends=False)")


def test_what_a_listener_of_another_cgroup_accepts_is_limited(
    scratch: Cgroup, elsewhere: Cgroup
) -> None:
    """Before the limit and later, once for each byte; and it is told."""
    with moved(elsewhere, scratch) as (server, client, address, listener):
        connect(server, client, address, listener)
        eventually(lambda: client.do("received_in_all()") > 1 << 20)
        with throttle.apply([scratch], {Direction.UPLOAD: RATE}) as live:
            [note] = live.notes()
            assert f"{server.pid} (" in note
            assert elsewhere.path in note
            connect(server, client, address, listener)
            time.sleep(1.5)
            assert 0.7 <= rate_of(client, 3) / RATE.bytes_per_s <= 1.3
        eventually(lambda: rate_of(client, 0.5) > 5 * RATE.bytes_per_s)


def test_what_is_of_the_cgroup_has_no_mark(scratch: Cgroup, elsewhere: Cgroup) -> None:
    """It would be charged twice."""
    with target(scratch) as own, target(elsewhere) as other:
        there = other.do("listen()")
        here = own.do("listen()")
        scratch.move_in(other.pid)
        with throttle.apply([scratch], BOTH):
            assert marked(other.pid, [there]) == [True]
            assert marked(own.pid, [here]) == [False]


def test_an_acknowledgement_passes_one_gate(scratch: Cgroup, elsewhere: Cgroup) -> None:
    """The one at the root takes the place of that of the cgroup, which would hold it twice."""
    with target(elsewhere) as other:
        other.do("listen()")
        scratch.move_in(other.pid)
        with throttle.apply([scratch], {Direction.DOWNLOAD: RATE}):
            own = programs_of(os.getpid())
            found = [
                programs.info_by_id(number).name
                for where in (scratch, cgroups.root())
                for number in attached(where, HOOKS)
                if number in own
            ]
    assert found.count("pybpft_gate") <= 1
    assert found.count("pybpft_ingress") == 1


def test_a_cgroup_without_strays_has_no_programs_elsewhere(scratch: Cgroup) -> None:
    """Nothing is attached to the root where nothing needs it, and nothing is said."""
    with target(scratch) as own:
        own.do("listen()")
        with throttle.apply([scratch], BOTH) as live:
            assert live.notes() == []
            assert not programs_of(os.getpid()).intersection(attached(cgroups.root(), HOOKS))


def test_a_socket_that_comes_later_is_found(scratch: Cgroup, elsewhere: Cgroup) -> None:
    """As that of a service which is activated while the limit is in force."""
    with target(elsewhere) as other, throttle.apply([scratch], BOTH) as live:
        there = other.do("listen()")
        scratch.move_in(other.pid)
        eventually(live.notes)
        assert marked(other.pid, [there]) == [True]


LEAVING = """
import os, socket, subprocess, sys, time
address, port, where, way = sys.argv[1:]
before = socket.create_connection((address, int(port)))
def leave():
    fd = os.open(where + "/cgroup.procs", os.O_WRONLY)
    os.write(fd, b"0")
def fetch():
    leave()
    after = socket.create_connection((address, int(port)))
    for one in (before, after):
        if os.fork() == 0:
            while one.recv(1 << 18):
                pass
            os._exit(0)
    os.wait()
if way == "itself" or os.fork() == 0:
    if way == "daemon":
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(0.6)
    fetch()
elif way == "daemon":
    time.sleep(4)  # on a busy machine it is looked at once a second
    os._exit(0)
else:
    os.wait()
"""


@contextmanager
def leaving(
    wire: Wire, server: Target, into: Cgroup, way: str, *options: str
) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """``run`` with a command that leaves its cgroup in some way, and its JSON as it comes."""
    address = wire.server.address
    port = server.do(f"port({server.do(f'stream_server({address!r}, {TCP}, sends=True)')})")
    command = [sys.executable, "-c", LEAVING, address, str(port), into.path, way]
    reading, writing = os.pipe()
    with subprocess.Popen(
        wire.client.inside(
            *TOOL, "run", "-q", *options, "--download-limit", "1M",
            "--json-file", f"/dev/fd/{writing}", "--", *command,
        ),
        pass_fds=[writing],
        env=ENVIRONMENT,
        text=True,
    ) as tool:  # fmt: skip
        os.close(writing)
        events: list[dict[str, Any]] = []
        try:
            with os.fdopen(reading) as lines:
                for line in lines:
                    events.append(json.loads(line))
                    if events[-1]["event"] == "note":
                        break
                yield tool, events
        finally:
            for pid in into.pids_below():
                os.kill(pid, signal.SIGKILL)
            tool.terminate()
            tool.wait(PATIENCE_S)


@pytest.mark.timed
@pytest.mark.parametrize("way", ["itself", "child", "daemon"])
def test_a_command_that_leaves_its_cgroup_is_limited(
    scratch: Cgroup, elsewhere: Cgroup, way: str
) -> None:
    """By what it has open from before and what it opens then, each byte once; and it is told."""
    with (
        Wire() as wire,
        target(scratch, wire.server.inside) as server,
        leaving(wire, server, elsewhere, way, "--wait") as (_, events),
    ):
        assert events[-1]["event"] == "note"
        assert f"has moved to {elsewhere.path}" in events[-1]["text"]
        time.sleep(1.5)
        pids = elsewhere.pids()
        begin, before = time.monotonic(), received(pids)
        time.sleep(3)
        rate = (received(pids) - before) / (time.monotonic() - begin)
        assert 0.7 <= rate / RATE.bytes_per_s <= 1.3


def received(pids: list[int]) -> int:
    """What came in by all connections of some processes, each once."""
    infos = (
        one.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        for one in Scan().new(pids)
        if one.is_tcp
    )
    return sum(struct.unpack_from("=Q", info, 128)[0] for info in infos)


def test_who_cannot_be_followed_is_told_with_what_limits_it(
    scratch: Cgroup, elsewhere: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where process ids mean something else, as in a container."""
    monkeypatch.setattr("pybpfthrottle.linux.process.in_first_namespace", lambda: False)
    with target(scratch) as own, limited_command(scratch, own.pid) as live:
        elsewhere.move_in(own.pid)
        [note] = eventually(live.notes)
        assert f"{own.pid} (" in note
        assert "is not limited there" in note
        assert f"--unit {os.path.basename(elsewhere.path)}" in note


def limited_command(cgroup: Cgroup, pid: int) -> Throttle:
    """A limit as ``run`` makes it."""
    return throttle.apply([cgroup], BOTH, command=Process(pid))
