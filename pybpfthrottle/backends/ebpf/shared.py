"""Programs and maps that several throttles of this process share.

Nearly all of what a throttle costs to make is the kernel's verification of its programs. So only
the first throttle of a process has all of them for itself. Those that follow share the programs
that do the work; each has only small ones, by which these are entered (ebpf_src/entries.h), and a
slot in the maps of the others.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, Hashable, Iterable, Iterator, Mapping, Optional

from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.bucket import NETWORKS, put_networks, with_room
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.programs import ENTRIES, Role, Shipped
from pybpfthrottle.backends.ebpf.records import ThrottleEntry
from pybpfthrottle.backends.protocol import Order
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.abi import BPF_F_MMAPABLE
from pybpfthrottle.bpf.codecs import U32
from pybpfthrottle.bpf.loader import Loadable, Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import Error
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction, Traffic

if TYPE_CHECKING:
    from pybpfthrottle.backends.ebpf.crowd import Crowd

log = Logger(__name__)

# The keeper maps it into its memory.
GATE = "GATE"
# Arrays, with the elements of each throttle in its slot.
_BY_DIRECTION = ("CGROUP_CONFIGS", "CGROUP_BUCKETS", "CGROUP_STATS", "CGROUP_FLOWS")
_ARRAYS = (*_BY_DIRECTION, GATE)
_MAPS = (*_ARRAYS, "SOCKETS", NETWORKS)
# What programs are entered by, with how many places each has.
_INGRESS, _EGRESS, _SOCKOPS = "INGRESS", "EGRESS", "SOCKOPS"
_ENTERED_BY = (_INGRESS, _EGRESS, _SOCKOPS)
# How many throttles share programs: few at first, as the memory is allocated for all of them.
_FIRST, _MOST, _GROWTH = 8, 512, 8


class Body(NamedTuple):
    """A shared program, and where it is entered."""

    name: str
    object: str
    by: str
    place: int


def body_of(entry: Shipped) -> Optional[Body]:
    """Return the shared program that an entry enters, if it does."""
    if entry.role is Role.SHAPE:
        name = "pybpfs_sockopsp" if entry.multipath else "pybpfs_sockops"
        return Body(name, "throttle-shared", _SOCKOPS, 0)
    if entry.role is Role.GATE:
        return Body("pybpfs_gate", "gate-shared", _EGRESS, ThrottleEntry.ENTRY_GATE)
    if entry.role is not Role.POLICE:
        return None
    if entry.direction is Direction.DOWNLOAD:
        return Body("pybpfs_ingress", "throttle-shared", _INGRESS, ThrottleEntry.ENTRY_DENY)
    if entry.verdict == "congestion":
        return Body("pybpfs_egresscn", "throttle-shared", _EGRESS, ThrottleEntry.ENTRY_TELL)
    return Body("pybpfs_egress", "throttle-shared", _EGRESS, ThrottleEntry.ENTRY_DENY)


class Terms(NamedTuple):
    """What throttles that share have in common.

    Of the ``options`` only those that are about programs. Throttles that are ``kept`` share only
    with each other: after a crash they stay.
    """

    traffic: Traffic = Traffic()
    options: Options = Options()
    kept: bool = False

    @classmethod
    def of(cls, order: Order) -> Terms:
        """Return those of an order."""
        options = order.options or Options()
        return cls(
            order.traffic.changed(loopback=False),
            Options(attach=options.attach, egress_verdict=options.egress_verdict),
            order.spec.kept,
        )


class Bank:
    """Shared programs, loaded as they are needed, and maps with a number of slots.

    A slot is used once only: sockets may still have the number of a throttle that has ended.
    """

    def __init__(self, slots: int, terms: Terms = Terms()) -> None:  # noqa: B008 - immutable
        """Create the maps. Raises BpfError, ObjectFileError or ThrottleError."""
        self.is_closed = False
        self.slots = slots
        self.terms = terms
        # Those that limit single sockets, once there are any, or why there can be none.
        self.crowd: Optional[Crowd] = None
        self.no_crowd: Optional[str] = None
        # What its throttles limit, and what is above that.
        self._limited: Counter[Hashable] = Counter()
        self._above: Counter[Hashable] = Counter()
        self._live: set[int] = set()
        self._used = 0
        self._closing = ExitStack()
        self._entries: dict[tuple[str, ...], Loadable] = {}
        self._bodies: dict[str, Object] = {}
        self._ring: Optional[Map[Any, Any]] = None
        self.maps: dict[str, Map[Any, Any]] = {}
        self._places: dict[str, Map[Any, Any]] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            spec = with_room(self._fitting("throttle-shared"), terms.traffic)
            self.maps.update({name: self._create(spec, name) for name in _MAPS})
            spec = programs.read(ENTRIES)
            self._places.update({name: self._create(spec, name) for name in _ENTERED_BY})
            put_networks(self.maps, terms.traffic)
            undo.pop_all()

    def _create(self, spec: ObjectSpec, name: str) -> Map[Any, Any]:
        with Loadable(spec, []) as types:
            return self._closing.enter_context(types.create(name))

    def places(self) -> list[Map[Any, Any]]:
        """Return the maps by which programs are entered."""
        return list(self._places.values())

    @cached_property
    def map_ids(self) -> Mapping[str, int]:
        """The ids of the maps."""
        return {name: live.id for name, live in self.maps.items()}

    def take(self, order: Order) -> Optional[Seat]:
        """Return a free slot, or None.

        Throttles that may limit the same sockets get none: a socket's record tells of one only.
        """
        if self._used == self.slots - 1 or self._is_limited(order):
            return None
        if self.crowd is not None and self.crowd.limits(order):
            return None
        self._used += 1
        self._live.add(self._used)
        return Seat(self, self._used, order)

    def is_live(self, slot: int) -> bool:
        """Whether there is a throttle in a slot, and has not ended."""
        return slot in self._live

    def give_back(self, slot: int) -> bool:
        """A throttle has ended. Return whether it was the last one."""
        self._live.remove(slot)
        return not self._live

    def count(self, order: Order, step: int) -> None:
        """Add what a throttle limits, or with a step of -1 take it away."""
        for one, above in _limited(order):
            self._limited[one] += step
            for each in above:
                self._above[each] += step

    def _is_limited(self, order: Order) -> bool:
        return any(
            self._limited[one] or self._above[one] or any(self._limited[each] for each in above)
            for one, above in _limited(order)
        )

    def load(
        self,
        names: Iterable[str],
        given: Mapping[str, Map[Any, Any]],
        ring: Optional[Map[Any, Any]] = None,
    ) -> Object:
        """Load entries with these names for a throttle whose own maps are given.

        ``ring`` is the keeper's, for a gate. Raises BpfError or ObjectFileError.
        """
        names = tuple(names)
        for name in names:
            program = programs.by_name(name)
            if program is not None:
                self.provide(program, ring)
        if names not in self._entries:
            loadable = Loadable(self._fitting(ENTRIES), names)
            self._entries[names] = self._closing.enter_context(loadable)
        return self._entries[names].load(maps={**given, **self.maps, **self._places})

    def provide(self, entry: Shipped, ring: Optional[Map[Any, Any]] = None) -> None:
        """Load the shared program that an entry enters, if it does; a gate's with this ring."""
        body = body_of(entry)
        if body is not None:
            self._provide(body, ring)

    def _provide(self, body: Body, ring: Optional[Map[Any, Any]]) -> None:
        """Load a shared program, unless it is loaded already; for the gate, with this ring."""
        if body.name in self._bodies and (ring is None or ring is self._ring):
            return
        given = self.maps if ring is None else {**self.maps, "GATE_RING": ring}
        loaded = loader.load(self._fitting(body.object), [body.name], maps=given)
        self._closing.callback(loaded.close)
        self._places[body.by].typed(U32, U32)[body.place] = loaded.programs[body.name].fd
        self._bodies[body.name] = loaded
        if ring is not None:
            self._ring = ring

    def _fitting(self, name: str) -> ObjectSpec:
        """Return an object with room for all slots in its maps."""
        spec = programs.read(name)
        fitting = {
            one: map_spec.changed(max_entries=map_spec.max_entries * self.slots)
            for one, map_spec in spec.maps.items()
            if one in _ARRAYS
        }
        if GATE in fitting:
            fitting[GATE] = fitting[GATE].changed(flags=BPF_F_MMAPABLE)
        if NETWORKS in spec.maps and NETWORKS in self.maps:
            fitting[NETWORKS] = spec.maps[NETWORKS].changed(
                max_entries=self.maps[NETWORKS].spec.max_entries
            )
        return spec.changed(maps={**spec.maps, **fitting})

    def close(self) -> None:
        """Close all programs and maps."""
        self.is_closed = True
        with self._closing:
            if self.crowd is not None:
                self.crowd.close()


