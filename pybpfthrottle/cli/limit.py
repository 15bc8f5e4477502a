"""The bare command: limit a process's cgroup, given cgroups or units, until told to stop."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from typing import Optional, Sequence

import click

from pybpfthrottle import cgroup as cgroups_v2
from pybpfthrottle import process
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.cli.cleanup import tidy_up
from pybpfthrottle.cli.options import Request
from pybpfthrottle.cli.watch import SAMPLE_S, SWITCHES, Watch
from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.process import Process, is_kernel_thread
from pybpfthrottle.signals import SignalQueue
from pybpfthrottle.throttle import Throttle

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def limit(
    request: Request,
    *,
    pid: Optional[int],
    cgroups: Sequence[str],
    units: Sequence[str],
    whole_cgroup: bool,
    stack: bool,
    as_json: bool,
) -> None:
    """Put the limits in force, show them, and take them away at the end."""
    if pid is None and not cgroups and not units:
        raise click.UsageError("no target: give --pid, --cgroup or --unit")
    if pid is not None and (cgroups or units):
        raise click.UsageError("--pid goes with neither --cgroup nor --unit")
    target = None if pid is None else Process(pid)
    chosen = _targets(target, cgroups, units)
    if not whole_cgroup:
        if target is not None:
            _refuse_company(target, chosen[0])
        _refuse_own_session(chosen)
    with ExitStack() as claims:
        if not stack:
            for cgroup in chosen:
                claims.callback(os.close, cgroups_v2.claim(cgroup))
        reason = _limit(request, chosen, target, as_json=as_json)
    if reason == "vanished":
        raise CgroupError(f"the cgroup {chosen[0].path} was removed while it was limited")


def _limit(
    request: Request, chosen: Sequence[Cgroup], target: Optional[Process], *, as_json: bool
) -> str:
    """Put the limits in force until the end; what brought it."""
    pid = target.pid if target else None
    with SignalQueue((*_STOP, *SWITCHES)) as signals, request.apply(chosen) as live:
        tidy_up()
        watch = Watch(
            live,
            pid=pid,
            name=target.name if target else "",
            terminal=sys.stdout,
            json_file=sys.stdout if as_json else None,
            quiet=request.quiet,
        )
        watch.start(pid=pid)
        if not request.quiet and not as_json:
            how = live.describe()
            rates = ", ".join(
                f"{direction} {rate} ({how[str(direction)]['shape']})"
                for direction, rate in live.limits.items()
            )
            where = ", ".join(cgroup.path for cgroup in chosen)
            watch.say(f"Limiting {where}: {rates}. Ctrl-C ends it.")
        reason = _wait(watch, live, target, signals, request.duration_s)
        watch.end(reason=reason)
    return reason


def _wait(
    watch: Watch,
    live: Throttle,
    target: Optional[Process],
    signals: SignalQueue,
    duration_s: Optional[float],
) -> str:
    """Until a signal, the duration, or the end of the process or cgroup; what it was."""
    now = time.monotonic()
    end = now + duration_s if duration_s else math.inf
    following = now + SAMPLE_S
    while True:
        came = signals.wait(min(following, end) - time.monotonic())
        watch.switch(came)
        ends = [number for number in came if number in _STOP]
        if ends:
            return ends[0].name
        now = time.monotonic()
        if now >= end:
            return "duration"
        if now < following:
            continue
        following += SAMPLE_S
        # systemd removes a cgroup with its last process: that is an end like any other.
        if target is not None and not target.alive():
            return "exited"
        if live.vanished():
            return "vanished"
        watch.sample()


def _targets(target: Optional[Process], paths: Sequence[str], units: Sequence[str]) -> list[Cgroup]:
    if target is not None:
        return [cgroups_v2.from_pid(target.pid)]
    chosen = [cgroups_v2.from_path(path) for path in paths]
    chosen += [cgroups_v2.from_unit(name) for name in units]
    chosen = list(dict.fromkeys(chosen))
    for one in chosen:
        for other in chosen:
            if one is not other and other in one:
                raise CgroupError(
                    f"{other.path} is inside of {one.path}: its packets would be charged twice"
                )
    return chosen


def _refuse_company(target: Process, cgroup: Cgroup) -> None:
    """A cgroup is limited as a whole: refuse, if that meets others than the process."""
    others = [pid for pid in cgroup.pids_below() if pid != target.pid and not is_kernel_thread(pid)]
    if not cgroup.is_root() and not others:
        return
    what = "is the root cgroup" if cgroup.is_root() else "is not its own"
    raise ProcessError(
        f"the cgroup of process {target.pid} ({target.name}), {cgroup.path}, {what};"
        f" it also holds {process.listed(others) or 'whatever is in no other cgroup'}."
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
                    f"{cgroup.path} holds this session too (process"
                    f" {process.listed([pid])}): the limit would be for the terminal or the"
                    " remote login that you work on. If you mean that, add --whole-cgroup"
                )
