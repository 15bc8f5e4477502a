"""The token bucket in the kernel, at the cgroup's ingress and egress hooks."""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import contextmanager, suppress
from functools import cache, partial
from threading import Thread
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle import cgroup, objects, process, sockets
from pybpfthrottle.backends import Limits, Options, Priority, Targets, connections
from pybpfthrottle.backends.adoption import Adoption
from pybpfthrottle.backends.attach import ATTACH_TYPES, attach
from pybpfthrottle.backends.connections import SOCKETS
from pybpfthrottle.backends.guard import Guard
from pybpfthrottle.backends.marks import MARKS, PROCESSES, Marks
from pybpfthrottle.backends.pacer import Pacer, Seen
from pybpfthrottle.backends.records import (
    INVERSE_RATE_SHIFT,
    THROTTLE_LOOPBACK,
    THROTTLE_MAGIC,
    THROTTLE_VERSION,
    ThrottleBucket,
    ThrottleConfig,
    ThrottleFlows,
    ThrottleStats,
)
from pybpfthrottle.backends.shaping import POLICE, Shaping
from pybpfthrottle.backends.shaping import choose as shaping_for
from pybpfthrottle.bpf import features, loader, privileges
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.links import Attachment
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.specs import ObjectSpec
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.errors import (
    AttachError,
    BpfError,
    CgroupError,
    Error,
    NoMarksError,
    ThrottleError,
)
from pybpfthrottle.limits import Counters, Direction, Rate
from pybpfthrottle.selection import Selection
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.sockets import Borrowed

log = logging.getLogger(__name__)

_MS = 1_000_000
_NS_PER_S = 1_000_000_000

# One packet as large as they come, at least.
BURST_BYTES = 64 * 1024
# How much longer small packets pass: a ping is not caught behind a bulk transfer.
SMALL_NS = 20 * _MS
# As in shape.h.
EPOCH_SHIFT = 30
PACING_SLACK_NS = 300 * _MS
MARKER = "pybpft_create"


def config_for(
    rate: Optional[Rate], *, loopback: bool, shaping: Shaping = POLICE
) -> ThrottleConfig:
    """The record for a rate, in units that spare the program each division."""
    owner = process.identity()
    config = ThrottleConfig(
        magic=THROTTLE_MAGIC,
        version=THROTTLE_VERSION,
        owner_pid=owner.pid,
        owner_pid_namespace=owner.pid_namespace,
        owner_start_ticks=owner.start_ticks,
        flags=shaping.flags | (THROTTLE_LOOPBACK if loopback else 0),
    )
    if rate is None:
        return config
    per_s = rate.bytes_per_s
    # At low rates both grow, in proportion, until they hold the largest packet.
    stretch = max(1.0, BURST_BYTES * _NS_PER_S / per_s / shaping.burst_ns)
    config.rate_bytes_per_s = per_s
    config.inverse_rate = (_NS_PER_S << INVERSE_RATE_SHIFT) // per_s
    config.credit_ns = int(shaping.credit_ns * stretch)
    config.debt_ns = int(shaping.debt_ns * stretch)
    config.small_ns = SMALL_NS
    return config


class _Placed(NamedTuple):
    """A program where it is attached."""

    program: str
    target: Cgroup
    hook: AttachType
    policy: AttachPolicy
    attachment: Attachment


class _Kind(NamedTuple):
    """Whose packets programs are for: all of a cgroup, or those of marked sockets."""

    letter: str  # in front of the hook in the programs' names
    read: Callable[[], ObjectSpec]

    def policer(self, direction: Direction, verdict: str) -> str:
        """The program for a direction; ``verdict`` is one of EGRESS_VERDICTS."""
        if direction is Direction.DOWNLOAD:
            return f"pybpft_{self.letter}ingress"
        if verdict == "auto":
            verdict = "congestion" if features.CONGESTION_VERDICT.available() else "deny"
        return f"pybpft_{self.letter}egress{'cn' if verdict == 'congestion' else ''}"

    @property
    def shaper(self) -> str:
        """The program that shapes."""
        return f"pybpft_{self.letter}sockops"


@cache
def _read_object() -> ObjectSpec:
    """The faster one, where this kernel takes it."""
    direct = features.DIRECT_PACKET_ACCESS.available()
    return objects.read("throttle-direct" if direct else "throttle")


@cache
def _read_marked() -> ObjectSpec:
    return objects.read("throttle-marked")


