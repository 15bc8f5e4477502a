"""Why nothing of a throttle's target passes, in a few words."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple, Optional, Sequence

from pybpfthrottle import witness
from pybpfthrottle.errors import Error
from pybpfthrottle.linux import carriers, process
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux.netns import Connection
from pybpfthrottle.linux.tcp import Look
from pybpfthrottle.throttle import Throttle

# A pause is no reason to look.
_FIRST_LOOK, _MOST_SAMPLES = 3, 60
_MOST_NAMES = 2
_NO_CONNECTION = ("no-connection", "no connection leaves this machine")


class Reason(NamedTuple):
    """Why nothing passes: a stable code, and a text."""

    code: str
    text: str

    def to_json(self) -> dict[str, str]:
        """Return it for JSON."""
        return self._asdict()


class Idleness:
    """Looks for a reason while nothing passes, ever more rarely. ``process_id`` is the target's.

    Call ``sample`` every second.
    """

    # Of all throttles together.
    _spending = witness.Spending()

    def __init__(self, throttle: Throttle, process_id: Optional[int]) -> None:
        self._throttle = throttle
        self._process_id = process_id
        self._counted = 0
        self._samples = 0
        self._next = _FIRST_LOOK
        self._reason: Optional[Reason] = None

    def sample(self, counted: int) -> Optional[Reason]:
        """Return why the throttle's count of bytes does not grow, if that is known.

        None if it grows, or has stopped a moment ago.
        """
        if counted != self._counted:
            self._counted, self._samples, self._next = counted, 0, _FIRST_LOOK
            self._reason = None
            return None
        self._samples += 1
        if self._samples >= self._next and self._spending.due:
            self._next = self._samples + min(self._samples, _MOST_SAMPLES)
            with self._spending, suppress(Error, OSError):
                self._reason = why(self._throttle, self._process_id, self._samples)
        return self._reason


def why(throttle: Throttle, process_id: Optional[int], seconds: float) -> Optional[Reason]:
    """Return why nothing has passed in the last seconds, or None if it is just quiet.

    Raises an error of this package, or OSError.
    """
    pids = witness.processes(throttle)
    left = _left(throttle, process_id, pids)
    if left is not None or not pids:
        return left
    look = witness.look(throttle) or Look({}, frozenset())
    active = [one for one in look.connections.values() if one.info.moved_within(seconds)]
    if active:
        return _of_active(throttle, pids, look, active)
    return _of_carriers(throttle, carriers.find(pids))


def _left(throttle: Throttle, process_id: Optional[int], pids: Sequence[int]) -> Optional[Reason]:
    """Return that the process has left the cgroups that are limited, and is not followed."""
    if process_id is None or process_id in pids or process.has_ended(process_id):
        return None
    with suppress(Error, OSError):
        where = cgroups_v2.from_pid(process_id)
        if throttle.cgroups and not any(where in one for one in throttle.cgroups):
            return Reason("left", f"{process.listed([process_id])} has moved to {where.path}")
    return None


def _of_active(
    throttle: Throttle, pids: Sequence[int], look: Look, active: Sequence[Connection]
) -> Optional[Reason]:
    """Return why connections that carry data are not limited."""
    local = () if throttle.spec.traffic.loopback else look.on_loopback
    rest = [one for one in active if one.cookie not in local]
    if not rest:
        return Reason("loopback", f"all goes over loopback, to {_other_ends(pids, active)}")
    if len(witness.exempt(throttle, rest)) == len(rest):
        first, *others = sorted({one.ends[1][0] for one in rest})
        more = f" and {len(others)} more" if others else ""
        return Reason("exempt", f"all goes to {first}{more}, which is exempt")
    ids = witness.cgroup_ids(throttle)
    strangers = {one.cgroup_id for one in rest if one.cgroup_id is not None} - ids
    if ids and strangers:
        where = cgroups_v2.by_id(min(strangers))
        place = "one that was removed" if where is None else where.path
        return Reason("other-cgroup", f"its sockets belong to another cgroup, {place}")
    return None


def _other_ends(pids: Sequence[int], local: Sequence[Connection]) -> str:
    """Return the processes that connections lead to, or where they lead if nobody is found."""
    found = carriers.other_ends({one.inode: pids[0] for one in local})
    others = [pid for pid in found if pid not in pids]
    if others:
        return process.listed(others, most=_MOST_NAMES)
    return "itself" if found else f"port {local[0].ends[1][1]}"


def _of_carriers(throttle: Throttle, found: carriers.Carriers) -> Optional[Reason]:
    """Return who carries the data of processes that have no active connection."""
    for devices in found.devices.values():
        return Reason("device", f"its packets go through {', '.join(devices)}")
    if found.leaves:
        return None
    if found.over_pipes:
        who = process.listed(found.over_pipes, most=_MOST_NAMES)
        return Reason("carried", f"{who} has the connection, over a pipe or Unix socket")
    if found.over_loopback and not throttle.spec.traffic.loopback:
        who = process.listed(found.over_loopback, most=_MOST_NAMES)
        return Reason("loopback", f"all goes over loopback, to {who}")
    return None if found.over_loopback else Reason(*_NO_CONNECTION)
