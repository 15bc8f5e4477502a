"""Limits on single sockets by throttles that share a bank: one set of programs for them all.

The kernel attaches at most 64 programs at each hook of a cgroup, and marked sockets may be of any
cgroup, so the programs for them are at the root. A socket's mark is the slot of its throttle, and
one set of programs enters the shared ones for whichever slot it finds.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import connections, programs
from pybpfthrottle.backends.ebpf.connections import SOCKETS
from pybpfthrottle.backends.ebpf.loaded import Loaded
from pybpfthrottle.backends.ebpf.marks import MARKS, PROCESSES, Processes, Tracing, processes_in
from pybpfthrottle.backends.ebpf.placed import Placements
from pybpfthrottle.backends.ebpf.programs import ENTRIES, Scope
from pybpfthrottle.backends.ebpf.records import RECORD
from pybpfthrottle.backends.ebpf.registry import RecordMap
from pybpfthrottle.backends.ebpf.shared import Seat, sharing
from pybpfthrottle.backends.protocol import Order
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.loader import Loadable
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.errors import AttachError, Error
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import descendants, process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import MIN_RATE, Direction, Target, ThrottleSpec

log = Logger(__name__)

# All throttles look at their processes in the same moment, so that a map of many is read once.
_FRESH_S = 0.05
_MANY = 50
NOT_SHAPED = "TCP is not shaped, packets over the limit are dropped"
_GATE = programs.gate(Scope.MARKED)


class Crowd:
    """The programs at the root, and the marks and processes of all throttles in a bank."""

    def __init__(self, seat: Seat) -> None:
        """Load all programs but the gate, and try to attach them. Raises Error or OSError."""
        self._bank = bank = seat.bank
        self._seat = Seat(bank, 0, None)
        self._closing = ExitStack()
        # All that a throttle may want: what it does not want is off in its slot.
        limits = dict.fromkeys(Direction, MIN_RATE)
        self._loaded = Loaded(limits, bank.terms.options)
        self._closing.callback(self._loaded.close)
        self.placed = Placements(self._loaded.programs)
        # How many throttles limit something: while there are none, nothing is attached.
        self._active = 0
        self._tracing: Optional[Tracing] = None
        self._untraced: Optional[Exception] = None
        # Why connections are not shaped, if they are not.
        self.unshaped: Optional[str] = None
        # What a user should know, a line each.
        self.notes: list[str] = []
        self._slots: dict[int, int] = {}
        self._slots_s = -math.inf
        with ExitStack() as undo:
            undo.callback(self.close)
            self._load()
            self._attach()
            self.placed.detach()
            undo.pop_all()

    def _load(self) -> None:
        self._loaded.share(self._seat)
        self.unshaped = self._loaded.load(Scope.MARKED, lambda: programs.read(ENTRIES))
        self.processes = processes_in(self._loaded.maps)
        # By it others know whose the programs are. It has no id: it is no throttle.
        spec = ThrottleSpec(Target(), {}, self._bank.terms.traffic)
        record = {"owner": list(process.identity()), "cgroups": [], "spec": spec.to_json()}
        RecordMap(self._loaded.maps[RECORD]).write(record)
        self._records = self._closing.enter_context(Loadable(programs.read(ENTRIES), []))

    def begin(self) -> None:
        """A throttle is about to limit something. Raises AttachError; then it does not."""
        with sharing.busy:
            if not self._active:
                self._attach()
            self._active += 1

    def end(self) -> None:
        """A throttle does not limit anything any more. Each call needs one of ``begin``."""
        with sharing.busy:
            self._active -= 1
            if not self._active:
                self._detach()

    def _attach(self) -> None:
        with ExitStack() as undo:
            self.placed = Placements(self._loaded.programs)
            undo.callback(self.placed.detach)
            self.placed.attach(self._loaded.policers(Scope.MARKED, self.cgroups))
            self.placed.attach(self._loaded.markers(self.cgroups))
            self._attach_shaper()
            if self._bank.terms.kept and not self.placed.are_links():
                raise AttachError("what is shared and stays has to be attached by links")
            undo.pop_all()

    def _attach_shaper(self) -> None:
        shaper = self._loaded.shaper(Scope.MARKED)
        if shaper is None:
            return
        self.notes = []
        try:
            self.placed.attach(self._loaded.everywhere(shaper, self.cgroups))
            self.unshaped = None
        except AttachError as error:
            self.unshaped = str(error)
            self.notes = [f"{NOT_SHAPED}: {error}"]

    def _detach(self) -> None:
        """Give connections back what they had, and detach the programs."""
        with ExitStack() as steps:
            steps.callback(self.placed.detach)
            # Of earlier throttles some may not have sent anything since.
            holders = connections.pids(self.cgroups)
            connections.restore(holders, self._loaded.maps[SOCKETS])

    @property
    def cgroups(self) -> list[Cgroup]:
        """Where it is attached."""
        return [cgroups_v2.root()]

    @property
    def maps(self) -> dict[str, Map[Any, Any]]:
        """The maps that its throttles share, beside those of the bank."""
        return {name: self._loaded.maps[name] for name in (MARKS, PROCESSES)}

    @property
    def traced(self) -> Mapping[str, Map[Any, Any]]:
        """The maps for programs that follow processes."""
        return self._loaded.maps

    def new_record(self, slot: int) -> Map[Any, Any]:
        """Return a map for the record of a throttle; the caller closes it."""
        record = self._records.create(RECORD)
        RecordMap(record).begin(slot)
        return record

    def open_gate(self, ring: Map[Any, Any]) -> None:
        """Load the gate, with a keeper's ring, and attach it. Raises Error or OSError."""
        with sharing.busy:
            if _GATE.name in self._loaded.programs:
                self._bank.provide(_GATE, ring)
            else:
                self._loaded.add(self._bank.load([_GATE.name], self._loaded.maps, ring))
            if not self.placed.has(_GATE):
                self.placed.attach(self._loaded.everywhere(_GATE, self.cgroups))

    def trace(self) -> Tracing:
        """Follow the processes in the map from now on. Raises what Tracing.begin raises."""
        with sharing.busy:
            if self._untraced is not None:
                raise self._untraced
            if self._tracing is not None:
                return self._tracing
            try:
                self._tracing = Tracing.begin(self._loaded.maps, executions=False)
            except (Error, OSError) as error:
                # Without the frames that it came through: they hold megabytes.
                self._untraced = error.with_traceback(None)
                raise
            self._closing.callback(self._tracing.close)
            return self._tracing

    def links(self) -> Sequence[Link]:
        """Return what keeps the map of processes up to date in the kernel."""
        return () if self._tracing is None else self._tracing.links

    # Its processes.

    def is_live(self, slot: int) -> bool:
        """Whether there is a throttle in a slot."""
        return self._bank.is_live(slot)

    def limits(self, order: Order) -> bool:
        """Whether one of its throttles has some of an order's processes already."""
        if order.processes is None:
            return False
        chosen = {one.pid for one in order.processes.processes}
        if order.processes.children:
            chosen |= descendants.of(chosen)
        return any(self._bank.is_live(self.slot_now(pid)) for pid in chosen)

    def slot_now(self, pid: int) -> int:
        """Return the slot of one process, as it is; 0 if no throttle has it."""
        found = self.processes.get(pid)
        return 0 if found is None else int(found.slot)

    def slots(self, fresh_s: float = _FRESH_S) -> dict[int, int]:
        """Return the slot of each process, as it was a moment ago at most."""
        now = time.monotonic()
        if now >= self._slots_s + fresh_s:
            self._slots = {pid: one.slot for pid, one in self.processes.items()}
            self._slots_s = now
        return self._slots

    def close(self) -> None:
        """Close all."""
        self._closing.close()


