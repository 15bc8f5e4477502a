"""The table of one throttle, in the network namespace where its processes are."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import Iterator, Mapping, Optional, Sequence

from pybpfthrottle.backends.nftables import rules
from pybpfthrottle.backends.nftables.nft import Nft
from pybpfthrottle.backends.nftables.rules import Member, State
from pybpfthrottle.errors import BackendError, CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Counters, Direction, Limits, Rate


@contextmanager
def members(cgroups: Sequence[Cgroup], *, root_level: int = 0) -> Iterator[list[Member]]:
    """Yield cgroups as nft wants them, within the context. Raises BackendError or CgroupError.

    The root, which nothing matches, is refused unless ``root_level`` is given, for a trial.
    """
    with ExitStack() as stack:
        found = []
        for cgroup in cgroups:
            try:
                level = cgroups_v2.depth(cgroup) or root_level
            except CgroupError as error:
                raise BackendError(f"nftables cannot match {cgroup.path}: {error}") from error
            if not level:
                raise BackendError("nftables cannot match the root cgroup")
            fd = cgroup.open()
            stack.callback(os.close, fd)
            # nft prepends /sys/fs/cgroup, wherever cgroup v2 is mounted, and reads its number from
            # there. No character of a cgroup's name can break a path by descriptor.
            found.append(Member(level, f"../../../proc/{os.getpid()}/fd/{fd}"))
        yield found


class Table:
    """A throttle's table. All methods raise BackendError."""

    def __init__(self, throttle_id: str, nft: Nft, *, loopback: bool = False) -> None:
        self._id = throttle_id
        self._nft = nft
        self._loopback = loopback
        self.name = rules.table_name(throttle_id)

    def create(
        self,
        limits: Limits,
        cgroups: Sequence[Cgroup],
        counters: Mapping[Direction, Counters] = {},
    ) -> None:
        """Create it, with counters that begin at these values, in place of one that is damaged."""
        for rate in limits.values():
            _refuse_beyond(rate)
        is_there = self._is_ours()
        if is_there is False:
            raise BackendError(
                f"there is a table {rules.FAMILY} {self.name} that pybpfthrottle has not made"
            )
        with members(cgroups) as matched:
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
        listing = self._nft.table(self.name)
        if listing is None:
            return None
        try:
            return rules.read(listing, directions, cgroups)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"cannot read the table {self.name}: {error!r}") from error

    def delete(self) -> bool:
        """Delete it, if it is there and the throttle's; return whether it was."""
        if not self._is_ours():
            return False
        self._nft.change(rules.delete(self._id))
        return True

    def _is_ours(self) -> Optional[bool]:
        """Whether the table of this name is the throttle's; None if there is none."""
        listing = self._nft.table(self.name)
        return None if listing is None else rules.is_ours(listing, self._id)


def _refuse_beyond(rate: Optional[Rate]) -> None:
    if rate is not None and rate > rules.MAX_RATE:
        raise BackendError(f"nftables limits to {rules.MAX_RATE} at most, not to {rate}")
