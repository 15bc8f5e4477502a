"""What is limited on this machine, read from the kernel, whoever limits it.

There is no state besides the kernel's: a throttle is in force if its mechanism says so.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache
from typing import Callable, Iterable, Iterator, Optional, Sequence

from pybpfthrottle.backends import files, protocol
from pybpfthrottle.backends.protocol import Backend, Match, Record
from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.errors import CgroupError, Error, ProcessError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import own_cgroups, process, run_files
from pybpfthrottle.linux.cgroup import Cgroup, locked
from pybpfthrottle.linux.process import Identity, Process
from pybpfthrottle.targets import Selection

# No letters that look like another letter or a digit. The first must not begin a number.
_LETTERS = "bcdfghjkmnpqrstvwxz"
_ID_CHARACTERS = 6

# How long clearing up after a killed instance may take.
_PATIENCE_S = 2.0

# How soon a process that starts more limits tidies up again, and when it did.
_TIDY_S = 10.0
_tidied_s = -math.inf

_TWICE = "packets would be charged to both limits. If you want both, add --stack"


def new_id() -> str:
    """Return an id that no throttle has."""
    first, *others = os.urandom(_ID_CHARACTERS)
    digits = _LETTERS + "23456789"
    return _LETTERS[first % len(_LETTERS)] + "".join(digits[n % len(digits)] for n in others)


def records() -> list[Record]:
    """Return the throttles in force, including those of other processes, oldest first.

    Needs CAP_SYS_ADMIN. Raises OSError.
    """
    is_gone = cache(process.is_gone)  # many may have the same owner
    found = (record for record in _known() if _is_in_force(record, is_gone))
    return sorted(found, key=lambda record: (record.since_ns, record.id))


def _in_use() -> Iterator[Backend]:
    """Return the backends that may have something in force; no other has to be imported."""
    for name in protocol.NAMES:
        if name in protocol.CARRYING or files.ids(name):
            yield get_backend(name)


def _known(*, others: bool = False) -> list[Record]:
    """Return all records; with ``others`` those of this process may be left out.

    Raises OSError if nothing is found where looking is not permitted.
    """
    found: list[Record] = []
    refused: Optional[OSError] = None
    for backend in _in_use():
        try:
            found += backend.in_force(others=others)
        except OSError as error:
            # Without bpf(2) nothing can be limited by it.
            if error.errno not in (errno.ENOSYS, errno.EINVAL):
                refused = error
    if refused is not None and not found:
        raise refused
    return found


def _is_in_force(record: Record, is_gone: Callable[[Identity], bool] = process.is_gone) -> bool:
    """Whether a record is not a crash's leftover, and was not removed by others."""
    return not record.removed and not record.expired and (record.kept or not is_gone(record.owner))


def tidy_up() -> None:
    """Remove the leftovers of a crash, and what was kept and is over, as far as possible here."""
    with suppress(Error, OSError):
        for record in _known():
            if record.kept and record.expired and not record.supervised and not record.removed:
                get_backend(record.backend).open(record).remove()
    for backend in _in_use():
        with suppress(Error, OSError):
            backend.tidy_up()
    with suppress(Error, OSError):
        own_cgroups.remove_abandoned()
    if run_files.stems(run_files.WAYS_OUT):
        from pybpfthrottle import wayout

        with suppress(Error, OSError):
            wayout.tidy_up()
    with locked():
        run_files.tidy_up()


def tidy_up_again() -> None:
    """Do so if it was some time ago: a process may start many limits in a row."""
    global _tidied_s
    now = time.monotonic()
    if now >= _tidied_s + _TIDY_S:
        _tidied_s = now
        tidy_up()


def find(
    *,
    name: Optional[str] = None,
    pid: Optional[int] = None,
    cgroup: Optional[str] = None,
    unit: Optional[str] = None,
) -> list[Record]:
    """Return the throttles with an id or name, or of a process, cgroup or unit."""
    return [
        record
        for record in records()
        if (name is None or name in (record.id, record.spec.name))
        and (pid is None or _is_for(record, pid))
        and (cgroup is None or _is_on(record, cgroup))
        and (unit is None or _is_unit(record, unit))
    ]


