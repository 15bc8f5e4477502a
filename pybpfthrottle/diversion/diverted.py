"""A diversion in force: the packets that come in for a cgroup, or for marked sockets, are late."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any, Callable, Iterable, Optional, Sequence

from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.attach import ATTACH_TYPES, attach, refuse_to_override
from pybpfthrottle.backends.ebpf.marks import MARKS
from pybpfthrottle.bpf import maps
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.loader import Loadable
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.conditions.model import Impairment, Injected
from pybpfthrottle.diversion.keeping import OBJECT, DiversionKeeper, Kept, networks_of
from pybpfthrottle.diversion.records import KEEPER, RING, STATE, DivertState, DivertTag
from pybpfthrottle.diversion.tally import Tally
from pybpfthrottle.errors import DiversionError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.supervisor import Chore

_TAG_BITS = 12
_LINK = AttachPolicy(method="link")
_HOOKS = (ATTACH_TYPES[Direction.DOWNLOAD], ATTACH_TYPES[Direction.UPLOAD])

Pids = Callable[[], Iterable[int]]


def needs_diversion(impairment: Impairment) -> bool:
    """Whether packets have to be held for an impairment: all but a loss alone."""
    return bool(impairment.changed(loss=None))


def open(  # noqa: A001 - it is diversion.open
    place: Cgroup,
    impairment: Impairment,
    *,
    marks: Optional[Map[Any, Any]] = None,
    loopback: bool = False,
    pids: Optional[Pids] = None,
) -> Diversion:
    """Impair what comes in for the sockets of a cgroup, or with ``marks`` for marked ones only.

    TCP and UDP, IPv4 and IPv6; multicast, broadcast and ICMP pass, and so does the loopback device
    without ``loopback``, which changes settings of it for the time being. ``pids`` returns the
    processes whose network namespaces are served from the start; by default those of the cgroup.

    Linux 5.10 with CONFIG_DEBUG_INFO_BTF; needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN. Raises
    DiversionError, AttachError or CgroupError.
    """
    with ExitStack() as undo:
        try:
            keeper = DiversionKeeper.join()
            undo.callback(keeper.leave)
            tally = Tally.create()
            undo.callback(tally.close)
            diversion = Diversion(keeper, tally)
            diversion._closing = undo
            diversion._begin(place, impairment, marks, loopback, pids or place.pids_below)
        except OSError as error:
            raise DiversionError(f"packets cannot be delayed here: {error}") from error
        diversion._closing = undo.pop_all()
    return diversion


class Diversion:
    """Impairs packets until ``close``, or the end of ``with``."""

    def __init__(self, keeper: DiversionKeeper, tally: Tally) -> None:
        self._keeper = keeper
        self._tally = tally
        # More than once if the keeper has had to be replaced: then they come after those of others.
        self.times_attached = 0
        self._closing = ExitStack()
        self._number = keeper.number()

    def _begin(
        self,
        place: Cgroup,
        impairment: Impairment,
        marks: Optional[Map[Any, Any]],
        loopback: bool,
        pids: Pids,
    ) -> None:
        spec = programs.read(OBJECT)
        state = self._closing.enter_context(maps.create(spec.maps[STATE]))
        self._state: Map[int, DivertState] = state.typed(U32, StructureCodec(DivertState))
        self._state[0] = DivertState(self._number, 1, _bit(self._number), loopback)
        used = {KEEPER: self._keeper.shared, RING: self._keeper.ring, STATE: state}
        if marks is not None:
            used[MARKS] = marks
        names = _names(marks is not None)
        loaded = self._closing.enter_context(_loadable(names).load(maps=used))
        live = [loaded.programs[name] for name in names]

        def attach_all() -> Sequence[Link]:
            self.times_attached += 1
            with ExitStack() as undo:
                made = []
                for program, hook in zip(live, _HOOKS):
                    refuse_to_override(program, place, hook, _LINK)
                    link = attach(program, place, hook, _LINK, repeats=True)
                    undo.callback(link.detach)
                    made.append(link)
                undo.pop_all()
            return made  # type: ignore[return-value]

        self._kept = Kept(state, self._tally, attach_all, impairment, loopback)
        self._keeper.serve(self._number, self._kept, networks_of(pids()))
        self._closing.callback(self._keeper.drop, self._number)

    @property
    def impairment(self) -> Impairment:
        """What is done to packets at present."""
        return self._kept.wanted

    @property
    def tag(self) -> int:
        """The tc_index of packets that come back; others that hold them add bits of their own."""
        return int(DivertTag.DIVERT_TAG | self._state[0].bit)

    @property
    def keeper_pid(self) -> int:
        """The process that holds the packets."""
        return self._keeper.pid

    def change(self, impairment: Impairment, *, anew: bool = True) -> None:
        """Impair what comes from now on in another way; what is held stays as it is.

        Without ``anew`` the chances that are running go on: those of a delay that changes.
        """
        self._keeper.change(self._number, impairment, anew=anew)

    def counts(self) -> Injected:
        """Return what was done so far, in packets as they were on the wire."""
        self._keeper.run()
        state, done = self._state[0], self._tally.injected()
        return replace(
            done,
            seen=done.seen + state.full,
            late_dropped=done.late_dropped + state.full,
            passed_undelayed=state.stale + state.unserved,
        )

    def problems(self) -> list[str]:
        """Return what keeps packets from being impaired as asked for, a line each."""
        found = []
        if self._keeper.ended is not None:
            found.append(f"packets are not delayed: their keeper has ended: {self._keeper.ended}")
        if self._kept.refused is not None:
            found.append(f"packets are not delayed: {self._kept.refused}")
        found += [f"some packets pass undelayed: {why}" for why in self._keeper.unserved.values()]
        return found

    def chores(self) -> Sequence[Chore]:
        """Return the keeper's chore, which all diversions of this process share."""
        return [self._keeper]

    def close(self) -> None:
        """Give back at once what is held, and end. Doing so twice is no error."""
        with self._closing.pop_all():
            pass

    def __enter__(self) -> Diversion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _names(marked: bool) -> tuple[str, str]:
    """Return the programs for what comes in, and for what goes out."""
    if not marked:
        return "pybpfd_in", "pybpfd_out"
    if features.MPTCP_SOCKET.available():
        return "pybpfd_inp", "pybpfd_outp"
    return "pybpfd_inm", "pybpfd_outm"


@cache
def _loadable(names: tuple[str, ...]) -> Loadable:
    """Return programs fitted to this kernel once."""
    return Loadable(programs.read(OBJECT), names)


@cache
def _first_bit() -> int:
    return os.urandom(1)[0] % _TAG_BITS


def _bit(number: int) -> int:
    """Return the bit of a diversion, another one than its neighbours have.

    Two with the same bit on one socket delay a packet only once, which is no harm.
    """
    return 1 << (_first_bit() + number) % _TAG_BITS
