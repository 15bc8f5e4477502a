"""What each process sends and receives, as the kernel counts it, beside what its peers count."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL, Lab, attached, lab
from since import needs_command, since
from targets import eventually, listening, programs_of

from pybpfthrottle import traffic
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.cli import plot
from pybpfthrottle.demo.wire import DEVICE
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import cgroup, netns, process
from pybpfthrottle.traffic import ProcessTraffic, Scope, Watch, _Namespaces

# TCP with time stamps, over IPv4 with an MTU of 1500: 1448 bytes of 1500.
SEGMENT, PACKET = 1448, 1500
RECEIVE_BUFFER = int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[2])
# One that accepts, in a process that inherits the listener, as in a pre-forking server. It answers
# each request, a number of bytes, with as many; what ends in "c" by closing as well.
PREFORK = """
import os, socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
dual = sys.argv[1] == "::"
listener = socket.create_server((sys.argv[1], 7000), family=family, dualstack_ipv6=dual)
worker = os.fork()
if worker:
    print(worker, flush=True)
while not worker:
    accepted, _ = listener.accept()
    while request := accepted.recv(100):
        accepted.sendall(bytes(int(request.strip(b"c"))))
        if request.endswith(b"c"):
            accepted.close()
            break
sys.stdin.read()
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
        assert len(ours) == 5
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
    """The process that is curl among those that a process has started; 0 until there is one."""
    families, pending = process.families(), [pid]
    while pending:
        found = pending.pop()
        if process.name_of(found) == "curl":
            return found
        pending += families.get(found, ())
    return 0


def named(watch: Watch, name: str) -> list[ProcessTraffic]:
    """The processes of a name that have moved something."""
    return [one for one in watch.snapshot() if one.name == name and one.pid is not None]


def test_a_download_is_counted_as_its_peer_counts_it(own: Lab, watch: Watch) -> None:
    """With a header of 52 bytes for each 1448; the server is charged the same, the other way."""
    pid, size = download(own)
    client, server = watch.of(pid), watch.of(own.server.pid)
    # What curl has not read when its time is over has been received all the same.
    least = size * PACKET / SEGMENT
    assert least * 0.995 <= client.download_bytes <= least * 1.005 + RECEIVE_BUFFER
    # What is on its way then is thrown away by its kernel, and the server counts it.
    assert server.upload_bytes == pytest.approx(client.download_bytes, rel=0.02)
    assert client.usage(Scope.INTERNET, Scope.LOOPBACK) == (0, 0, 0, 0)
    assert not client.alive
    assert client.name == "curl"
    assert server.alive


def test_short_processes_are_not_lost(own: Lab, watch: Watch) -> None:
    """Each that has ended before the next look is counted, under its own name."""
    downloads = [download(own, 0.1) for _ in range(20)]
    pids = {pid for pid, size in downloads if size}  # a busy machine may not get that far
    assert pids
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
    """A connection from before the watch is its process's from the first packet, not nobody's."""
    command = own.inside("curl", "-sN", "--max-time", "30", own.url)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as curl:
        eventually(lambda: carried(own)[0] > 1_000_000)
        with traffic.watch() as watch:
            before = carried(own)[0]
            eventually(lambda: carried(own)[0] > before + 10_000_000)
            later = carried(own)[0]
            assert watch.of(curl.pid).download_bytes >= later - before
            assert watch.of(own.server.pid).upload_bytes > 1_000_000
        curl.kill()


@pytest.fixture
def workers(own: Lab) -> Iterator[tuple[int, int]]:
    """The ids of a pre-forking server, and of its worker."""
    with prefork(own, own.wire.server.address) as found:
        yield found


@contextmanager
def prefork(own: Lab, address: str) -> Iterator[tuple[int, int]]:
    """A pre-forking server at an address, ``::`` for all; its id, and its worker's."""
    server = own.wire.server.inside(sys.executable, "-c", PREFORK, address)
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as master:
        try:
            assert master.stdout
            yield master.pid, int(master.stdout.readline())
        finally:
            os.killpg(master.pid, signal.SIGKILL)


@contextmanager
def connected(own: Lab) -> Iterator[socket.socket]:
    """A connection from the client's namespace, of this process."""
    address = (own.wire.server.address, 7000)
    namespace = os.open(f"/proc/{own.wire.client.process.pid}/ns/net", os.O_RDONLY)
    try:
        with netns.inside(namespace, lambda: socket.create_connection(address, 10)) as made:
            yield made
    finally:
        os.close(namespace)


def ask(connection: socket.socket, size: int, end: str = "") -> None:
    """Have the worker send so much, and read it."""
    connection.sendall(f"{size}{end}".encode())
    while size:
        received = connection.recv(min(size, 1 << 16))
        assert received
        size -= len(received)


