"""Limits for processes, with real programs and real transfers: one is limited, another is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator

import pytest
import targets
import unadopted
from lab import Lab, lab
from since import is_emulated, needs_command
from targets import (
    eventually,
    listening,
    rates_over,
    selected,
    target,
    tool,
    transferred,
)

from pybpfthrottle import throttle
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate

pytestmark = pytest.mark.timed

RATE = Rate.parse("1M")
# An emulated machine carries 4 MB/s beside the limited process.
MANY_TIMES = 3 if is_emulated() else 20
DIRECTIONS = list(Direction)


@pytest.fixture
def own() -> Iterator[Lab]:
    """Two namespaces, with a server in one of them."""
    with lab() as made:
        yield made


@contextmanager
def program(
    inside: Callable[..., list[str]], cgroup: Cgroup, *command: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a namespace and in a cgroup, ended in the end."""
    with (
        open("/dev/zero", "rb") as zeros,
        subprocess.Popen(
            inside(*command),
            stdin=zeros,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: cgroup.move_in(0),
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def curl(direction: Direction, url: str) -> list[str]:
    """Curl, as fast as it can."""
    command = ["curl", "--globoff", "-sN", "--max-time", "60", url]
    return [*command, "-T", "-"] if direction is Direction.UPLOAD else command


@contextmanager
def transfers(own: Lab, cgroup: Cgroup, direction: Direction, count: int) -> Iterator[list[int]]:
    """So many of curl, all of which transfer already; their ids."""
    with ExitStack() as stack:
        command = curl(direction, own.url)
        started = [program(own.wire.client.inside, cgroup, *command) for _ in range(count)]
        found = [stack.enter_context(each) for each in started]
        pids = [each.pid for each in found]
        for pid in pids:
            eventually(lambda pid=pid: transferred(pid, direction) > 1 << 20)
        yield pids


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_of_two_in_a_cgroup_is_limited(own: Lab, scratch: Cgroup, direction: Direction) -> None:
    """Both transfer already: one comes down to its limit, the other one does not notice."""
    with transfers(own, scratch, direction, 2) as pids:
        with throttle.apply([], {direction: RATE}, processes=selected(pids[0])):
            time.sleep(1.5)
            mine, others = rates_over(pids, direction, 3)
        # Of a fast connection that is policed so much is dropped at first that it has to recover.
        assert 0.4 <= mine / RATE.bytes_per_s <= 1.3
        assert others > MANY_TIMES * RATE.bytes_per_s
        # Without the limit it is as fast as before.
        eventually(lambda: rates_over(pids, direction, 1)[0] > 5 * RATE.bytes_per_s)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_other_direction_is_not_limited(
    own: Lab, scratch: Cgroup, direction: Direction
) -> None:
    """A limit for one direction leaves what goes the other way alone."""
    [other] = [each for each in Direction if each is not direction]
    with (
        transfers(own, scratch, direction, 1) as [pid],
        throttle.apply([], {other: RATE}, processes=selected(pid)),
    ):
        assert rates_over([pid], direction, 1.5)[0] > MANY_TIMES * RATE.bytes_per_s


def test_processes_share_one_limit(own: Lab, scratch: Cgroup) -> None:
    """Two that were named together get what the limit allows together."""
    with (
        transfers(own, scratch, Direction.UPLOAD, 2) as pids,
        throttle.apply([], {Direction.UPLOAD: RATE}, processes=selected(*pids)),
    ):
        time.sleep(1.5)
        assert 0.7 <= sum(rates_over(pids, Direction.UPLOAD, 3)) / RATE.bytes_per_s <= 1.3


def test_each_may_have_its_own_limit(own: Lab, scratch: Cgroup) -> None:
    """With --each every one of them gets it."""
    with transfers(own, scratch, Direction.UPLOAD, 2) as pids:
        options = [part for pid in pids for part in ("--pid", str(pid))]
        with tool("--each", *options, "--upload-limit", "1M"):
            time.sleep(1.5)
            rates = rates_over(pids, Direction.UPLOAD, 3)
    assert all(0.7 <= rate / RATE.bytes_per_s <= 1.3 for rate in rates)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ipv6_is_limited(scratch: Cgroup, direction: Direction) -> None:
    """A transfer over IPv6 that goes on already."""
    with (
        lab(ipv6=True) as own,
        transfers(own, scratch, direction, 1) as [pid],
        throttle.apply([], {direction: RATE}, processes=selected(pid)),
    ):
        time.sleep(1.5)
        assert 0.7 <= rates_over([pid], direction, 3)[0] / RATE.bytes_per_s <= 1.3


@pytest.mark.parametrize("way", ["child('fork exec')", "child('double fork setsid')"])
def test_what_a_child_transfers_is_limited(own: Lab, scratch: Cgroup, way: str) -> None:
    """Its connections are new, and held to the limit from their first byte."""
    with (
        target(scratch, own.inside) as parent,
        throttle.apply([], {Direction.DOWNLOAD: RATE}, processes=selected(parent.pid)),
    ):
        child = parent.do(way)
        how = f"download({own.wire.server.address!r}, 8080, wait=True)"
        parent.do(f"order({child}, {how!r})")
        begin = time.monotonic()
        eventually(lambda: transferred(child, Direction.DOWNLOAD))
        time.sleep(2)
        took = time.monotonic() - begin
        assert transferred(child, Direction.DOWNLOAD) <= (took * 1.1 + 0.3) * RATE.bytes_per_s
        assert 0.7 <= rates_over([child], Direction.DOWNLOAD, 2)[0] / RATE.bytes_per_s <= 1.3


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_datagrams_of_old_and_new_sockets_are_limited(scratch: Cgroup, family: str) -> None:
    """As many come as the limit lets through, and those of a sibling come all."""
    with lab() as own, ExitStack() as stack:
        server = own.wire.server
        address = server.address if family == "AF_INET" else server.address6
        receiver = stack.enter_context(target(scratch, server.inside))
        sender, sibling = (stack.enter_context(target(scratch, own.inside)) for _ in range(2))
        receivers = [receiver.do(f"receiver({family})") for _ in range(3)]
        ports = [receiver.do(f"port({each})") for each in receivers]
        old = sender.do(f"make({family}, SOCK_DGRAM)")
        with throttle.apply([], {Direction.UPLOAD: RATE}, processes=selected(sender.pid)) as live:
            new = sender.do(f"make({family}, SOCK_DGRAM)")
            theirs = sibling.do(f"make({family}, SOCK_DGRAM)")
            for one, fd, port in zip((sender, sender, sibling), (old, new, theirs), ports):
                one.do(f"flood({fd}, {address!r}, {port}, 4 * {RATE.bytes_per_s})")
            time.sleep(0.5)
            before = [receiver.do(f"received({each})") for each in receivers]
            begin = time.monotonic()
            time.sleep(3)
            after = [receiver.do(f"received({each})") for each in receivers]
            seconds = time.monotonic() - begin
            assert live.counters()[Direction.UPLOAD].packets_dropped
        by_old, by_new, by_sibling = (
            (end - start) / seconds / RATE.bytes_per_s for start, end in zip(before, after)
        )
        assert min(by_old, by_new) > 0.05
        assert 0.7 <= by_old + by_new <= 1.15
        assert by_sibling > 2.5


def test_a_moved_process_has_one_limit_for_old_and_new_connections(
    own: Lab, scratch: Cgroup
) -> None:
    """Those that were open have marks, new ones are of the cgroup: both have one bucket."""
    how = f"download({own.wire.server.address!r}, 8080)"
    with target(scratch, own.inside) as parent, target(scratch, own.inside) as sibling:
        child = parent.do("child('fork exec')")
        parent.do(f"tell({child}, {how!r})")
        sibling.do(how)
        with tool("--move-cgroup", "--pid", str(parent.pid), "--download-limit", "1M"):
            time.sleep(1.5)
            pids = [parent.pid, child, sibling.pid]
            _, old, _ = rates_over(pids, Direction.DOWNLOAD, 2)
            parent.do(how)
            time.sleep(0.5)
            new, older, others = rates_over(pids, Direction.DOWNLOAD, 3)
        assert 0.7 <= old / RATE.bytes_per_s <= 1.3
        assert new > 0.05 * RATE.bytes_per_s
        assert 0.7 <= (new + older) / RATE.bytes_per_s <= 1.3
        assert others > 5 * RATE.bytes_per_s


@pytest.mark.since("6.1")  # downloads are gated
def test_a_new_download_has_a_part_beside_an_old_one(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is gated from user space, as before Linux 6.12."""
    monkeypatch.setattr(targets, "TOOL", [sys.executable, unadopted.__file__])
    with lab() as own, target(scratch, own.inside) as parent:
        how = f"download({own.wire.server.address!r}, 8080)"
        child = parent.do("child('fork exec')")
        parent.do(f"tell({child}, {how!r})")
        with tool("--pid", str(parent.pid), "--download-limit", "1M"):
            time.sleep(1.5)
            parent.do(how)
            time.sleep(0.5)
            new, old = rates_over([parent.pid, child], Direction.DOWNLOAD, 5)
    assert min(new, old) > 0.3 * RATE.bytes_per_s
    assert 0.85 <= (new + old) / RATE.bytes_per_s <= 1.15


# Programs that people limit.


def test_wget(own: Lab, scratch: Cgroup) -> None:
    """A download of wget's that goes on already; curl beside it does not notice."""
    wget = needs_command("wget")
    inside, direction = own.wire.client.inside, Direction.DOWNLOAD
    with (
        program(inside, scratch, wget, "-q", "-O", "/dev/null", own.url) as client,
        transfers(own, scratch, direction, 1) as [other],
    ):
        eventually(lambda: transferred(client.pid, direction) > 1 << 20)
        with tool("--pid", str(client.pid), "--download-limit", "1M"):
            time.sleep(1.5)
            mine, others = rates_over([client.pid, other], direction, 3)
    assert 0.4 <= mine / RATE.bytes_per_s <= 1.3
    assert others > MANY_TIMES * RATE.bytes_per_s


def test_iperf3(own: Lab, scratch: Cgroup) -> None:
    """Both of its connections together; its control connection is one more."""
    iperf3 = needs_command("iperf3")
    near, far = own.wire.client.inside, own.wire.server
    serve = [iperf3, "-s", "-1"]
    ask = [iperf3, "-c", far.address, "-t", "30", "-P", "2"]
    with program(far.inside, scratch, *serve):
        eventually(lambda: b":1451 " in listening(far.process.pid))
        with program(near, scratch, *ask) as client:
            eventually(lambda: transferred(client.pid, Direction.UPLOAD) > 1 << 20)
            with tool("--pid", str(client.pid), "--upload-limit", "1M"):
                time.sleep(1.5)
                [rate] = rates_over([client.pid], Direction.UPLOAD, 3)
    assert 0.7 <= rate / RATE.bytes_per_s <= 1.3


# It keeps to the directory: it need not be installed, but only unpacked.
NGINX = """
daemon off; pid {directory}/pid; error_log {directory}/log; user root; worker_processes 2;
events {{ }}
http {{
  access_log off; client_body_temp_path {directory}/1; proxy_temp_path {directory}/2;
  fastcgi_temp_path {directory}/3; uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
  server {{ listen {address}:{port}; root {directory}; }}
}}
"""


@pytest.mark.parametrize("name", ["nginx", "http.server"])
def test_a_web_server(own: Lab, scratch: Cgroup, tmp_path: Path, name: str) -> None:
    """What it sends, by a worker of before the limit, to clients of before and later."""
    inside, address, port = own.wire.server.inside, own.wire.server.address, 8081
    os.truncate(os.open(tmp_path / "large", os.O_CREAT | os.O_WRONLY), 1 << 40)
    if name == "nginx":
        nginx = needs_command("nginx")
        (tmp_path / "own").write_text(NGINX.format(directory=tmp_path, address=address, port=port))
        serve = [nginx, "-c", str(tmp_path / "own")]
    else:
        serve = [sys.executable, "-m", "http.server", "-d", str(tmp_path), "-b", address, str(port)]
    ask = curl(Direction.DOWNLOAD, f"http://{address}:{port}/large")
    with program(inside, scratch, *serve) as process, ExitStack() as stack:
        eventually(lambda: f":{port:04X} ".encode() in listening(own.wire.server.process.pid))
        clients = [stack.enter_context(program(own.wire.client.inside, scratch, *ask))]
        eventually(lambda: transferred(clients[0].pid, Direction.DOWNLOAD) > 1 << 20)
        with tool("--pid", str(process.pid), "--upload-limit", "1M"):
            clients.append(stack.enter_context(program(own.wire.client.inside, scratch, *ask)))
            time.sleep(1.5)
            rates = rates_over([each.pid for each in clients], Direction.DOWNLOAD, 3)
    assert min(rates) > 0
    assert 0.7 <= sum(rates) / RATE.bytes_per_s <= 1.3
