"""Downloads by HTB on an IFB device, to which filters redirect what comes for a target's sockets.

A packet's cgroup is not known where it comes in: the filters match addresses and ports.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends import files
from pybpfthrottle.backends.protocol import Order
from pybpfthrottle.backends.recorded import Kind, State
from pybpfthrottle.backends.tc import shaper
from pybpfthrottle.backends.tc.at_ingress import AtIngress
from pybpfthrottle.backends.tc.ingress import IPV4, IPV6
from pybpfthrottle.backends.tc.iproute import Listing
from pybpfthrottle.backends.tc.sockets import Flow, flows, limited_processes
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux.cgroup import Cgroup, locked_if_free
from pybpfthrottle.model import Counters, Direction, Rate
from pybpfthrottle.supervisor import Chore

NAME = "ifb_tc"
_MAJOR, _MINOR = "1", 1
# How often to look for sockets: soon while there are new ones, later after a while without. In
# 0.25 s a download of 1 Gbit/s has brought 30 MB that no filter has seen.
_SOON_S, _LATER_S, _WHILE_S = 0.05, 0.25, 5.0
# With many sockets a look takes long: it may not take more than a twentieth of a CPU.
_PAUSE_PER_LOOK = 20
# The kernel has 4095 numbers for the filters of a preference.
_MOST = 4000


class IfbRules(AtIngress):
    """An IFB device of its own, and filters on the devices that packets come by."""

    backend = NAME

    def _prepare(self, handles: Mapping[str, Any]) -> None:
        self._ifb = f"pybpf-{self._id}"
        self._prepare_ingress(handles, {"kind": "mirred", "to_dev": self._ifb})
        self._numbers: dict[Flow, int] = {}
        self._looking = Looking(self._look)

    @property
    def _what(self) -> str:
        return f"device {self._ifb}, for filters"

    def _make(self) -> None:
        self._ip.add_ifb(self._ifb)
        root = shaper.root(self._ifb, _MAJOR, default=_MINOR)
        self._ip.change([root, *shaper.shape(self._ifb, _MINOR, self._rate, _MAJOR)])
        self._numbers = numbered(self._flows(self._order), {})

    def _filters(self, device: str) -> Sequence[str]:
        return self._adding(device, self._numbers)

    def _counted(self, device: str, qdiscs: Listing) -> Optional[Counters]:
        """Return nothing counted, unless the qdisc or some filters are missing."""
        there = self._ingress.has_qdisc(qdiscs, device) and len(self._ingress.nodes(device))
        return Counters() if there is not False and there >= len(self._numbers) else None

    def _state(self, qdiscs: Listing) -> State:
        """Return what the IFB device has counted, and whether all is there."""
        found = super()._state(qdiscs)
        counted = shaper.counters(qdiscs, self._ifb, _MINOR, _MAJOR)
        if counted is None:
            return found._replace(intact=False)
        sums = {self._direction: shaper.total(found.counters[self._direction], counted)}
        return State(sums, found.intact)

    def set_limit(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit; the counters continue."""
        self._ip.change(shaper.shape(self._ifb, _MINOR, rate, _MAJOR))

    def set_cgroups(self, directions: Sequence[Direction], cgroups: Sequence[Cgroup]) -> None:
        """Limit these cgroups instead; the counters continue."""
        super().set_cgroups(directions, cgroups)
        self._change(self._flows(self._order))

    def delete(self) -> None:
        """Remove the filters, and then the device."""
        try:
            super().delete()
        finally:
            self._ip.delete_ifb(self._ifb)

    def chores(self) -> Sequence[Chore]:
        """Return the chores that follow routes and sockets."""
        return [*super().chores(), self._looking]

    def processes(self) -> list[int]:
        """Return the selected processes that are limited now; none if cgroups are limited."""
        return limited_processes(self._order)

    # Sockets come and go.

    def _flows(self, order: Order) -> set[Flow]:
        try:
            return flows(order, self._ip.descriptor)
        except OSError as error:
            raise BackendError(f"cannot list sockets: {error.strerror}") from error

    def _look(self) -> bool:
        """Adapt the filters to the sockets that there are; return whether they have changed."""
        wanted = self._flows(self._order)
        if wanted == self._numbers.keys():
            return False
        with locked_if_free() as is_free:
            if not is_free or files.read(NAME, self._id) is None:
                return False
            self._change(wanted)
        return True

    def _change(self, wanted: set[Flow]) -> None:
        numbers = numbered(wanted, self._numbers)
        if len(numbers) < len(wanted):
            self._say(f"there are more than {_MOST} connections; some of them are not limited")
        gone = self._numbers.keys() - numbers.keys()
        come = {flow: number for flow, number in numbers.items() if flow not in self._numbers}
        lines: list[str] = []
        for device in self._devices:
            handles = self._ingress.nodes(device) if gone else {}
            for key in {(flow.version, self._numbers[flow]) for flow in gone} & handles.keys():
                lines.append(self._ingress.remove_command(device, key[0], handles[key]))
            lines += self._adding(device, come)
        try:
            self._ip.change(lines)
        except BackendError:
            # What is there now is not known: begin again at the next look.
            self._numbers = {}
            for device in self._devices:
                with suppress(BackendError):
                    self._ingress.remove_filters(device, surely=True)
            raise
        self._numbers = numbers

    def _adding(self, device: str, numbers: Mapping[Flow, int]) -> list[str]:
        action = f"mirred egress redirect dev {self._ifb}"
        return [
            self._ingress.command(device, flow.version, number, flow.match, action)
            for flow, number in sorted(numbers.items())
        ]


class Looking:
    """The chore that looks for new sockets, more often while there are some."""

    def __init__(self, look: Callable[[], bool]) -> None:
        """``look`` returns whether there were changes."""
        self._look = look
        self._changed_s = time.monotonic()
        self.due_s = self._changed_s + _SOON_S

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Look, and set when to look again."""
        began = time.monotonic()
        # If the look fails, the next one is later.
        self.due_s = began + _LATER_S
        if self._look():
            self._changed_s = began
        now = time.monotonic()
        pause = _SOON_S if now - self._changed_s < _WHILE_S else _LATER_S
        self.due_s = now + max(pause, _PAUSE_PER_LOOK * (now - began))


def numbered(flows: Iterable[Flow], before: Mapping[Flow, int]) -> dict[Flow, int]:
    """Return a number for each flow, distinct among those of its version of IP.

    Flows keep the number that they had before. Of too many flows some get none.
    """
    wanted = set(flows)
    found = {flow: number for flow, number in before.items() if flow in wanted}
    for version in (IPV4, IPV6):
        used = {number for flow, number in found.items() if flow.version == version}
        free = (number for number in range(1, _MOST + 1) if number not in used)
        # Those of any remote address first.
        come = sorted(one for one in wanted - found.keys() if one.version == version)
        found.update(zip(sorted(come, key=lambda flow: flow.remote != ""), free))
    return found


def _how(rate: Optional[Rate]) -> Mapping[str, str]:
    return {"shape": "queue" if rate else "none", "shape_reason": "HTB delays packets in a queue"}


def _burst_bytes(rate: Optional[Rate]) -> int:
    return shaper.burst_bytes(rate) if rate else 0


KIND = Kind(
    NAME,
    IfbRules,
    _how,
    _burst_bytes,
    "IFB devices",
    "ip link delete, tc filter delete",
    shaper.CANNOT_BLOCK,
)
