"""The bare command: limit a process's cgroup, given cgroups or units, until told to stop."""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import Optional, Sequence

import click

from pybpfthrottle import cgroup as cgroups_v2
from pybpfthrottle import process, throttle
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.cli.display import LiveLine
from pybpfthrottle.cli.options import backends_of, limits_of, options_of, start_logging
from pybpfthrottle.cli.report import JsonLines, Meter, never_ran
from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.limits import Rate
from pybpfthrottle.process import Process
from pybpfthrottle.signals import SignalQueue
from pybpfthrottle.throttle import Throttle

log = logging.getLogger(__name__)

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAMPLE_S = 1.0
_LISTED = 5


def limit(
    *,
    pid: Optional[int],
    cgroups: Sequence[str],
    units: Sequence[str],
    whole_cgroup: bool,
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
    as_json: bool,
) -> None:
    """Put the limits in force, show them, and take them away at the end."""
    limits = limits_of(download_limit, upload_limit)
    if pid is None and not cgroups and not units:
        raise click.UsageError("no target: give --pid, --cgroup or --unit")
    if pid is not None and (cgroups or units):
        raise click.UsageError("--pid goes with neither --cgroup nor --unit")
    start_logging(verbose)
    target = None if pid is None else Process(pid)
    chosen = _targets(target, cgroups, units)
    if not whole_cgroup:
        if target is not None:
            _refuse_company(target, chosen[0])
        _refuse_own_session(chosen)
    with SignalQueue(_STOP) as signals:
        with throttle.apply(
            chosen,
            limits,
            options=options_of(loopback, bpf_attach_method, egress_verdict),
            backends=backends_of(download_backend, upload_backend),
        ) as live:
            watch = _Watch(live, target, quiet=quiet, as_json=as_json)
            cgroups_v2.remove_abandoned()
            reason = watch.until_the_end(signals, duration)
        if reason == "vanished":
            raise CgroupError(f"the cgroup {chosen[0].path} was removed while it was limited")


def _targets(target: Optional[Process], paths: Sequence[str], units: Sequence[str]) -> list[Cgroup]:
    if target is not None:
        return [cgroups_v2.from_pid(target.pid)]
    chosen = [cgroups_v2.from_path(path) for path in paths]
    chosen += [cgroups_v2.from_unit(name) for name in units]
    for one in chosen:
        for other in chosen:
            if one is not other and other in one:
                raise CgroupError(
                    f"{other.path} is inside of {one.path}: its packets would be charged twice"
                )
    return chosen


def _refuse_company(target: Process, cgroup: Cgroup) -> None:
    """A cgroup is limited as a whole: refuse, if that meets others than the process."""
    others = [pid for pid in cgroup.pids() if pid != target.pid]
    if not cgroup.is_root() and not others:
        return
    named = ", ".join(f"{pid} ({process.name_of(pid)})" for pid in others[:_LISTED])
    if len(others) > _LISTED:
        named += f" and {len(others) - _LISTED} more"
    what = "is the root cgroup" if cgroup.is_root() else "is not its own"
    raise ProcessError(
        f"the cgroup of process {target.pid} ({target.name}), {cgroup.path}, {what};"
        f" it also holds {named or 'whatever is in no other cgroup'}."
        " To limit them all, add --whole-cgroup; to limit a new program alone,"
        " start it with pybpfthrottle run"
    )


def _refuse_own_session(chosen: Sequence[Cgroup]) -> None:
    """Nobody should lose the connection that they type on by accident."""
    for pid in process.own_session():
        try:
            where = cgroups_v2.from_pid(pid)
        except (ProcessError, CgroupError):
            continue
        for cgroup in chosen:
            if where in cgroup:
                raise ProcessError(
                    f"{cgroup.path} holds this session too (process {pid},"
                    f" {process.name_of(pid)}): the limit would be for the terminal or the"
                    " remote login that you work on. If you mean that, add --whole-cgroup"
                )


class _Watch:
    """Shows a throttle while it is in force."""

    def __init__(
        self, live: Throttle, target: Optional[Process], *, quiet: bool, as_json: bool
    ) -> None:
        self._live = live
        self._target = target
        self._quiet = quiet
        self._json = JsonLines(sys.stdout) if as_json else None
        self._line = LiveLine(sys.stdout, enabled=not quiet and not as_json)
        self._meter = Meter(live)

    def until_the_end(self, signals: SignalQueue, duration: Optional[float]) -> str:
        """Wait for a signal, the duration, the process or the cgroup; the reason for the end."""
        where = ", ".join(cgroup.path for cgroup in self._live.cgroups)
        if self._json:
            self._json.start(self._live, pid=self._target.pid if self._target else None)
        elif not self._quiet:
            rates = ", ".join(f"{d} {rate}" for d, rate in self._live.limits.items())
            click.echo(f"Limiting {where}: {rates}. Ctrl-C ends it.")
        reason = self._wait(signals, duration)
        self._line.clear()
        readings = self._meter.total()
        if self._json:
            self._json.end(self._meter.elapsed_s, readings, reason=reason)
        elif not self._quiet:
            for reading in readings:
                click.echo(reading.summary(self._meter.elapsed_s))
            silent = never_ran(readings, pid=self._pid, cgroup=where)
            if silent:
                click.echo(silent, err=True)
        return reason

    def _wait(self, signals: SignalQueue, duration: Optional[float]) -> str:
        begin = time.monotonic()
        end = begin + duration if duration else float("inf")
        following = begin + _SAMPLE_S
        while True:
            came = signals.wait(min(following, end) - time.monotonic())
            if came:
                return came[0].name
            now = time.monotonic()
            if now >= end:
                return "duration"
            if now < following:
                continue
            following += _SAMPLE_S
            if self._live.vanished():
                return "vanished"
            if self._target is not None and not self._target.alive():
                return "exited"
            self._show()

    def _show(self) -> None:
        readings = self._meter.sample()
        self._line.draw(readings)
        if self._json:
            self._json.sample(self._meter.elapsed_s, readings)
        name = f" ({self._target.name})" if self._target else ""
        for reading in readings:
            log.info("PID %s%s %s", self._pid, name, reading.line())
            log.info(
                "eBPF stats PID %s cgroup %d: %s",
                self._pid,
                self._live.cgroups[0].id,
                reading.counters,
            )

    @property
    def _pid(self) -> str:
        return str(self._target.pid) if self._target else "-"
