"""Limiting from Python: what the command line does, with the same fallbacks and safety rules."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, TypeVar, Union
from weakref import WeakKeyDictionary

from pybpfthrottle import registry
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import CgroupError, ProcessError, ThrottleError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup, locked
from pybpfthrottle.linux.process import Identity, Process
from pybpfthrottle.model import Limits, Rate, Target, ThrottleSpec, Traffic
from pybpfthrottle.plan import Wish
from pybpfthrottle.throttle import Throttle, limits_of, open_record, start

T = TypeVar("T")

# One, or several.
Some = Union[T, Iterable[T]]
# A string as on the command line, bytes per second, or a Rate.
Limit = Union[str, int, Rate]


def limit(
    *,
    pid: Some[int] = (),
    name: Some[str] = (),
    exe: Some[str] = (),
    user: Some[str] = (),
    cgroup: Some[str] = (),
    unit: Some[str] = (),
    download: Optional[Limit] = None,
    upload: Optional[Limit] = None,
    children: bool = True,
    loopback: bool = False,
    traffic: str = "all",
    to: Some[str] = (),
    but: Some[str] = (),
    label: str = "",
    stack: bool = False,
    wish: Optional[Wish] = None,
    supervise: bool = True,
) -> Throttle:
    """Limit processes, cgroups or systemd units, which share the limit; return the throttle.

    Processes are given by ``pid``, or match one each of the given ``name``, ``exe`` and ``user``,
    now or later. With ``children`` the processes that they start are limited too. ``cgroup`` is a
    cgroup v2 path. ``download`` and ``upload`` are limits as on the command line ("1M", "8mbit"),
    or in bytes per second. ``traffic`` is all, internet or local; ``to`` has the networks (CIDR)
    that alone are limited, ``but`` those that are not. ``label`` is a name to choose the throttle
    by. ``wish`` says how to put the limit in force.

    What another process limits already is refused, with what is above or below it. So is a process
    or cgroup that this program limits already in the same direction; but it may limit a process and
    its child, or a cgroup and one below it. ``stack`` allows all of these; packets are then charged
    to both limits.

    The limit is in force when this returns, and ends with the ``with`` or ``async with`` block, by
    ``remove``, or with this process. Later processes and open connections need looking after: by a
    background thread, which all throttles of this process share; within ``async with`` by the event
    loop; and without ``supervise`` by the caller, who has to run what ``chores`` returns.

    Raises LimitError for a limit that cannot be read, ProcessError or CgroupError for a target
    that does not exist, may not be limited or is limited already, ThrottleError if nothing can
    limit here, and BpfError for what the kernel refuses. Then nothing stays
    attached. Needs root, or CAP_BPF and CAP_NET_ADMIN; Linux 4.10, for processes 5.10.
    """
    limits = {
        direction: rate
        for direction, rate in limits_of(download=download, upload=upload).items()
        if rate is not None
    }
    if not limits:
        raise ThrottleError("no limit was given: give download, upload or both")
    target = target_from(
        pid=pid, name=name, exe=exe, user=user, cgroup=cgroup, unit=unit, children=children
    )
    meant = Traffic(loopback)
    if traffic != "all" or to or but:
        from pybpfthrottle import networks  # which takes a moment

        meant = networks.traffic(traffic, _some(to), _some(but), loopback=loopback)
    wish = wish or Wish()
    if stack:
        wish = wish.changed(stack=True)
    with beside_own(target, limits, wish) as remember:
        throttle = start(ThrottleSpec(target, limits, meant, label), wish)
        remember(throttle)
    registry.tidy_up_again()
    if supervise:
        throttle.supervise()
    return throttle


def target_from(
    *,
    pid: Some[int] = (),
    name: Some[str] = (),
    exe: Some[str] = (),
    user: Some[str] = (),
    cgroup: Some[str] = (),
    unit: Some[str] = (),
    children: bool = True,
) -> Target:
    """Return the target that is given as for ``limit``. Raises ThrottleError if there is none."""
    target = Target(
        pids=tuple(map(_process_id, _some(pid))),
        names=_some(name),
        executables=tuple(map(os.fspath, _some(exe))),
        users=tuple(map(str, _some(user))),
        children=children,
        cgroups=_some(cgroup),
        units=_some(unit),
    )
    if not (target.processes or target.cgroups or target.units):
        raise ThrottleError("no target was given: give pid, name, exe, user, cgroup or unit")
    if target.processes and (target.cgroups or target.units):
        raise ThrottleError("processes cannot share a limit with cgroups and units")
    return target


Given = Union[Identity, Cgroup]
# The throttles of this program, with the process that has made them: a child of it has copies.
_own: WeakKeyDictionary[Throttle, tuple[int, Mapping[Given, str]]] = WeakKeyDictionary()


@contextmanager
def beside_own(target: Target, limits: Limits, wish: Wish) -> Iterator[Callable[[Throttle], None]]:
    """Yield what remembers the throttle that is started meanwhile for a target.

    Raises ProcessError or CgroupError if this program limits a part of it already.
    """
    with locked():
        given = dict(_given(target))
        if not wish.stack:
            _refuse_own(given, limits)
        yield lambda throttle: _own.__setitem__(throttle, (os.getpid(), given))


def _given(target: Target) -> Iterator[tuple[Given, str]]:
    """Yield the processes and cgroups of a target that exist, and what people call them."""
    for pid in target.pids:
        with suppress(ProcessError):
            process = Process(pid)
            yield process.identity, f"process {pid} ({process.name})"
    for path in target.cgroups:
        with suppress(CgroupError):
            yield cgroups.from_path(path), path
    for name in target.units:
        with suppress(CgroupError):
            yield cgroups.from_unit(name), name


def _refuse_own(given: Mapping[Given, str], limits: Limits) -> None:
    for throttle, (maker, others) in list(_own.items()):
        both = [one for one in given if one in others]
        if both and maker == os.getpid() and _limits_any(throttle, limits):
            error = ProcessError if isinstance(both[0], Identity) else CgroupError
            raise error(
                f"{given[both[0]]} is already limited by {throttle.id}, which this program has"
                " made: packets would be charged to both limits. Change that one with its set(),"
                " or give stack=True if you want both"
            )


def _limits_any(throttle: Throttle, limits: Limits) -> bool:
    """Whether a throttle is in force, and limits one of the directions that are to be limited."""
    own = {**throttle.limits, **throttle.paused}
    return any(rate and own.get(one) for one, rate in limits.items()) and throttle.in_force


def _process_id(given: Any) -> int:
    if not isinstance(given, int):
        raise ThrottleError(f"a process id is a number, such as 1234, but not {given!r}")
    return given


def _some(given: Some[Any]) -> tuple[Any, ...]:
    return (given,) if isinstance(given, (str, int)) else tuple(given)


class RunningThrottle(NamedTuple):
    """A throttle in force, whoever made it."""

    record: Record

    @property
    def id(self) -> str:
        """The id by which the command line chooses it."""
        return self.record.id

    @property
    def name(self) -> str:
        """The name that it was given, or the empty string."""
        return self.record.spec.name

    @property
    def target(self) -> Target:
        """What it limits, as requested."""
        return self.record.spec.target

    @property
    def limits(self) -> Limits:
        """The limit of each direction; None is unlimited."""
        return self.record.spec.limits

    @property
    def cgroups(self) -> tuple[str, ...]:
        """The paths of the cgroups that its programs are attached to."""
        return self.record.cgroups

    @property
    def owner(self) -> Identity:
        """The process that keeps it."""
        return self.record.owner

    @property
    def owner_pid(self) -> int:
        """The id of the process that keeps it."""
        return self.record.owner.pid

    @property
    def kept(self) -> bool:
        """Whether it stays in force after its owner ends."""
        return self.record.kept

    def open(self) -> Throttle:
        """Open the throttle, to read, change or remove it; ``close`` leaves it in force.

        Raises ThrottleError if it is gone.
        """
        return open_record(self.record)


def throttles() -> list[RunningThrottle]:
    """Return the throttles in force on this machine, whoever made them, oldest first.

    Needs CAP_SYS_ADMIN, or raises OSError. Linux 4.13.
    """
    return [RunningThrottle(record) for record in registry.records()]
