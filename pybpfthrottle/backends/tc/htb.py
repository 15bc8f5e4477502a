"""Uploads by HTB: a rule of nftables gives the packets of cgroups a class's priority.

HTB classifies a packet by its priority where that names a class (net/sched/sch_htb.c), so nobody's
marks are touched, and no filter is needed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Iterator, Mapping, Optional, Sequence

from pybpfthrottle.backends import files, nft
from pybpfthrottle.backends.nft import FAMILY, Member, Nft, comment, members, of, table_name
from pybpfthrottle.backends.recorded import Kind, State
from pybpfthrottle.backends.tc import iproute, shaper
from pybpfthrottle.backends.tc.on_devices import OnDevices
from pybpfthrottle.errors import BackendError
from pybpfthrottle.model import Counters, Rate

NAME = "tc_htb"
_CHAIN = "upload"
# Behind all that others do, whose priority would be lost otherwise.
_PRIORITY = 150


class HtbRules(OnDevices):
    """A class on each device, below a root that all throttles share, and a table of nftables."""

    backend = NAME

    def _prepare(self, handles: Mapping[str, Any]) -> None:
        self._nft = Nft(self._ip.place)
        self._minor = int(handles.get("minor", 0)) or self._free_minor()

    def _free_minor(self) -> int:
        used = shaper.minors(self._ip.qdiscs())
        for record in files.records(NAME):
            if record.handles["network_namespace"] == self._ip.namespace:
                used.add(int(record.handles["minor"]))
        return next(one for one in range(1, 0xFFFF) if one not in used)

    @property
    def _what(self) -> str:
        return f"class {shaper.MAJOR}:{self._minor:x}"

    @property
    def handles(self) -> Mapping[str, Any]:
        """What finds it again."""
        return {**super().handles, "minor": self._minor}

    def _begin(self, device: str, qdiscs: iproute.Listing) -> None:
        root = shaper.root_of(qdiscs, device)
        if root is None:
            raise BackendError(f"there is no device {device}")
        lines = shaper.shape(device, self._minor, self._rate)
        if not shaper.is_ours(root):
            if not shaper.is_default(root):
                raise BackendError(
                    f"{device} has a root qdisc that somebody has set ({root['kind']}"
                    f" {root['handle']}), and HTB would replace it"
                )
            lines.insert(0, shaper.root(device))
        self._ip.change(lines)

    def _end(self, device: str, qdiscs: iproute.Listing) -> None:
        root = shaper.root_of(qdiscs, device)
        if root is None or not shaper.is_ours(root):
            return
        there = shaper.minors(qdiscs, device)
        if device not in self._devices and self._minor not in there:
            return
        if there:
            # What has failed half-way has a class without a queue, which is not listed.
            with suppress(BackendError):
                self._ip.change([shaper.unshape(device, self._minor)])
        if not there - {self._minor}:
            # The kernel puts its own default back.
            self._ip.change([f"qdisc delete dev {device} root"])

    def _match(self) -> None:
        there = self._table()
        with members(self._order.cgroups) as matched:
            lines = commands(self._id, self._devices, matched, self._minor)
            begin = "" if there is None else _delete(self._id)
            self._nft.change(begin + "".join(f"{line}\n" for line in lines))

    def state(self, directions: object, cgroups: int) -> Optional[State]:
        """Return what has been counted, and whether class and rules are there."""
        found = super().state([self._direction], cgroups)
        listing = self._nft.table(table_name(self._id))
        rules = [] if listing is None else list(of("rule", listing))
        return found and found._replace(intact=found.intact and len(rules) == cgroups + 1)

    def delete(self) -> None:
        """Remove the table, and the class of each device, with the root if it was the last one."""
        try:
            if self._table() is not None:
                self._nft.change(_delete(self._id))
        finally:
            super().delete()

    def _counted(self, device: str, qdiscs: iproute.Listing) -> Optional[Counters]:
        return shaper.counters(qdiscs, device, self._minor)

    def _table(self) -> Optional[nft.Listing]:
        """Return what is in the throttle's table; None if there is none."""
        listing = self._nft.table(table_name(self._id))
        if listing is not None and not _is_ours(listing, self._id):
            raise BackendError(
                f"there is a table {FAMILY} {table_name(self._id)} that pybpfthrottle has not made"
            )
        return listing

    def close(self) -> None:
        """Release the namespace; what is in force stays."""
        super().close()
        if hasattr(self, "_nft"):
            self._nft.close()


def commands(
    throttle_id: str, devices: Sequence[str], matched: Sequence[Member], minor: int
) -> Iterator[str]:
    """Return the commands that create a throttle's table."""
    table = f"{FAMILY} {table_name(throttle_id)}"
    yield f"create table {table}"
    yield (
        f"add chain {table} {_CHAIN} {{ type filter hook output priority {_PRIORITY} ;"
        " policy accept ; }"
    )
    others = " ".join(f'oifname != "{device}"' for device in devices)
    classify = f"meta priority set {shaper.MAJOR}:{minor:x}"
    for statement in (f"{others} accept", *(f"{one.matched} {classify}" for one in matched)):
        yield f'add rule {table} {_CHAIN} {statement} comment "{comment(throttle_id)}"'


def _delete(throttle_id: str) -> str:
    return f"delete table {FAMILY} {table_name(throttle_id)}\n"


def _is_ours(listing: nft.Listing, throttle_id: str) -> bool:
    return all(one.get("comment") == comment(throttle_id) for one in of("rule", listing)) and (
        {one["name"] for one in of("chain", listing)} == {_CHAIN}
    )


def _how(rate: Optional[Rate]) -> Mapping[str, str]:
    return {"shape": "queue" if rate else "none", "shape_reason": "HTB delays packets in a queue"}


def _burst_bytes(rate: Optional[Rate]) -> int:
    return shaper.burst_bytes(rate) if rate else 0


KIND = Kind(
    NAME,
    HtbRules,
    _how,
    _burst_bytes,
    "queueing disciplines",
    "tc qdisc del, nft flush",
    shaper.CANNOT_BLOCK,
)
