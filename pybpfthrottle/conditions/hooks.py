"""What the kernel's own hooks do: losses, outages, refused connections and unanswered questions.

The programs of ``conditions.bpf.c`` are attached where a throttle's packets pass, and hold its
record: whoever finds one that a crash has left knows whose it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Collection, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.placed import Placements
from pybpfthrottle.backends.ebpf.programs import Role, Scope, Shipped
from pybpfthrottle.backends.protocol import Foothold
from pybpfthrottle.bpf import loader, maps
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.conditions.model import Conditions, Loss
from pybpfthrottle.conditions.records import (
    ConditionsCounts,
    ConditionsFlags,
    ConditionsRule,
    ConditionsScale,
)
from pybpfthrottle.diversion.places import Places
from pybpfthrottle.errors import BpfError, CgroupError, ThrottleError
from pybpfthrottle.linux import clock
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction
from pybpfthrottle.throttle import Throttle

_NS_PER_S = 1_000_000_000
_RULES, _COUNTS = "COND_RULES", "COND_COUNTS"
_CONNECT = (AttachType.CGROUP_INET4_CONNECT, AttachType.CGROUP_INET6_CONNECT)
# The throttle's, which the programs use or hold.
_SHARED = ("THROTTLE", "CGROUP_CONFIGS", "MARKS")


class Counted(NamedTuple):
    """What the hooks did to one direction's packets, which are counted as large as on the wire.

    ``lost`` were lost by chance, in bursts or as each n-th, ``outage`` while nothing passed.
    ``blocked`` are connections that were refused, or the packets that would have opened one;
    ``unanswered`` are answers of name servers that were dropped.
    """

    seen: int = 0
    lost: int = 0
    outage: int = 0
    blocked: int = 0
    unanswered: int = 0


class Hooks:
    """The programs of one network, on all that a throttle is for. ``close`` detaches them."""

    def __init__(self, throttle: Throttle) -> None:
        """Attach nothing yet: ``follow`` does, and ``set`` says what is to be done."""
        self._maps: dict[str, Map[Any, Any]] = {}
        self._loaded: dict[str, Object] = {}
        self._places = Places(throttle.foothold, self._attach)
        self._refuses = False
        self._closing = ExitStack()

    def follow(self, *, anew: bool = False) -> None:
        """Attach programs to what the throttle is for by now, or all of them ``anew``.

        They let everything pass until ``set`` says otherwise. Raises ThrottleError, BpfError or
        CgroupError.
        """
        self._places.follow(anew=anew)

    def set(
        self,
        conditions: Conditions,
        *,
        loopback: bool = False,
        elsewhere: Collection[Direction] = (),
    ) -> None:
        """Put other conditions in force; their first period begins now.

        Packets of the directions ``elsewhere`` are lost there.

        Raises ThrottleError, BpfError or CgroupError if this kernel cannot refuse connections.
        """
        if conditions.block == "refuse" and not self._refuses:
            self._refuses = True
            try:
                self.follow(anew=True)
            except (BpfError, CgroupError):
                self._refuses = False
                self.follow(anew=True)
                raise
        rules = self._own_maps()[_RULES].typed(U32, StructureCodec(ConditionsRule))
        for direction in Direction:
            rules[direction] = rule_of(
                conditions, direction, loopback=loopback, elsewhere=direction in elsewhere
            )

    def counts(self) -> dict[Direction, Counted]:
        """Return what was done to each direction's packets since the hooks were attached."""
        counts = self._own_maps()[_COUNTS].typed(U32, StructureCodec(ConditionsCounts))
        return {
            direction: Counted(*(getattr(counts[direction], name) for name in Counted._fields))
            for direction in Direction
        }

    def detach(self) -> None:
        """Detach the programs; what they have counted is still known."""
        self._places.close()

    def close(self) -> None:
        """Detach the programs. Doing so twice is no error."""
        self.detach()
        self._closing.close()

    def _attach(self, scope: Scope, cgroup: Cgroup, foothold: Foothold) -> ExitStack:
        found = _programs(scope, connect=self._refuses)
        with ExitStack() as undo:
            live: dict[str, Any] = {}
            for one in found:
                live.update(self._load(one, foothold).programs)
            placed = Placements(live)
            placed.attach((one, cgroup, foothold.policy) for one in found)
            undo.callback(placed.detach)
            return undo.pop_all()

    def _own_maps(self) -> dict[str, Map[Any, Any]]:
        """Return the programs' maps, which are there before them: a cgroup may be gone by then."""
        if not self._maps:
            specs = programs.read(programs.with_role(Role.IMPAIR)[0].objects[0]).maps
            for name in (_RULES, _COUNTS):
                self._maps[name] = self._closing.enter_context(maps.create(specs[name]))
        return self._maps

    def _load(self, program: Shipped, foothold: Foothold) -> Object:
        """Return a loaded program. All share their maps, and some with the throttle."""
        if program.name not in self._loaded:
            given = {name: foothold.maps[name] for name in _SHARED if name in foothold.maps}
            used = {**given, **self._own_maps()}
            loaded = self._closing.enter_context(_loaded(program, used))
            self._maps.update({name: one for name, one in loaded.maps.items() if name not in given})
            self._loaded[program.name] = loaded
        return self._loaded[program.name]