def test_what_a_worker_accepts_is_its_own(own: Lab, watch: Watch, workers: tuple[int, int]) -> None:
    """Once somebody has looked who has it open, with all that it moved before."""
    master, worker = workers
    with connected(own) as connection:
        ask(connection, 100_000)
        watch.due_s = 0.0  # on a machine with many processes it looks less often
        eventually(lambda: watch.of(worker).upload_bytes > 100_000)
        ask(connection, 1_000_000)
        assert watch.of(worker).upload_bytes > 1_100_000
    # The handshake is the listener's.
    assert watch.of(master).usage().upload_packets <= 1
    assert watch.of(os.getpid()).download_bytes > 1_100_000


def test_what_a_worker_has_closed_was_its_own(
    own: Lab, watch: Watch, workers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although nobody looked while it was open."""
    master, worker = workers
    monkeypatch.setattr(watch, "due_s", math.inf)
    for _ in range(10):
        with connected(own) as connection:
            ask(connection, 10_000, "c")
            assert not connection.recv(1)
    assert watch.of(worker).upload_bytes > 100_000
    assert watch.of(master).usage().upload_packets <= 10
    assert watch.of(worker).name.startswith("python")


IPPROTO_MPTCP = 262


@since("5.19")  # tells which MPTCP socket a packet's belongs to
@pytest.mark.parametrize("protocol", [socket.IPPROTO_TCP, IPPROTO_MPTCP])
def test_mptcp_is_counted(watch: Watch, protocol: int) -> None:
    """For who has the socket, and for a worker that accepts; also where the peer has only TCP."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        worker = os.fork()
        if not worker:
            try:
                accepted, _ = listener.accept()
                while accepted.recv(1 << 16):
                    pass
            finally:  # whatever happens: this is a copy of the process that runs the tests
                os._exit(0)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as client:
            client.connect(listener.getsockname())
            client.sendall(bytes(1_000_000))
        os.waitpid(worker, 0)
    mine, its = (watch.of(pid).usage(Scope.LOOPBACK) for pid in (os.getpid(), worker))
    assert mine.upload_bytes == pytest.approx(1_000_000, rel=0.02)
    assert its.download_bytes == pytest.approx(1_000_000, rel=0.02)
    assert mine.download_bytes < 20_000


@since("5.14")  # tells which network namespace a socket of a process was in that has ended
def test_remote_addresses_are_counted_on_request(own: Lab) -> None:
    """And the interface, by its name in the process's own network namespace."""
    with traffic.watch(remotes=True, interfaces=[DEVICE]) as watch:
        pid, size = download(own, 0.3)
        client, server = watch.of(pid), watch.of(own.server.pid)
    far, near = own.wire.server.address, own.wire.client.address
    assert [*client.by_interface] == [*server.by_interface] == [DEVICE]
    assert client.by_interface[DEVICE] == client.by_scope
    assert client.by_remote == {far: client.by_scope}
    assert client.by_remote[far][Scope.LOCAL].download_bytes > size
    # The handshake is charged to the process, but came before the connection.
    (usage,) = server.by_remote[near].values()
    assert usage.upload_bytes == pytest.approx(client.download_bytes, rel=0.02)


def test_another_interface_has_carried_nothing(own: Lab) -> None:
    """Loopback is one of all namespaces."""
    with traffic.watch(interfaces=["lo"]) as watch:
        pid, size = download(own, 0.1)
        assert size
        assert watch.of(pid).usage() == (0, 0, 0, 0)


ETHERNET_HEADER = 14
# Twice so many connections, one after the other, over both versions of IP.
MANY = """
import socket, sys
for address in sys.argv[2:]:
    for _ in range(int(sys.argv[1])):
        with socket.create_connection((address, 7000), 10) as one:
            one.sendall(b"10000c")
            while one.recv(65536):
                pass
"""


def carried(own: Lab) -> tuple[int, int]:
    """The bytes that the client's device has received and sent, without link headers."""
    text = Path(f"/proc/{own.wire.client.process.pid}/net/dev").read_text()
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{DEVICE}:"))
    numbers = [int(word) for word in line.partition(":")[2].split()]
    return (
        numbers[0] - ETHERNET_HEADER * numbers[1],
        numbers[8] - ETHERNET_HEADER * numbers[9],
    )


def test_the_sum_is_what_the_interface_has_carried(own: Lab, watch: Watch) -> None:
    """TCP and UDP over both versions, bulk and short connections, by processes that have ended."""
    needs_command("iperf3")
    for end in (own.wire.client, own.wire.server):
        # A device counts what the kernel has combined as one packet, with one header.
        segments = f"ip link set dev {DEVICE} gso_max_segs 1".split()
        subprocess.run(end.inside(*segments), check=True)
    addresses = (own.wire.server.address, own.wire.server.address6)
    with prefork(own, "::") as (_, worker), program(own.wire.server.inside("iperf3", "-s")):
        eventually(lambda: b":1451 " in listening(own.wire.server.process.pid))
        before = carried(own)
        commands = [
            [sys.executable, "-c", MANY, "250", *addresses],
            *(["iperf3", "-t", "1", *how.split(), "-c", addresses[0]] for how in ("", "-R")),
            *(["iperf3", "-t", "1", *how.split(), "-c", addresses[1]] for how in ("-u -b 50M",)),
            ["iperf3", "-t", "1", "-u", "-b", "50M", "-R", "-c", addresses[0]],
            ["curl", "-sN", "-o", "/dev/null", "--max-time", "1", own.url],
        ]
        pids = [run(own.inside(*command)) for command in commands]
        after = carried(own)
        used = [watch.of(pid).usage(Scope.LOCAL) for pid in pids]
        served = watch.of(worker).usage(Scope.LOCAL)
    download, upload = (later - earlier for later, earlier in zip(after, before))
    assert sum(usage.download_bytes for usage in used) == pytest.approx(download, rel=0.002)
    assert sum(usage.upload_bytes for usage in used) == pytest.approx(upload, rel=0.002)
    # 10,000 bytes each, with headers of 52 and 72 bytes; what follows a close is the kernel's.
    short = used[0]
    headers = 250 * 7 * (52 + 72)
    assert short.download_bytes == pytest.approx(500 * 10_000 + headers, rel=0.03)
    assert served.upload_bytes == pytest.approx(short.download_bytes, rel=0.03)


def run(command: list[str]) -> int:
    """Run a command to its end; the id that it had."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        pass
    return running.pid


@contextmanager
def program(command: list[str]) -> Iterator[None]:
    """Runs beside."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        try:
            yield
        finally:
            running.kill()


def test_who_is_not_there_is_an_error(watch: Watch) -> None:
    """Not a process without traffic."""
    with pytest.raises(ProcessError, match="there is no process"):
        watch.of(4_000_000)


@pytest.mark.timed
def test_top_tells_scripts(own: Lab) -> None:
    """One interval as JSON: the busy process, its rate and its limit."""
    command = own.inside("curl", "-sN", "--max-time", "30", own.url)
    limited = [*TOOL, "run", "-q", "--download-limit", "1M", "--", *command]
    with subprocess.Popen(limited, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as running:
        curl = eventually(lambda: curl_below(running.pid))
        time.sleep(1)  # its limit begins
        top = [*TOOL, "top", "--once", "--json", "--pid", str(curl)]
        shown = subprocess.run(top, stdout=subprocess.PIPE, env=ENVIRONMENT, check=True)
        running.terminate()
    (row,) = json.loads(shown.stdout)["processes"]
    assert row["name"] == "curl"
    assert row["limits"] == {"download": 1 << 20}
    assert row["download_bytes_per_s"] == pytest.approx((1 << 20) * PACKET / SEGMENT, rel=0.25)


def test_monitor_prints_a_line_a_second(own: Lab, tmp_path: Path) -> None:
    """As JSON lines, and records a table that plot reads; Ctrl-C ends it without a word."""
    monitor = [*TOOL, "monitor", "--name", "curl", "--by", "name", "--interval", "0.5", "--json"]
    curl = own.inside("curl", "-sN", "-o", "/dev/null", "--max-time", "30", own.url)
    path = tmp_path / "x.csv"
    monitor += ["--record", str(path)]
    with (
        subprocess.Popen(monitor, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) as monitoring,
        program(curl),
    ):
        assert monitoring.stdout
        lines = islice(monitoring.stdout, 3)
        rates = [json.loads(line)["download_bytes_per_s"] for line in lines]
        assert [rate > 1_000_000 for rate in rates][1:] == [True, True]
        monitoring.send_signal(signal.SIGINT)
        monitoring.communicate(timeout=10)
    with path.open() as file:
        recorded = {series.direction: series.rates for series in plot.read(file)}
    assert recorded["download"][:3] == rates
    assert monitoring.returncode in (130, -signal.SIGINT)


def test_the_screen_is_given_back() -> None:
    """The full screen shows a table, and Ctrl-C leaves the terminal as it was."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(ENVIRONMENT, TERM="xterm", COLUMNS="80", LINES="24")
        os.execvp(TOOL[0], [*TOOL, "top", "--plain", "--interval", "0.3"])
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


@pytest.mark.since("5.14")
def test_a_namespace_with_the_number_of_another_is_read_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel gives the number of one that has ended to the next one."""
    namespaces = _Namespaces()
    known = namespaces.of()
    assert known
    cookie, known.cookie, known.names = known.cookie, 1, {1: "gone"}
    monkeypatch.setattr(traffic, "_RENAMED_S", 0.0)
    assert namespaces.by_cookie(cookie) is known
    assert known.names[1] == "lo"
