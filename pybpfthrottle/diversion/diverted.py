"""A diversion in force: the packets that come in for a cgroup, or for marked sockets, are late."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.attach import ATTACH_TYPES, attach, refuse_to_override
from pybpfthrottle.backends.ebpf.bucket import NETWORKS
from pybpfthrottle.backends.ebpf.marks import MARKS
from pybpfthrottle.backends.ebpf.shared import GATE
from pybpfthrottle.backends.protocol import Foothold
from pybpfthrottle.bpf import maps, running
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.loader import Loadable
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.diversion import keeping
from pybpfthrottle.diversion.keeping import OBJECT, DiversionKeeper, Kept, networks_of
from pybpfthrottle.diversion.records import KEEPER, RING, STATE, DivertState, DivertTag
from pybpfthrottle.diversion.tally import Tally
from pybpfthrottle.errors import DiversionError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.supervisor import Chore

if TYPE_CHECKING:
    from pybpfthrottle.conditions.model import Impairment, Injected

_TAG_BITS = 10
_BUCKETS, _CONFIGS = "CGROUP_BUCKETS", "CGROUP_CONFIGS"
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
    maps = {} if marks is None else {MARKS: marks}
    with ExitStack() as undo:
        try:
            diversion = Diversion.join(undo)
            # It starts while the programs are loaded, of which none may be refused.
            diversion._keeper.start()
            diversion._keeper.program_of_device()
            names = _names(marks is not None)
            kept = diversion._attached(place, names, maps, loopback=loopback)
            kept.wanted, kept.loopback = impairment, loopback
            diversion._keeper.serve(
                diversion._number, kept, networks_of((pids or place.pids_below)())
            )
            undo.callback(diversion._keeper.drop, diversion._number)
        except OSError as error:
            raise DiversionError(f"packets cannot be delayed here: {error}") from error
        diversion._closing = undo.pop_all()
    return diversion


def open_queue(place: Cgroup, foothold: Foothold, *, marked: bool, pids: Pids) -> Diversion:
    """Have UDP that comes in for a cgroup, or for a limit's marked sockets, wait for its turn.

    It does so in a queue of its limit, from its ``start`` on, and only while that is used up.
    ``pids`` returns the processes whose network namespaces are served from the start.

    Needs what ``open`` needs. Raises DiversionError, AttachError or CgroupError.
    """
    with ExitStack() as undo:
        try:
            diversion = Diversion.join(undo)
            names, used = _parts_of_queue(foothold, marked)
            kept = diversion._attached(place, names, used, slot=foothold.slot)
            kept.limit = [foothold.maps[name] for name in (_BUCKETS, _CONFIGS, GATE)]
            kept.slot = foothold.slot
            diversion._networks = networks_of(pids())
            diversion._links = list(kept.attach())
            for link in diversion._links:
                undo.callback(link.close)
        except OSError as error:
            raise DiversionError(str(error)) from error
        diversion._closing = undo.pop_all()
    return diversion


def prepare_queue(foothold: Foothold, *, marked: bool) -> None:
    """Do ahead what takes ``open_queue`` long: fit the programs to this kernel, once.

    Raises ObjectFileError or ExternError.
    """
    names, used = _parts_of_queue(foothold, marked)
    _loadable(names, _sizes(used))
    keeping.program_of_device()
    running.forget_types()


def _parts_of_queue(
    foothold: Foothold, marked: bool
) -> tuple[tuple[str, str], dict[str, Map[Any, Any]]]:
    """Return the programs of a limit's queue, and the maps that they share with the limit."""
    shared = (_BUCKETS, _CONFIGS, NETWORKS, *([MARKS] if marked else []))
    used = {name: foothold.maps[name] for name in shared if name in foothold.maps}
    names = ("pybpfd_queuem", "pybpfd_outm") if marked else ("pybpfd_queue", "pybpfd_out")
    return names, used