def _is_for(record: Record, pid: int) -> bool:
    """Whether a throttle limits a process, or is kept by it."""
    return (
        pid == record.owner.pid
        or pid in record.spec.target.pids
        or pid in get_backend(record.backend).processes(record)
    )


def _is_on(record: Record, path: str) -> bool:
    """Whether a throttle is on a cgroup, whatever path it has where that was made."""
    try:
        number = cgroups_v2.from_path(path).id
    except (CgroupError, OSError):
        return os.path.realpath(path) in record.cgroups
    return number in record.cgroup_ids or (
        not record.cgroup_ids and os.path.realpath(path) in record.cgroups
    )


def _is_unit(record: Record, unit: str) -> bool:
    wanted = cgroups_v2.unit_name(unit)
    return wanted in map(cgroups_v2.unit_name, record.spec.target.units)


class _Once(threading.local):
    """What other processes limit, while this thread keeps them from limiting more."""

    known: Optional[list[Record]] = None
    depth = 0


_once = _Once()


@contextmanager
def looking_once() -> Iterator[None]:
    """Look once at what others limit, for all throttles that are started within it.

    Others wait meanwhile before they start any: so do not stay for long.
    """
    with locked():
        _once.depth += 1
        try:
            yield
        finally:
            _once.depth -= 1
            _once.known = None


def refuse_limited(selection: Optional[Selection], chosen: Sequence[Cgroup]) -> None:
    """Raise ProcessError or CgroupError if another instance already limits part of a target."""
    try:
        known = _settled() if _once.known is None else _once.known
        _once.known = known if _once.depth else None
    except OSError:  # without the right to look, there is no answer
        return
    others = [
        record
        for record in known
        if _is_in_force(record) and not process.same(record.owner, process.identity())
    ]
    own = [] if selection is None else list(selection.processes)
    cgroups = _with_cgroups_of(own, chosen) if others else []
    for record in others:
        if record.match is Match.CGROUP:
            _refuse_in_cgroups(cgroups, chosen, record)
        else:
            _refuse_among_processes(own, chosen, record)


def _settled() -> list[Record]:
    """Return all records of other processes once no killed instance is still being cleared up.

    Its guard would restore connections that are limited anew. This takes a moment at most.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        known = _known(others=True)
        if time.monotonic() >= deadline or not any(map(_is_cleared_up, known)):
            return known
        time.sleep(0.01)


def _is_cleared_up(record: Record) -> bool:
    return (
        record.clears_up is not None
        and process.is_gone(record.owner)
        and not process.is_gone(record.clears_up)
    )


def _with_cgroups_of(own: Iterable[Process], chosen: Sequence[Cgroup]) -> list[Cgroup]:
    """Return chosen cgroups and those that processes are in."""
    found = list(chosen)
    for one in own:
        with suppress(CgroupError, ProcessError):  # it may be in none that is visible
            found.append(cgroups_v2.from_pid(one.pid))
    return found


def _refuse_in_cgroups(wanted: Sequence[Cgroup], chosen: Sequence[Cgroup], record: Record) -> None:
    """Refuse if ``record``, which limits whole cgroups, covers some of the target.

    ``wanted`` has its cgroups, of which some were ``chosen`` as a whole.
    """
    for limited in record.visible_cgroups():
        if any(each in limited or (each in chosen and limited in each) for each in wanted):
            raise CgroupError(
                f"{limited.path} is already limited by process {record.owner.pid}: {_TWICE}"
            )


def _refuse_among_processes(
    own: Sequence[Process], chosen: Sequence[Cgroup], record: Record
) -> None:
    """Refuse if ``record``, which limits processes' sockets, covers some of the target."""
    limited = set(get_backend(record.backend).processes(record))
    for one in own:
        if one.pid in limited:
            chosen_pids = record.spec.target.pids
            whose = ", with its parents," if chosen_pids and one.pid not in chosen_pids else ""
            raise ProcessError(
                f"process {one.pid} ({one.name}) is already limited{whose} by process"
                f" {record.owner.pid}: its {_TWICE}"
            )
    for cgroup in chosen if limited else ():
        for pid in limited.intersection(cgroup.pids_below()):
            raise CgroupError(
                f"process {process.listed([pid])} in {cgroup.path} is already limited by process"
                f" {record.owner.pid}. If you want both limits, add --stack"
            )
