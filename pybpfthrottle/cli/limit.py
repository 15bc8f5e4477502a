"""The bare command: limit processes, given cgroups or units, until told to stop."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from errno import ENOSPC
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence

import click

from pybpfthrottle import registry
from pybpfthrottle.cli import background, conditions
from pybpfthrottle.cli.options import Request
from pybpfthrottle.cli.records import BOTH_ON_STDOUT, JSON, Output
from pybpfthrottle.cli.say import echo, say
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup, process
from pybpfthrottle.linux.notify import notify
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.model import Target
from pybpfthrottle.plan import Wish
from pybpfthrottle.supervisor import Chore, Periodic, Supervisor
from pybpfthrottle.throttle import Each, Throttle, start

if TYPE_CHECKING:
    from pybpfthrottle.cli.watch import Watch
    from pybpfthrottle.conditions.network import Network

_REFUTED = 3
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
    detach: bool

    def mistake(self) -> Optional[str]:
        """Return what is wrong with their combination, or None."""
        matching = self.names or self.executables or self.users
        processes = self.pids or matching
        alone = self.whole_cgroup or self.move_cgroup
        if not processes and not self.cgroups and not self.units:
            return "no target: give --pid, --name, --exe, --user, --cgroup or --unit"
        if processes and (self.cgroups or self.units):
            first = "--pid" if self.pids else "--name, --exe and --user"
            return f"{first} cannot be combined with --cgroup or --unit"
        if not processes and (self.no_children or self.each or self.move_cgroup):
            option = "--each" if self.each else "--no-children"
            option = "--move-cgroup" if self.move_cgroup else option
            return f"{option} needs --pid" + (", --name, --exe or --user" * (not alone))
        if matching and alone:
            option = "--move-cgroup" if self.move_cgroup else "--whole-cgroup"
            return f"{option} works only with --pid, not with --name, --exe or --user"
        if self.move_cgroup and self.whole_cgroup:
            return "--move-cgroup and --whole-cgroup cannot be combined"
        if alone and processes and (self.no_children or self.each):
            option = "--each" if self.each else "--no-children"
            return f"{option} cannot be combined with --move-cgroup or --whole-cgroup"
        if self.detach and (self.each or self.move_cgroup):
            option = "--each" if self.each else "--move-cgroup"
            return f"{option} cannot be combined with --detach"
        return None

    def target(self) -> Target:
        """Return what is to be limited."""
        return Target(
            pids=tuple(dict.fromkeys(self.pids)),
            names=tuple(self.names),
            executables=tuple(self.executables),
            users=tuple(self.users),
            children=not self.no_children,
            cgroups=tuple(self.cgroups),
            units=tuple(self.units),
        )

    def wish(self, request: Request) -> Wish:
        """Return how it is to be limited."""
        processes = bool(self.pids)
        matching = "move-cgroup" if self.move_cgroup else "auto"
        return Wish(
            matching="whole-cgroup" if processes and self.whole_cgroup else matching,
            backends=request.backends,
            options=request.options,
            stack=self.stack,
            insist=self.whole_cgroup and not processes,
        )


def limit(request: Request, wanted: Wanted) -> int:
    """Put limits in force, show them, remove them at the end; return the exit status."""
    mistake = wanted.mistake() or _mistake(request, wanted)
    if mistake:
        raise click.UsageError(mistake)
    if request.mount_cgroup2:
        cgroup.mount_if_missing()
    going_on = background.begin() if wanted.detach else None
    if isinstance(going_on, int):
        return going_on
    spec = request.spec(wanted.target(), kept=wanted.detach)
    wish = wanted.wish(request)
    with SignalQueue(_STOP) as signals, Supervisor() as supervisor, ExitStack() as stack:
        command = _Command(request, wanted)
        if wanted.each:
            command.each = stack.enter_context(Each(spec, wish))
            stack.callback(command.end_networks)
            for throttle in command.each.throttles:
                command.begin(throttle)
            command.each.begun = command.begin
            supervisor.add(command.each.chores)
        else:
            throttle = start(spec, wish)
            stack.callback(throttle.remove)
            stack.callback(command.end_networks)
            command.begin(throttle)
            supervisor.add(throttle.chores)
        supervisor.add(command.network_chores)
        registry.tidy_up()
        background.pick_up()
        if going_on is not None:
            going_on.ready()
        notify("READY=1")
        supervisor.add(lambda: [signals, command.sampling], strict=True)
        command.until_the_end(supervisor, signals)
        if command.failed and not command.said_so:
            say(f"error: cannot write: {os.strerror(ENOSPC)}")
        return 1 if command.failed else _REFUTED if command.refuted else 0


def _mistake(request: Request, wanted: Wanted) -> Optional[str]:
    """Return what is wrong with where the output is to go, or None."""
    record = request.record
    if record is not None and record.on_stdout and (wanted.as_json or wanted.detach):
        return BOTH_ON_STDOUT if wanted.as_json else "--detach needs a file to --record to, not -"
    if wanted.detach and request.prove and (record is None or record.form != JSON):
        return "--prove and --detach need --record FILE.jsonl: nobody would see the proof"
    return None


class _Command:
    """Shows the limits that are in force."""

    def __init__(self, request: Request, wanted: Wanted) -> None:
        self._request = request
        self._wanted = wanted
        self._shown: list[tuple[Throttle, Watch]] = []
        self._said: set[str] = set()
        self._reason = ""
        self._outputs = [Output(sys.stdout, on_stdout=True)] if wanted.as_json else []
        self._outputs += [request.record] if request.record is not None else []
        self._mute = request.quiet or any(one.on_stdout for one in self._outputs)
        self.failed = self.refuted = False
        self.each: Optional[Each] = None
        # By the throttles that they are on.
        self._networks: dict[Throttle, Network] = {}

    @cached_property
    def sampling(self) -> Periodic:
        """The chore that shows the rates."""
        from pybpfthrottle.cli.watch import SAMPLE_S

        return Periodic(SAMPLE_S, self._sample)

    @property
    def said_so(self) -> bool:
        """Whether it was said already that something could not be written."""
        return any(output.failed for output in self._outputs)

    def begin(self, throttle: Throttle) -> None:
        """Show a limit that has begun."""
        from pybpfthrottle.cli.watch import Watch  # now that the limit is in force

        network = conditions.begin(
            throttle, self._request.network, loopback=self._request.traffic.loopback
        )
        if network is not None:
            self._networks[throttle] = network
        pids = throttle.spec.target.pids
        name = process.name_of(pids[0]) if pids else ""
        several = self.each is not None
        watch = Watch(
            throttle,
            pid=pids[0] if pids else None,
            name=name,
            terminal=sys.stdout,
            outputs=self._outputs,
            quiet=self._request.quiet,
            background=self._wanted.detach,
            prefix=f"{pids[0]} ({name}): " if several else "",
            several=several,
            prove=self._request.prove,
            network=network,
        )
        self._shown.append((throttle, watch))
        watch.start(pid=pids[0] if pids else None, pids=list(pids), target=throttle.what)
        rates = ", ".join(
            f"{direction} {throttle.limits[direction]} ({how['shape']})"
            for direction, how in throttle.how().items()
        )
        # Fallbacks come first: they explain the rest.
        for note in throttle.plan_notes:
            self._said.add(note)
            if self._mute:
                watch.note(note)
            else:
                watch.record_note(note)
                self._say(note)
        end = f"pybpfthrottle remove {throttle.id}" if self._wanted.detach else "Ctrl-C"
        if network is not None:
            self._say(f"Bad network for {throttle.what}: {network.asked}. {end} ends it.")
        else:
            self._say(f"Limiting {throttle.what}: {rates}. {end} ends it.")
        self._say_notes()
        if throttle.selection is not None and not throttle.processes():
            self._say("No process matches yet; waiting for one to start.")

    def network_chores(self) -> list[Chore]:
        """Return what has to be done for the networks that are in force."""
        return [one for network in self._networks.values() for one in network.own_chores()]

    def end_networks(self) -> None:
        """End the networks that are in force."""
        while self._networks:
            self._networks.popitem()[1].close()

    def until_the_end(self, supervisor: Supervisor, signals: SignalQueue) -> None:
        """Wait for a signal, the duration, or the end of all that is limited.

        Raises CgroupError if given cgroups were removed.
        """
        end = time.monotonic() + (self._request.duration_s or math.inf)
        while not self._reason:
            supervisor.step(end)
            self._reason = next((number.name for number in signals.take()), self._reason)
            if not self._reason and time.monotonic() >= end:
                self._reason = "duration"
        for _, watch in self._shown:
            self._end(watch, self._reason)
        if self._reason == "vanished":
            raise CgroupError(self._shown[0][0].why_vanished())

    def _sample(self) -> None:
        """Show the rates of the last seconds, and which limits have begun or ended."""
        self._say_notes()
        ended = {id(throttle): throttle.ended() for throttle, _ in self._shown}
        waits = self.each is not None and self.each.waits()
        if all(ended.values()) and not waits:
            self._reason = next(iter(ended.values()), "exited")
            return
        for throttle, watch in list(self._shown):
            watch.sample()
            if ended[id(throttle)] and self.each is not None:
                self._end(watch, ended[id(throttle)])
                if throttle in self._networks:
                    self._networks.pop(throttle).close()
                self.each.end(throttle)
                self._shown.remove((throttle, watch))

    def _end(self, watch: Watch, reason: str) -> None:
        if reason == "removed":
            watch.note("The limit was removed.")
        watch.end(reason=reason)
        self.failed |= watch.failed()
        self.refuted |= watch.refuted

    def _say(self, line: str) -> None:
        if not self._mute:
            with suppress(OSError):
                echo(line)

    def _say_notes(self) -> None:
        """Print each note on what is covered or not, once."""
        for throttle, watch in self._shown:
            more = self._networks[throttle].notes() if throttle in self._networks else []
            for note in [*throttle.notes(), *more]:
                if note not in self._said:
                    self._said.add(note)
                    watch.note(note)
        for note in self.each.notes() if self.each is not None else ():
            if note not in self._said:
                self._said.add(note)
                for output in self._outputs:
                    output.recorder(None).note(note)
                if not self._request.quiet and not self._wanted.as_json:
                    say(note)
