"""Throttle: choose a backend for each direction, apply, read counters, change, remove."""

from __future__ import annotations

import time
from typing import Mapping, Optional, Sequence

from pybpfthrottle.backends import Backend, Handle, Limits, Options, Targets
from pybpfthrottle.backends.ebpf.backend import EbpfBackend
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Counters, Direction, Rate
from pybpfthrottle.targets import Selection

BACKENDS: tuple[Backend, ...] = (EbpfBackend(),)


class Throttle:
    """Limits in force on cgroups or processes, which share them. ``remove`` or ``with`` ends it."""

    def __init__(self, targets: Targets, limits: Limits, handles: dict[Direction, Handle]) -> None:
        self.cgroups = tuple(targets.cgroups)
        self.selection = targets.processes
        self._limits = dict(limits)
        self._handles = handles
        self.started_s = time.monotonic()

    @property
    def limits(self) -> Mapping[Direction, Optional[Rate]]:
        """The limit for each direction; None is unlimited."""
        return dict(self._limits)

    def counters(self) -> dict[Direction, Counters]:
        """What each direction counted since the throttle was made."""
        found: dict[Direction, Counters] = {}
        for handle in self._distinct_handles():
            found.update(handle.counters())
        return found

    def burst_bytes(self, direction: Direction) -> int:
        """What may pass at once after an idle time, beyond the rate."""
        return self._handles[direction].burst_bytes(direction)

    def set_limit(self, direction: Direction, rate: Optional[Rate]) -> None:
        """Change a limit while it is in force; None lifts it. Raises ThrottleError."""
        if direction not in self._handles:
            raise ThrottleError(f"this throttle was made without a limit for {direction}")
        self._handles[direction].set_rate(direction, rate)
        self._limits[direction] = rate

    def switch(self, method: str) -> None:
        """Attach by another method, link or legacy, without a moment without a limit.

        Raises AttachError; then what was attached before still is.
        """
        for handle in self._distinct_handles():
            handle.switch(method)

    def describe(self) -> dict[str, dict[str, str]]:
        """How each direction is limited."""
        return {
            str(direction): handle.describe(direction)
            for direction, handle in self._handles.items()
        }

    def vanished(self) -> bool:
        """Whether nothing is left to limit, and nothing can come."""
        if any(cgroup.exists() for cgroup in self.cgroups):
            return False
        if self.selection is None:
            return True
        return not self.selection.matches_some and not self.processes()

    def processes(self) -> list[int]:
        """The selected processes that are limited now, and those that they have started."""
        found = (pid for handle in self._distinct_handles() for pid in handle.processes())
        return sorted(set(found))

    def notes(self) -> list[str]:
        """What is not covered, or covered besides, a line each; more may come with time."""
        found = (note for handle in self._distinct_handles() for note in handle.notes())
        return list(dict.fromkeys(found))

    def remove(self) -> None:
        """Take the limits away. Doing so twice is no error."""
        for handle in self._distinct_handles():
            handle.remove()

    def __enter__(self) -> Throttle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _distinct_handles(self) -> list[Handle]:
        return list({id(handle): handle for handle in self._handles.values()}.values())


def apply(
    cgroups: Sequence[Cgroup],
    limits: Limits,
    *,
    processes: Optional[Selection] = None,
    options: Options = Options(),  # noqa: B008 - an immutable value
    backends: Optional[Mapping[Direction, str]] = None,
) -> Throttle:
    """Put limits in force on cgroups, which share them; the traffic of all others is not touched.

    With ``processes`` they are for the sockets of these, whatever cgroup they are of.
    ``backends`` names a mechanism for a direction; without, the best available one is chosen.
    Raises ThrottleError, BpfError, CgroupError or ProcessError; then nothing stays attached.
    """
    if not limits:
        raise ThrottleError("no limit was given")
    targets = Targets(cgroups, processes)
    chosen: dict[Backend, dict[Direction, Optional[Rate]]] = {}
    for direction, rate in limits.items():
        backend = choose(direction, (backends or {}).get(direction, "auto"))
        chosen.setdefault(backend, {})[direction] = rate
    handles: dict[Direction, Handle] = {}
    try:
        for backend, share in chosen.items():
            handle = backend.apply(targets, share, options)
            handles.update(dict.fromkeys(share, handle))
    except BaseException:
        for handle in handles.values():
            handle.remove()
        raise
    return Throttle(targets, limits, handles)


def prepare() -> None:
    """Do what takes time and can be done before ``apply``, as in a thread beside other work."""
    for backend in BACKENDS:
        backend.prepare()


def choose(direction: Direction, name: str = "auto") -> Backend:
    """The named backend, or the best available one.

    Raises ThrottleError with the reason of each that is not available.
    """
    if name != "auto" and name not in (backend.name for backend in BACKENDS):
        known = ", ".join(backend.name for backend in BACKENDS)
        raise ThrottleError(f"no backend {name!r} for {direction} (known: {known})")
    reasons = []
    for backend in sorted(BACKENDS, key=lambda backend: -backend.priority):
        if name not in ("auto", backend.name):
            continue
        reason = backend.unavailable(direction)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ThrottleError(f"cannot limit {direction}: {'; '.join(reasons)}")
