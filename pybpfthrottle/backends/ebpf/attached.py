"""Which programs are attached to cgroups, with their flags and owners, whoever attached them."""

from __future__ import annotations

import errno
import os
import pwd
import re
import time
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Collection, Iterator, Optional, Sequence

from pybpfthrottle.bpf import features, links, programs
from pybpfthrottle.bpf.abi import AttachType, LinkType, ProgType
from pybpfthrottle.bpf.links import AttachMode, LinkInfo
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.bpf.syscall import ENOTSUPP
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import clock, process
from pybpfthrottle.linux.cgroup import Cgroup

CGROUP_TYPES = tuple(
    attach_type
    for attach_type in AttachType
    if attach_type.name.startswith("CGROUP_") or attach_type is AttachType.LSM_CGROUP
)
# The kernel does not have this attach type.
_NO_HOOK = (errno.EINVAL, errno.ENOTSUP, ENOTSUPP)


class Links:
    """The links of the machine, and who holds them: listed only once, on first use."""

    @cached_property
    def by_program(self) -> dict[int, list[LinkInfo]]:
        """Return the links to cgroups, by the program that they attach."""
        found: dict[int, list[LinkInfo]] = {}
        with suppress(OSError):  # listing may not be permitted (CAP_SYS_ADMIN, Linux 5.8)
            for link in links.all_infos():
                if link.type == LinkType.CGROUP:
                    found.setdefault(link.program_id, []).append(link)
        return found

    @cached_property
    def holders(self) -> dict[int, list[int]]:
        """Return the processes that have each link open. Scans all processes."""
        return holders_of_links()


class HeldLink(NamedTuple):
    """A link, and who holds it."""

    id: int
    links: Links

    @property
    def pids(self) -> tuple[int, ...]:
        """The visible processes that have a descriptor for it."""
        return tuple(self.links.holders.get(self.id, ()))


class Attached(NamedTuple):
    """A program at one hook of a cgroup.

    ``mode`` is None for effective programs, whose mode the kernel does not report; ``info`` is None
    if this process may not look the program up (CAP_SYS_ADMIN).
    """

    cgroup: Cgroup
    attach_type: AttachType
    program_id: int
    mode: Optional[AttachMode]
    info: Optional[ProgramInfo]
    links: tuple[HeldLink, ...]

    def __str__(self) -> str:
        if self.info is None:
            return f"program {self.program_id}"
        text = f"{self.info.name or 'a program without a name'} ({_details(self.info)})"
        for link in self.links:
            holders = process.listed(link.pids)
            text += f", link {link.id} held by {holders or 'a pin, or a process not visible here'}"
        return text


def at(
    cgroup: Cgroup,
    hooks: Sequence[AttachType] = CGROUP_TYPES,
    *,
    effective: bool = False,
    known: Optional[Links] = None,
) -> Iterator[Attached]:
    """Return what is attached to a cgroup; with ``effective`` also what it inherits.

    For many cgroups, pass ``known``, so that links are listed only once. Linux 4.15. Raises
    CgroupError, and OSError if the kernel refuses to say.
    """
    known = known or Links()
    fd = cgroup.open()
    try:
        for hook in hooks:
            try:
                found = links.query(fd, hook, effective=effective)
            except OSError as error:
                if error.errno in _NO_HOOK and features.QUERY.available():
                    continue
                raise
            mode = None if effective else AttachMode(found.attach_flags)
            for program_id in found.program_ids:
                own = tuple(
                    HeldLink(link.id, known)
                    for link in known.by_program.get(program_id, ())
                    if link.attach_type == hook and (effective or link.cgroup_id == cgroup.id)
                )
                yield Attached(cgroup, hook, program_id, mode, _info(program_id), own)
    finally:
        os.close(fd)


