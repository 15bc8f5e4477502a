"""Shows a throttle while it is in force: the live line, JSON lines, the log and the summary."""

from __future__ import annotations

import sys
from contextlib import suppress
from errno import ENOSPC
from typing import TYPE_CHECKING, Any, Optional, Sequence, TextIO

from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.cli.display import LiveLine
from pybpfthrottle.cli.passage import Passage
from pybpfthrottle.cli.records import JSON, Output, Sample
from pybpfthrottle.cli.report import NOTHING_PASSED, never_ran, not_working
from pybpfthrottle.cli.say import PROGRAM, echo, echo_lines, say
from pybpfthrottle.errors import Error
from pybpfthrottle.idle import Idleness, Reason
from pybpfthrottle.linux import cgroup
from pybpfthrottle.logger import Logger
from pybpfthrottle.meter import Meter, Reading
from pybpfthrottle.model import Limits
from pybpfthrottle.throttle import Throttle
from pybpfthrottle.witness import RoundTrips

if TYPE_CHECKING:
    from pybpfthrottle.conditions.network import Network
    from pybpfthrottle.proof import Proof, Prover

log = Logger(__name__)

SAMPLE_S = 1.0
# A limit may begin between a packet and its answer.
_FIRST_SECONDS_S = 2.5


class Watch:
    """One throttle's display. ``pid`` and ``name`` identify the process in log lines.

    As one of ``several`` it has no live line, and each JSON line has the pid. In the ``background``
    there is no live line either.
    """

    def __init__(
        self,
        live: Throttle,
        *,
        pid: Optional[int],
        name: str,
        terminal: TextIO,
        outputs: Sequence[Output],
        quiet: bool,
        prefix: str = "",
        several: bool = False,
        background: bool = False,
        prove: bool = False,
        network: Optional[Network] = None,
    ) -> None:
        self._live = live
        self._network = network
        self._pid = "-" if pid is None else str(pid)
        self._name = f" ({name})" if name else ""
        self._terminal = terminal
        taken = [one for one in outputs if one.on_stdout and terminal is sys.stdout]
        self._line = LiveLine(terminal, enabled=not (several or background or quiet or taken))
        self._outputs = outputs
        self._taken = bool(taken)
        self._recorders = [one.recorder(pid, several=several) for one in outputs]
        self._quiet = quiet or bool(taken)
        # CSV has no place for notes.
        self._says_notes = not quiet and not any(one.form == JSON for one in taken)
        self._prefix = prefix
        self._meter = Meter(live)
        self._limits: Limits = live.limits
        self._passage = Passage(live)
        self._backends = {
            direction: get_backend(how["backend"]) for direction, how in live.how().items()
        }
        self._round_trips = RoundTrips(live)
        self._idleness = Idleness(live, pid)
        self._prover: Optional[Prover] = None
        self._proves = prove
        self._told_waiting = False
        self.refuted = False
        self._told_not_working = False
        self._full = False

    def start(self, **fields: Any) -> None:
        """The limits are in force."""
        for recorder in self._recorders:
            about = {} if self._network is None else {"network": self._network.to_json()}
            recorder.start(self._live, **fields, **about)
        if self._proves:
            from pybpfthrottle.proof import Prover

            self._prover = Prover(self._live)
        if self._recorders:
            self._round_trips.begin()

    def sample(self) -> None:
        """Show the rates of the last seconds; call this every SAMPLE_S."""
        self._tell_changes()
        readings = self._meter.sample()
        if not any(reading.counters.program_calls for reading in readings):
            self._passage.look()
            self._tell_if_not_working()
        reason = self._why_idle(readings)
        self._line.draw(readings, self._injected() or (reason.text if reason else ""))
        self._record(readings, reason)
        if self._prover is not None:
            self._tell(self._prover.sample())
        for reading in readings:
            log.info("PID %s%s %s", self._pid, self._name, reading.line())
            log.info(
                "%s stats PID %s cgroup %s: %s",
                *(self._backends[reading.direction].title, self._pid, self._cgroup_id()),
                reading.counters,
            )

    def _injected(self) -> str:
        """Return what the network has done, for the live line; empty without one."""
        if self._network is None or not self._line.enabled:
            return ""
        return "   ".join(self._network.told())

    def _told_network(self) -> Optional[dict[str, Any]]:
        """Return what the network has done, for JSON."""
        return None if self._network is None else self._network.to_json()

    def _why_idle(self, readings: Sequence[Reading]) -> Optional[Reason]:
        """Return why nothing passes, where somebody reads it."""
        if not (self._recorders or self._line.enabled):
            return None
        return self._idleness.sample(_counted(readings))

    def _record(self, readings: list[Reading], reason: Optional[Reason]) -> None:
        if not self._recorders:
            return
        idle = reason.to_json() if reason else None
        trip = self._round_trips.sample(_counted(readings))
        sample = Sample(self._meter.elapsed_s, readings, trip, idle, self._told_network())
        for recorder in self._recorders:
            recorder.sample(sample)

    def end(self, *, expect_traffic: bool = True, **fields: Any) -> None:
        """Show the rates over the whole time, while the counters still exist."""
        self._line.close()
        if self._prover is not None:
            self._tell(self._prover.end())
        last = self._meter.sample()
        readings = self._meter.total()
        for recorder in self._recorders:
            network = self._told_network()
            samples = (
                Sample(self._meter.elapsed_s, one, network=network) for one in (last, readings)
            )
            recorder.end(*samples, **fields)
        if self._quiet:
            return
        for reading in readings:
            self.say(reading.summary(self._meter.elapsed_s))
        if self._network is not None:
            for line in self._network.told():
                self.say(line)
        if expect_traffic and not any(reading.counters.program_calls for reading in readings):
            self._say_why_nothing()

    def _tell(self, proof: Optional[Proof]) -> None:
        """Say what a proof has shown, or once that there is nothing to prove yet."""
        if proof is None:
            if self._prover and self._prover.waits and not self._told_waiting:
                self._told_waiting = True
                self.note("Nothing has moved yet: the proof is made with the first traffic.")
            return
        self.refuted = proof.fails
        for recorder in self._recorders:
            recorder.proof(proof)
        if not self._taken:
            self.say(str(proof))
        elif self._says_notes:
            say(str(proof))

    def _say_why_nothing(self) -> None:
        """Say whether nothing has passed, or packets have passed unseen."""
        text = NOTHING_PASSED
        if self._passage.seen(thorough=True):
            marked = self._live.selection is not None
            text = never_ran(
                pid=self._pid,
                cgroup=self._cgroup_id(),
                backend=next(iter(self._backends.values())),
                marked=marked,
            )
        with suppress(OSError):
            echo_lines(text, err=True)

    def _tell_if_not_working(self) -> None:
        """Say once, after the first seconds, that the limit does not see what passes."""
        if (
            self._passage.was_seen
            and not self._told_not_working
            and self._meter.elapsed_s > _FIRST_SECONDS_S
        ):
            self._told_not_working = True
            self.note(not_working(next(iter(self._backends.values()))))

    def note(self, text: str) -> None:
        """Print a note on what is covered, to standard error or as a JSON line."""
        self._line.clear()
        self.record_note(text)
        if self._says_notes:
            say(self._prefix.removeprefix(PROGRAM) + text)

    def record_note(self, text: str) -> None:
        """Record a note that is said elsewhere."""
        for recorder in self._recorders:
            recorder.note(text)

    def _tell_changes(self) -> None:
        """Report limits that somebody else has changed."""
        before, self._limits = self._limits, self._live.limits
        for direction, rate in self._limits.items():
            if before[direction] != rate:
                self.note(f"The {direction} limit was changed to {rate or 'none'}.")

    def say(self, line: str) -> None:
        """Print a line for people. Ignore a terminal or reader that is gone."""
        try:
            echo(self._prefix + line, file=self._terminal)
        except OSError as error:
            self._full = self._full or error.errno == ENOSPC

    def failed(self) -> bool:
        """Whether records or lines could not be written for lack of space."""
        return self._full or any(output.failed for output in self._outputs)

    def _cgroup_id(self) -> str:
        try:
            if self._live.cgroups:
                return str(self._live.cgroups[0].id)
            return str(cgroup.from_pid(int(self._pid)).id)
        except (OSError, Error, ValueError):  # gone, or there are several
            return "?"


def _counted(readings: Sequence[Reading]) -> int:
    """Return the bytes that a throttle has counted in all."""
    return sum(reading.counters.bytes_total for reading in readings)
