"""tracefs: the ids of tracepoints, and probes of kernels that have no other way to make them.

Source: Documentation/trace/events.rst, kprobetrace.rst and uprobetracer.rst of the kernel.
"""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import contextmanager, suppress
from typing import Iterator

from pybpfthrottle.bpf import perf
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.tracing import nearest

_PLACES = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_numbers = itertools.count()


@contextmanager
def directory() -> Iterator[str]:
    """Where tracefs is; where nobody has mounted it, it is mounted for this process alone.

    Mounting needs Linux 5.2 and CAP_SYS_ADMIN. Raises AttachError.
    """
    for place in _PLACES:
        if os.path.isdir(f"{place}/events"):
            yield place
            return
    try:
        fd = perf.mount_nowhere("tracefs")
    except OSError as error:
        raise AttachError(
            f"tracefs is not mounted, and cannot be mounted for this process alone ({error});"
            f" as root: mount -t tracefs tracefs {_PLACES[0]}",
            errno=error.errno or 0,
        ) from error
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def tracepoint_id(name: str) -> int:
    """Return the id of a tracepoint, "sched/sched_switch" or "sched:sched_switch".

    Raises AttachError, with the nearest names where there is no such tracepoint.
    """
    category, _, event = name.replace(":", "/", 1).partition("/")
    if not category or not event or "/" in event:
        raise AttachError(
            f"{name!r} is no name of a tracepoint: write CATEGORY/NAME, as in sched/sched_switch"
        )
    with directory() as place:
        try:
            return int(perf.read(f"{place}/events/{category}/{event}/id"))
        except (FileNotFoundError, NotADirectoryError) as error:
            hint = nearest.hint(f"{category}/{event}", tracepoints(place, category))
            raise AttachError(
                f"this kernel has no tracepoint {category}/{event}{hint}", errno=errno.ENOENT
            ) from error


def tracepoints(place: str, category: str = "") -> list[str]:
    """Return the names of the tracepoints, of one category if it exists, as CATEGORY/NAME."""
    events = f"{place}/events"
    categories = [category] if category and os.path.isdir(f"{events}/{category}") else []
    found = []
    for one in categories or perf.names(events):
        with suppress(OSError):  # a plain file such as events/enable
            found += [f"{one}/{name}" for name in perf.names(f"{events}/{one}") if "." not in name]
    return found


def functions() -> list[str]:
    """Return the functions that the kernel can trace; a name may belong to several.

    Raises AttachError or OSError.
    """
    with directory() as place:
        lines = perf.read(f"{place}/available_filter_functions").splitlines()
    return [line.partition(" ")[0] for line in lines if line]


class Probe(NamedTuple):
    """A probe in one of the files ``kprobe_events`` and ``uprobe_events``, by its full name."""

    file: str
    name: str
    id: int

    def remove(self) -> None:
        """Take it out; if it is gone, do nothing. Raises OSError: EBUSY while it is in use."""
        with directory() as place, suppress(FileNotFoundError):
            perf.append(f"{place}/{self.file}", f"-:{self.name}\n")


def make_probe(file: str, where: str, *, returns: bool = False) -> Probe:
    """Make a probe, for kernels before 4.17. ``where`` is a function, or PATH:OFFSET.

    Raises AttachError where the kernel has no such probes, or OSError.
    """
    # One that a killed process left behind must not be in the way, as must not another thread's.
    name = f"pybpf_{os.getpid()}/probe_{next(_numbers)}"
    with directory() as place:
        if not os.path.exists(f"{place}/{file}"):
            option = f"CONFIG_{file.upper()}"
            raise AttachError(f"this kernel has no {file[:6]}s ({option})", errno=errno.ENOENT)
        perf.append(f"{place}/{file}", f"{'r' if returns else 'p'}:{name} {where}\n")
        probe = Probe(file, name, 0)
        try:
            return probe._replace(id=int(perf.read(f"{place}/events/{name}/id")))
        except BaseException:
            probe.remove()
            raise
