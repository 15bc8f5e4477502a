"""The loaded programs and maps of one throttle, and where each program is to be attached."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.bucket import Shaping, shaping_for
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.placed import Wanted
from pybpfthrottle.backends.ebpf.programs import Role, Scope, Shipped
from pybpfthrottle.backends.ebpf.records import RECORD
from pybpfthrottle.backends.ebpf.registry import RecordMap
from pybpfthrottle.backends.ebpf.shared import Seat
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.errors import BpfError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction, Limits
from pybpfthrottle.settings import AttachPolicy

if TYPE_CHECKING:
    from pybpfthrottle.backends.ebpf.crowd import Crowd

log = Logger(__name__)


class Loaded:
    """What a throttle with these limits and options has loaded so far. ``close`` closes it all.

    ``programs`` and ``maps`` are by name; all objects share the maps. ``object_name`` is that of
    the first object.
    """

    def __init__(self, limits: Limits, options: Options) -> None:
        self._limits = limits
        self._options = options
        self._seat: Optional[Seat] = None
        self._closing = ExitStack()
        self.programs: dict[str, Program] = {}
        self.maps: dict[str, Map[Any, Any]] = {}
        self.object_name = ""

    def share(self, seat: Optional[Seat]) -> None:
        """Share most of what will be loaded with other throttles; with None share nothing."""
        self._seat = seat
        self.maps.clear()
        if seat is not None:
            self.maps.update(seat.maps)

    def load(self, scope: Scope, spec: Callable[[], ObjectSpec]) -> Optional[str]:
        """Load the programs for a scope, and the shaper if wanted and supported by this kernel.

        ``spec`` is asked for unless they are shared. Return why the kernel refuses the shaper, or
        None. Raises BpfError.
        """
        policers = {direction: self._policer(scope, direction) for direction in self._limits}
        marks = programs.with_role(Role.MARK) if scope is Scope.MARKED else ()
        names = [program.name for program in (*policers.values(), *marks)]
        loaded = refused = None
        if self.shapes():
            shaper = programs.shaper(scope)
            try:
                loaded = self._load(spec, [*names, shaper.name])
            except BpfError as error:
                refused = shaper.needs.why_refused(error)
                log.debug("This kernel does not take %s: %s", shaper.name, error)
        self.add(loaded or self._load(spec, names))
        for direction, program in policers.items():
            log.debug(
                "Program '%s' loaded with expected_attach_type: Some(%s)",
                program.name,
                "Ingress" if direction is Direction.DOWNLOAD else "Egress",
            )
        return refused

    def enter(self, crowd: Crowd, slot: int) -> None:
        """Have the maps of a crowd, and of its own only a record, instead of programs for marks."""
        self.maps.update(crowd.maps)
        if RECORD not in self.maps:
            self.maps[RECORD] = crowd.new_record(slot)
            self._closing.callback(self.maps[RECORD].close)
        self.object_name = self.object_name or programs.ENTRIES

    def add(self, loaded: Object) -> None:
        """Have the programs and maps of an object too."""
        self._closing.callback(loaded.close)
        self.programs.update(loaded.programs)
        self.maps.update(loaded.maps)
        if self._seat is not None and RECORD in loaded.maps:
            RecordMap(loaded.maps[RECORD]).begin(self._seat.slot)

    def for_a_moment(self, scope: Scope, name: str) -> Object:
        """Load a program that uses the throttle's maps, for the caller to close.

        Raises BpfError.
        """
        return self._load(lambda: programs.read(programs.object_for(scope)), [name])

    def _load(self, spec: Callable[[], ObjectSpec], names: Sequence[str]) -> Object:
        if self._seat is not None:
            loaded = self._seat.load(names, self.maps)
        else:
            loaded = loader.load(spec(), names, maps=self.maps)
        self.object_name = self.object_name or loaded.spec.name
        return loaded

    def shaping(self, direction: Direction) -> Shaping:
        """Return how a direction is to be kept to its limit, if the kernel refuses nothing."""
        shape = self._options.shape.get(direction, "auto")
        rate = self._limits[direction]
        # What is blocked may have a rate later, which can be kept only by what is loaded now.
        return shaping_for(direction, None if rate and rate.is_blocked else rate, shape)

    def shapes(self) -> bool:
        """Whether anything is to be shaped."""
        return any(self.shaping(direction).flags for direction in self._limits)

    def shaper(self, scope: Scope) -> Optional[Shipped]:
        """Return the shaper that is loaded for a scope, if one is."""
        found = programs.with_role(Role.SHAPE, scope)
        return next((program for program in found if program.name in self.programs), None)

    def policers(self, scope: Scope, cgroups: Sequence[Cgroup]) -> Iterator[Wanted]:
        """Return where the policers are to be attached."""
        for target in cgroups:
            for direction in self._limits:
                policy = self._options.attach.get(direction, AttachPolicy())
                yield self._policer(scope, direction), target, policy

    def markers(self, cgroups: Sequence[Cgroup]) -> Iterator[Wanted]:
        """Return where the programs that mark new sockets are to be attached."""
        for marker in programs.with_role(Role.MARK):
            yield from self.everywhere(marker, cgroups)

    def everywhere(self, program: Shipped, cgroups: Sequence[Cgroup]) -> Iterator[Wanted]:
        """Return a program that serves both directions, for each cgroup."""
        for target in cgroups:
            yield program, target, self.policy()

    def policy(self) -> AttachPolicy:
        """Return how what serves both directions is attached."""
        return self._options.attach.get(next(iter(self._limits)), AttachPolicy())

    def ids(self) -> dict[str, int]:
        """Return the ids of the maps."""
        shared = {} if self._seat is None else self._seat.map_ids
        own = {name: live.id for name, live in self.maps.items() if name not in shared}
        return {**shared, **own}

    def close(self) -> None:
        """Close all programs and maps."""
        self._closing.close()

    def _policer(self, scope: Scope, direction: Direction) -> Shipped:
        return programs.policer(scope, direction, self._options.egress_verdict)
