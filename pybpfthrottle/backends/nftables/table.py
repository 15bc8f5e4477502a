"""The table of one throttle, in the network namespace where its processes are."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

from pybpfthrottle.backends.nft import FAMILY, Nft, members, table_name
from pybpfthrottle.backends.nftables import rules
from pybpfthrottle.backends.protocol import Order
from pybpfthrottle.backends.recorded import Kind, Save, State
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.supervisor import Chore

NAME = "nftables"


class Table:
    """A throttle's table. All methods raise BackendError."""

    def __init__(self, throttle_id: str, nft: Nft, *, loopback: bool = False) -> None:
        self._id = throttle_id
        self._nft = nft
        self._loopback = loopback
        self._table = table_name(throttle_id)

    @property
    def name(self) -> str:
        """What limits, for people."""
        return f"table {self._table}"

    @property
    def handles(self) -> Mapping[str, Any]:
        """Nothing: the throttle's id finds it."""
        return {}

    def create(
        self, limits: Limits, order: Order, counters: Mapping[Direction, Counters] = {}
    ) -> None:
        """Create it, with counters that begin at these values, in place of one that is damaged."""
        for rate in limits.values():
            _refuse_beyond(rate)
        is_there = self._is_ours()
        if is_there is False:
            raise BackendError(
                f"there is a table {FAMILY} {self._table} that pybpfthrottle has not made"
            )
        with members(order.cgroups) as matched:
            commands = rules.create(
                self._id, limits, matched, loopback=self._loopback, counters=counters
            )
            self._nft.change((rules.delete(self._id) if is_there else "") + commands)

    def set_limit(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change a limit; the counters continue."""
        _refuse_beyond(rate)
        self._nft.change(rules.set_limit(self._id, direction, rate, loopback=self._loopback))

    def set_cgroups(self, directions: Sequence[Direction], cgroups: Sequence[Cgroup]) -> None:
        """Limit these cgroups instead; the counters continue."""
        with members(cgroups) as matched:
            self._nft.change(rules.set_members(self._id, directions, matched))

    def state(self, directions: Sequence[Direction], cgroups: int) -> Optional[State]:
        """Return what is there of a table that limits so many cgroups; None if it is gone."""
        listing = self._nft.table(self._table)
        if listing is None:
            return None
        try:
            return rules.read(listing, directions, cgroups)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"cannot read the {self.name}: {error!r}") from error

    def delete(self) -> bool:
        """Delete it, if it is there and the throttle's; return whether it was."""
        if not self._is_ours():
            return False
        self._nft.change(rules.delete(self._id))
        return True

    def chores(self) -> Sequence[Chore]:
        """Return nothing: the rules hold wherever packets go."""
        return ()

    def notes(self) -> Sequence[str]:
        """Return nothing: what nftables loses is known beforehand."""
        return ()

    def processes(self) -> list[int]:
        """Return nothing: cgroups are limited."""
        return []

    def close(self) -> None:
        """Release the namespace."""
        self._nft.close()

    def _is_ours(self) -> Optional[bool]:
        """Whether the table of this name is the throttle's; None if there is none."""
        listing = self._nft.table(self._table)
        return None if listing is None else rules.is_ours(listing, self._id)


def _refuse_beyond(rate: Optional[Rate]) -> None:
    if rate is not None and rate > rules.MAX_RATE:
        raise BackendError(f"nftables limits to {rules.MAX_RATE} at most, not to {rate}")


def _open(
    throttle_id: str, order: Order, place: Place, handles: Mapping[str, Any], save: Save
) -> Table:
    return Table(throttle_id, Nft(place), loopback=order.traffic.loopback)


def _how(rate: Optional[Rate]) -> Mapping[str, str]:
    return {
        "shape": "police" if rate else "none",
        "shape_reason": "nftables can drop packets, and not delay them",
    }


def _burst_bytes(rate: Optional[Rate]) -> int:
    """Return the size of the kernel's bucket: never less than a second's worth."""
    return rate.bytes_per_s + rules.BURST_BYTES if rate and not rate.is_blocked else 0


KIND = Kind(NAME, _open, _how, _burst_bytes, "tables", "nft flush ruleset")
