"""The filters of a throttle at the ingress hooks of devices, and the qdisc that they need."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Sequence

from pybpfthrottle.backends import files
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.backends.tc.iproute import Iproute, Listing
from pybpfthrottle.errors import BackendError

IPV4, IPV6 = 4, 6
# A throttle has two preferences, one for each version of IP. The kernel itself begins at 49152.
_FIRST, _LAST = 31_000, 32_000
_KINDS = ("clsact", "ingress")
BACKENDS = ("ifb_tc", "tc_police")


class Ingress:
    """The filters of one throttle. All methods raise BackendError.

    ``preference`` is the first of its two; ``made`` are the devices where it has made the qdisc,
    which it removes with the last filter, or passes on to another throttle.
    """

    def __init__(
        self, throttle_id: str, ip: Iproute, handles: Mapping[str, Any], action: Mapping[str, str]
    ) -> None:
        """``action`` is what the kernel shows of the filters' actions."""
        self._id = throttle_id
        self._ip = ip
        self._action = action
        self.preference = int(handles.get("preference", 0))
        self.made = list(handles.get("made", ()))
        # The record does not know of it yet.
        self._left: set[str] = set()

    def choose_preference(self, devices: Sequence[str]) -> None:
        """Choose preferences that nobody uses on these devices."""
        used = {int(record.handles["preference"]) for record in self._others()}
        for device in devices:
            used |= {int(one["pref"]) & ~1 for one in self._ip.filters(device)}
        free = (one for one in range(_FIRST, _LAST, 2) if one not in used)
        self.preference = next(free, 0)
        if not self.preference:
            raise BackendError("there are too many filters")

    @property
    def handles(self) -> Mapping[str, Any]:
        """What finds the filters again."""
        return {"preference": self.preference, "made": self._all_made()}

    def has_qdisc(self, qdiscs: Listing, device: str) -> bool:
        """Whether a device has the qdisc, whoever has made it."""
        return any(one["dev"] == device and one["kind"] in _KINDS for one in qdiscs)

    def nodes(self, device: str) -> dict[tuple[int, int], str]:
        """Return the kernel's handle of each filter on a device, by IP version and number."""
        return nodes([one for one in self._ip.filters(device) if self._is_at_ours(one)])

    def actions(self, device: str) -> list[Mapping[str, Any]]:
        """Return the actions of the filters on a device that look like the throttle's."""
        return [
            action
            for one in self._ip.filters(device)
            if self._is_at_ours(one) and self._has_action(one)
            for action in one["options"]["actions"]
        ]

    def command(
        self, device: str, version: int, number: int, match: str, action: str, verb: str = "add"
    ) -> str:
        """Return the command that adds a filter, or changes its action.

        ``version`` is 4, 6, or 0 for all that is not IP too; ``number`` is one of 1 to 4095.
        """
        return (
            f"filter {verb} dev {device} ingress pref {self._preference(version)}"
            f" protocol {_protocol(version)} handle ::{number:x} u32 {match} action {action}"
        )

    def remove_command(self, device: str, version: int, handle: str) -> str:
        """Return the command that removes a filter, by the handle that the kernel shows."""
        return (
            f"filter delete dev {device} ingress pref {self._preference(version)}"
            f" protocol {_protocol(version)} handle {handle} u32"
        )

    def will_make(self, device: str) -> None:
        """Note in the handles that the qdisc of a device is the throttle's."""
        self.made.append(device)
        self._left.discard(device)

    def make(self, device: str) -> None:
        """Make the qdisc; ``will_make`` has to be recorded before."""
        self._ip.change([f"qdisc add dev {device} clsact"])

    def remove(self, device: str, *, surely: bool) -> None:
        """Remove the throttle's filters, and the qdisc if a throttle made it and nobody uses it.

        Unless filters of these preferences are ``surely`` its own, they have to look like them.
        """
        self.remove_filters(device, surely=surely)
        made = self._all_made()
        if device in made:
            self._pass_on_or_remove(device)
        self.made = [one for one in made if one != device]
        self._left.add(device)

    def remove_filters(self, device: str, *, surely: bool) -> None:
        """Remove the throttle's filters."""
        found = [one for one in self._ip.filters(device) if self._is_at_ours(one)]
        if surely or any(map(self._has_action, found)):
            preferences = sorted({int(one["pref"]) for one in found})
            self._ip.change(f"filter delete dev {device} ingress pref {one}" for one in preferences)

    def _all_made(self) -> list[str]:
        """Return the devices in ``made``, and those that other throttles have passed on."""
        entries = [files.read(name, self._id) for name in BACKENDS]
        recorded = [entry.record.handles["made"] for entry in entries if entry is not None]
        made = dict.fromkeys([*self.made, *(one for each in recorded for one in each)])
        return [device for device in made if device not in self._left]

    def _pass_on_or_remove(self, device: str) -> None:
        for record in self._others():
            if device in record.handles["devices"]:
                made = [*record.handles["made"], device]
                files.update(record.backend, record.id, handles={**record.handles, "made": made})
                return
        if not any(self._ip.filters(device, hook) for hook in ("ingress", "egress")):
            self._ip.change([f"qdisc delete dev {device} clsact"])

    def _others(self) -> Iterator[Record]:
        """Return the other throttles with filters in this namespace."""
        for backend in BACKENDS:
            for record in files.records(backend):
                here = record.handles["network_namespace"] == self._ip.namespace
                if here and record.id != self._id:
                    yield record

    def _preference(self, version: int) -> int:
        return self.preference + (version == IPV6)

    def _is_at_ours(self, one: Mapping[str, Any]) -> bool:
        return int(one["pref"]) & ~1 == self.preference

    def _has_action(self, one: Mapping[str, Any]) -> bool:
        actions = one.get("options", {}).get("actions", ())
        return any(self._action.items() <= action.items() for action in actions)


def nodes(filters: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """Return the kernel's handle of each filter, by the version of IP and the filter's number."""
    found = {}
    for one in filters:
        handle = str(one.get("options", {}).get("fh", ""))
        number = handle.rpartition(":")[2]
        if number:
            version = IPV6 if one["protocol"] == "ipv6" else IPV4
            found[version, int(number, 16)] = handle
    return found


def _protocol(version: int) -> str:
    return {IPV4: "ip", IPV6: "ipv6"}.get(version, "all")