def blocking(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    """Return the programs that block ours at a cgroup's hook: the cgroup's own, or an ancestor's.

    A program that may be overridden blocks only in its own cgroup. If the kernel does not say
    (before Linux 4.15, or without privileges), returns none.
    """
    for where in cgroup.with_ancestors():
        with suppress(OSError, CgroupError):
            found = [
                one
                for one in at(where, [hook])
                if one.mode is AttachMode.SINGLE
                or (one.mode is AttachMode.ALLOW_OVERRIDE and where == cgroup)
            ]
            if found:
                return found
    return []


def overridden(cgroup: Cgroup, hook: AttachType, *, but: Collection[int] = ()) -> list[Attached]:
    """Return the programs that stop running for a cgroup once anything is attached at a hook.

    These are an ancestor's that may be overridden, unless something in between already overrides
    them. ``but`` has the ids of the cgroup's own programs to ignore, as the question is about them.
    For ancestors that are not visible (above a cgroup namespace) see ``from_above``. If the kernel
    does not say (before Linux 4.15, or without privileges), returns none.
    """
    with suppress(OSError, CgroupError):
        for where in cgroup.with_ancestors():
            found = _query(where, hook)
            if [one for one in found.program_ids if one not in but or where != cgroup]:
                # Check the mode first: an ancestor may have many programs to describe.
                overridable = found.attach_flags == AttachMode.ALLOW_OVERRIDE and where != cgroup
                return list(at(where, [hook])) if overridable else []
    return []


# Throttles look in one go, and most of their cgroups are beside each other.
_ANSWER_LASTS_S = 0.2


def may_override(cgroup: Cgroup, hook: AttachType) -> bool:
    """Whether an ancestor has a program that may be overridden, as it was a moment ago.

    Costs little if it is asked of many cgroups; only ``overridden`` tells what it is about one.
    """
    above = os.path.dirname(cgroup.path)
    return _has_overridable(above, hook, int(time.monotonic() / _ANSWER_LASTS_S))


@lru_cache(maxsize=64)
def _has_overridable(path: str, hook: AttachType, moment: int) -> bool:
    with suppress(OSError, CgroupError):
        for where in Cgroup(path).with_ancestors():
            found = _query(where, hook)
            if found.program_ids and found.attach_flags == AttachMode.ALLOW_OVERRIDE:
                return True
    return False


def from_above(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    """Return the programs that run for a cgroup and are attached to invisible ancestors.

    Only if neither the cgroup nor a visible ancestor has any: only then might one of them be
    overridden.
    """
    with suppress(OSError, CgroupError):
        above = list(cgroup.with_ancestors())
        if above and not above[-1].is_root() and not any(_ids_at(a, hook) for a in above):
            return list(at(cgroup, [hook], effective=True))
    return []


def silenced(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    """Return the programs of visible ancestors that are overridden for a cgroup.

    Linux 4.15. Raises CgroupError, and OSError if the kernel refuses to say.
    """
    found: list[Attached] = []
    overriding = False
    for where in cgroup.with_ancestors():
        here = list(at(where, [hook]))
        if overriding and here and here[0].mode is AttachMode.ALLOW_OVERRIDE:
            found += here
        overriding = overriding or bool(here)
    return found


def left(origin: Cgroup, other: Cgroup) -> list[Attached]:
    """Return the programs that run for one cgroup but not for another, at any hook.

    Linux 4.15. Raises CgroupError, and OSError if the kernel refuses to say.
    """
    if other == origin:
        return []
    known = Links()

    def running(where: Cgroup) -> dict[tuple[AttachType, int], Attached]:
        found = at(where, effective=True, known=known)
        return {(one.attach_type, one.program_id): one for one in found}

    # One that begins or ends above both meanwhile is not among those before and after.
    before, elsewhere, after = running(origin), running(other), running(origin)
    return [one for key, one in before.items() if key in after and key not in elsewhere]


def effective_ids(cgroup: Cgroup, hook: AttachType) -> frozenset[int]:
    """Return the ids of the programs that run at a cgroup's hook; none if the kernel lacks it.

    Linux 4.15. Raises CgroupError, and OSError if the kernel refuses to say.
    """
    return frozenset(_ids_at(cgroup, hook, effective=True))


def runs_any(cgroup: Cgroup, hook: AttachType) -> bool:
    """Whether any program runs at a cgroup's hook, as far as the kernel tells (Linux 4.15).

    If it may not tell this process, one may.
    """
    with suppress(OSError, CgroupError):
        return bool(effective_ids(cgroup, hook))
    return True


def _ids_at(cgroup: Cgroup, hook: AttachType, *, effective: bool = False) -> tuple[int, ...]:
    return _query(cgroup, hook, effective=effective).program_ids


def _query(cgroup: Cgroup, hook: AttachType, *, effective: bool = False) -> links.Attached:
    """Return what is attached at a hook: nothing if the kernel lacks it."""
    fd = cgroup.open()
    try:
        return links.query(fd, hook, effective=effective)
    except OSError as error:
        if error.errno in _NO_HOOK:
            return links.Attached(0, ())
        raise
    finally:
        os.close(fd)


def _info(program_id: int) -> Optional[ProgramInfo]:
    with suppress(OSError):  # it may be gone, or looking may not be permitted
        return programs.info_by_id(program_id)
    return None


def _details(info: ProgramInfo) -> str:
    try:
        kind = ProgType(info.type).name.lower()
    except ValueError:
        kind = str(info.type)
    if not info.load_time_ns:  # before Linux 4.15
        return f"id {info.id}, tag {info.tag}, {kind}"
    try:
        user = pwd.getpwuid(info.created_by_uid).pw_name
    except KeyError:
        user = str(info.created_by_uid)
    age_s = max(0.0, (clock.boottime_ns() - info.load_time_ns) / 1e9)
    return f"id {info.id}, tag {info.tag}, {kind}, loaded by {user} {_ago(age_s)}"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def links_of(pid: int) -> set[int]:
    """Return the ids of the BPF links that a process has open, if this one may look."""
    found = set()
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError), open(f"/proc/{pid}/fdinfo/{descriptor}") as file:
                match = re.search(r"^link_id:\t(\d+)$", file.read(), re.MULTILINE)
                if match:
                    found.add(int(match[1]))
    return found


def holders_of_links() -> dict[int, list[int]]:
    """Return the processes that have each BPF link open. Scans all processes."""
    found: dict[int, list[int]] = {}
    for pid in process.running():
        for link_id in links_of(pid):
            found.setdefault(link_id, []).append(pid)
    return found