def _programs(scope: Scope, *, connect: bool) -> list[Shipped]:
    """Return the programs for a scope: one for each hook."""
    verdict = "congestion" if features.CONGESTION_VERDICT.available() else "deny"
    return [
        one
        for one in programs.with_role(Role.IMPAIR, scope)
        if (connect and one.hook in _CONNECT)
        or one.direction is Direction.DOWNLOAD
        or (one.direction is Direction.UPLOAD and one.verdict == verdict)
    ]


def _loaded(program: Shipped, maps: Mapping[str, Map[Any, Any]]) -> Object:
    """Load a program from the first object that this kernel accepts. Raises BpfError."""
    refused: Optional[BpfError] = None
    for name in program.objects:
        spec = programs.read(name)
        same = {one: maps[one].spec for one in spec.maps.keys() & maps.keys()}
        try:
            return loader.load(spec.changed(maps={**spec.maps, **same}), [program.name], maps=maps)
        except BpfError as error:
            refused = refused or error
    raise refused or ThrottleError(f"{program.name} is in no object")


def rule_of(
    conditions: Conditions,
    direction: Direction,
    *,
    loopback: bool = False,
    elsewhere: bool = False,
) -> ConditionsRule:
    """Return what the hooks have to do in a direction, as they read it."""
    impairment = conditions.impairment(direction)
    loss = Loss() if elsewhere else impairment.loss or Loss()
    outage = conditions.outage
    return ConditionsRule(
        seed=impairment.seed,
        enter=round(loss.enter * (1 << ConditionsScale.SHIFT)),
        leave=round(loss.leave * (1 << ConditionsScale.SHIFT)),
        nth=loss.nth,
        begin_ns=clock.monotonic_ns(),
        period_ns=round(outage.period_s * _NS_PER_S) if outage else 0,
        up_ns=round((outage.period_s - outage.down_s) * _NS_PER_S) if outage else 0,
        flags=_flags(conditions, direction) | ConditionsFlags.LOOPBACK * loopback,
    )


def _flags(conditions: Conditions, direction: Direction) -> int:
    of: Sequence[tuple[bool, ConditionsFlags]] = (
        (conditions.dns == "lost", ConditionsFlags.DNS_LOST),
        (conditions.dns == "slow", ConditionsFlags.DNS_SLOW),
    )
    if direction is Direction.UPLOAD:
        of = (
            (conditions.block == "drop", ConditionsFlags.NO_SYN),
            (conditions.block == "refuse", ConditionsFlags.REFUSE),
        )
    return sum(flag for is_set, flag in of if is_set)
