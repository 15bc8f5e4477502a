"""Systemd units across restarts, each of which creates a new cgroup."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from typing import Callable, Iterable, Optional

from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import libc
from pybpfthrottle.linux.cgroup import Cgroup

# How soon a unit is found that restarts in another slice, or without inotify.
_PERIOD_S = 1.0

# include/uapi/linux/inotify.h
_IN_CREATE, _IN_ONLYDIR = 0x00000100, 0x01000000
_EVENTS_BYTES = 1 << 16


class Unit:
    """A unit's name, and its present or last cgroup; or one beside the one that it will have."""

    def __init__(self, name: str, cgroup: Cgroup, cgroup_id: int) -> None:
        self.name = name
        self.cgroup = cgroup
        self.cgroup_id = cgroup_id


class Comings:
    """A chore that waits for units to start: it notices a new cgroup at its creation.

    ``moved`` is called with a unit and its new cgroup, and again if it returns False. ``stopped``
    is called with a unit that turns out not to run. ``close`` ends the chore.
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
        # Check immediately: a unit may have been restarted already.
        self.due_s = -math.inf
        self._inotify = -1
        with suppress(OSError):  # the user may have reached the limit in fs.inotify
            self._inotify = libc.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a cgroup was created near one of the units."""
        return self._inotify

    def run(self) -> None:
        """Check whether units have started again."""
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
        """Stop waiting."""
        if self._inotify >= 0:
            descriptor, self._inotify = self._inotify, -1
            os.close(descriptor)

    def _watch(self, unit: Unit) -> None:
        """Watch the slices of a unit, which may vanish with it.

        From the top down, and before the check, so that no creation goes unnoticed.
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
        found = _present(Cgroup(os.path.join(os.path.dirname(unit.cgroup.path), unit.name)))
        if found is None and searches:
            with suppress(CgroupError):
                found = cgroups.from_unit(unit.name)
        if found is None:
            if searches:
                self._stopped(unit)
            return
        # Set before limiting it: if the unit is restarted meanwhile, the next check sees that.
        with suppress(FileNotFoundError):
            cgroup_id = found.id
            if self._moved(unit, found):
                unit.cgroup, unit.cgroup_id = found, cgroup_id


def _present(cgroup: Cgroup) -> Optional[Cgroup]:
    return cgroup if cgroup.exists() else None
