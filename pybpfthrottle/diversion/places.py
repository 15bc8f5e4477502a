"""Where a throttle's packets pass, and what else is attached there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Callable, Iterator, Protocol

from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.protocol import Foothold
from pybpfthrottle.linux.cgroup import Cgroup

# Whose packets, and the cgroup with its id: another one may be made at its path.
_Place = tuple[Scope, Cgroup, int]


class Limit(Protocol):
    """A throttle, or what is one of its directions."""

    def foothold(self) -> Foothold:
        """Return where its packets pass. Raises ThrottleError if that is nowhere to be seen."""


class Places:
    """What is attached at each place of a throttle. ``close`` detaches all."""

    def __init__(
        self, throttle: Limit, attach: Callable[[Scope, Cgroup, Foothold], ExitStack]
    ) -> None:
        """``attach`` attaches at one place, and returns what detaches that."""
        self._throttle = throttle
        self._attach = attach
        self._attached: dict[_Place, ExitStack] = {}

    def follow(self, *, anew: bool = False) -> bool:
        """Attach at the places that there are now, and at no others; return whether any is new.

        With ``anew`` all is attached once more, before what was is detached. Raises what ``attach``
        raises.
        """
        foothold = self._throttle.foothold()
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
        return bool(new)

    def close(self) -> None:
        """Detach all. Doing so twice is no error."""
        attached, self._attached = self._attached, {}
        with ExitStack() as gone:
            for one in attached.values():
                gone.callback(one.close)


def _places(foothold: Foothold) -> Iterator[_Place]:
    for scope, cgroups in ((Scope.ALL, foothold.cgroups), (Scope.MARKED, foothold.marked_at)):
        for cgroup in cgroups:
            try:
                yield scope, cgroup, cgroup.id
            except OSError:  # it is gone
                continue
