"""The token bucket in the kernel, at the cgroup's ingress and egress hooks."""

from __future__ import annotations

import errno
import logging
import time
from contextlib import suppress
from functools import cache
from typing import NamedTuple, Optional, Sequence

from pybpfthrottle import cgroup, objects, process
from pybpfthrottle.backends import Limits, Options, Priority, connections
from pybpfthrottle.backends.attach import ATTACH_TYPES, attach
from pybpfthrottle.backends.connections import SOCKETS
from pybpfthrottle.backends.guard import Guard
from pybpfthrottle.backends.records import (
    INVERSE_RATE_SHIFT,
    THROTTLE_LOOPBACK,
    THROTTLE_MAGIC,
    THROTTLE_VERSION,
    ThrottleBucket,
    ThrottleConfig,
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
from pybpfthrottle.bpf.specs import ObjectSpec
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.errors import AttachError, BpfError, CgroupError, Error, ThrottleError
from pybpfthrottle.limits import Counters, Direction, Rate
from pybpfthrottle.settings import AttachPolicy

log = logging.getLogger(__name__)

_MS = 1_000_000
_NS_PER_S = 1_000_000_000

# One packet as large as they come, at least.
BURST_BYTES = 64 * 1024
# How much longer small packets pass: a ping is not caught behind a bulk transfer.
SMALL_NS = 20 * _MS
SHAPER, ADOPTER = "pybpft_sockops", "pybpft_adopt"


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


class EbpfHandle:
    """One object loaded for one throttle: its maps, its programs, and where they are attached."""

    def __init__(
        self,
        loaded: Object,
        limits: Limits,
        options: Options,
        *,
        object_name: str,
        cannot_shape: Optional[str],
    ) -> None:
        self._loaded = loaded
        self._options = options
        self._object_name = object_name
        self._cannot_shape = cannot_shape
        self._rates = dict(limits)
        self._shapings = dict.fromkeys(limits, POLICE)
        self._placed: list[_Placed] = []
        self._guard: Optional[Guard] = None
        self._configs: Map[int, ThrottleConfig] = loaded.maps["CGROUP_CONFIGS"].typed(
            U32, StructureCodec(ThrottleConfig)
        )
        self._buckets: Map[int, ThrottleBucket] = loaded.maps["CGROUP_BUCKETS"].typed(
            U32, StructureCodec(ThrottleBucket)
        )
        self._stats: Map[int, list[ThrottleStats]] = loaded.maps["CGROUP_STATS"].typed(
            U32, StructureCodec(ThrottleStats)
        )

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

    def burst_bytes(self, direction: Direction) -> int:
        """Credit, debt, and the packet that goes into debt."""
        rate = self._rates[direction]
        if rate is None:
            return 0
        config = self._configs[direction]
        time_ns: int = config.credit_ns + config.debt_ns + config.small_ns
        time_ns += self._buckets[direction].slack_ns
        return rate.bytes_per_s * time_ns // _NS_PER_S + BURST_BYTES

    def place(self, program: str, target: Cgroup, hook: AttachType, policy: AttachPolicy) -> None:
        """Attach one of the loaded programs. Raises AttachError or CgroupError."""
        attachment = attach(self._loaded.programs[program], target, hook, policy)
        self._placed.append(_Placed(program, target, hook, policy, attachment))

    def switch(self, method: str) -> None:
        """For each program first the new attachment, then the end of the old one."""
        for index, placed in enumerate(self._placed):
            if placed.attachment.rung.partition(" ")[0] == method:
                continue
            policy = placed.policy._replace(method=method)
            program = self._loaded.programs[placed.program]
            attachment = attach(program, placed.target, placed.hook, policy)
            self._placed[index] = placed._replace(attachment=attachment)
            placed.attachment.detach()

    def shape(self, cgroups: Sequence[Cgroup]) -> None:
        """Attach the shaper. Where another tool's program refuses it, the policer is left."""
        if SHAPER not in self._loaded.programs:
            return
        count = len(self._placed)
        policy = self._options.attach.get(next(iter(self._rates)), AttachPolicy())
        try:
            for target in cgroups:
                self.place(SHAPER, target, AttachType.CGROUP_SOCK_OPS, policy)
        except AttachError as error:
            self._detach_but(count)
            self._cannot_shape = str(error)
            for direction, rate in self._rates.items():
                self.set_rate(direction, rate)
        else:
            self._adopt(cgroups)

    def _adopt(self, cgroups: Sequence[Cgroup]) -> None:
        """Shape the connections that are open already; where that is refused, they are policed."""
        if ADOPTER not in self._loaded.programs:
            return
        count = len(self._placed)
        try:
            for target in cgroups:
                self.place(ADOPTER, target, AttachType.CGROUP_SETSOCKOPT, AttachPolicy())
            refused = connections.adopt(cgroups)
        except (BpfError, OSError) as error:
            log.debug("Connections that are open are not shaped: %s", error)
        else:
            if refused:
                log.info("%d connections that were open are policed, not shaped", refused)
                self._leave_room()
        finally:
            self._detach_but(count)
            self._loaded.programs.pop(ADOPTER).close()

    def _leave_room(self) -> None:
        """As long a burst as the policer has, for connections that nothing else slows down."""
        for direction, shaping in self._shapings.items():
            bucket = self._buckets[direction]
            bucket.slack_ns = max(bucket.slack_ns, POLICE.burst_ns - shaping.burst_ns)
            self._buckets[direction] = bucket

    def remove(self) -> None:
        """Give connections back what they had, detach everything, and close what was loaded."""
        try:
            if self._placed:
                self._restore()
            if self._guard is not None:
                self._guard.end()
                self._guard = None
            self._detach_but(0)
        finally:
            self._loaded.close()

    def _detach_but(self, count: int) -> None:
        """The last ones first, until so many are left."""
        while len(self._placed) > count:
            self._placed.pop().attachment.detach()

    def guard(self) -> None:
        """Have connections restored also if this process is killed."""
        if SOCKETS in self._loaded.maps:
            self._guard = Guard(self._cgroups(), self._loaded.maps[SOCKETS])

    def _restore(self) -> None:
        if SOCKETS not in self._loaded.maps:
            return
        for direction in self._rates:
            # The shaper sets nothing any more.
            self._configs[direction] = config_for(None, loopback=False)
        connections.restore(self._cgroups(), self._loaded.maps[SOCKETS])

    def _cgroups(self) -> list[Cgroup]:
        return list(dict.fromkeys(placed.target for placed in self._placed))

    def describe(self, direction: Direction) -> dict[str, str]:
        """How it is attached and shaped, and which of the shipped objects it comes from."""
        hook = ATTACH_TYPES[direction]
        rungs = sorted({placed.attachment.rung for placed in self._placed if placed.hook is hook})
        shaping = self._shapings[direction]
        if shaping.flags & ~self._configs[direction].flags and self._rates[direction] is not None:
            shaping = Shaping("police", f"the kernel refused what {shaping.method} needs")
        return {
            "backend": "ebpf",
            "object": self._object_name,
            "attached_by": "+".join(rungs),
            "shape": shaping.method,
            "shape_reason": shaping.reason,
        }


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

    def apply(self, cgroups: Sequence[Cgroup], limits: Limits, options: Options) -> EbpfHandle:
        """Load once, and attach to each cgroup.

        Raises BpfError or CgroupError; then all is undone.
        """
        programs = {_program_name(direction, options): direction for direction in limits}
        spec = _read_object()
        loaded, cannot_shape = _load(spec, list(programs), limits, options)
        handle = EbpfHandle(
            loaded, limits, options, object_name=spec.name, cannot_shape=cannot_shape
        )
        try:
            for name, direction in programs.items():
                log.debug(
                    "Program '%s' loaded with expected_attach_type: Some(%s)",
                    name,
                    "Ingress" if direction is Direction.DOWNLOAD else "Egress",
                )
                handle.set_rate(direction, limits[direction])
            policies = {
                direction: options.attach.get(direction, AttachPolicy()) for direction in limits
            }
            for target in cgroups:
                for name, direction in programs.items():
                    handle.place(name, target, ATTACH_TYPES[direction], policies[direction])
            handle.shape(cgroups)
            if options.guard:
                handle.guard()
        except BaseException:
            handle.remove()
            raise
        return handle


def _load(
    spec: ObjectSpec, programs: list[str], limits: Limits, options: Options
) -> tuple[Object, Optional[str]]:
    """With the shaper, if it is wanted and this kernel takes it; else why it does not."""
    wanted = any(
        shaping_for(direction, rate, options.shape.get(direction, "auto")).flags
        for direction, rate in limits.items()
    )
    if not wanted:
        return loader.load(spec, programs), None
    for more in ([SHAPER, ADOPTER], [SHAPER]):
        try:
            return loader.load(spec, [*programs, *more]), None
        except BpfError as error:
            log.debug("This kernel does not take %s: %s", " and ".join(more), error)
            refused = str(error)
    return loader.load(spec, programs), refused


@cache
def _read_object() -> ObjectSpec:
    """The faster one, where this kernel takes it."""
    direct = features.DIRECT_PACKET_ACCESS.available()
    return objects.read("throttle-direct" if direct else "throttle")


def _program_name(direction: Direction, options: Options) -> str:
    if direction is Direction.DOWNLOAD:
        return "pybpft_ingress"
    verdict = options.egress_verdict
    if verdict == "auto":
        verdict = "congestion" if features.CONGESTION_VERDICT.available() else "deny"
    return "pybpft_egresscn" if verdict == "congestion" else "pybpft_egress"
