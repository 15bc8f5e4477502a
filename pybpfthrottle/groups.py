"""``pybpfthrottle.group``: throttles that share a total. Other limits import none of this."""

from __future__ import annotations

from typing import Any, Iterable, Optional

from pybpfthrottle.face import limit
from pybpfthrottle.shares import GivenRate, GivenRates, GroupSpec, Member
from pybpfthrottle.sharing import Group
from pybpfthrottle.throttle import Throttle


class Line(Group):
    """A group of throttles that share a total; ``limit`` adds one."""

    def limit(
        self,
        *,
        weight: float = 1,
        floor: GivenRates = None,
        ceiling: GivenRates = None,
        within: str = "",
        **target: Any,
    ) -> Throttle:
        """Limit processes, cgroups or units as a member of the group; return the throttle.

        ``weight`` is from 1 to 10000. ``floor`` is what it gets whatever the others want,
        ``ceiling`` the most that it gets: for both directions, or ``{"download": "2M"}``.
        ``within`` names a group in this one. All else is as for ``pybpfthrottle.limit``, without
        ``download`` and ``upload``.

        Raises ShareError for floors that are more than the total, and what ``limit`` raises.
        """
        group = within or self.spec.name
        member = Member.of(group, weight=weight, floor=floor, ceiling=ceiling)
        self.check(member, "the new throttle")
        limits = {str(direction): rate for direction, rate in self.limits(member).items()}
        throttle = limit(**{**limits, **target})
        try:
            self.add(throttle, member)
        except BaseException:
            throttle.remove()
            raise
        return throttle


def group(
    name: str = "line",
    *,
    total: Optional[GivenRate] = None,
    upload: Optional[GivenRate] = None,
    download: Optional[GivenRate] = None,
    groups: Iterable[GroupSpec] = (),
    supervise: bool = True,
) -> Line:
    """Return a group whose members share a total: ``total`` each way, or ``upload``, ``download``.

    ``groups`` are groups within it. What a member does not use, the others get within 100 ms. The
    group and its members end with the ``with`` block, by ``remove``, or with this process. A
    background thread moves their rates; without ``supervise`` the caller has to run what ``chores``
    returns, and its members' chores in the same loop.

    Raises ShareError or LimitError. Needs the eBPF backend.
    """
    made = Line(GroupSpec.of(name, total=total, upload=upload, download=download), groups)
    if supervise:
        made.supervise()
    return made
