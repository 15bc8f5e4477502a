"""The token bucket of a throttle in the kernel: its rates, how they are kept, what it counted."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Mapping, Optional

from pybpfthrottle.backends.ebpf.records import (
    ThrottleBucket,
    ThrottleConfig,
    ThrottleFlags,
    ThrottleFlows,
    ThrottleFormat,
    ThrottleShift,
    ThrottleStats,
    element,
)
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import clock, process
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import MAX_RATE, Counters, Direction, Limits, Rate, Traffic

log = Logger(__name__)

# The map that the address of the other end is looked up in.
NETWORKS = "CGROUP_NETWORKS"
_MS = 1_000_000
_NS_PER_S = 1_000_000_000
_NEVER_NS = (1 << 63) - 1

# At least one packet of the largest size.
BURST_BYTES = 64 * 1024
# How much longer small packets pass: a bulk transfer does not hold up a ping.
SMALL_NS = 20 * _MS
# Small windows keep the kernel from merging packets: beyond this rate, they cost more than the
# policer's retransmissions.
MOST_FOR_WINDOW = Rate(25_000_000)
# The keeper handles every acknowledgement. At 100 and 400 MB/s on veth the whole machine took 2 and
# 1.6 times the CPU of the policer, where 1 to 19 % was retransmitted; nothing was measured beyond.
MOST_FOR_GATE = Rate(500_000_000)
# The queue's keeper handles every packet of UDP.
MOST_FOR_QUEUE = Rate(12_500_000)
# The policer's burst is 250 ms, longer than TCP's shortest retransmission timeout (200 ms): with
# less, a flow that waits for the timeout loses bandwidth for good (with 150 ms, 0.72 of the limit
# was measured). 40 % of the burst may be owed. That is also the burst at the start, where there is
# no credit yet: it makes up for TCP's slow start in the first seconds. Flows limited by a receive
# window wait for no timeout. The shaper itself adds what shaped connections may owe beyond this.
_POLICED = (150 * _MS, 100 * _MS)
_WINDOW = (50 * _MS, 20 * _MS)
_BURSTS = {
    "police": _POLICED,
    "block": _POLICED,
    "pace": _POLICED,
    "window": _WINDOW,
    "gate": _WINDOW,
}
# Nothing passes a bucket that may run ahead of the clock by so much: it lags behind by less.
_BLOCKING_DEBT_NS = -(1 << 62)
_FLAGS = {
    "police": 0,
    "block": 0,
    "pace": ThrottleFlags.PACE,
    "window": ThrottleFlags.WINDOW,
    "gate": ThrottleFlags.WINDOW | ThrottleFlags.GATE,
}
# The best first.
_METHODS = {Direction.UPLOAD: ("pace",), Direction.DOWNLOAD: ("gate", "window")}
_MOST = {
    "window": (MOST_FOR_WINDOW, "the receive window costs too much CPU"),
    "gate": (MOST_FOR_GATE, "the gate costs too much CPU"),
}


def too_fast_for_queue(rate: Optional[Rate]) -> Optional[str]:
    """Return why downloads without a receive window do not wait in a queue at a rate, or None."""
    if rate is None or rate.is_blocked:
        return "downloads have no rate"
    if rate.bytes_per_s > MOST_FOR_QUEUE.bytes_per_s:
        return f"above {MOST_FOR_QUEUE} a queue costs too much CPU"
    return None


class Shaping(NamedTuple):
    """How a direction is kept to its limit, and why.

    ``method`` is one of settings.SHAPES except auto, or block.
    """

    method: str
    reason: str

    @property
    def credit_ns(self) -> int:
        """How far the bucket may lag behind the clock."""
        return _BURSTS[self.method][0]

    @property
    def debt_ns(self) -> int:
        """How far the bucket may run ahead of the clock before packets are dropped."""
        return _BURSTS[self.method][1]

    @property
    def burst_ns(self) -> int:
        """Credit and debt together."""
        return self.credit_ns + self.debt_ns

    @property
    def flags(self) -> int:
        """What the programs have to do, as enum throttle_flags."""
        return _FLAGS[self.method]


POLICE = Shaping("police", "nothing else was asked for")
BLOCK = Shaping("block", "nothing is to pass")


def shaping_for(
    direction: Direction,
    rate: Optional[Rate],
    wanted: str,
    *,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Shaping:
    """Return the method for a direction; ``refused`` says why methods are unavailable.

    If the wanted method is refused, the next best is returned.
    """
    if rate is not None and rate.is_blocked:
        return BLOCK
    methods = _METHODS[direction]
    if wanted not in ("auto", *methods):
        return Shaping("police", f"--shape {wanted}")
    reason = "this kernel can" if wanted == "auto" else f"--shape {wanted}"
    for method in methods[0 if wanted == "auto" else methods.index(wanted) :]:
        if method in refused:
            reason = f"{method} cannot be had here: {refused[method]}"
            continue
        most, cost = _MOST.get(method, (None, ""))
        if wanted == "auto" and rate and most and rate.bytes_per_s > most.bytes_per_s:
            reason = f"above {most} {cost}"
            continue
        return Shaping(method, reason)
    return Shaping("police", reason)


def config_for(
    rate: Optional[Rate],
    *,
    loopback: bool,
    shaping: Shaping = POLICE,
    owner: Optional[Identity] = None,
    expires_ns: int = 0,
    networks: bool = False,
) -> ThrottleConfig:
    """Return the record for a rate, in units that spare the program every division.

    ``owner`` is the process that keeps the throttle, by default this one; ``expires_ns`` is when it
    ends, on CLOCK_BOOTTIME, or 0. With ``networks`` the address of the other end decides.
    """
    owner = owner or process.identity()
    config = ThrottleConfig(
        magic=ThrottleFormat.MAGIC,
        version=ThrottleFormat.VERSION,
        owner_pid=owner.pid,
        owner_pid_namespace=owner.pid_namespace,
        owner_start_ticks=owner.start_ticks,
        flags=shaping.flags
        | (ThrottleFlags.LOOPBACK if loopback else 0)
        | (ThrottleFlags.NETWORKS if networks else 0),
        expires_ns=_on_the_buckets_clock(expires_ns),
    )
    if rate is not None:
        _set_rate(config, rate, shaping)
    return config


def inverse_of(rate: Rate) -> int:
    """Return the time that a byte takes, as the programs reckon with it."""
    return (_NS_PER_S << ThrottleShift.INVERSE_RATE_SHIFT) // _reckoned(rate)


def _reckoned(rate: Rate) -> int:
    """Return the rate for the programs, which take 0 for unlimited.

    What is owed when a direction is blocked is soon paid at the highest rate.
    """
    return (MAX_RATE if rate.is_blocked else rate).bytes_per_s


def _set_rate(config: ThrottleConfig, rate: Rate, shaping: Shaping) -> None:
    """Fill in what a rate decides."""
    per_s = _reckoned(rate)
    # At low rates both grow, in proportion, until they hold the largest packet.
    stretch = max(1.0, BURST_BYTES * _NS_PER_S / per_s / shaping.burst_ns)
    config.rate_bytes_per_s = per_s
    config.inverse_rate = inverse_of(rate)
    config.credit_ns = int(shaping.credit_ns * stretch)
    config.debt_ns = int(shaping.debt_ns * stretch)
    config.small_ns = SMALL_NS
    if rate.is_blocked:
        config.credit_ns, config.debt_ns = 0, _BLOCKING_DEBT_NS


def _on_the_buckets_clock(boottime_ns: int) -> int:
    """Return a time on CLOCK_MONOTONIC, if the machine does not sleep until then."""
    if not boottime_ns:
        return _NEVER_NS
    return clock.monotonic_ns() + boottime_ns - clock.boottime_ns()


class ElementCodec:
    """The directions of the throttle in a slot, as keys into its maps."""

    def __init__(self, slot: int) -> None:
        self._first = element(slot, 0)

    def encode(self, value: int) -> bytes:
        """Return the key of a direction."""
        return U32.encode(self._first + value)

    def decode(self, data: bytes) -> int:
        """Return the direction of a key."""
        return U32.decode(data) - self._first


class Seen(NamedTuple):
    """What the programs know of uploads.

    ``owed_ns`` is the time for which the limit is used up already, ``passed`` the bytes sent so
    far, and ``flows`` the number of connections that the programs shape.
    """

    owed_ns: int
    passed: int
    flows: int


def with_room(spec: ObjectSpec, traffic: Traffic) -> ObjectSpec:
    """Return an object whose map of networks has room for those that decide.

    Raises ThrottleError for the object that has none: that of Linux 4.14.
    """
    if traffic.everywhere:
        return spec
    if NETWORKS not in spec.maps:
        raise ThrottleError(
            "addresses cannot be told apart here (--traffic, --to, --except): this needs Linux 5.1"
            " and CAP_PERFMON"
        )
    from pybpfthrottle import networks

    count = len(networks.decisions(traffic))
    large = spec.maps[NETWORKS].changed(max_entries=count)
    return spec.changed(maps={**spec.maps, NETWORKS: large})


def put_networks(maps: Mapping[str, Map[Any, Any]], traffic: Traffic) -> None:
    """Tell the programs which networks are limited, once, before any rate is in force."""
    if traffic.everywhere:
        return
    from pybpfthrottle import networks

    tree = maps[NETWORKS].elements
    for network, limited in networks.decisions(traffic).items():
        tree.update(networks.key(network), U32.encode(limited))


class Bucket:
    """The rates of a throttle, in its maps."""

    def __init__(
        self,
        maps: Mapping[str, Map[Any, Any]],
        limits: Limits,
        *,
        traffic: Traffic,
        shapes: Mapping[Direction, str],
        owner: Identity,
        expires_ns: int = 0,
        slot: int = 0,
    ) -> None:
        """``shapes`` has one of settings.SHAPES for each direction that is not auto.

        ``expires_ns`` is when the limits end, on CLOCK_BOOTTIME, or 0. ``slot`` tells throttles
        apart that share maps.
        """
        self._maps = maps
        self._slot = slot
        self._traffic = traffic
        self._shapes = shapes
        self._owner = owner
        self._expires_ns = expires_ns
        self.rates = dict(limits)
        # The rates in force that are not the limits.
        self._moved: dict[Direction, Rate] = {}
        self.refused: dict[str, str] = {}
        self._lends = False
        self._shapings = dict.fromkeys(limits, POLICE)
        key = ElementCodec(slot)
        self._configs: Map[int, ThrottleConfig] = maps["CGROUP_CONFIGS"].typed(
            key, StructureCodec(ThrottleConfig)
        )
        self._buckets: Map[int, ThrottleBucket] = maps["CGROUP_BUCKETS"].typed(
            key, StructureCodec(ThrottleBucket)
        )
        self._stats: Map[int, list[ThrottleStats]] = maps["CGROUP_STATS"].typed(
            key, StructureCodec(ThrottleStats)
        )

    def begin(self, refused: Mapping[str, str]) -> None:
        """Put all rates in force. ``refused`` says why methods are unavailable."""
        self.refused = dict(refused)
        for direction, rate in self.rates.items():
            self.set_rate(direction, rate)

    def lift_others(self) -> None:
        """Let packets pass whose direction has no limit, before ``begin``.

        The shaper learns from either direction whether networks matter.
        """
        for direction in Direction:
            if direction not in self.rates:
                self._lift(direction)

    def set_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change a rate immediately; the programs rescale the debt, which is constant in bytes.

        Raises ThrottleError for a direction that the throttle does not have.
        """
        if direction not in self.rates:
            raise ThrottleError(f"this throttle was made without a limit for {direction}")
        wanted = self._shapes.get(direction, "auto")
        shaping = shaping_for(direction, rate, wanted, refused=self.refused)
        config = config_for(
            rate,
            loopback=self._traffic.loopback,
            networks=not self._traffic.everywhere,
            shaping=shaping,
            owner=self._owner,
            expires_ns=self._expires_ns,
        )
        config.slot = self._slot
        config.flags |= self._lending(direction, rate)
        config.slack_ns = self._configs[direction].slack_ns
        self._configs[direction] = config
        self._shapings[direction] = shaping
        self.rates[direction] = rate
        self._moved.pop(direction, None)
        log.debug("%s: %s, since %s", direction, shaping.method, shaping.reason)

    def element(self, direction: Direction) -> int:
        """Return the key of a direction into each of the maps."""
        return element(self._slot, direction)

    def move_rate(self, direction: Direction, rate: Rate) -> None:
        """Put another rate in force, by the method of the limit, which stays in ``rates``."""
        config = self._configs[direction]
        _set_rate(config, rate, self._shapings[direction])
        self._configs[direction] = config
        self._moved[direction] = rate

    def in_force(self, direction: Direction) -> Optional[Rate]:
        """Return the rate in force: the limit, unless it was moved."""
        return self._moved.get(direction, self.rates[direction])

    def method(self, direction: Direction) -> str:
        """Return the method by which a direction is to be kept, whatever the kernel refuses."""
        return self._shapings[direction].method

    def stop_shaping(self) -> None:
        """Only drop what is over the limit."""
        self.begin(dict.fromkeys(_BURSTS, "another process is about to do so"))

    def lift(self) -> None:
        """Let all packets pass, and stop shaping."""
        for direction in self.rates:
            self._lift(direction)

    def _lift(self, direction: Direction) -> None:
        networks = not self._traffic.everywhere
        config = config_for(None, loopback=False, owner=self._owner, networks=networks)
        config.slot = self._slot
        self._configs[direction] = config

    def shaping(self, direction: Direction) -> Shaping:
        """Return how a direction is kept to its limit."""
        shaping = self._shapings[direction]
        if shaping.flags & self._buckets[direction].refused and self.rates[direction] is not None:
            return Shaping("police", f"the kernel refused what {shaping.method} needs")
        return shaping

    def shapes_not_kept(self) -> list[str]:
        """Return the methods asked for by name that cannot be used, a line each."""
        return [
            f"--shape {wanted} does not work here, and the {direction} is kept by"
            f" {shaping.method}: {shaping.reason}"
            for direction, rate in self.rates.items()
            for wanted, shaping in [(self._shapes.get(direction), self.shaping(direction))]
            if wanted in _METHODS[direction] and shaping.method != wanted and rate
            if not rate.is_blocked
        ]

    def drops_early(self, direction: Direction) -> bool:
        """Whether what has no receive window loses packets now, as it is over the limit."""
        return bool(self._buckets[direction].early_root)

    def flags(self, direction: Direction) -> int:
        """Return what the programs do now, as enum throttle_flags."""
        return int(self._configs[direction].flags & ~self._buckets[direction].refused)

    def paces(self, direction: Direction) -> bool:
        """Whether a direction's connections are to be paced."""
        return self._shapings[direction].method == "pace"

    def lend(self, is_lent: bool) -> None:
        """Say whether what comes before the queue of downloads may be owed."""
        self._lends = is_lent
        direction = Direction.DOWNLOAD
        if direction in self.rates:
            config = self._configs[direction]
            config.flags &= ~ThrottleFlags.LEND
            config.flags |= self._lending(direction, self.rates[direction])
            self._configs[direction] = config

    def _lending(self, direction: Direction, rate: Optional[Rate]) -> int:
        is_lent = self._lends and direction is Direction.DOWNLOAD
        return ThrottleFlags.LEND if is_lent and too_fast_for_queue(rate) is None else 0

    def leave_room(self, direction: Direction, slack_ns: int = 0) -> None:
        """Allow as much debt as the policer does, for connections that nothing else slows down."""
        slack_ns = slack_ns or POLICE.burst_ns - self._shapings[direction].burst_ns
        config = self._configs[direction]
        config.slack_ns = max(config.slack_ns, slack_ns)
        self._configs[direction] = config

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted, over all CPUs."""
        return {
            direction: Counters(
                *(sum(getattr(cpu, name) for cpu in cpus) for name in Counters._fields)
            )
            for direction in self.rates
            for cpus in [self._stats[direction]]
        }

    def burst_bytes(self, direction: Direction) -> int:
        """Return the credit, the debt, and the packet that goes into debt."""
        rate = self.in_force(direction)
        if rate is None or rate.is_blocked:
            return 0
        config = self._configs[direction]
        bucket = self._buckets[direction]
        time_ns: int = max(config.credit_ns, bucket.credit_ns) + config.debt_ns + config.small_ns
        time_ns += max(config.slack_ns, bucket.slack_ns)
        return rate.bytes_per_s * time_ns // _NS_PER_S + BURST_BYTES

    def seen(self) -> Seen:
        """Return what the programs know of uploads."""
        flows: ThrottleFlows = self._maps["CGROUP_FLOWS"].typed(
            ElementCodec(self._slot), StructureCodec(ThrottleFlows)
        )[Direction.UPLOAD]
        even_at_ns = self._buckets[Direction.UPLOAD].even_at_ns
        now = clock.monotonic_ns()
        epochs_ago = (now >> ThrottleShift.EPOCH_SHIFT) - flows.epoch
        return Seen(
            owed_ns=even_at_ns - now if even_at_ns else 0,
            passed=self.counters()[Direction.UPLOAD].bytes_passed,
            flows=(max(flows.now, flows.before), flows.now, 0)[min(epochs_ago, 2)],
        )
