"""Rules on the devices that packets are routed by, which they follow when routes change."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, ClassVar, Mapping, Optional, Sequence

from pybpfthrottle.backends import files
from pybpfthrottle.backends.protocol import Order
from pybpfthrottle.backends.recorded import Save, State
from pybpfthrottle.backends.tc import shaper
from pybpfthrottle.backends.tc.iproute import Iproute, Listing, devices
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux.cgroup import Cgroup, locked_if_free
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.supervisor import Chore, Periodic

log = Logger(__name__)

_FOLLOW_S = 1.0
# Other characters may mean something to tc or nft.
_PLAIN = re.compile(r"[\w.@:-]+")


class OnDevices(ABC):
    """What limits one direction of an order on devices. All methods raise BackendError.

    What a device has counted before it was left is in ``_before``.
    """

    backend: ClassVar[str]

    def __init__(
        self,
        throttle_id: str,
        order: Order,
        place: Place,
        handles: Mapping[str, Any],
        save: Save,
    ) -> None:
        self._id = throttle_id
        self._order = order
        self._save = save
        [(self._direction, self._rate)] = order.limits.items()
        self._ip = Iproute(place)
        self._before = Counters(*handles.get("before", ()))
        self._notes: dict[str, None] = {}
        self._following = Periodic(_FOLLOW_S, self._follow)
        try:
            self._devices = list(handles.get("devices") or self._routed())
            if not self._devices:
                raise BackendError(f"there is no route, so {self.backend} has no device to limit")
            self._prepare(handles)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _prepare(self, handles: Mapping[str, Any]) -> None:
        """Find the throttle by its handles, or choose them; nothing is in force by that."""

    @abstractmethod
    def _begin(self, device: str, qdiscs: Listing) -> None:
        """Limit on a device."""

    @abstractmethod
    def _end(self, device: str, qdiscs: Listing) -> None:
        """Remove what is there and ours from a device."""

    @abstractmethod
    def _counted(self, device: str, qdiscs: Listing) -> Optional[Counters]:
        """Return what a device's rules have counted; None if something is missing there."""

    @property
    def name(self) -> str:
        """What limits, for people."""
        return f"{self._what} on {', '.join(self._devices)}"

    @property
    @abstractmethod
    def _what(self) -> str:
        """What limits, for people."""

    @property
    def handles(self) -> Mapping[str, Any]:
        """What finds it again."""
        return {"devices": self._devices, "before": list(self._before)}

    def create(
        self, limits: Limits, order: Order, counters: Mapping[Direction, Counters] = {}
    ) -> None:
        """Put it in force, in place of what is damaged; the counters begin at these values."""
        self._rate, self._order = limits[self._direction], order
        if counters:
            self.delete()
            self._before = counters[self._direction]
            self._save(self.handles)
        self._make()
        qdiscs = self._ip.qdiscs()
        for device in self._devices:
            self._begin(device, qdiscs)
        self._match()

    def _make(self) -> None:  # noqa: B027 - only one that has a device of its own has it
        """Make what the devices share."""

    def _match(self) -> None:  # noqa: B027 - only one that does not match on devices has it
        """Send packets where they are limited."""

    def state(self, directions: Sequence[Direction], cgroups: int) -> Optional[State]:
        """Return what has been counted, and whether all is there, on devices that are there."""
        return self._state(self._ip.qdiscs())

    def _state(self, qdiscs: Listing) -> State:
        counted = [
            self._counted(device, qdiscs)
            for device in self._devices
            if shaper.root_of(qdiscs, device) is not None
        ]
        known = [one for one in counted if one is not None]
        sums = {self._direction: shaper.total(self._before, *known)}
        return State(sums, len(known) == len(counted))

    def delete(self) -> None:
        """Remove all that is there and ours."""
        qdiscs = self._ip.qdiscs()
        for device in self._found(qdiscs):
            self._end(device, qdiscs)

    def _found(self, qdiscs: Listing) -> list[str]:
        """Return the devices to look at: a device may have another name by now."""
        return list(dict.fromkeys(str(one["dev"]) for one in qdiscs))

    # Routes change.

    def _routed(self) -> list[str]:
        found = devices(self._ip.routes())
        for device in found:
            if not _PLAIN.fullmatch(device):
                raise BackendError(f"the name of the device {device!r} has unusual characters")
        return [*found, "lo"] if self._order.traffic.loopback else found

    def _follow(self) -> None:
        routed = self._routed()
        if set(routed) == set(self._devices):
            return
        with locked_if_free() as is_free:
            entry = files.read(self.backend, self._id) if is_free else None
            if entry is not None:
                # Somebody else may have changed it.
                self._rate = entry.record.spec.limits[self._direction]
                self._move(routed)

    def _move(self, routed: Sequence[str]) -> None:
        before = self._devices
        if not routed:
            self._say(f"{', '.join(before)}: no route leads there any more")
            return
        come = [device for device in routed if device not in before]
        self._devices = [*before, *come]
        self._save(self.handles)
        qdiscs = self._ip.qdiscs()
        try:
            for device in come:
                self._begin(device, qdiscs)
        except BackendError as error:
            for device in come:
                with suppress(BackendError):
                    self._end(device, self._ip.qdiscs())
            self._devices = before
            self._save(self.handles)
            self._say(f"packets are routed by {', '.join(come)} now, and not limited: {error}")
            return
        qdiscs = self._ip.qdiscs()
        for device in [device for device in before if device not in routed]:
            if shaper.root_of(qdiscs, device) is not None:
                counted = self._counted(device, qdiscs) or Counters()
                self._before = shaper.total(self._before, counted)
                self._end(device, qdiscs)
        self._devices = list(routed)
        self._match()
        self._save(self.handles)
        self._say(f"packets are routed by {', '.join(routed)} now: the limit has followed")

    def _say(self, note: str) -> None:
        if note not in self._notes:
            log.warning("%s", note)
            self._notes[note] = None

    def set_cgroups(self, directions: Sequence[Direction], cgroups: Sequence[Cgroup]) -> None:
        """Limit these cgroups instead; the counters continue."""
        self._order = self._order._replace(cgroups=cgroups)
        self._match()

    def set_limit(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit; the counters continue."""
        self._rate = rate
        qdiscs = self._ip.qdiscs()
        for device in self._devices:
            if shaper.root_of(qdiscs, device) is not None:
                self._begin(device, qdiscs)

    def chores(self) -> Sequence[Chore]:
        """Return the chore that follows the routes."""
        return [self._following]

    def notes(self) -> Sequence[str]:
        """Return where it limits, and what has changed, a line each."""
        return [self._where(), *self._notes]

    def _where(self) -> str:
        each = ", each by itself" if len(self._devices) > 1 else ""
        return f"{self.backend} limits on {', '.join(self._devices)}{each}, and on no other device"

    def processes(self) -> list[int]:
        """Return nothing: cgroups are limited."""
        return []

    def close(self) -> None:
        """Release the namespace; what is in force stays."""
        self._ip.close()
