"""A throttle by nftables that another process keeps, or has left behind."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

from pybpfthrottle.backends import files
from pybpfthrottle.backends.nftables import rules
from pybpfthrottle.backends.nftables.nft import Nft
from pybpfthrottle.backends.nftables.table import Table
from pybpfthrottle.backends.nftables.throttle import NAME, burst_bytes, how
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import netns, process
from pybpfthrottle.linux.cgroup import Cgroup, locked
from pybpfthrottle.model import Counters, Direction, Limits, Rate
from pybpfthrottle.supervisor import Chore


class FoundThrottle:
    """A throttle of another process. ``close`` leaves it in force."""

    def __init__(self, record: Record) -> None:
        """Raises ThrottleError if it is gone."""
        self._found = record
        self._limits = dict(record.spec.limits)
        self._nft = Nft(int(record.handles["network_namespace"]))
        self._table = Table(record.id, self._nft, loopback=record.spec.traffic.loopback)

    @property
    def limits(self) -> Limits:
        """The limit of each direction."""
        return self._limits

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction counted. Raises ThrottleError if the table is gone."""
        state = self._table.state(list(self._limits), len(self._found.cgroups))
        if state is None:
            raise ThrottleError(f"the throttle {self._found.id} is gone")
        return state.counters

    def burst_bytes(self, direction: Direction) -> int:
        """Return how much may pass at once after an idle time, beyond the rate."""
        return burst_bytes(self._limits[direction])

    def set_rate(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change the limit of a direction at once, and tell its owner. Raises BackendError."""
        with locked():
            self._table.set_limit(direction, rate)
            self._limits[direction] = rate
            files.set_limit(self._found, direction, rate)

    def switch(self, method: str) -> None:
        """Raise ThrottleError: there is only one way."""
        raise ThrottleError(f"{NAME} has no attach methods, and cannot switch to {method}")

    def move(self, gone: Cgroup, come: Cgroup) -> None:
        """Raise ThrottleError: only the owner follows units."""
        raise ThrottleError(
            f"only process {self._found.owner.pid} can move its limit from {gone.path}"
        )

    def describe(self, direction: Direction) -> dict[str, str]:
        """Return how a direction is limited."""
        return how(self._limits[direction], self._table.name)

    def processes(self) -> list[int]:
        """Return nothing: cgroups are limited."""
        return []

    def notes(self) -> Sequence[str]:
        """Return nothing: only the owner knows."""
        return ()

    def chores(self) -> Sequence[Chore]:
        """Return nothing: the owner does the chores."""
        return ()

    def removed_by_others(self) -> bool:
        """Whether the throttle has been removed in the meantime."""
        return files.read(NAME, self._found.id) is None

    def remove(self) -> None:
        """Delete the table and the file, by which its owner notices and exits."""
        with locked():
            self._table.delete()
            files.delete(NAME, self._found.id)
        self.close()

    def close(self) -> None:
        """Leave the throttle in force."""
        self._nft.close()


class Leftover(NamedTuple):
    """The table of a throttle whose owner was killed."""

    record: Record

    def __str__(self) -> str:
        return f"the {self.record.attached_by} of nftables, of process {self.record.owner.pid}"

    @property
    def kind(self) -> str:
        """What it is, in the plural."""
        return "tables"

    def to_json(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "id": self.record.id,
            "name": rules.table_name(self.record.id),
            "owner_pid": self.record.owner.pid,
        }

    def remove(self) -> None:
        """Delete the table, unless it went with its network namespace. Raises BackendError."""
        with locked():
            namespace = int(self.record.handles["network_namespace"])
            if netns.exists(namespace):
                with Nft(namespace) as nft:
                    Table(self.record.id, nft).delete()
            files.delete(NAME, self.record.id)


def leftovers() -> list[Leftover]:
    """Return the tables that were left by killed owners."""
    return [
        Leftover(record)
        for record in files.records(NAME)
        if not record.kept and process.is_gone(record.owner)
    ]