class Seat:
    """The slot of one throttle, and what it shares. ``leave`` gives it up.

    That of the bank's crowd is in slot 0, and without an order.
    """

    def __init__(self, bank: Bank, slot: int, order: Optional[Order]) -> None:
        self._bank = bank
        self.slot = slot
        self._order: Optional[Order] = None
        self.limit(order)

    @property
    def bank(self) -> Bank:
        """What it is a part of."""
        return self._bank

    @property
    def maps(self) -> Mapping[str, Map[Any, Any]]:
        """The maps that are shared."""
        return self._bank.maps

    @property
    def map_ids(self) -> Mapping[str, int]:
        """Their ids."""
        return self._bank.map_ids

    def places(self) -> list[Map[Any, Any]]:
        """Return the maps by which programs are entered.

        The kernel empties them with their last user: who goes on without this process pins them.
        """
        return self._bank.places()

    def load(
        self,
        names: Iterable[str],
        given: Mapping[str, Map[Any, Any]],
        ring: Optional[Map[Any, Any]] = None,
    ) -> Object:
        """Load the throttle's own programs, see Bank.load."""
        with sharing.busy:
            return self._bank.load(names, given, ring)

    def limit(self, order: Optional[Order]) -> None:
        """Note what the throttle limits from now on."""
        before, self._order = self._order, order
        for one, step in ((before, -1), (order, 1)):
            if one is not None:
                self._bank.count(one, step)

    def leave(self) -> None:
        """Give it up; the last one closes what is shared."""
        self.limit(None)
        sharing.leave(self)