_ALL, _MARKED = _Kind("", _read_object), _Kind("m", _read_marked)


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
        self._place_policers(_ALL, cgroups)
        if self._shape(_ALL, cgroups):
            with self._adopting(_ALL, cgroups) as adopt:
                for found in sockets.Scan().new(connections.pids(cgroups)):
                    adopt(found)

    def limit_processes(self, selection: Selection) -> None:
        """The packets of the sockets that processes have, and make.

        Raises AttachError, CgroupError, ProcessError or ThrottleError.
        """
        cgroups = self._place_marked(selection)
        shaped = self._shape(_MARKED, cgroups)
        self._marks = Marks(
            selection,
            self._maps[MARKS],
            self._maps[PROCESSES],
            partial(self._adopting, _MARKED, cgroups if shaped else ()),
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
            self._place_policers(_MARKED, cgroups)
            if selection.new_sockets:
                self._place_all(MARKER, cgroups, AttachType.CGROUP_INET_SOCK_CREATE)
        except AttachError:
            self._detach_but(count)
            raise

    def _place_policers(self, kind: _Kind, cgroups: Sequence[Cgroup]) -> None:
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
            if placed.attachment.rung.partition(" ")[0] == method:
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

    def _shape(self, kind: _Kind, cgroups: Sequence[Cgroup]) -> bool:
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
        self, kind: _Kind, cgroups: Sequence[Cgroup]
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
        rungs = sorted({placed.attachment.rung for placed in self._placed if placed.hook is hook})
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


class EbpfBackend:
    """Linux 4.10 with cgroup v2; nothing outside of the cgroup is touched."""

    name = "ebpf"
    priority = Priority.BEST

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Why it cannot limit this direction here, or None."""
        try:
            cgroup.mount()
        except CgroupError as error:
            return str(error)
        refused = features.CGROUP_SKB.missing()
        if refused is None:
            return None
        if isinstance(refused, OSError) and refused.errno in (errno.EPERM, errno.ENOSYS):
            return privileges.why_refused(refused, "BPF_PROG_LOAD")
        return f"this kernel does not take cgroup_skb programs (CONFIG_CGROUP_BPF): {refused}"

    def prepare(self) -> None:
        """Read the object ahead; what is wrong with it is told when it is applied."""
        with suppress(Error):
            _read_object()

    def apply(self, targets: Targets, limits: Limits, options: Options) -> EbpfHandle:
        """Load once, and attach to each target.

        Raises BpfError, CgroupError, ProcessError or ThrottleError; then all is undone.
        """
        kinds = [_ALL] if targets.cgroups else []
        kinds += [_MARKED] if targets.processes is not None else []
        handle: Optional[EbpfHandle] = None
        try:
            for kind in kinds:
                try:
                    handle = _load(kind, targets, limits, options, handle)
                except BpfError as error:
                    if kind is _MARKED:
                        raise NoMarksError(
                            f"the kernel takes no marks on sockets: {error}"
                        ) from error
                    raise
            if handle is None:
                raise ThrottleError("no target was given")
            # First: it may be needed as soon as something is shaped, and is to be forked before
            # there is a thread.
            if options.guard:
                handle.guard()
            if targets.cgroups:
                handle.limit_cgroups(targets.cgroups)
            if targets.processes is not None:
                handle.limit_processes(targets.processes)
            handle.follow()
        except BaseException:
            if handle is not None:
                handle.remove()
            raise
        return handle


def _load(
    kind: _Kind,
    targets: Targets,
    limits: Limits,
    options: Options,
    handle: Optional[EbpfHandle],
) -> EbpfHandle:
    """The programs of a kind, with the shaper if it is wanted and this kernel takes it.

    They share the maps of what ``handle`` has already.
    """
    programs = {kind.policer(direction, options.egress_verdict): direction for direction in limits}
    wanted = any(
        shaping_for(direction, rate, options.shape.get(direction, "auto")).flags
        for direction, rate in limits.items()
    )
    names = [*programs, *([MARKER] if kind is _MARKED else [])]
    spec = kind.read()
    refused = None
    for more in ([*names, kind.shaper], names) if wanted else (names,):
        try:
            loaded = loader.load(spec, more, maps=handle.maps if handle else {})
            break
        except BpfError as error:
            if more is names:
                raise
            refused = str(error)
            log.debug("This kernel does not take %s: %s", ", ".join(more), error)
    for name, direction in programs.items():
        log.debug(
            "Program '%s' loaded with expected_attach_type: Some(%s)",
            name,
            "Ingress" if direction is Direction.DOWNLOAD else "Egress",
        )
    if handle is None:
        handle = EbpfHandle(loaded, targets, limits, options, object_name=spec.name)
    else:
        handle.add(loaded)
    handle.begin(refused if wanted and kind.shaper not in loaded.programs else None)
    return handle
