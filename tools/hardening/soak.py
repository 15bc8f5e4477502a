"""Limits made, changed and ended at random, under load; afterwards all is as before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Callable, NamedTuple, NoReturn

from hardening.sealed import Sealed, forked
from pybpfthrottle.cli import app
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup

_MOST_CGROUPS, _MOST_PROCESSES, _MOST_THROTTLES = 4, 6, 5
_RATES = ("200K", "1M", "8mbit", "20M")
_PATIENCE_S = 20.0
# Python's memory grows a little until all of its code has run.
_MOST_GROWTH_KB = 8192
_LINK = "soak0"
_AT_ONCE_BYTES = 20_000


class Use(NamedTuple):
    """What a process holds."""

    descriptors: int
    memory_kb: int

    @classmethod
    def of(cls, pid: int) -> Use:
        """Raises OSError for a process that has ended."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return cls(len(os.listdir(f"/proc/{pid}/fd")), int(status["VmRSS"].split()[0]))


class Soak:
    """What there is at a moment, and what may happen to it. ``close`` ends all of it."""

    def __init__(self, sealed: Sealed, seed: int) -> None:
        self._sealed = sealed
        self._random = Random(seed)  # noqa: S311 - no secret
        self._stack = ExitStack()
        self._home = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._home.chmod(0o755)  # the real user id is not that of root
        self._rules = self._home / "rules.toml"
        self._output = (self._home / "output").open("w+b")
        self._stack.callback(self._output.close)
        self._cgroups: list[Cgroup] = []
        self._processes: list[int] = []
        # Those that keep a limit until they are told to end.
        self._owners: dict[str, int] = {}
        self._kept: set[str] = set()
        self._number = 0
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.daemon = 0
        self.network = self._network()
        self.actions: list[Callable[[], None]] = [
            self.make_cgroup, self.end_cgroup, self.begin_process, self.end_process,
            self.limit_cgroup, self.limit_process, self.run, self.detach,
            self.change, self.change, self.pause, self.switch,
            self.remove, self.stop, self.kill, self.reload, self.flap, self.clean, self.look,
        ]  # fmt: skip

    def begin(self) -> None:
        """Start the daemon, with something to limit."""
        self.make_cgroup()
        for _ in range(3):
            self.begin_process()
        self._write_rules()
        self.daemon = self._in_background("daemon", str(self._rules))
        # Its file says that the rules are in force.
        self._wait(lambda: os.path.exists("/run/pybpfthrottle/rules.state"))

    def step(self) -> None:
        """Do one thing."""
        action = self._random.choice(self.actions)
        action()
        self.done[action.__name__] += 1
        self._collect()

    # What there is to limit.

    def make_cgroup(self) -> None:
        """Make a cgroup."""
        if len(self._cgroups) < _MOST_CGROUPS:
            self._number += 1
            self._cgroups.append(self._sealed.cgroup.create_child(f"soak-{self._number}"))

    def end_cgroup(self) -> None:
        """End the processes of a cgroup, and remove it, whatever limits it."""
        if len(self._cgroups) > 1:
            one = self._cgroups.pop(self._random.randrange(len(self._cgroups)))
            self._remove(one)

    def _remove(self, cgroup: Cgroup) -> None:
        """Remove a cgroup with those below it, and end what is there, or is just coming."""
        deadline = time.monotonic() + _PATIENCE_S
        while cgroup.exists():
            for pid in cgroup.pids_below():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._sealed.reap()
            for directory, _, _ in os.walk(cgroup.path, topdown=False):
                with suppress(OSError):
                    os.rmdir(directory)
            if time.monotonic() > deadline:
                self.failures.append(f"{cgroup} cannot be removed: {cgroup.pids_below()}")
                return

    def begin_process(self) -> None:
        """Start a process that transfers."""
        if len(self._processes) < _MOST_PROCESSES:
            where = self._random.choice(self._cgroups)
            pid = os.fork()
            if pid == 0:
                _transfer(where)
            self._processes.append(pid)

    def end_process(self) -> None:
        """End one."""
        if len(self._processes) > 1:
            pid = self._processes.pop(self._random.randrange(len(self._processes)))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # Limits.

    def limit_cgroup(self) -> None:
        """Limit a cgroup until told to end."""
        self._limit("--cgroup", self._random.choice(self._cgroups).path)

    def limit_process(self) -> None:
        """Limit a process until told to end."""
        how = self._random.choice(((), ("--move-cgroup",)))
        if self._processes:
            self._limit("--pid", str(self._random.choice(self._processes)), *how)

    def _limit(self, *what: str) -> None:
        if len(self._owners) < _MOST_THROTTLES:
            label = self._label()
            method = self._random.choice(("auto", "link", "legacy"))
            options = (*self._limits(), "--bpf-attach-method", method, "--label", label, "--stack")
            self._owners[label] = self._in_background(*what, *options)

    def run(self) -> None:
        """Run a command that is limited."""
        self._do("run", "-q", *self._limits(), "--", "sleep", "0.1")

    def detach(self) -> None:
        """Make a limit that stays."""
        if len(self._kept) < _MOST_THROTTLES:
            label = self._label()
            where = self._random.choice(self._cgroups).path
            self._kept.add(label)
            self._do("--cgroup", where, *self._limits(), "--stack", "--label", label, "--detach")

    def change(self) -> None:
        """Give one another rate."""
        self._do("set", self._one(), "-d", self._random.choice((*_RATES, "none")))

    def pause(self) -> None:
        """Lift one for a moment."""
        one = self._one()
        self._do("pause", one)
        self._do("resume", one)

    def switch(self) -> None:
        """Attach one by another method."""
        method = self._random.choice(("link", "legacy"))
        self._do("set", self._one(), "--bpf-attach-method", method)

    def remove(self) -> None:
        """Remove one."""
        one = self._one()
        self._do("remove", one)
        self._kept.discard(one)

    def stop(self) -> None:
        """Interrupt the owner of one."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill the owner of one."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._owners:
            label = self._random.choice(sorted(self._owners))
            with suppress(ProcessLookupError):
                os.kill(self._owners[label], number)

    def reload(self) -> None:
        """Change the rules."""
        self._write_rules()
        self._do("apply", str(self._rules))

    def flap(self) -> None:
        """Have links come and go."""
        for command in (
            f"link add {_LINK} type veth", f"link set {_LINK} up", "link set lo down",
            "link set lo up", f"link del {_LINK}",
        ):  # fmt: skip
            subprocess.run(["ip", *command.split()], check=True)

    def clean(self) -> None:
        """Remove leftovers."""
        self._do("cleanup")

    def look(self) -> None:
        """List all throttles."""
        self._do("list", "--json")

    # The end.

    def use(self) -> Use:
        """Return what the daemon holds, with its first rules and nothing to limit."""
        self._rules.write_text("")
        self._do("apply", str(self._rules))
        return Use.of(self.daemon)

    def end(self) -> list[str]:
        """End everything; return what is left, and what was wrong."""
        for label in sorted(self._kept):
            self._do("remove", label)
        for pid in (*self._owners.values(), self.daemon):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for pid in self._processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in (*self._owners.values(), self.daemon, *self._processes):
            deadline = time.monotonic() + _PATIENCE_S
            while not process.has_ended(pid) and time.monotonic() < deadline:
                self._sealed.reap()
                time.sleep(0.02)
        self._do("cleanup")
        for one in self._cgroups:
            self._remove(one)
        self.failures += self._sealed.settled(_PATIENCE_S)
        network = self._network()
        if network != self.network:
            self.failures.append(f"the network was {self.network!r} and is {network!r}")
        return self.failures

    def close(self) -> None:
        """End what is left, and remove files."""
        self._sealed.clear()
        self._stack.close()

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one(self) -> str:
        return self._random.choice(sorted({*self._owners, *self._kept}) or ["nobody"])

    def _label(self) -> str:
        self._number += 1
        return f"{os.path.basename(self._sealed.cgroup.path)}-{self._number}"

    def _limits(self) -> tuple[str, ...]:
        down, up = (self._random.choice(_RATES) for _ in range(2))
        return ("-d", down, "-u", up, "--loopback")

    def _write_rules(self) -> None:
        """Write rules for some of the cgroups; some of them are gone by then, or are not yet."""
        text = ""
        for number in range(self._random.randrange(1, 4)):
            where = f"{self._sealed.cgroup.path}/soak-{self._random.randrange(1, 9)}"
            text += f'[[rule]]\nname = "rule{number}"\nmatch = {{ cgroup = "{where}*" }}\n'
            text += f'loopback = true\nupload = "{self._random.choice(_RATES)}"\n'
        draft = self._rules.with_suffix(".draft")
        draft.write_text(text)
        draft.rename(self._rules)

    def _do(self, *arguments: str) -> None:
        """Run a command. That what it names is gone by then is no failure."""
        self._output.seek(0)
        self._output.truncate()
        _, status = forked(lambda: _command(arguments), output=self._output.fileno())
        self._output.seek(0)
        said = self._output.read().decode("utf-8", "replace")
        if status not in (0, 1) or "Traceback" in said:
            self.failures.append(f"{' '.join(arguments)}: status {status}: {said[-2000:]}")

    def _in_background(self, *arguments: str) -> int:
        path = self._home / f"output-{self._number}"
        pid = os.fork()
        if pid == 0:
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for number in (1, 2):
                os.dup2(out, number)
            _leave(arguments)
        self._sealed.knows(pid)
        return pid

    def _collect(self) -> None:
        """Forget what has ended, and look at what background processes have said."""
        self._sealed.reap()
        for label, pid in list(self._owners.items()):
            if process.has_ended(pid):
                del self._owners[label]
        self._processes = [pid for pid in self._processes if not process.has_ended(pid)]
        if process.has_ended(self.daemon):
            self.failures.append("the daemon has ended")
        for path in self._home.glob("output-*"):
            said = path.read_text(errors="replace")
            if "Traceback" in said:
                self.failures.append(said[-2000:])
                path.unlink()

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError("the daemon does not begin")
            time.sleep(0.02)

    @staticmethod
    def _network() -> str:
        """Return what is configured in the network namespace."""
        commands = (("tc", "qdisc", "show"), ("nft", "list", "ruleset"), ("ip", "-br", "link"))
        return "".join(
            subprocess.run(command, capture_output=True, text=True).stdout for command in commands
        )


def _command(arguments: tuple[str, ...]) -> NoReturn:
    app.main(list(arguments))


def _leave(arguments: tuple[str, ...]) -> NoReturn:
    """Become a command."""
    status = 70
    try:
        app.main(list(arguments))
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _transfer(where: Cgroup) -> NoReturn:
    """Open connections and transfer by them, for ever."""
    try:
        where.move_in(0)
        while True:
            with suppress(OSError):
                _exchange()
            time.sleep(0.05)
    finally:
        os._exit(1)


def _exchange() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(server.getsockname(), timeout=1))
        other = stack.enter_context(server.accept()[0])
        other.settimeout(1)
        for _ in range(20):
            client.sendall(bytes(_AT_ONCE_BYTES))
            left = _AT_ONCE_BYTES
            while left > 0:
                left -= len(other.recv(left)) or left
            time.sleep(0.02)


class Report(NamedTuple):
    """What was done, what the daemon held before and after, and what was wrong."""

    done: Counter[str]
    before: Use
    after: Use
    failures: list[str]


def soak(seconds: float, seed: int) -> Report:
    """Do things at random for so long. For a process that does nothing else; needs root."""
    deadline = time.monotonic() + seconds
    with Sealed() as sealed, Soak(sealed, seed) as made:
        made.begin()
        # Once all of its code has run, so that what it holds later can be compared with it.
        while time.monotonic() < deadline - seconds * 0.75:
            made.step()
        before = made.use()
        while time.monotonic() < deadline:
            made.step()
        after = made.use()
        failures = made.end()
    if after.descriptors > before.descriptors:
        failures.append(f"the daemon has {after.descriptors} descriptors, before {before}")
    if after.memory_kb > before.memory_kb + _MOST_GROWTH_KB:
        failures.append(f"the daemon has {after.memory_kb} KB, before {before}")
    return Report(made.done, before, after, failures)
