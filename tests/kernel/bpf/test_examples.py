"""The examples of docs/examples do what they say, each in less than 80 lines of Python."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable

import pytest
from compiled import EXAMPLES, compiled
from since import needs_machine, needs_option, since

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@contextmanager
def again_and_again(act: Callable[[], object]) -> Iterator[None]:
    """Do something until what is inside ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(0.02):
            act()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def until(words: str, show: Callable[[], str]) -> str:
    """Return the first output that has these words."""
    deadline = time.monotonic() + 30
    while words not in (shown := show()):
        assert time.monotonic() < deadline, shown
    return shown


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as its command does, and returns what it shows."""

    def main(name: str, *arguments: object) -> str:
        path = tmp_path / f"{name}.o"
        path.write_bytes(compiled(name))
        example = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)
        example["main"]([*map(str, arguments), "--object", str(path)])
        return capsys.readouterr().out

    return main


def test_there_are_examples():
    """Each example has a C part of its name, and few lines."""
    assert len(NAMES) >= 8
    for name in NAMES:
        assert (EXAMPLES / f"{name}.bpf.c").exists()
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


@since("5.10")
def test_opensnoop(run: Callable[..., str]):
    """It shows the file that this process opens, and the one that is not there."""
    with again_and_again(open_missing):
        options = ("--pid", os.getpid(), "--count", 3)
        shown = until("ENOENT /no/such", lambda: run("opensnoop", *options))
    assert f"{os.getpid():7} " in shown


def open_missing() -> None:
    """Try to open a file that does not exist."""
    with pytest.raises(FileNotFoundError):
        os.open("/no/such", os.O_RDONLY)


@since("5.10")
def test_execsnoop(run: Callable[..., str]):
    """It shows a program that is started, with its arguments."""
    command = ["true", uuid.uuid4().hex[:8]]
    with again_and_again(lambda: subprocess.run(command, capture_output=True)):
        until(" ".join(command), lambda: run("execsnoop", "--count", 5))


@since("5.10")
def test_tcplife(run: Callable[..., str]):
    """It shows a connection that ends: its process, its bytes and its addresses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def connect() -> None:
            with socket.create_connection(("127.0.0.1", port)) as client:
                accepted, _ = server.accept()
                with accepted:
                    accepted.sendall(bytes(1000))
                    client.sendall(bytes(500))
                    client.recv(1000, socket.MSG_WAITALL)

        with again_and_again(connect):
            shown = run("tcplife", "--port", port, "--count", 4)
    lines = [line for line in shown.splitlines() if f"{os.getpid():7} " in line]
    # From either side; a byte more for the ends of both streams.
    assert any(f"127.0.0.1:{port}" in line and " 1000 " in line for line in lines), shown


@since("5.10")
def test_biolatency(run: Callable[..., str], tmp_path: Path):
    """It counts requests to a disk."""
    path = tmp_path / "written"

    def write() -> None:
        with path.open("wb") as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())

    needs_machine("a disk", found=any(Path("/sys/block").glob("*/device")))
    with again_and_again(write):
        for seconds in (0.3, 3, 10):
            shown = run("biolatency", "--seconds", seconds)
            if "->" in shown:
                break
    assert "MICROSECONDS" in shown
    assert "#" in shown


def test_profile(run: Callable[..., str]):
    """It names the functions that a busy process is in."""
    program = "print(1, flush=True)\nwhile True: sum(range(1000000))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            # In the loop it is in sum, or in the arithmetic of its numbers.
            options = ("--pid", process.pid, "--frequency", 499, "--seconds", 0.5)
            shown = until("sum", lambda: run("profile", *options))
        finally:
            process.kill()
    assert all(line.startswith("python") for line in shown.splitlines())


@since("5.9")
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_xdpcount(run: Callable[..., str], mode: str):
    """It counts what reaches an interface."""
    name = f"t{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", f"{name}p"], check=True)
    try:
        for end in (name, f"{name}p"):
            subprocess.run(["ip", "link", "set", end, "up"], check=True)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((f"{name}p", 0))
            packet = bytes(12) + b"\x08\x00" + b"\x45" + bytes(8) + b"\x11" + bytes(40)
            with again_and_again(lambda: sender.send(packet)):
                for seconds in (0.3, 3, 10):
                    shown = run("xdpcount", name, "--mode", mode, "--seconds", seconds)
                    if "udp" in shown:
                        break
        assert "udp" in shown
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


@since("6.4")
def test_congestion(run: Callable[..., str]):
    """Connections may choose it while it runs, and it counts them."""
    sent = 200_000

    def transfer() -> None:
        with suppress(FileNotFoundError), socket.create_server(("127.0.0.1", 0)) as server:
            with socket.socket() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"pybpf_example")
                client.connect(server.getsockname())
                accepted, _ = server.accept()
                with accepted:
                    threading.Thread(target=client.sendall, args=[bytes(sent)]).start()
                    accepted.recv(sent, socket.MSG_WAITALL)

    with again_and_again(transfer):
        for seconds in (0.3, 3, 10):
            shown = run("congestion", "--percent", 85, "--seconds", seconds)
            numbers = dict(line.rsplit(maxsplit=1) for line in shown.splitlines()[1:])
            if int(numbers["acknowledged"]):
                break
    assert int(numbers["connections"]) > 0
    assert int(numbers["acknowledged"]) > 0


@since("6.12")
def test_scheduler(run: Callable[..., str]):
    """All tasks go through its queue while it runs."""
    works = os.path.isdir("/sys/kernel/sched_ext")
    needs_option("CONFIG_SCHED_CLASS_EXT", works=works)
    with again_and_again(lambda: subprocess.run(["true"], check=True)):
        shown = run("scheduler", "--slice-ms", 2, "--seconds", 1)
    assert int(shown.split()[2]) > 0
