"""The token bucket in the kernel, at the cgroup's ingress and egress hooks."""

from __future__ import annotations

import errno
import logging
import time
from contextlib import suppress
from functools import cache
from typing import NamedTuple, Optional, Sequence

from pybpfthrottle import cgroup, objects, process
from pybpfthrottle.backends import Limits, Options, Priority
from pybpfthrottle.backends.attach import ATTACH_TYPES, attach
from pybpfthrottle.backends.records import (
    INVERSE_RATE_SHIFT,
    THROTTLE_LOOPBACK,
    THROTTLE_MAGIC,
    THROTTLE_VERSION,
    ThrottleBucket,
    ThrottleConfig,
    ThrottleStats,
)
from pybpfthrottle.bpf import features, loader, privileges
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.links import Attachment
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.specs import ObjectSpec
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.errors import CgroupError, Error, ThrottleError
from pybpfthrottle.limits import Counters, Direction, Rate
from pybpfthrottle.settings import AttachPolicy

log = logging.getLogger(__name__)

_MS = 1_000_000
_NS_PER_S = 1_000_000_000

# The burst after an idle time: 250 ms, which is longer than TCP's shortest retransmission timeout
# (200 ms): with less, a flow that waits for it loses bandwidth for good (0.72 of the limit was
# measured with 150 ms). And 64 KB at least, one packet as large as they come.
BURST_NS = 250 * _MS
BURST_BYTES = 64 * 1024
# The share of it that the bucket may owe. It is also the burst at the start, where there is no
# credit yet: it makes up for the slow start of TCP in the first seconds.
DEBT_SHARE = 0.4
# How much longer small packets pass: a ping is not caught behind a bulk transfer.
SMALL_NS = 20 * _MS


def config_for(rate: Optional[Rate], *, loopback: bool) -> ThrottleConfig:
    """The record for a rate, in units that spare the program each division."""
    owner = process.identity()
    config = ThrottleConfig(
        magic=THROTTLE_MAGIC,
        version=THROTTLE_VERSION,
        owner_pid=owner.pid,
        owner_pid_namespace=owner.pid_namespace,
        owner_start_ticks=owner.start_ticks,
        flags=THROTTLE_LOOPBACK if loopback else 0,
    )
    if rate is None:
        return config
    per_s = rate.bytes_per_s
    burst_ns = max(BURST_NS, BURST_BYTES * _NS_PER_S // per_s)
    debt_ns = int(burst_ns * DEBT_SHARE)
    config.rate_bytes_per_s = per_s
    config.inverse_rate = (_NS_PER_S << INVERSE_RATE_SHIFT) // per_s
    config.credit_ns = burst_ns - debt_ns
    config.debt_ns = debt_ns
    config.small_ns = SMALL_NS
    return config


class _Placed(NamedTuple):
    """A program where it is attached."""

    program: str
    target: Cgroup
    direction: Direction
    attachment: Attachment


class EbpfHandle:
    """One object loaded for one throttle: its maps, its programs, and where they are attached."""

    def __init__(self, loaded: Object, limits: Limits, options: Options, object_name: str) -> None:
        self._loaded = loaded
        self._options = options
        self._object_name = object_name
        self._rates = dict(limits)
        self._placed: list[_Placed] = []
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
        self._configs[direction] = config_for(rate, loopback=self._options.loopback)
        if old is not None and rate is not None:
            now = time.monotonic_ns()
            owed_ns = self._buckets[direction].even_at_ns - now
            if owed_ns > 0:
                owed_ns = owed_ns * old.bytes_per_s // rate.bytes_per_s
                self._buckets[direction] = ThrottleBucket(even_at_ns=now + owed_ns)
        self._rates[direction] = rate

    def burst_bytes(self, direction: Direction) -> int:
        """Credit, debt, and the packet that goes into debt."""
        rate = self._rates[direction]
        if rate is None:
            return 0
        config = self._configs[direction]
        time_ns: int = config.credit_ns + config.debt_ns + config.small_ns
        return rate.bytes_per_s * time_ns // _NS_PER_S + BURST_BYTES

    def place(self, program: str, target: Cgroup, direction: Direction) -> None:
        """Attach one of the loaded programs. Raises AttachError or CgroupError."""
        policy = self._options.attach.get(direction, AttachPolicy())
        self._placed.append(
            _Placed(program, target, direction, self._attach(program, target, direction, policy))
        )

    def switch(self, method: str) -> None:
        """For each program first the new attachment, then the end of the old one."""
        for index, placed in enumerate(self._placed):
            policy = self._options.attach.get(placed.direction, AttachPolicy())
            if placed.attachment.rung.partition(" ")[0] == method:
                continue
            attachment = self._attach(
                placed.program, placed.target, placed.direction, policy._replace(method=method)
            )
            self._placed[index] = placed._replace(attachment=attachment)
            placed.attachment.detach()

    def remove(self) -> None:
        """Detach everything, and close what was loaded."""
        try:
            while self._placed:
                self._placed.pop().attachment.detach()
        finally:
            self._loaded.close()

    def _attach(
        self, program: str, target: Cgroup, direction: Direction, policy: AttachPolicy
    ) -> Attachment:
        return attach(self._loaded.programs[program], target, ATTACH_TYPES[direction], policy)

    def describe(self, direction: Direction) -> dict[str, str]:
        """The way its program is attached, and which of the shipped objects it comes from."""
        rungs = sorted(
            {placed.attachment.rung for placed in self._placed if placed.direction is direction}
        )
        return {"backend": "ebpf", "object": self._object_name, "attached_by": "+".join(rungs)}


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
        spec = _read_object()
        wanted = {direction: _program_name(direction, options) for direction in limits}
        loaded = loader.load(spec, wanted.values())
        handle = EbpfHandle(loaded, limits, options, spec.name)
        try:
            for direction, name in wanted.items():
                log.debug(
                    "Program '%s' loaded with expected_attach_type: Some(%s)",
                    name,
                    "Ingress" if direction is Direction.DOWNLOAD else "Egress",
                )
                handle.set_rate(direction, limits[direction])
            for target in cgroups:
                for direction, name in wanted.items():
                    handle.place(name, target, direction)
        except BaseException:
            handle.remove()
            raise
        return handle


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
