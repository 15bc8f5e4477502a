"""The bare command: limit processes, given cgroups or units, until told to stop."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from typing import Callable, NamedTuple, Optional, Sequence

import click

from pybpfthrottle.cli.cleanup import tidy_up
from pybpfthrottle.cli.options import Request
from pybpfthrottle.cli.watch import SAMPLE_S, SWITCHES, Watch
from pybpfthrottle.errors import CgroupError, Error, NoMarksError, ProcessError, ThrottleError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup, Moved
from pybpfthrottle.linux.process import Process, is_kernel_thread
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.targets import Selection, executable, user_id
from pybpfthrottle.throttle import Throttle

log = logging.getLogger(__name__)

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Wanted(NamedTuple):
    """The command's own options, as app.py declares them."""

    pids: Sequence[int]
    names: Sequence[str]
    executables: Sequence[str]
    users: Sequence[str]
    no_children: bool
    each: bool
    move_cgroup: bool
    cgroups: Sequence[str]
    units: Sequence[str]
    whole_cgroup: bool
    stack: bool
    as_json: bool

    def mistake(self) -> Optional[str]:
        """What is wrong with their combination, or None."""
        matching = self.names or self.executables or self.users
        processes = self.pids or matching
        alone = self.whole_cgroup or self.move_cgroup
        if not processes and not self.cgroups and not self.units:
            return "no target: give --pid, --name, --exe, --user, --cgroup or --unit"
        if processes and (self.cgroups or self.units):
            first = "--pid" if self.pids else "--name, --exe and --user"
            return f"{first} goes with neither --cgroup nor --unit"
        if not processes and (self.no_children or self.each or self.move_cgroup):
            option = "--each" if self.each else "--no-children"
            option = "--move-cgroup" if self.move_cgroup else option
            return f"{option} goes with --pid" + (", --name, --exe and --user" * (not alone))
        if matching and alone:
            option = "--move-cgroup" if self.move_cgroup else "--whole-cgroup"
            return f"{option} goes with --pid, not with --name, --exe and --user"
        if self.move_cgroup and self.whole_cgroup:
            return "--move-cgroup and --whole-cgroup exclude each other"
        if alone and processes and (self.no_children or self.each):
            option = "--each" if self.each else "--no-children"
            return f"{option} goes with neither --move-cgroup nor --whole-cgroup"
        return None


def limit(request: Request, wanted: Wanted) -> None:
    """Put the limits in force, show them, and take them away at the end."""
    mistake = wanted.mistake()
    if mistake:
        raise click.UsageError(mistake)
    processes = wanted.pids or wanted.names or wanted.executables or wanted.users
    with SignalQueue((*_STOP, *SWITCHES)) as signals, ExitStack() as stack:
        command = _Command(request, wanted, stack)
        if processes and not wanted.whole_cgroup:
            command.limit_processes()
        else:
            command.limit_cgroups()
        tidy_up()
        command.until_the_end(signals)


class _Limit(NamedTuple):
    """One limit that is in force, which ``undo`` takes away.

    ``goes_on`` tells whether there still is what it is for.
    """

    live: Throttle
    watch: Watch
    goes_on: Callable[[], bool]
    undo: ExitStack


