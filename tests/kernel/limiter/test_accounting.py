"""What each process sends and receives, as the kernel counts it, beside what its peers count."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL, Lab, attached, lab
from targets import programs_of

from pybpfthrottle import traffic
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import cgroup, process
from pybpfthrottle.traffic import ProcessTraffic, Scope, Watch

# TCP with time stamps, over IPv4 with an MTU of 1500: 1448 bytes of 1500.
SEGMENT, PACKET = 1448, 1500
# Two that accept, in processes that inherit the listener, as in a pre-forking server.
PREFORK = """
import os, socket, sys, time
listener = socket.create_server((sys.argv[1], 7000))
worker = os.fork()
if worker:
    print(worker, flush=True)
else:
    while True:
        accepted, _ = listener.accept()
        accepted.sendall(b"x")
        time.sleep(3)
        accepted.sendall(bytes(1_000_000))
        accepted.close()
time.sleep(60)
"""


@pytest.fixture(scope="module")
def own() -> Iterator[Lab]:
    """Two namespaces with a server, whose connections are paced."""
    with lab() as made:
        yield made


@pytest.fixture
def watch() -> Iterator[Watch]:
    """A watch; nothing stays attached after it."""
    with traffic.watch() as made:
        ours = programs_of(os.getpid()) & set(attached(cgroup.root(), HOOKS))
        assert len(ours) == 3
        yield made
    assert not ours & set(attached(cgroup.root(), HOOKS))


def download(own: Lab, seconds: float = 1.0) -> tuple[int, int]:
    """Curl's process id, and what it says that it has got."""
    command = ["curl", "-sN", "--max-time", str(seconds), "-o", "/dev/null"]
    with subprocess.Popen(
        own.inside(*command, "-w", "%{size_download}", own.url), stdout=subprocess.PIPE, text=True
    ) as curl:
        out, _ = curl.communicate()
        return curl.pid, int(out)


def curl_below(pid: int) -> int:
    """The process that is curl among those that a process has started."""
    families, pending = process.families(), [pid]
    while process.name_of(pending[-1]) != "curl":
        pending += families.get(pending.pop(), ())
    return pending[-1]


def named(watch: Watch, name: str) -> list[ProcessTraffic]:
    """The processes of a name that have moved something."""
    return [one for one in watch.snapshot() if one.name == name and one.pid is not None]


def test_a_download_is_counted_as_its_peer_counts_it(own: Lab, watch: Watch) -> None:
    """With a header of 52 bytes for each 1448; the server is charged the same, the other way."""
    pid, size = download(own)
    client, server = watch.of(pid), watch.of(own.server.pid)
    assert client.download_bytes == pytest.approx(size * PACKET / SEGMENT, rel=0.005)
    # What was on its way when curl ended is thrown away by its kernel, and the server counts it.
    assert server.upload_bytes == pytest.approx(client.download_bytes, rel=0.02)
    assert client.usage(Scope.INTERNET, Scope.LOOPBACK) == (0, 0, 0, 0)
    assert not client.alive
    assert client.name == "curl"
    assert server.alive


def test_short_processes_are_not_lost(own: Lab, watch: Watch) -> None:
    """Each that has ended before the next look is counted, under its own name."""
    pids = {download(own, 0.1)[0] for _ in range(20)}
    assert {one.pid for one in named(watch, "curl")} >= pids
    assert all(watch.of(pid).download_bytes > 0 for pid in pids)