class Member(Processes):
    """The processes of one throttle of a crowd."""

    def __init__(self, crowd: Crowd, slot: int) -> None:
        super().__init__(crowd.maps, slot)
        self._crowd = crowd

    def pids(self) -> list[int]:
        """Return them; where there are many, as they were a moment ago at most."""
        slots = self._crowd.slots()
        if len(slots) < _MANY:
            slots = self._crowd.slots(fresh_s=0)
        return self._own(slots)

    def _own(self, slots: Mapping[int, int]) -> list[int]:
        # Another thread may begin a throttle meanwhile.
        return [pid for pid, slot in list(slots.items()) if slot == self.slot]

    def add(self, pid: int, *, follow: bool) -> None:
        """Add one, which is then no other throttle's any more."""
        super().add(pid, follow=follow)
        self._crowd.slots()[pid] = self.slot

    def discard(self, pid: int) -> None:
        """Remove one, unless it is another throttle's by now."""
        if self._crowd.slot_now(pid) == self.slot:
            super().discard(pid)
        if self._crowd.slots().get(pid) == self.slot:
            del self._crowd.slots()[pid]

    def are_others(self, pid: int) -> bool:
        """Whether another throttle limits a process."""
        slot = self._crowd.slots().get(pid, self.slot)
        return slot != self.slot and self._crowd.is_live(slot)

    def may_replace(self, mark: int) -> bool:
        """Whether the throttle that a socket is marked for has ended."""
        return mark != self.slot and not self._crowd.is_live(mark)

    def follow(self, *, executions: bool) -> Optional[Tracing]:
        """Follow them from now on. Raises what Tracing.begin raises."""
        self._tracing = self._crowd.trace()
        if not executions:
            return None
        return Tracing.begin(self._crowd.traced, executions=True, processes=False)

    def end(self) -> None:
        """Remove all, and last what they have started in the last moment."""
        if self._expects and self._tracing is not None:
            self._tracing.forget(self.slot)
        self._discard_all(self.pids())
        while pids := self._own(self._crowd.slots(fresh_s=0)):
            self._discard_all(pids)

    def _discard_all(self, pids: Iterable[int]) -> None:
        for pid in pids:
            self.discard(pid)


def join(seat: Seat) -> Optional[Crowd]:
    """Return the crowd of a seat's bank, made if there is none; None if it cannot be had."""
    bank = seat.bank
    with sharing.busy:
        if bank.crowd is None and bank.no_crowd is None:
            try:
                bank.crowd = Crowd(seat)
            except (Error, OSError) as error:
                log.info("Limits on processes cannot share programs: %s", error)
                bank.no_crowd = str(error)
        return bank.crowd