class _Command:
    """What was asked for; ``stack`` undoes what it does."""

    def __init__(self, request: Request, wanted: Wanted, stack: ExitStack) -> None:
        self._request = request
        self._wanted = wanted
        self._stack = stack
        self._limits: list[_Limit] = []
        self._said: set[str] = set()
        self._explained: list[str] = []
        # Where later processes get a limit each: which of them.
        self._later: Optional[Selection] = None
        # What it is called if the last thing that is limited goes.
        self._end = "exited"

    def limit_cgroups(self) -> None:
        """Cgroups as a whole. Raises CgroupError or ProcessError."""
        wanted = self._wanted
        targets = [Process(pid) for pid in wanted.pids]
        chosen = [cgroups_v2.from_pid(target.pid) for target in targets]
        chosen += [cgroups_v2.from_path(path) for path in wanted.cgroups]
        chosen += [cgroups_v2.from_unit(name) for name in wanted.units]
        chosen = list(dict.fromkeys(chosen))
        _refuse_nested(chosen)
        if targets:
            _refuse_root(chosen)
        if targets or not wanted.whole_cgroup:
            _refuse_own_session(chosen, "--cgroup PATH --whole-cgroup" if targets else None)
        if not targets:
            self._end = "vanished"
        self._limit_whole(chosen, targets)

    def limit_processes(self) -> None:
        """Processes, wherever they are. Raises ProcessError, CgroupError or ThrottleError."""
        wanted = self._wanted
        selection = Selection(
            tuple(Process(pid) for pid in dict.fromkeys(wanted.pids)),
            frozenset(wanted.names),
            frozenset(map(executable, wanted.executables)),
            frozenset(map(user_id, wanted.users)),
            children=not wanted.no_children,
        )
        if wanted.move_cgroup:
            self._claim(selection.processes)
            self._limit_moved(selection)
        elif wanted.each:
            self._later = selection if selection.matches_some else None
            for target in selection.processes:
                self._limit_each(target)
            self._limit_later()
        else:
            self._limit_marked(selection)

    def _limit_marked(self, selection: Selection) -> None:
        self._claim(selection.processes)
        try:
            live = self._stack.enter_context(self._request.apply(processes=selection))
        except NoMarksError as error:
            if selection.matches_some:
                raise ThrottleError(
                    f"single processes cannot be limited here: {error}; use --cgroup or --unit"
                ) from error
            self._limit_without_marks(selection, error)
        else:
            self._begin(live, selection.processes, str(selection), lambda: not live.vanished())
            if not live.processes():
                self._say("No process matches yet; those that are started will.")

    def _limit_without_marks(self, selection: Selection, why: Error) -> None:
        """The best that remains: all of its cgroup where nobody else is in it, or moving it."""
        cgroups = list(dict.fromkeys(cgroups_v2.from_pid(one.pid) for one in selection.processes))
        if any(cgroup.is_root() or _company(cgroup, selection) for cgroup in cgroups):
            self._explain(f"Single sockets cannot be limited here: {why}.")
            self._explain("The processes are moved into a cgroup of their own until the end.")
            self._limit_moved(selection)
        else:
            self._explain(f"Single sockets cannot be limited here: {why}.")
            self._explain("Nobody else is in the cgroup of the processes: all of it is limited.")
            self._limit_whole(cgroups, selection.processes)

    def _limit_moved(self, selection: Selection) -> None:
        """In cgroups of their own, and the sockets that they had before by marks; once claimed."""
        if not selection.processes[0].alive():
            raise ProcessError(f"process {selection.processes[0].pid} has ended")
        # Who is still where a crash has left it goes back first, or it would come back there.
        cgroups_v2.remove_abandoned()
        moved = self._stack.enter_context(Moved(one.pid for one in selection.processes))
        before = selection._replace(new_sockets=False)
        try:
            live = self._stack.enter_context(self._request.apply(moved.cgroups, before))
        except NoMarksError as error:
            live = self._stack.enter_context(self._request.apply(moved.cgroups))
            self._explain(f"Connections that are open already are not limited: {error}")
        moved.move()
        self._begin(live, selection.processes, f"{selection}, moved", moved.populated)

    def _limit_whole(self, cgroups: Sequence[Cgroup], targets: Sequence[Process]) -> None:
        if not self._wanted.stack:
            for cgroup in cgroups:
                self._stack.callback(os.close, cgroups_v2.claim(cgroup))
        live = self._stack.enter_context(self._request.apply(cgroups))

        def goes_on() -> bool:
            # systemd removes a cgroup with its last process: that is an end like any other.
            alive = not targets or any(target.alive() for target in targets)
            return alive and not live.vanished()

        self._begin(live, targets, ", ".join(cgroup.path for cgroup in cgroups), goes_on)

    def _limit_each(self, target: Process) -> None:
        selection = Selection((target,), children=not self._wanted.no_children)
        with ExitStack() as undo:
            self._claim([target], undo)
            live = undo.enter_context(self._request.apply(processes=selection))
            own = self._stack.enter_context(undo.pop_all())
        self._begin(live, [target], str(selection), lambda: not live.vanished(), own)

    def _limit_later(self) -> None:
        """Those that match and have no limit yet."""
        if self._later is None:
            return
        limited = {pid for one in self._limits for pid in one.live.processes()}
        for pid in set(self._later.matching()) - limited:
            try:
                self._limit_each(Process(pid))
            except Error as error:
                # It has ended, has a limit of another instance, or there are too many.
                log.info("%d gets no limit: %s", pid, error)

    def _claim(self, targets: Sequence[Process], undo: Optional[ExitStack] = None) -> None:
        if self._wanted.stack:
            return
        for target in targets:
            (undo or self._stack).callback(os.close, target.claim())
            try:
                cgroup = cgroups_v2.from_pid(target.pid)
            except CgroupError:  # it may be in none that is visible
                continue
            cgroups_v2.refuse_claimed(cgroup)

    def _begin(
        self,
        live: Throttle,
        targets: Sequence[Process],
        what: str,
        goes_on: Callable[[], bool],
        undo: Optional[ExitStack] = None,
    ) -> None:
        """A limit is in force: show it. Without ``undo`` it goes with everything."""
        first = targets[0] if targets else None
        several = self._wanted.each
        watch = Watch(
            live,
            pid=first.pid if first else None,
            name=first.name if first else "",
            terminal=sys.stdout,
            json_file=sys.stdout if self._wanted.as_json else None,
            quiet=self._request.quiet,
            prefix=f"{first.pid} ({first.name}): " if first and several else "",
            several=several,
        )
        self._limits.append(_Limit(live, watch, goes_on, undo or self._stack))
        pids = [target.pid for target in targets]
        watch.start(pid=pids[0] if pids else None, pids=pids, target=what)
        how = live.describe()
        rates = ", ".join(
            f"{direction} {rate} ({how[str(direction)]['shape']})"
            for direction, rate in live.limits.items()
        )
        self._say(f"Limiting {what}: {rates}. Ctrl-C ends it.")
        for line in self._explained if self._wanted.as_json else ():
            watch.note(line)
        self._say_notes()

    def _explain(self, line: str) -> None:
        """What is done instead of what was asked for; in JSON a note, when the limit begins."""
        self._explained.append(line)
        self._say(line)

    def _say(self, line: str) -> None:
        if not self._request.quiet and not self._wanted.as_json:
            with suppress(OSError):
                click.echo(line)

    def _say_notes(self) -> None:
        """What is found to be covered, or not; once each."""
        for one in self._limits:
            for note in one.live.notes():
                if note not in self._said:
                    self._said.add(note)
                    one.watch.note(note)

    def until_the_end(self, signals: SignalQueue) -> None:
        """Until a signal, the duration, or the end of all that is limited.

        Raises CgroupError if given cgroups were removed.
        """
        now = time.monotonic()
        end = now + self._request.duration_s if self._request.duration_s else math.inf
        following = now + SAMPLE_S
        reason = ""
        while not reason:
            came = signals.wait(min(following, end) - time.monotonic())
            for one in self._limits:
                one.watch.switch(came)
            stop = next((number.name for number in came if number in _STOP), "")
            now = time.monotonic()
            reason = stop or ("duration" if now >= end else "")
            if not reason and now >= following:
                following += SAMPLE_S
                reason = self._sample()
        for one in self._limits:
            one.watch.end(reason=reason)
        if reason == "vanished":
            paths = ", ".join(cgroup.path for cgroup in self._limits[0].live.cgroups)
            raise CgroupError(f"the cgroup {paths} was removed while it was limited")

    def _sample(self) -> str:
        """Show the rates; why there is nothing left to limit, or an empty string."""
        self._limit_later()
        self._say_notes()
        gone = [one for one in self._limits if not one.goes_on()]
        if len(gone) == len(self._limits) and self._later is None:
            return self._end
        for one in self._limits:
            one.watch.sample()
        for one in gone:
            one.watch.end(reason=self._end)
            one.undo.close()
            self._limits.remove(one)
        return ""


def _refuse_nested(chosen: Sequence[Cgroup]) -> None:
    for one in chosen:
        for other in chosen:
            if one is not other and other in one:
                raise CgroupError(
                    f"{other.path} is inside of {one.path}: its packets would be charged twice"
                )


def _company(cgroup: Cgroup, selection: Selection) -> bool:
    """Whether others than some processes are in a cgroup."""
    own = {one.pid for one in selection.processes}
    return any(pid not in own and not is_kernel_thread(pid) for pid in cgroup.pids_below())


def _refuse_root(chosen: Sequence[Cgroup]) -> None:
    for cgroup in chosen:
        if cgroup.is_root():
            raise ProcessError(
                f"{cgroup.path} is the root cgroup, which holds whatever is in no other one:"
                " leave --whole-cgroup out, to limit the process alone"
            )


def _refuse_own_session(chosen: Sequence[Cgroup], insist: Optional[str]) -> None:
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
                    " remote login that you work on. If you mean that, "
                    + (f"give {insist}" if insist else "add --whole-cgroup")
                )
