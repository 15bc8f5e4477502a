"""Limits that stay: the command that was typed ends, and a process in the background keeps them."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack, suppress
from typing import Optional, Sequence, Union

from pybpfthrottle import registry
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.cli.say import echo, say
from pybpfthrottle.errors import Error, ThrottleError
from pybpfthrottle.inforce import InForce, in_force
from pybpfthrottle.linux import clock, process, systemd
from pybpfthrottle.linux.cgroup import from_pid, locked, unit_of
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.logger import log_to
from pybpfthrottle.model import Direction
from pybpfthrottle.supervisor import Periodic, Supervisor
from pybpfthrottle.throttle import Throttle, take_over

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S = 1.0
_READY = b"r"


class Background:
    """What goes on without a terminal. Until ``ready`` it still has that of the command."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        # What is started from now on is not to hold on to them.
        sys.stdout, sys.stderr = (
            os.fdopen(os.dup(number), "w", errors="backslashreplace") for number in (1, 2)
        )
        log_to(sys.stderr)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)

    def ready(self) -> None:
        """Have the command that was typed end successfully, and give up the terminal."""
        os.chdir("/")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(1, stream.fileno())
        with suppress(BrokenPipeError):  # it was killed: the limits stay all the same
            os.write(self._pipe, _READY)
        os.close(self._pipe)


def begin() -> Union[Background, int]:
    """Go on in the background; in the process that was started, return its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reads)
        os.setsid()
        return Background(writes)
    os.close(writes)
    with open(reads, "rb") as pipe:
        try:
            is_ready = pipe.read(1) == _READY
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGINT)
            is_ready = False
    if is_ready:
        return 0
    # It has said why.
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def pick_up() -> None:
    """Have another process keep the limits whose process was killed."""
    try:
        ids = [one.id for one in _unsupervised()]
    except (OSError, Error):  # what may not be seen cannot be kept either
        return
    if ids:
        say(f"the process that kept {', '.join(ids)} has ended; another one goes on")
        import subprocess

        subprocess.Popen(
            [*_apart(), sys.executable, "-m", "pybpfthrottle", "supervise", *ids],
            env={**os.environ, "PYTHONPATH": process.PACKAGE_ROOT},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _apart() -> list[str]:
    """Return what starts a command outside of the service of systemd that this process is in.

    When a service stops, all of its processes are ended, and with them the limits that they keep.
    """
    with suppress(Error):
        unit = unit_of(from_pid(os.getpid()).path)
        if systemd.runs() and unit.endswith(".service"):
            package = f"--setenv=PYTHONPATH={process.PACKAGE_ROOT}"
            return ["systemd-run", "--quiet", "--collect", "--no-block", package]
    return []


def supervise(ids: Sequence[str]) -> int:
    """Keep throttles whose process has ended, all if none are named; return the exit status."""
    with SignalQueue(_STOP) as signals, Supervisor() as supervisor, ExitStack() as stack:
        throttles = _take_over_all(ids, stack)
        if not throttles:
            return 0 if throttles is None else 1

        def look() -> None:
            for throttle in list(throttles):
                if clock.has_come(throttle.spec.expires_ns) or throttle.ended():
                    throttle.remove()
                    throttles.remove(throttle)

        looking = Periodic(_LOOK_S, look)
        supervisor.add(lambda: [chore for one in throttles for chore in one.chores()])
        supervisor.add(lambda: [signals, looking], strict=True)
        while throttles and not signals.take():
            supervisor.step(looking.due_s)
    return 0


def _unsupervised() -> list[InForce]:
    """Return the kept throttles whose process has ended, except those of rules. Raises OSError."""
    return [
        one
        for one in in_force(registry.records())
        # What a rule is for now, only the process that keeps the rules finds out.
        if not one.record.supervised and not one.record.spec.target.rule
    ]


def _take_over_all(ids: Sequence[str], stack: ExitStack) -> Optional[list[Throttle]]:
    """Return what was taken over; None if there is nothing to do."""
    taken: list[Throttle] = []
    with locked():
        found = _unsupervised()
        if ids:
            known = {one.id: one for one in found}
            missing = [one for one in ids if one not in known]
            if missing:
                raise ThrottleError(
                    f"there is no throttle {missing[0]} that the kernel alone keeps; pybpfthrottle"
                    " list shows all throttles"
                )
            found = [known[one] for one in ids]
        if not found:
            echo("Each throttle has a process that keeps it.")
            return None
        for one in found:
            try:
                throttle = take_over(one.parts, {"ebpf": _options(one.parts)})
            except (Error, OSError) as error:
                say(f"error: {one.id} is not in force any more: {error}")
                continue
            stack.callback(throttle.remove)
            taken.append(throttle)
            echo(f"Keeping {throttle.id}: {throttle.what}.")
    return taken


def _options(records: Sequence[Record]) -> Options:
    """Return the options that a throttle was made with."""
    shapes = {
        Direction[name.upper()]: shape
        for record in records
        for name, shape in record.handles.get("shapes", {}).items()
    }
    return Options(shape=shapes)
