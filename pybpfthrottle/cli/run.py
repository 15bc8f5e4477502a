"""pybpfthrottle run: a command in a cgroup of its own, with its bandwidth limited."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from threading import Thread
from typing import Optional, Sequence, TextIO

from pybpfthrottle import throttle
from pybpfthrottle.cli.cleanup import tidy_up
from pybpfthrottle.cli.options import Request
from pybpfthrottle.cli.say import say
from pybpfthrottle.cli.watch import SAMPLE_S, SWITCHES, Watch
from pybpfthrottle.errors import Error, LaunchError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import OwnCgroup
from pybpfthrottle.linux.launch import Command, User
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.throttle import Throttle

_FAILED = 125
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP)
# The terminal sends these to the command itself; it decides what they mean.
_LEFT_ALONE = (signal.SIGINT, signal.SIGQUIT)


def run(
    request: Request,
    *,
    command: Sequence[str],
    user: Optional[str],
    wait: bool,
    json_file: Optional[TextIO],
) -> int:
    """Run the command; its exit status, or 125, 126 or 127 with a line that says why."""
    try:
        return _run(request, command, user, wait, json_file)
    except LaunchError as error:
        say(str(error))
        return error.status
    except Error as error:
        say(f"error: {error}")
        return _FAILED


def _run(
    request: Request,
    argv: Sequence[str],
    user: Optional[str],
    wait: bool,
    json_file: Optional[TextIO],
) -> int:
    with ExitStack() as stack:
        command = Command(argv, user=None if user is None else User.parse(user))
        stack.callback(command.abandon)
        signals = stack.enter_context(
            SignalQueue((*_PASSED_ON, *_LEFT_ALONE, *SWITCHES, signal.SIGCHLD))
        )
        # The kernel takes some 15 ms to move a process: time to read the object in.
        Thread(target=throttle.prepare).start()
        own = cgroups_v2.create_own(command.pid)
        stack.callback(_remove, own)
        # A child that was not let go is in the cgroup still: it must end first.
        stack.callback(command.abandon)
        live = stack.enter_context(request.apply([own.cgroup]))
        watch = Watch(
            live,
            pid=command.pid,
            name=os.path.basename(argv[0]),
            terminal=sys.stderr,
            json_file=json_file,
            quiet=request.quiet,
            prefix="pybpfthrottle: ",
        )
        command.let_go()
        tidy_up()
        watch.start(pid=command.pid, command=list(argv))
        return _Run(command, live, watch).until_the_end(signals, request.duration_s, wait=wait)


def _remove(own: OwnCgroup) -> None:
    if own.remove():
        return
    pids = own.cgroup.pids()
    say(
        f"{len(pids)} of the command's processes go on without a limit:"
        f" {process.listed(pids)}"
        f" (--wait keeps it); {own.cgroup.path} is removed at the next start after they end"
    )


class _Run:
    """A command that runs, and the limit that it has for all or some of the time."""

    def __init__(self, command: Command, live: Throttle, watch: Watch) -> None:
        self._command = command
        self._live = live
        self._watch = watch
        self._limited = True

    def until_the_end(
        self, signals: SignalQueue, duration_s: Optional[float], *, wait: bool
    ) -> int:
        """Wait for the command, and with ``wait`` for all that it started; its exit status."""
        begin = time.monotonic()
        end = begin + duration_s if duration_s else math.inf
        following = begin + SAMPLE_S
        status: Optional[int] = None
        while True:
            came = signals.wait(
                min(following, end if self._limited else math.inf) - time.monotonic()
            )
            stop = status is not None and any(
                number in came for number in (*_PASSED_ON, signal.SIGINT)
            )
            if self._limited:
                self._watch.switch(came)
            if status is None:
                self._pass_on(came)
                status = self._command.poll()
            now = time.monotonic()
            if now >= end:
                self._lift("duration", None)
            if status is not None and (stop or not (wait and self._holds_processes())):
                self._lift("exited", status)
                return status
            if now >= following:
                following += SAMPLE_S
                if self._limited:
                    self._watch.sample()

    def _lift(self, reason: str, status: Optional[int]) -> None:
        """Show the summary and take the limit away, unless that is done already."""
        if self._limited:
            self._watch.end(
                expect_traffic=status is None,
                reason=reason,
                exit_status=status,
            )
            self._live.remove()
            self._limited = False

    def _pass_on(self, came: Sequence[signal.Signals]) -> None:
        for number in came:
            if number in _PASSED_ON:
                os.kill(self._command.pid, number)

    def _holds_processes(self) -> bool:
        cgroup = self._live.cgroups[0]
        return self._limited and cgroup.exists() and cgroup.populated()
