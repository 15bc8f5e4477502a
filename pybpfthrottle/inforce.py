"""The throttles in force on this machine, whoever made them: each with all of its parts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterable, Iterator, Optional, Sequence

from pybpfthrottle import registry
from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import process
from pybpfthrottle.model import Counters, Direction, Limits, Rate, Traffic
from pybpfthrottle.throttle import Throttle, open_record


class InForce(NamedTuple):
    """A throttle in force: a record for each of its backends, all with the same id."""

    parts: tuple[Record, ...]

    @property
    def record(self) -> Record:
        """The first record, for what all of them share."""
        return self.parts[0]

    @property
    def id(self) -> str:
        """The id by which it is chosen."""
        return self.record.id

    @property
    def limits(self) -> Limits:
        """The limit of each direction that it has; None is unlimited."""
        return {
            direction: rate for part in self.parts for direction, rate in part.spec.limits.items()
        }

    @property
    def paused(self) -> Limits:
        """The limits that are lifted for now, of each direction that has one."""
        return {
            direction: rate for part in self.parts for direction, rate in part.spec.paused.items()
        }

    def limit(self, direction: Direction) -> str:
        """Return the limit of a direction that it has, in words."""
        return limit(self.limits[direction], self.paused.get(direction))

    @property
    def owner(self) -> str:
        """Who keeps it in force, in words."""
        return owner(self.record.owner.pid, self.record.supervised)

    @property
    def target(self) -> str:
        """What is limited, in words."""
        target = self.record.spec.target
        words = []
        if target.command:
            words.append("the command " + " ".join(target.command))
        if target.pids:
            words.append(process.listed(target.pids))
        words += [f"named {name}" for name in target.names]
        words += [f"running {path}" for path in target.executables]
        words += [f"of user {user}" for user in target.users]
        words += [f"unit {name}" for name in target.units]
        words += target.cgroups
        if target.rule:
            words.append(f"by rule {target.rule}")
        what = ", ".join(words) or ", ".join(self.record.cgroups)
        return (what or "unknown (of an older version)") + _networks(self.record.spec.traffic)

    @property
    def waits(self) -> bool:
        """Whether it limits nothing yet: a rule's, of which no process runs."""
        parts = self.parts if self.record.spec.target.by_rule else ()
        return bool(parts) and not any(get_backend(one.backend).processes(one) for one in parts)

    @contextmanager
    def opened(self) -> Iterator[list[tuple[Record, Throttle]]]:
        """Open its parts for a moment. Raises ThrottleError if they are gone."""
        opened: list[tuple[Record, Throttle]] = []
        try:
            for record in self.parts:
                opened.append((record, open_record(record)))
            yield opened
        finally:
            for _, throttle in opened:
                throttle.close()

    def counters(self) -> dict[Direction, Counters]:
        """Return what each direction has counted. Raises ThrottleError if it is gone."""
        with self.opened() as parts:
            return {
                direction: counted
                for _, throttle in parts
                for direction, counted in throttle.counters().items()
            }

    def set_limits(self, limits: Limits) -> None:
        """Change limits; None lifts one. Raises ThrottleError for a direction that it lacks."""
        own = self.limits
        with self.opened() as parts:
            for record, throttle in parts:
                for direction, rate in limits.items():
                    # What no part limits is refused by the first one.
                    if direction in record.spec.limits or direction not in own:
                        throttle.set_limit(direction, rate)

    def pause(self) -> None:
        """Lift its limits for now. Raises ThrottleError if they are already."""
        if self.paused:
            raise ThrottleError(f"{self.id} is paused already")
        with self.opened() as parts:
            for _, throttle in parts:
                throttle.pause()

    def resume(self) -> None:
        """Put back the limits that were lifted for now. Raises ThrottleError if none were."""
        if not self.paused:
            raise ThrottleError(f"{self.id} is not paused")
        with self.opened() as parts:
            for _, throttle in parts:
                throttle.resume()

    def switch(self, method: str) -> None:
        """Attach it by another method. Raises AttachError."""
        with self.opened() as parts:
            for _, throttle in parts:
                throttle.switch(method)

    def remove(self) -> None:
        """Remove it. The process that keeps it in force finds out, and ends."""
        with self.opened() as parts:
            for _, throttle in parts:
                throttle.remove()


def limit(rate: Optional[Rate], paused: Optional[Rate]) -> str:
    """Return a limit, or what it was before it was lifted for now, for people."""
    return f"{paused} (paused)" if paused is not None else str(rate or "unlimited")


def owner(pid: int, supervised: bool) -> str:
    """Return who keeps a throttle, for people."""
    return process.listed([pid]) if supervised else "the kernel alone"


def _networks(traffic: Traffic) -> str:
    """Return which networks are limited, as options."""
    words = [f"--traffic {traffic.kind}"] if traffic.kind != "all" else []
    words += [f"--to {one}" for one in traffic.to]
    words += [f"--except {one}" for one in traffic.but]
    return f" ({' '.join(words)})" if words else ""


def in_force(records: Iterable[Record]) -> list[InForce]:
    """Return the throttles that some records are parts of, in the same order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.id, []).append(record)
    return [InForce(tuple(parts)) for parts in found.values()]


class Cover:
    """Which throttles limit which processes, at one moment."""

    def __init__(self, throttles: Sequence[InForce]) -> None:
        """Raises OSError if what they limit may not be read."""
        self.throttles = throttles
        self._by_pid: dict[int, list[InForce]] = {}
        self._by_cgroup: list[tuple[str, InForce]] = []
        for one in throttles:
            pids = [get_backend(part.backend).processes(part) for part in one.parts]
            for pid in {pid for found in pids for pid in found}:
                self._by_pid.setdefault(pid, []).append(one)
            # Marks are looked at by programs on a cgroup above all processes, which limit few.
            whole = [part for part in one.parts if part.match is Match.CGROUP]
            paths = {where.path for part in whole for where in part.visible_cgroups()}
            self._by_cgroup += [(path, one) for path in sorted(paths)]

    @classmethod
    def now(cls) -> Cover:
        """Return what is limited now. Raises OSError or an error of this package."""
        return cls(in_force(registry.records()))

    def of(self, pid: Optional[int], cgroup: str) -> list[InForce]:
        """Return the throttles that limit a process in a cgroup, given by its path."""
        found = {} if pid is None else {one.id: one for one in self._by_pid.get(pid, ())}
        found.update((one.id, one) for path, one in self._by_cgroup if _is_below(cgroup, path))
        return list(found.values())


def _is_below(cgroup: str, path: str) -> bool:
    return bool(cgroup) and f"{cgroup}/".startswith(path.rstrip("/") + "/")


def limits_together(throttles: Iterable[InForce]) -> dict[Direction, Optional[Rate]]:
    """Return the limits that some throttles impose together: the lowest of each direction."""
    found: dict[Direction, Optional[Rate]] = {}
    for one in throttles:
        for direction, rate in one.limits.items():
            known = found.get(direction)
            found[direction] = min(filter(None, (known, rate)), default=None)
    return found
