"""pybpfthrottle run: a command in a cgroup of its own, with its bandwidth limited."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from typing import Optional, Sequence, TextIO

import click

from pybpfthrottle import cgroup as cgroups_v2
from pybpfthrottle import process, throttle
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.cli.display import LiveLine
from pybpfthrottle.cli.options import backends_of, limits_of, options_of, start_logging
from pybpfthrottle.cli.report import JsonLines, Meter, never_ran
from pybpfthrottle.errors import Error
from pybpfthrottle.launch import Command, LaunchError, User, exit_status
from pybpfthrottle.limits import Rate
from pybpfthrottle.signals import SignalQueue
from pybpfthrottle.throttle import Throttle

log = logging.getLogger(__name__)

_FAILED = 125
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP)
# The terminal sends these to the command itself; it decides what they mean.
_LEFT_TO_THE_COMMAND = (signal.SIGINT, signal.SIGQUIT)
_SAMPLE_S = 1.0


def run(
    *,
    command: Sequence[str],
    user: Optional[str],
    wait: bool,
    json_file: Optional[TextIO],
    download_limit: Optional[Rate],
    upload_limit: Optional[Rate],
    duration: Optional[float],
    loopback: bool,
    bpf_attach_method: str,
    egress_verdict: str,
    download_backend: str,
    upload_backend: str,
    verbose: int,
    quiet: bool,
) -> int:
    """Run the command; its exit status, or 125, 126 or 127 with a line that says why."""
    limits = limits_of(download_limit, upload_limit)
    start_logging(verbose)
    numbers = (*_PASSED_ON, *_LEFT_TO_THE_COMMAND, signal.SIGCHLD)
    try:
        started = Command(command, user=User.parse(user) if user else None)
        try:
            with SignalQueue(numbers) as signals:
                own = cgroups_v2.create_own(started.pid)
                try:
                    with throttle.apply(
                        [own.cgroup],
                        limits,
                        options=options_of(loopback, bpf_attach_method, egress_verdict),
                        backends=backends_of(download_backend, upload_backend),
                    ) as live:
                        watch = _Watch(started, live, quiet=quiet, json_file=json_file)
                        started.let_go()
                        cgroups_v2.remove_abandoned()
                        return watch.until_the_end(signals, duration, wait=wait)
                finally:
                    started.abandon()
                    if not own.remove():
                        _say_who_stays(own.cgroup)
        finally:
            started.abandon()
    except LaunchError as error:
        click.echo(f"pybpfthrottle: {error}", err=True)
        return error.status
    except Error as error:
        click.echo(f"pybpfthrottle: error: {error}", err=True)
        return _FAILED


def _say_who_stays(cgroup: Cgroup) -> None:
    pids = cgroup.pids()
    named = ", ".join(f"{pid} ({process.name_of(pid)})" for pid in pids[:5])
    click.echo(
        f"pybpfthrottle: {len(pids)} of the command's processes go on without a limit: {named}"
        f" (--wait keeps it); {cgroup.path} is removed at the next start after they end",
        err=True,
    )


class _Watch:
    """Waits for the command, passes signals on, and shows the rates."""

    def __init__(
        self, command: Command, live: Throttle, *, quiet: bool, json_file: Optional[TextIO]
    ) -> None:
        self._command = command
        self._live = live
        self._quiet = quiet
        self._json = JsonLines(json_file) if json_file else None
        self._line = LiveLine(sys.stderr, enabled=not quiet)
        self._meter = Meter(live)
        self._name = os.path.basename(command.argv[0])

    def until_the_end(self, signals: SignalQueue, duration: Optional[float], *, wait: bool) -> int:
        """The exit status of the command."""
        if self._json:
            self._json.start(self._live, pid=self._command.pid, command=self._command.argv)
        begin = time.monotonic()
        end = begin + duration if duration else float("inf")
        following = begin + _SAMPLE_S
        status: Optional[int] = None
        limited = True
        while True:
            came = signals.wait(min(following, end if limited else following) - time.monotonic())
            if status is None:
                self._pass_on(came)
                status = self._ended()
                if status is not None and limited:
                    self._report(status)
            elif any(number in came for number in (*_PASSED_ON, signal.SIGINT)):
                return status
            if status is not None and not (wait and limited and self._populated()):
                return status
            now = time.monotonic()
            if limited and now >= end:
                self._report(None)
                self._live.remove()
                limited = False
            if now >= following:
                following += _SAMPLE_S
                if limited and status is None:
                    self._show()

    def _pass_on(self, came: Sequence[signal.Signals]) -> None:
        for number in came:
            if number in _PASSED_ON:
                os.kill(self._command.pid, number)

    def _ended(self) -> Optional[int]:
        pid, wait_status = os.waitpid(self._command.pid, os.WNOHANG)
        return exit_status(wait_status) if pid else None

    def _populated(self) -> bool:
        return self._live.cgroups[0].exists() and self._live.cgroups[0].populated()

    def _show(self) -> None:
        readings = self._meter.sample()
        self._line.draw(readings)
        if self._json:
            self._json.sample(self._meter.elapsed_s, readings)
        for reading in readings:
            log.info("PID %d (%s) %s", self._command.pid, self._name, reading.line())
            log.info(
                "eBPF stats PID %d cgroup %d: %s",
                self._command.pid,
                self._live.cgroups[0].id,
                reading.counters,
            )

    def _report(self, status: Optional[int]) -> None:
        """The summary, when the command has ended or (None) its limit has."""
        self._line.clear()
        readings = self._meter.total()
        if self._json:
            reason = "duration" if status is None else "exited"
            self._json.end(self._meter.elapsed_s, readings, reason=reason, exit_status=status)
        if self._quiet:
            return
        for reading in readings:
            click.echo(f"pybpfthrottle: {reading.summary(self._meter.elapsed_s)}", err=True)
        silent = never_ran(readings, pid=self._command.pid, cgroup=self._live.cgroups[0].path)
        if silent and status is None:
            click.echo(silent, err=True)
