"""nft: its commands are changes that happen as a whole or not at all, its answers are JSON."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle.backends.commands import Commands
from pybpfthrottle.errors import BackendError, CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.logger import Logger

log = Logger(__name__)

FAMILY = "inet"
PREFIX = "pybpfthrottle-"
_PACKAGE = "nftables"

# What nft -j list prints: an object each, below its kind.
Listing = Sequence[Mapping[str, Any]]


class Member(NamedTuple):
    """A cgroup as nft wants it: its depth, and a path to it from /sys/fs/cgroup."""

    level: int
    path: str

    @property
    def matched(self) -> str:
        """What matches the packets of its sockets, in nft's language."""
        return f'socket cgroupv2 level {self.level} "{self.path}"'


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


class Nft(Commands):
    """Runs nft in one network namespace. ``close`` or ``with`` releases that.

    All methods raise BackendError.
    """

    def change(self, commands: str) -> None:
        """Carry out commands, all or none."""
        log.debug("nft in network namespace %d:\n%s", self.namespace, commands.rstrip())
        self.run(["nft", "-f", "-"], package=_PACKAGE, text=commands)

    def check(self, commands: str) -> None:
        """Have the kernel accept commands, and carry out none of them."""
        self.run(["nft", "--check", "-f", "-"], package=_PACKAGE, text=commands)

    def table(self, name: str) -> Optional[Listing]:
        """Return what is in a table, or None if there is no such table."""
        try:
            return self._list("table", FAMILY, name)
        except BackendError:
            tables = self._list("tables", FAMILY)
            if any(one.get("table", {}).get("name") == name for one in tables):
                raise
            return None

    def __enter__(self) -> Nft:
        return self

    def _list(self, *what: str) -> Listing:
        answer = self.ask(["nft", "-j", "list", *what], package=_PACKAGE)
        try:
            listing: Listing = answer["nftables"]
        except (KeyError, TypeError) as error:
            raise BackendError(f"cannot read what nft prints: {str(answer)[:80]}") from error
        return listing


def table_name(throttle_id: str) -> str:
    """Return the name of a throttle's table."""
    return PREFIX + throttle_id


def comment(throttle_id: str) -> str:
    """Return the comment of a throttle's rules."""
    return f"pybpfthrottle {throttle_id}"


def of(kind: str, listing: Listing) -> Iterator[Mapping[str, Any]]:
    """Return what a listing has of a kind."""
    return (one[kind] for one in listing if kind in one)