class Diversion:
    """Impairs packets until ``close``, or the end of ``with``."""

    def __init__(self, keeper: DiversionKeeper, tally: Tally) -> None:
        self._keeper = keeper
        self._tally = tally
        # More than once if the keeper has had to be replaced: then they come after those of others.
        self.times_attached = 0
        # Of a queue that is not started: what the keeper gets then, and where it begins.
        self._links: list[Link] = []
        self._networks: list[int] = []
        self._closing = ExitStack()
        self._number = keeper.number()

    @classmethod
    def join(cls, undo: ExitStack) -> Diversion:
        """Return one that does nothing yet; ``undo`` gives up what it has. Raises OSError."""
        keeper = DiversionKeeper.join()
        undo.callback(keeper.leave)
        tally = Tally.create()
        undo.callback(tally.close)
        diversion = cls(keeper, tally)
        diversion._closing = undo
        return diversion

    def _attached(
        self,
        place: Cgroup,
        names: tuple[str, str],
        given: Mapping[str, Map[Any, Any]],
        *,
        loopback: bool = False,
        slot: Optional[int] = None,
    ) -> Kept:
        """Load the programs, with maps that are given; return what the keeper has to know.

        It is the queue of the limit in a ``slot`` if there is one.
        """
        spec = programs.read(OBJECT)
        state = self._closing.enter_context(maps.create(spec.maps[STATE]))
        self._state: Map[int, DivertState] = state.typed(U32, StructureCodec(DivertState))
        bit = _bit(self._number) if slot is None else DivertTag.DIVERT_QUEUED
        is_on = slot is None
        self._state[0] = DivertState(self._number, is_on, bit, loopback, slot or 0)
        used = {KEEPER: self._keeper.shared, RING: self._keeper.ring, STATE: state, **given}
        loaded = self._closing.enter_context(_loadable(names, _sizes(given)).load(maps=used))
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

        self._kept = Kept(self._state, self._tally, attach_all)
        return self._kept

    def start(self) -> None:
        """Have a queue take packets, whose programs are attached. Doing so twice is no error.

        It does not wait for the keeper to start, but packets do. Raises OSError.
        """
        links, self._links = self._links, []
        if links:
            self._keeper.begin(self._number, self._kept, self._networks, links)
            self._closing.callback(self._keeper.drop, self._number)

    @property
    def impairment(self) -> Optional[Impairment]:
        """What is done to packets at present; None for the queue of a limit."""
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
        state = self._state[0]
        return self._tally.injected(state.full, undelayed=state.stale + state.unserved)

    def problems(self) -> list[str]:
        """Return what keeps packets from being impaired as asked for, a line each."""
        failure = self.failure()
        found = [] if failure is None else [f"packets are not delayed: {failure}"]
        found += [f"some packets pass undelayed: {why}" for why in self._keeper.unserved.values()]
        return found

    def failure(self) -> Optional[str]:
        """Return why no packet is diverted any more, or None."""
        if self._keeper.ended is not None:
            return f"their keeper has ended: {self._keeper.ended}"
        return self._kept.refused

    def has_taken(self) -> bool:
        """Whether any packet was diverted until now."""
        return bool(self._state[0].taken) and not self._kept.has_no_device

    def unserved(self) -> Optional[str]:
        """Return why no packet could be diverted until now, or None."""
        state, reasons = self._state[0], self._keeper.unserved
        passes = self._kept.has_no_device or (state.unserved and not state.taken)
        return next(iter(reasons.values()), None) if passes else None

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


def _sizes(given: Mapping[str, Map[Any, Any]]) -> tuple[tuple[str, int], ...]:
    """Return the sizes of maps: a limit's may have room for others too."""
    return tuple((name, one.spec.max_entries) for name, one in given.items())


@cache
def _loadable(names: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> Loadable:
    """Return programs fitted to this kernel, and to maps of other sizes, once."""
    spec = programs.read(OBJECT)
    given = {name: spec.maps[name].changed(max_entries=size) for name, size in sizes}
    return Loadable(spec.changed(maps={**spec.maps, **given}), names)


@cache
def _first_bit() -> int:
    return os.urandom(1)[0] % _TAG_BITS


def _bit(number: int) -> int:
    """Return the bit of a diversion, another one than its neighbours have.

    Two with the same bit on one socket delay a packet only once, which is no harm.
    """
    return 1 << (_first_bit() + number) % _TAG_BITS