def test_udp_is_counted_by_the_packet(watch: Watch) -> None:
    """Headers of 28 bytes each; on loopback both ends are this process."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        for _ in range(100):
            one.sendto(bytes(1000), one.getsockname())
            one.recv(2000)
        usage = watch.of(os.getpid()).usage(Scope.LOOPBACK)
    assert usage.upload_packets == usage.download_packets == 100
    assert usage.upload_bytes == usage.download_bytes == 100 * 1028


def test_open_sockets_belong_to_who_has_them(own: Lab) -> None:
    """A connection from before the watch is its process's, not nobody's."""
    command = own.inside("curl", "-sN", "--max-time", "3", own.url)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as curl:
        time.sleep(0.5)
        with traffic.watch() as watch:
            time.sleep(1)
            assert watch.of(curl.pid).download_bytes > 1_000_000
            assert watch.of(own.server.pid).upload_bytes > 1_000_000
        curl.kill()


def test_what_a_worker_accepts_is_its_own(own: Lab, watch: Watch) -> None:
    """Although the listener is another process's: found by looking who has the socket open."""
    address = own.wire.server.address
    server = own.wire.server.inside(sys.executable, "-c", PREFORK, address)
    with subprocess.Popen(server, stdout=subprocess.PIPE, start_new_session=True) as master:
        try:
            assert master.stdout
            worker = int(master.stdout.readline())
            client = own.inside("curl", "-s", "--http0.9", "--max-time", "8", f"{address}:7000")
            with subprocess.Popen(client, stdout=subprocess.DEVNULL) as curl:
                deadline = time.monotonic() + 8
                while curl.poll() is None and time.monotonic() < deadline:
                    watch.refresh()
                    time.sleep(0.2)
            assert watch.of(worker).upload_bytes > 1_000_000
            assert watch.of(master.pid).upload_bytes < 1000
        finally:
            os.killpg(master.pid, signal.SIGKILL)


def test_who_is_not_there_is_an_error(watch: Watch) -> None:
    """Not a process without traffic."""
    with pytest.raises(ProcessError, match="there is no process"):
        watch.of(4_000_000)


def test_top_tells_scripts(own: Lab) -> None:
    """One interval as JSON: the busy process, its rate and its limit."""
    command = own.inside("curl", "-sN", "--max-time", "6", own.url)
    limited = [*TOOL, "run", "-q", "--download-limit", "1M", "--", *command]
    with subprocess.Popen(limited, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as running:
        time.sleep(1.5)
        top = [*TOOL, "top", "--once", "--json", "--pid", str(curl_below(running.pid))]
        shown = subprocess.run(top, stdout=subprocess.PIPE, env=ENVIRONMENT, check=True)
        running.send_signal(signal.SIGINT)
    (row,) = json.loads(shown.stdout)["processes"]
    assert row["name"] == "curl"
    assert row["limits"] == {"download": 1 << 20}
    assert row["download_bytes_per_s"] == pytest.approx((1 << 20) * PACKET / SEGMENT, rel=0.1)


def test_monitor_prints_a_line_a_second(own: Lab) -> None:
    """As JSON lines; Ctrl-C ends it without a word."""
    monitor = [*TOOL, "monitor", "--name", "curl", "--by", "name", "--interval", "0.5", "--json"]
    with subprocess.Popen(
        monitor, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as monitoring:
        time.sleep(1)
        download(own, 2.5)
        monitoring.send_signal(signal.SIGINT)
        out, _ = monitoring.communicate(timeout=10)
    rates = [json.loads(line)["download_bytes_per_s"] for line in out.splitlines()]
    assert len([rate for rate in rates if rate > 3_000_000]) >= 3
    assert monitoring.returncode in (130, -signal.SIGINT)


def test_the_screen_is_given_back() -> None:
    """The full screen shows a table, and Ctrl-C leaves the terminal as it was."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(ENVIRONMENT, TERM="xterm", COLUMNS="80", LINES="24")
        os.execvp(TOOL[0], [*TOOL, "top", "--interval", "0.3"])
    out = b""
    deadline = time.monotonic() + 20
    while out.count(b"Ctrl-C ends it") < 2 and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            out += os.read(terminal, 1 << 16)
    os.write(terminal, b"\x03")
    try:
        while chunk := os.read(terminal, 1 << 16):
            out += chunk
    except OSError:  # its other end is closed
        pass
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"down/s" in out
    assert b"\x1b[?1049h" in out
    assert out.rindex(b"\x1b[?1049l") > out.rindex(b"\x1b[?1049h")
    assert b"\x1b[?25h" in out[out.rindex(b"\x1b[?25l") :]
    assert b"Traceback" not in out
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 130
