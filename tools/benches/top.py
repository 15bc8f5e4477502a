"""CPU of top in percent of one core, while many processes use many sockets.

Each of the processes sends a datagram a second, on the loopback device of a network namespace, so
that all of them have a row that changes.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from benches import table

ROOT = Path(__file__).resolve().parents[2]
_READY = b"ready\n"
# Starting takes a moment, and is not to be measured.
_START_S = 5.0
_SECONDS = 20.0
_LOAD = """
import os, signal, socket, sys, time
count, each = map(int, sys.argv[1:])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for number in range(count):
    if os.fork() == 0:
        own = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(each)]
        for one in own:
            one.bind(("127.0.0.1", 0))
        time.sleep(number / count)
        while os.getppid() != 1:
            own[0].sendto(bytes(500), own[-1].getsockname())
            own[-1].recv(1000)
            time.sleep(1)
        os._exit(0)
print("ready", flush=True)
sys.stdin.read()
os.killpg(0, signal.SIGKILL)
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    table.configure(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--processes", type=int, default=500, metavar="N")
    parser.add_argument("--sockets", type=int, default=2, metavar="N", help="of each process")


def main(arguments: argparse.Namespace) -> int:
    """Measure and show; the exit status."""
    ways = {"top": [], "top --plain": ["--plain"]}
    with _load(arguments.processes, arguments.sockets):
        found: dict[str, Any] = {
            name: {
                "% of a core": statistics.median(_percent(more) for _ in range(arguments.rounds))
            }
            for name, more in ways.items()
        }
    return table.show(found, as_json=arguments.json)


@contextmanager
def _load(processes: int, sockets: int) -> Iterator[None]:
    inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$0" "$@"', sys.executable]
    with subprocess.Popen(
        [*inside, "-c", _LOAD, str(processes), str(sockets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as load:
        assert load.stdout
        assert load.stdout.readline() == _READY
        yield


def _percent(options: list[str]) -> float:
    """Return what top needs in a terminal of 80x24, in percent of one core."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", LANG="C.UTF-8", PYTHONPATH=str(ROOT))
        os.environ.update(COLUMNS="80", LINES="24")
        command = [sys.executable, "-m", "pybpfthrottle", "top", "--scope", "all", *options]
        os.execv(command[0], command)
    try:
        _read(terminal, _START_S)
        before = _cpu_s(pid)
        _read(terminal, _SECONDS)
        return 100 * (_cpu_s(pid) - before) / _SECONDS
    finally:
        os.write(terminal, b"\x03")
        _read(terminal, 1.0)
        os.waitpid(pid, 0)
        os.close(terminal)


def _read(terminal: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left_s)[0]:
            try:
                os.read(terminal, 1 << 16)
            except OSError:  # its other end is closed
                return


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process. Source: man 5 proc_pid_stat."""
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