class Sharing:
    """Who shares what in this process."""

    def __init__(self) -> None:
        self.busy = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._banks: list[Bank] = []
        self._alone = 0
        self.refused = ""

    def join(self, order: Order) -> Optional[Seat]:
        """Return a slot for a throttle, or None if it has to have programs of its own.

        Each call needs one of ``leave``.
        """
        with self.busy:
            # A process that was forked has other throttles than its parent.
            if self._owner != os.getpid():
                self._forget()
            seat = self._seat(order) if self._may_share(order) else None
            if seat is None:
                self._alone += 1
            return seat

    def _may_share(self, order: Order) -> bool:
        # The first may well be the only one.
        return (
            bool(self._alone or self._banks or _company(order) > 1)
            and not self.refused
            and features.DIRECT_PACKET_ACCESS.available()
        )

    def _seat(self, order: Order) -> Optional[Seat]:
        terms = Terms.of(order)
        for bank in self._banks:
            seat = bank.take(order) if bank.terms == terms else None
            if seat is not None:
                return seat
        try:
            before = sum(bank.terms == terms for bank in self._banks)
            size = _FIRST * _GROWTH**before
            while size <= _company(order):  # slot 0 is nobody's
                size *= _GROWTH
            bank = Bank(min(_MOST, size), terms)
        except (Error, OSError) as error:
            self.refuse(str(error))
            return None
        self._banks.append(bank)
        return bank.take(order)

    def refuse(self, why: str) -> None:
        """Share nothing from now on."""
        log.info("Throttles cannot share programs: %s", why)
        self.refused = why

    def leave(self, seat: Optional[Seat] = None) -> None:
        """A throttle has ended, which had a seat in a bank, or all its programs for itself."""
        bank = None if seat is None else seat.bank
        with self.busy:
            if seat is not None and seat.bank.give_back(seat.slot):
                seat.bank.close()
            if self._owner != os.getpid():
                return
            if bank is None:
                self._alone -= 1
            elif bank.is_closed:
                self._banks.remove(bank)


def _company(order: Order) -> int:
    return (order.options or Options()).company


def _limited(order: Order) -> Iterator[tuple[Hashable, list[Hashable]]]:
    """Yield what a throttle limits, as far as is known beforehand, each with what is above it."""
    for cgroup in order.cgroups:
        yield cgroup.path, list(_parents(cgroup.path))
    if order.processes is not None:
        # Their sockets may be of any cgroup.
        top = cgroups_v2.root().path
        for process in order.processes.processes:
            yield process.pid, [top]


def _parents(path: str) -> Iterator[str]:
    while path != (path := os.path.dirname(path)):
        yield path


sharing = Sharing()
