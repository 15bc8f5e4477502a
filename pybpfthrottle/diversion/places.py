"""Where a throttle's packets pass, and what else is attached there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Callable, Iterator, Optional

from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.protocol import Foothold
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.supervisor import Chore

if TYPE_CHECKING:
    from pybpfthrottle.diversion.diverted import Diversion

# Whose packets, and the cgroup with its id: another one may be made at its path.
_Place = tuple[Scope, Cgroup, int]


class Places:
    """What is attached at each place of a throttle. ``close`` detaches all."""

    def __init__(
        self,
        foothold: Callable[[], Foothold],
        attach: Callable[[Scope, Cgroup, Foothold], ExitStack],
    ) -> None:
        """``attach`` attaches at one place, and returns what detaches that."""
        self._foothold = foothold
        self._attach = attach
        self._attached: dict[_Place, ExitStack] = {}

    def follow(self, *, anew: bool = False) -> None:
        """Attach at the places that there are now, and at no others.

        With ``anew`` all is attached once more, before what was is detached. Raises what
        ``foothold`` and ``attach`` raise.
        """
        foothold = self._foothold()
        wanted = dict.fromkeys(_places(foothold))
        before = dict(self._attached)
        new = [place for place in wanted if anew or place not in before]
        with ExitStack() as undo:
            made = {}
            for place in new:
                made[place] = self._attach(place[0], place[1], foothold)
                undo.callback(made[place].close)
            undo.pop_all()
        self._attached = {**{one: before[one] for one in wanted if one not in made}, **made}
        with ExitStack() as gone:
            for place, attached in before.items():
                if self._attached.get(place) is not attached:
                    gone.callback(attached.close)

    def close(self) -> None:
        """Detach all. Doing so twice is no error."""
        attached, self._attached = self._attached, {}
        with ExitStack() as gone:
            for one in attached.values():
                gone.callback(one.close)


class Diverted:
    """The diversions at the places of a limit: none before ``begin``. ``close`` ends them.

    It may be begun again.
    """

    def __init__(
        self,
        foothold: Callable[[], Foothold],
        divert: Callable[[Scope, Cgroup, Foothold], Diversion],
        ends: Callable[[Diversion], object] = lambda one: None,
    ) -> None:
        """``divert`` makes one, and ``ends`` is called before one is closed."""
        self._foothold = foothold
        self._divert = divert
        self._ends = ends
        self._places: Optional[Places] = None
        self.open: list[Diversion] = []

    def __bool__(self) -> bool:
        """Whether packets are diverted."""
        return self._places is not None

    def begin(self) -> None:
        """Divert at all places. Raises what ``divert`` raises; then nothing is diverted."""
        self._places = Places(self._foothold, self._attach)
        try:
            self.follow()
        except BaseException:
            self.close()
            raise

    def follow(self) -> None:
        """Divert at the places that there are now."""
        if self._places is not None:
            self._places.follow()

    def attached(self) -> list[tuple[Diversion, int]]:
        """Return all there are, and how often the programs of each were attached.

        That is more than once if a keeper has had to be replaced.
        """
        return [(one, one.times_attached) for one in self.open]

    def chores(self) -> list[Chore]:
        """Return what a supervisor has to do for them."""
        found = {id(chore): chore for one in self.open for chore in one.chores()}
        return list(found.values())

    def close(self) -> None:
        """Give back what is held, and end. Doing so twice is no error."""
        places, self._places = self._places, None
        if places is not None:
            places.close()

    def _attach(self, scope: Scope, cgroup: Cgroup, foothold: Foothold) -> ExitStack:
        with ExitStack() as undo:
            one = self._divert(scope, cgroup, foothold)
            self.open.append(one)
            undo.callback(self._end, one)
            return undo.pop_all()

    def _end(self, one: Diversion) -> None:
        self.open.remove(one)
        try:
            self._ends(one)
        finally:
            one.close()


def _places(foothold: Foothold) -> Iterator[_Place]:
    for scope, cgroups in ((Scope.ALL, foothold.cgroups), (Scope.MARKED, foothold.marked_at)):
        for cgroup in cgroups:
            try:
                yield scope, cgroup, cgroup.id
            except OSError:  # it is gone
                continue
