"""A throttle that is in force: its maps, its programs, and where they are attached."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle.backends import Limits, Options, Targets
from pybpfthrottle.backends.ebpf import connections
from pybpfthrottle.backends.ebpf.adoption import Adoption
from pybpfthrottle.backends.ebpf.attach import ATTACH_TYPES, attach, rung
from pybpfthrottle.backends.ebpf.bucket import BURST_BYTES, config_for
from pybpfthrottle.backends.ebpf.connections import SOCKETS
from pybpfthrottle.backends.ebpf.guard import Guard
from pybpfthrottle.backends.ebpf.kinds import ALL, MARKED, MARKER, Kind
from pybpfthrottle.backends.ebpf.marks import MARKS, PROCESSES, Marks
from pybpfthrottle.backends.ebpf.pacer import Pacer, Seen
from pybpfthrottle.backends.ebpf.records import (
    ThrottleBucket,
    ThrottleConfig,
    ThrottleFlows,
    ThrottleStats,
)
from pybpfthrottle.backends.ebpf.shaping import POLICE, Shaping
from pybpfthrottle.backends.ebpf.shaping import choose as shaping_for
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.links import Attachment
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.errors import (
    AttachError,
    ThrottleError,
)
from pybpfthrottle.linux import cgroup, sockets
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import Borrowed
from pybpfthrottle.model import Counters, Direction, Rate
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.targets import Selection

log = logging.getLogger(__name__)

_MS = 1_000_000
_NS_PER_S = 1_000_000_000
# As in shape.h.
EPOCH_SHIFT = 30
PACING_SLACK_NS = 300 * _MS


class _Placed(NamedTuple):
    """A program where it is attached."""

    program: str
    target: Cgroup
    hook: AttachType
    policy: AttachPolicy
    attachment: Attachment


class EbpfHandle:
    """What was loaded for one throttle: its maps, its programs, and where they are attached."""

    def __init__(
        self,
        loaded: Object,
        targets: Targets,
        limits: Limits,
        options: Options,
        *,
        object_name: str,
    ) -> None:
        self._targets = targets
        self._objects = [loaded]
        self._programs: dict[str, Program] = dict(loaded.programs)
        self._maps: dict[str, Map[Any, Any]] = dict(loaded.maps)
        self._options = options
        self._object_name = object_name
        self._cannot_shape: Optional[str] = None
        self._rates = dict(limits)
        self._shapings = dict.fromkeys(limits, POLICE)
        self._placed: list[_Placed] = []
        self._guard: Optional[Guard] = None
        self._pacer: Optional[Pacer] = None
        self._unadopted = 0
        self._marks: Optional[Marks] = None
        self._follower: Optional[_Follower] = None
        self._follows = False
        self._notes: list[str] = []
        self._configs: Map[int, ThrottleConfig] = self._maps["CGROUP_CONFIGS"].typed(
            U32, StructureCodec(ThrottleConfig)
        )
        self._buckets: Map[int, ThrottleBucket] = self._maps["CGROUP_BUCKETS"].typed(
            U32, StructureCodec(ThrottleBucket)
        )
        self._stats: Map[int, list[ThrottleStats]] = self._maps["CGROUP_STATS"].typed(
            U32, StructureCodec(ThrottleStats)
        )

    @property
    def maps(self) -> dict[str, Map[Any, Any]]:
        """All maps, by name; those of one object are used by the next."""
        return self._maps

    def add(self, loaded: Object) -> None:
        """Programs of another object, which shares the maps of the first."""
        self._objects.append(loaded)
        self._programs.update(loaded.programs)
        self._maps.update(loaded.maps)

    def counters(self) -> dict[Direction, Counters]:
        """What each direction counted, over all CPUs."""
        return {
            direction: Counters(
                *(sum(getattr(cpu, name) for cpu in cpus) for name in Counters._fields)
            )
            for direction in self._rates
            for cpus in [self._stats[direction]]
        }

    def set_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit at once; what is owed is owed in bytes, so its time is scaled."""
        if direction not in self._rates:
            raise ThrottleError(f"this throttle was made without a limit for {direction}")
        old = self._rates[direction]
        wanted = self._options.shape.get(direction, "auto")
        shaping = shaping_for(direction, rate, wanted, refused=self._cannot_shape)
        self._configs[direction] = config_for(
            rate, loopback=self._options.loopback, shaping=shaping
        )
        self._shapings[direction] = shaping
        log.info("%s: %s, since %s", direction, shaping.method, shaping.reason)
        if old is not None and rate is not None:
            now = time.monotonic_ns()
            bucket = self._buckets[direction]
            owed_ns = bucket.even_at_ns - now
            if owed_ns > 0:
                bucket.even_at_ns = now + owed_ns * old.bytes_per_s // rate.bytes_per_s
                self._buckets[direction] = bucket
        self._rates[direction] = rate
        if self._pacer is not None and direction is Direction.UPLOAD:
            self._pacer.start(rate if shaping.method == "pace" else None)

    def burst_bytes(self, direction: Direction) -> int:
        """Credit, debt, and the packet that goes into debt."""
        rate = self._rates[direction]
        if rate is None:
            return 0
        config = self._configs[direction]
        time_ns: int = config.credit_ns + config.debt_ns + config.small_ns
        time_ns += self._buckets[direction].slack_ns
        return rate.bytes_per_s * time_ns // _NS_PER_S + BURST_BYTES

    def limit_cgroups(self, cgroups: Sequence[Cgroup]) -> None:
        """All packets of cgroups. Raises AttachError or CgroupError."""
        self._place_policers(ALL, cgroups)
        if self._shape(ALL, cgroups):
            with self._adopting(ALL, cgroups) as adopt:
                for found in sockets.Scan().new(connections.pids(cgroups)):
                    adopt(found)

    def limit_processes(self, selection: Selection) -> None:
        """The packets of the sockets that processes have, and make.

        Raises AttachError, CgroupError, ProcessError or ThrottleError.
        """
        cgroups = self._place_marked(selection)
        shaped = self._shape(MARKED, cgroups)
        self._marks = Marks(
            selection,
            self._maps[MARKS],
            self._maps[PROCESSES],
            partial(self._adopting, MARKED, cgroups if shaped else ()),
        )
        self._marks.begin()
        self._follows = selection.new_sockets

    def _place_marked(self, selection: Selection) -> list[Cgroup]:
        """At the top, where each socket is seen; or else at the cgroups of the processes."""
        top = cgroup.root()
        try:
            self._place_programs_for_marks([top], selection)
        except AttachError as error:
            own = dict.fromkeys(cgroup.from_pid(one.pid) for one in selection.processes)
            below = [one for one in own if one != top]
            if not below:
                raise
            self._place_programs_for_marks(below, selection)
            self._notes.append(
                f"sockets that were made in other cgroups than"
                f" {', '.join(one.path for one in below)} are not limited: {error}"
            )
            return below
        return [top]

    def _place_programs_for_marks(self, cgroups: Sequence[Cgroup], selection: Selection) -> None:
        count = len(self._placed)
        try:
            self._place_policers(MARKED, cgroups)
            if selection.new_sockets:
                self._place_all(MARKER, cgroups, AttachType.CGROUP_INET_SOCK_CREATE)
        except AttachError:
            self._detach_but(count)
            raise

    def _place_policers(self, kind: Kind, cgroups: Sequence[Cgroup]) -> None:
        for target in cgroups:
            for direction in self._rates:
                program = kind.policer(direction, self._options.egress_verdict)
                policy = self._options.attach.get(direction, AttachPolicy())
                self._place(program, target, ATTACH_TYPES[direction], policy)

    def _place_all(self, program: str, cgroups: Sequence[Cgroup], hook: AttachType) -> None:
        policy = self._options.attach.get(next(iter(self._rates)), AttachPolicy())
        for target in cgroups:
            self._place(program, target, hook, policy)

    def _place(self, program: str, target: Cgroup, hook: AttachType, policy: AttachPolicy) -> None:
        """Attach one of the loaded programs. Raises AttachError or CgroupError."""
        attachment = attach(self._programs[program], target, hook, policy)
        self._placed.append(_Placed(program, target, hook, policy, attachment))

    def switch(self, method: str) -> None:
        """For each program first the new attachment, then the end of the old one."""
        for index, placed in enumerate(self._placed):
            if rung(placed.attachment).partition(" ")[0] == method:
                continue
            policy = placed.policy._replace(method=method)
            program = self._programs[placed.program]
            attachment = attach(program, placed.target, placed.hook, policy)
            self._placed[index] = placed._replace(attachment=attachment)
            placed.attachment.detach()

    def begin(self, cannot_shape: Optional[str]) -> None:
        """Put the rates in force. ``cannot_shape`` is why the policer alone is left, or None."""
        self._cannot_shape = cannot_shape or self._cannot_shape
        for direction, rate in self._rates.items():
            self.set_rate(direction, rate)

    def _shape(self, kind: Kind, cgroups: Sequence[Cgroup]) -> bool:
        """Attach the shaper. Where another tool's program refuses it, the policer is left."""
        if kind.shaper not in self._programs:
            return False
        count = len(self._placed)
        try:
            self._place_all(kind.shaper, cgroups, AttachType.CGROUP_SOCK_OPS)
        except AttachError as error:
            self._detach_but(count)
            self.begin(str(error))
            return False
        if self._pacer is None:
            self._pacer = Pacer(self._pids, self._maps[SOCKETS], self._seen)
        return True

    @contextmanager
    def _adopting(
        self, kind: Kind, cgroups: Sequence[Cgroup]
    ) -> Iterator[Callable[[Borrowed], None]]:
        """Connections that were open before are shaped.

        Those that the kernel does not adopt have their uploads paced from outside, and their
        downloads policed.
        """
        if self._pacer is None or not cgroups:
            yield lambda found: None
            return
        with Adoption(kind.read(), self._maps, cgroups, self._pacer) as adoption:
            yield adoption
        if adoption.unadopted:
            self._unadopted += adoption.unadopted
            for direction, shaping in self._shapings.items():
                log.info("%s: of open connections %s", direction, self._open(direction))
                if direction is Direction.UPLOAD and shaping.method == "pace":
                    self._pacer.start(self._rates[direction])
            self._leave_room()

    def _open(self, direction: Direction) -> str:
        """What is done about connections that were open, and that the kernel did not adopt."""
        pace = self._shapings[direction].method == "pace"
        if direction is Direction.UPLOAD and pace and self._pacer:
            return f"{len(self._pacer)} paced from user space"
        return f"{self._unadopted} policed"

    def _seen(self) -> Seen:
        """What the programs know of uploads."""
        flows: ThrottleFlows = self._maps["CGROUP_FLOWS"].typed(U32, StructureCodec(ThrottleFlows))[
            Direction.UPLOAD
        ]
        even_at_ns = self._buckets[Direction.UPLOAD].even_at_ns
        now = time.monotonic_ns()
        epochs_ago = (now >> EPOCH_SHIFT) - flows.epoch
        return Seen(
            owed_ns=even_at_ns - now if even_at_ns else 0,
            passed=self.counters()[Direction.UPLOAD].bytes_passed,
            flows=(max(flows.now, flows.before), flows.now, 0)[min(epochs_ago, 2)],
        )

    def _leave_room(self) -> None:
        """As long a burst as the policer has, for connections that nothing else slows down."""
        for direction, shaping in self._shapings.items():
            bucket = self._buckets[direction]
            slack_ns = POLICE.burst_ns - shaping.burst_ns
            if direction is Direction.UPLOAD and self._pacer:
                slack_ns = PACING_SLACK_NS
            bucket.slack_ns = max(bucket.slack_ns, slack_ns)
            self._buckets[direction] = bucket

    def remove(self) -> None:
        """Give connections back what they had, detach everything, and close what was loaded."""
        try:
            if self._follower is not None:
                self._follower.end()
                self._follower = None
            if self._pacer is not None:
                self._pacer.end()
            if self._placed:
                self._restore()
            if self._guard is not None:
                self._guard.end()
                self._guard = None
            self._detach_but(0)
        finally:
            if self._marks is not None:
                self._marks.close()
            for loaded in self._objects:
                loaded.close()

    def _detach_but(self, count: int) -> None:
        """The last ones first, until so many are left."""
        while len(self._placed) > count:
            self._placed.pop().attachment.detach()

    def guard(self) -> None:
        """Have connections restored also if this process is killed."""
        if SOCKETS in self._maps:
            self._guard = Guard(self._holders, self._maps[SOCKETS])

    def follow(self) -> None:
        """Keep up to date, in a thread, what is limited and what of it is shaped."""
        if self._marks is not None and self._follows:
            self._follower = _Follower(self._marks)

    def processes(self) -> list[int]:
        """The selected processes that are limited now, and those that they have started."""
        return [] if self._marks is None else self._marks.pids()

    def notes(self) -> list[str]:
        """What is not covered, or covered besides, a line each."""
        return [*self._notes, *(self._marks.notes() if self._marks else ())]

    def _restore(self) -> None:
        if SOCKETS not in self._maps:
            return
        for direction in self._rates:
            # The shaper sets nothing any more.
            self._configs[direction] = config_for(None, loopback=False)
        connections.restore(self._holders(), self._maps[SOCKETS])

    def _pids(self) -> list[int]:
        """The processes whose sockets are limited."""
        return sorted({*connections.pids(self._targets.cgroups), *self.processes()})

    def _holders(self) -> list[int]:
        """All that may have a socket that was shaped: one with a mark may be handed over."""
        cgroups = self._targets.cgroups if self._targets.processes is None else [cgroup.root()]
        return connections.pids(cgroups)

    def describe(self, direction: Direction) -> dict[str, str]:
        """How it is attached and shaped, and which of the shipped objects it comes from."""
        hook = ATTACH_TYPES[direction]
        rungs = sorted({rung(placed.attachment) for placed in self._placed if placed.hook is hook})
        shaping = self._shapings[direction]
        if shaping.flags & ~self._configs[direction].flags and self._rates[direction] is not None:
            shaping = Shaping("police", f"the kernel refused what {shaping.method} needs")
        how = {
            "backend": "ebpf",
            "object": self._object_name,
            "attached_by": "+".join(rungs),
            "shape": shaping.method,
            "shape_reason": shaping.reason,
        }
        if self._unadopted:
            how["open_connections"] = self._open(direction)
        return how


class _Follower:
    """The thread in which marks are kept up to date."""

    def __init__(self, marks: Marks) -> None:
        self._stop, self._stopping = os.pipe()
        self._thread = Thread(target=marks.follow, args=(self._stop,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait until it has ended."""
        os.close(self._stopping)
        self._thread.join()
        os.close(self._stop)
