"""pybpfthrottle run: a command in a cgroup of its own, with its bandwidth limited."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from threading import Thread
from typing import TYPE_CHECKING, Optional, Sequence, TextIO

import click

from pybpfthrottle import registry, throttle
from pybpfthrottle.cli import conditions
from pybpfthrottle.cli.options import Request
from pybpfthrottle.cli.records import Output
from pybpfthrottle.cli.say import PROGRAM, clear_the_line, say, say_error
from pybpfthrottle.errors import Error, LaunchError
from pybpfthrottle.linux import cgroup, process
from pybpfthrottle.linux.launch import Command, User
from pybpfthrottle.linux.own_cgroups import OwnCgroup
from pybpfthrottle.linux.signals import (
    SentSignals,
    SignalQueue,
    stop_as_a_job,
    stops_left_to_others,
)
from pybpfthrottle.model import Target
from pybpfthrottle.plan import Wish
from pybpfthrottle.supervisor import Periodic, Supervisor
from pybpfthrottle.throttle import Throttle

if TYPE_CHECKING:
    from pybpfthrottle.cli.watch import Watch
    from pybpfthrottle.conditions.network import Network
    from pybpfthrottle.line.own import OwnNetwork

_FAILED = 125
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_PASSED_ON = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)
# The terminal sends these to the command as well, which decides what they mean. Those sent by
# kill are told apart, and passed on.
_LEFT_ALONE = (signal.SIGINT,)
_SENT = (signal.SIGQUIT,)
_QUEUED = (*_PASSED_ON, *_LEFT_ALONE, signal.SIGCONT, signal.SIGCHLD)


def run(
    request: Request,
    *,
    command: Sequence[str],
    user: Optional[str],
    wait: bool,
    netns: bool,
    json_file: Optional[TextIO],
) -> int:
    """Run the command; return its exit status, or 125, 126 or 127 with a line that says why."""
    try:
        _refuse_netns_without_a_network(request, netns=netns)
        return _run(request, command, user, wait, _outputs(request, json_file), netns=netns)
    except LaunchError as error:
        if str(error):
            say(str(error))
        return error.status
    except Error as error:
        say_error(error)
        return _FAILED


def _outputs(request: Request, json_file: Optional[TextIO]) -> list[Output]:
    """Return what to record to: --json-file is JSON lines, whatever its name."""
    found = [] if json_file is None else [Output(json_file)]
    return found if request.record is None else [*found, request.record]


def _run(
    request: Request,
    argv: Sequence[str],
    user: Optional[str],
    wait: bool,
    outputs: Sequence[Output],
    *,
    netns: bool,
) -> int:
    if request.mount_cgroup2:
        cgroup.mount_if_missing()
    with ExitStack() as stack:
        line = stack.enter_context(_own_network()) if netns else None
        enter = {} if line is None else {"enter": line.enter}
        command = Command(argv, user=None if user is None else User.parse(user), **enter)
        stack.callback(command.abandon)
        signals = stack.enter_context(SignalQueue(_QUEUED))
        sent = stack.enter_context(SentSignals(_SENT))
        # Moving a process takes the kernel about 15 ms: read and import the rest meanwhile. Python
        # 3.9 lets two threads import the same module from a zip, and one of them gets half of it.
        if sys.version_info >= (3, 10):
            Thread(target=_prepare).start()
        spec = request.spec(Target(command=tuple(argv)))
        wish = Wish(backends=request.backends, options=request.options)
        try:
            live, own = throttle.start_command(command.pid, spec, wish)
        except Error:
            command.check_waits()  # Ctrl-C may be the reason
            raise
        stack.callback(_end, live, own, netns=netns)
        # A child that was not let go is in the cgroup still: it must end first.
        stack.callback(command.abandon)
        network = conditions.begin(
            live, request.network, loopback=request.traffic.loopback, line=line
        )
        if network is not None:
            stack.callback(network.close)
        if line is not None:
            line.open(live.id)
        from pybpfthrottle.cli.watch import Watch

        watch = Watch(
            live,
            pid=command.pid,
            name=os.path.basename(argv[0]),
            terminal=sys.stderr,
            outputs=outputs,
            quiet=request.quiet,
            prefix=PROGRAM,
            prove=request.prove,
            network=network,
        )
        # From now on the command decides whether it stops; this process follows it.
        stack.enter_context(stops_left_to_others())
        command.let_go()
        from pybpfthrottle.cli import background

        registry.tidy_up()
        background.pick_up()
        watch.start(pid=command.pid, command=list(argv))
        handed_over = _handed_over(argv)
        if handed_over is not None:
            watch.note(handed_over)
        supervisor = stack.enter_context(Supervisor())
        if network is not None:
            watch.note(f"Bad network: {network.asked}.")
            if line is not None:
                watch.note(f"The command is in {line}.")
            supervisor.add(network.own_chores)
        return _Run(command, live, watch, wait=wait, network=network, netns=netns).until_the_end(
            supervisor, signals, sent, request.duration_s
        )


def _own_network() -> OwnNetwork:
    from pybpfthrottle.line.own import OwnNetwork

    return OwnNetwork()


def _refuse_netns_without_a_network(request: Request, *, netns: bool) -> None:
    if netns and request.network is None:
        raise click.UsageError("--netns is for a bad network: add --delay, --loss, --profile, ...")
    if netns and request.traffic.loopback:
        raise click.UsageError(
            "with --netns the loopback device is the command's own, and nothing is wrong with it:"
            " omit --loopback"
        )


def _prepare() -> None:
    # What fails here, such as for lack of descriptors, is told by whoever needs it.
    with suppress(OSError, ImportError):
        throttle.prepare()
        from pybpfthrottle.cli import watch  # noqa: F401 - what comes after the limit


def _end(live: Throttle, own: Optional[OwnCgroup], *, netns: bool) -> None:
    """Remove the limit and the cgroup, and say who goes on."""
    live.remove()
    if own is not None and not own.remove():
        later = f"; {own.cgroup.path} is removed at the next start after they end"
        _say_who_goes_on(own.cgroup.pids(), later, netns=netns)


def _say_who_goes_on(pids: Sequence[int], more: str = "", *, netns: bool = False) -> None:
    what = "network" if netns else "limit"
    say(
        f"{len(pids)} of the command's processes continue without a {what}:"
        f" {process.listed(pids)} (--wait keeps it){more}"
    )


# Commands that only ask a daemon, whose processes are not their children.
_ASK_A_DAEMON = frozenset(
    ("at", "batch", "docker", "incus", "kubectl", "lxc", "machinectl", "nerdctl", "virsh")
)


def _handed_over(argv: Sequence[str]) -> Optional[str]:
    """Return a note for a command that is known to have others do its work, or None."""
    name = os.path.basename(argv[0])
    if name == "systemd-run" and "--scope" not in argv:
        return (
            "systemd-run lets systemd start the command, so it is not limited: add --scope to"
            " systemd-run, or limit the unit with --unit"
        )
    if name in _ASK_A_DAEMON:
        return (
            f"{name} asks a daemon to do the work, and the daemon is not limited: limit its unit"
            " or container with --unit, --cgroup or --pid"
        )
    return None


class _Run:
    """A running command and its limit, which may end earlier."""

    def __init__(
        self,
        command: Command,
        live: Throttle,
        watch: Watch,
        *,
        wait: bool,
        network: Optional[Network] = None,
        netns: bool = False,
    ) -> None:
        self._command = command
        self._netns = netns
        self._live = live
        self._watch = watch
        self._wait = wait
        self._network = network
        self._limited = True
        self._said: set[str] = set()
        self._status: Optional[int] = None

    def until_the_end(
        self,
        supervisor: Supervisor,
        signals: SignalQueue,
        sent: SentSignals,
        duration_s: Optional[float],
    ) -> int:
        """Wait for the command, with ``wait`` also for its children; return its exit status."""
        end = time.monotonic() + (duration_s or math.inf)
        self._say_notes()
        supervisor.add(self._live.chores)
        from pybpfthrottle.cli.watch import SAMPLE_S

        sampling = Periodic(SAMPLE_S, self._sample)
        supervisor.add(lambda: [signals, sent, sampling], strict=True)
        while True:
            supervisor.step(end if self._limited else math.inf)
            came = [*signals.take(), *sent.take()]
            if self._status is None:
                self._poll(came)
            # A signal ends the wait for processes that outlive the command.
            stopped = self._status is not None and any(
                number in came for number in (*_ENDING, signal.SIGINT)
            )
            if self._status is None:
                self._pass_on(came)
            if time.monotonic() >= end:
                self._lift("duration")
            if self._status is not None and (stopped or not self._outlived()):
                self._lift("exited")
                return self._status

    def _poll(self, came: Sequence[signal.Signals]) -> None:
        """Find out what has become of the command; as long as it is stopped, be stopped, too."""
        was_stopped = self._command.is_stopped
        self._status = self._command.poll()
        if not self._command.is_stopped:
            return
        if not was_stopped:
            with suppress(OSError):  # the terminal may be gone
                clear_the_line()
            stop_as_a_job()
        elif signal.SIGCONT in came:
            # A shell continues the whole job, but sudo, for example, only its own child.
            os.kill(self._command.pid, signal.SIGCONT)

    def _sample(self) -> None:
        if self._limited:
            self._say_notes()
            self._watch.sample()
            if self._live.ended() == "removed":
                self._watch.note("The limit was removed; the command continues without it.")
                self._lift("removed")

    def _say_notes(self) -> None:
        """Print each note, such as which processes have left the cgroup, once."""
        more = [] if self._network is None else self._network.notes()
        for note in [*self._live.notes(), *more]:
            if note not in self._said:
                self._said.add(note)
                self._watch.note(note)

    def _lift(self, reason: str) -> None:
        """Show the summary and remove the limit, unless already done."""
        if self._limited:
            self._say_notes()
            self._watch.end(
                expect_traffic=self._status is None,
                reason=reason,
                exit_status=self._status,
            )
            # Those in a cgroup are told when it is removed.
            pids = [] if self._live.cgroups else self._live.processes()
            if self._network is not None:
                self._network.close()
            self._live.remove()
            self._limited = False
            if pids and reason == "exited":
                _say_who_goes_on(pids, netns=self._netns)

    def _pass_on(self, came: Sequence[signal.Signals]) -> None:
        for number in came:
            if number in (*_PASSED_ON, *_SENT):
                os.kill(self._command.pid, number)

    def _outlived(self) -> bool:
        """Whether to wait for the command's children."""
        if not (self._wait and self._limited):
            return False
        if not self._live.cgroups:
            return bool(self._live.processes())
        cgroup = self._live.cgroups[0]
        return (cgroup.exists() and cgroup.populated()) or bool(self._live.processes())
