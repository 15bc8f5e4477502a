"""Each system call of a limit's life refused, or followed by a kill; then look at what is left."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Callable, Iterator, NamedTuple, Optional

from hardening.doors import KILL, Doors
from hardening.sealed import Sealed, cgroup_of, forked
from pybpfthrottle import registry, throttle
from pybpfthrottle.cli import app
from pybpfthrottle.errors import Error
from pybpfthrottle.linux import libc
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate, Target, ThrottleSpec, Traffic
from pybpfthrottle.plan import Wish

# What a guard, a keeper or the kernel does after the end of a process takes a moment.
_AT_ONCE_S, _PATIENCE_S = 0.3, 10.0
_PR_SET_PDEATHSIG = 1
_BOTH = dict.fromkeys(Direction, Rate.parse("1M"))
_LIMITS = ("-d", "1M", "-u", "1M", "--loopback")


class Place(NamedTuple):
    """What there is to limit: a cgroup, a process with connections, and a file of rules.

    ``label`` names what is kept.
    """

    cgroup: Cgroup
    pid: int
    rules: str
    label: str


class Outcome(NamedTuple):
    """One point: the call, what was done to it, and what was wrong afterwards, if anything."""

    scenario: str
    point: int
    call: str
    way: int
    tidied: bool
    failure: str

    def __str__(self) -> str:
        how = "killed after" if self.way == KILL else f"{errno.errorcode[self.way]} for"
        return f"{self.scenario}: {how} call {self.point}, {self.call}: {self.failure or 'nothing'}"


def _in_process(target: Target, *, method: str = "auto", backend: str = "", **wish: str) -> int:
    """Put a throttle in force, use it, and remove it; what fails on purpose is no failure."""
    chosen = dict.fromkeys(Direction, backend) if backend else {}
    before = set(os.listdir("/proc/self/fd"))
    try:
        spec = ThrottleSpec(target, _BOTH, Traffic(loopback=True))
        live = throttle.start(spec, Wish(backends=chosen, **wish))  # type: ignore[arg-type]
        try:
            if method != "auto":
                live.switch(method)
            live.set_limit(Direction.UPLOAD, Rate.parse("2M"))
            live.counters()
        finally:
            live.remove()
    except (Error, OSError) as error:
        print("error:", error)
    after = {fd for fd in os.listdir("/proc/self/fd") if not _is_kept(fd)}
    if len(after) > len(before):
        for fd in after - before:
            with suppress(OSError):
                what = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
                print("left open:", os.readlink(f"/proc/self/fd/{fd}"), *what)
        return 71
    return 0


def _is_kept(fd: str) -> bool:
    """Whether a descriptor is kept for the next limit: of the types of programs that trace."""
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:btf"
    return False


def _commands(*lines: tuple[str, ...]) -> int:
    """Run commands one after the other in this process."""
    for line in lines:
        with suppress(SystemExit):
            app.main(list(line))
    return 0


SCENARIOS: dict[str, Callable[[Place], int]] = {
    "cgroup": lambda at: _in_process(Target(cgroups=(at.cgroup.path,))),
    "legacy": lambda at: _in_process(Target(cgroups=(at.cgroup.path,)), method="legacy"),
    "pid": lambda at: _in_process(Target(pids=(at.pid,))),
    "moved": lambda at: _in_process(Target(pids=(at.pid,)), matching="moved-cgroup"),
    "run": lambda at: _commands(("run", "-q", *_LIMITS, "--", "true")),
    "detach": lambda at: _commands(
        ("--cgroup", at.cgroup.path, *_LIMITS, "--label", at.label, "--detach"),
        ("remove", at.label),
    ),
    "rules": lambda at: _commands(("apply", at.rules), ("apply", "--stop")),
    "nftables": lambda at: _in_process(Target(cgroups=(at.cgroup.path,)), backend="nftables"),
}
# What removes that which was to stay.
_ENDS: dict[str, Callable[[Place], tuple[str, ...]]] = {
    "detach": lambda at: ("remove", at.label),
    "rules": lambda at: ("apply", "--stop"),
}


@contextmanager
def place(sealed: Sealed) -> Iterator[Place]:
    """Make something to limit within the surroundings."""
    where = cgroup_of(sealed, "target")
    pid = os.fork()
    if pid == 0:
        _converse(where)
    sealed.bystanders = frozenset({pid})
    own = cgroup_of(sealed, "own")
    own.move_in(os.getpid())
    while pid not in where.pids():
        time.sleep(0.01)
    with tempfile.TemporaryDirectory() as directory:
        # access(2) asks for the real user id, which is not that of root.
        Path(directory).chmod(0o755)
        rules = Path(directory, "rules.toml")
        rules.write_text(
            '[[rule]]\nname = "ordeal"\nupload = "1M"\ndownload = "1M"\n'
            f'match = {{ cgroup = "{where.path}" }}\n'
        )
        try:
            yield Place(where, pid, str(rules), os.path.basename(sealed.cgroup.path))
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _converse(where: Cgroup) -> None:
    """Transfer some bytes now and then between two sockets of this process, for ever.

    They are of two cgroups: one that was made elsewhere is limited by a mark.
    """
    try:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        stray = socket.create_server(("127.0.0.1", 0))
        elsewhere = socket.create_connection(stray.getsockname())
        where.move_in(0)
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        while True:
            elsewhere.send(b"x")
            client.sendall(b"x" * 1000)
            other.recv(1000)
            time.sleep(0.05)
    finally:
        os._exit(1)


def _play(sealed: Sealed, at: Place, scenario: str, doors: Doors) -> tuple[int, str]:
    """Run a scenario in a process of its own; return its status and what it says."""

    def act() -> int:
        doors.install()
        return SCENARIOS[scenario](at)

    with tempfile.TemporaryFile() as output:
        pid, status = forked(act, output=output.fileno())
        sealed.knows(pid)
        output.seek(0)
        return status, output.read().decode("utf-8", "replace")


def attempt(sealed: Sealed, at: Place, scenario: str, point: int, way: int) -> Outcome:
    """Run a scenario, meddle with one call, and look at what is left."""
    doors = Doors(point, way)
    status, said = _play(sealed, at, scenario, doors)
    failure = ""
    if status not in (0, 128 + 9) or "Traceback" in said:
        failure = f"status {status}: {said[-1500:]}"
    tidied = False
    if sealed.settled(_AT_ONCE_S):
        tidied = True
        _next_start(sealed, at, scenario)
        left = sealed.settled(_PATIENCE_S)
        if left:
            failure += f" left: {', '.join(left)}"
            sealed.clear()
    return Outcome(scenario, point, doors.name, way, tidied, failure)


def _next_start(sealed: Sealed, at: Place, scenario: str) -> None:
    """Do what the next start does; and remove what was to stay."""

    def act() -> int:
        registry.tidy_up()
        ends = _ENDS.get(scenario)
        return 0 if ends is None else _commands(ends(at))

    null = os.open(os.devnull, os.O_WRONLY)
    try:
        pid, _ = forked(act, output=null)
        sealed.knows(pid)
    finally:
        os.close(null)


def count(sealed: Sealed, at: Place, scenario: str) -> int:
    """Return how many calls a scenario makes if nobody meddles. Raises RuntimeError if it fails."""
    doors = Doors()
    status, said = _play(sealed, at, scenario, doors)
    left = sealed.settled(_PATIENCE_S)
    if status or left or "error" in said:
        raise RuntimeError(f"{scenario}: status {status}, {said[-2000:]} left: {left}")
    return doors.count


def sweep(
    sealed: Sealed, names: list[str], ways: list[int], sample: Optional[int], seed: int
) -> Iterator[tuple[str, int, Iterator[Outcome]]]:
    """For each scenario: its name, the number of its calls, and what each point comes to."""
    with place(sealed) as at:
        for name in names:
            calls = count(sealed, at, name)
            points = [(point, way) for point in range(1, calls + 1) for way in ways]
            if sample is not None:
                points = Random(seed).sample(points, min(sample, len(points)))  # noqa: S311
            yield name, calls, (attempt(sealed, at, name, *point) for point in points)
