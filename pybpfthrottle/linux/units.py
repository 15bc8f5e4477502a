"""Systemd units while they are stopped and started: each time with another cgroup."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Callable, Iterable, Optional

from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import libc
from pybpfthrottle.linux.cgroup import Cgroup

# How soon one is found that comes back in another slice, or where nothing tells of new cgroups.
_PERIOD_S = 1.0

# include/uapi/linux/inotify.h
_IN_CREATE, _IN_ONLYDIR = 0x00000100, 0x01000000
_EVENTS_BYTES = 1 << 16


@dataclass
class Unit:
    """A unit by its name, and the cgroup that it has, or had last."""

    name: str
    cgroup: Cgroup
    cgroup_id: int


class Comings:
    """Units that are waited for, as a chore: a new cgroup is noticed when it is made.

    ``moved`` is called with a unit and its new cgroup; if it returns false, it is called again.
    ``stopped`` is called with a unit that was looked for, and does not run. ``close`` ends it.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        moved: Callable[[Unit, Cgroup], bool],
        stopped: Callable[[Unit], None],
    ) -> None:
        self._units = list(units)
        self._moved = moved
        self._stopped = stopped
        # At once: it may have been started again before anybody looked.
        self.due_s = -math.inf
        self._inotify = -1
        with suppress(OSError):  # there may be too many of this user (fs.inotify)
            self._inotify = libc.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a cgroup was made near one of the units."""
        return self._inotify

    def run(self) -> None:
        """See whether units have come back."""
        searches = time.monotonic() >= self.due_s
        if searches:
            self.due_s = time.monotonic() + _PERIOD_S
        if self._inotify >= 0:
            with suppress(OSError):
                os.read(self._inotify, _EVENTS_BYTES)
        for unit in self._units:
            self._watch(unit)
            self._look(unit, searches)

    def close(self) -> None:
        """Wait no more."""
        if self._inotify >= 0:
            descriptor, self._inotify = self._inotify, -1
            os.close(descriptor)

    def _watch(self, unit: Unit) -> None:
        """Be told of what is made in the slices of a unit, which may go with it.

        From the top down, and before the look: nothing is made in between that nobody tells of.
        """
        above = list(Cgroup(os.path.dirname(unit.cgroup.path)).with_ancestors())
        if self._inotify >= 0:
            for directory in reversed(above):
                with suppress(OSError):
                    events = _IN_CREATE | _IN_ONLYDIR
                    libc.inotify_add_watch(self._inotify, directory.reach, events)

    def _look(self, unit: Unit, searches: bool) -> None:
        if unit.cgroup.is_still(unit.cgroup_id):
            return
        found = _present(unit.cgroup)
        if found is None and searches:
            with suppress(CgroupError):
                found = cgroups.from_unit(unit.name)
        if found is None:
            if searches:
                self._stopped(unit)
            return
        # Before it is limited: if it is another one by then, the next look sees that.
        with suppress(FileNotFoundError):
            cgroup_id = found.id
            if self._moved(unit, found):
                unit.cgroup, unit.cgroup_id = found, cgroup_id


def _present(cgroup: Cgroup) -> Optional[Cgroup]:
    return cgroup if cgroup.exists() else None
