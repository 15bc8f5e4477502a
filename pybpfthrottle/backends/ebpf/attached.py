"""What programs are attached to cgroups, with their flags and owners, whoever attached them."""

from __future__ import annotations

import errno
import os
import pwd
import re
from contextlib import suppress
from functools import cached_property
from typing import Collection, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle.bpf import features, links, programs
from pybpfthrottle.bpf.abi import AttachType, LinkType, ProgType
from pybpfthrottle.bpf.links import AttachMode, LinkInfo
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
# An attach type that this kernel does not have.
_NO_HOOK = (errno.EINVAL, errno.ENOTSUP, ENOTSUPP)


class Links:
    """The links of the machine, and who holds them: listed once, when first asked for."""

    @cached_property
    def by_program(self) -> dict[int, list[LinkInfo]]:
        """Return the links of cgroups, by the program that they attach."""
        found: dict[int, list[LinkInfo]] = {}
        with suppress(OSError):  # they may not be listed here (CAP_SYS_ADMIN, Linux 5.8)
            for link in links.all_infos():
                if link.type == LinkType.CGROUP:
                    found.setdefault(link.program_id, []).append(link)
        return found

    @cached_property
    def _holders(self) -> dict[int, list[int]]:
        return holders_of_links()

    def held(self, link: LinkInfo) -> HeldLink:
        """A link with the processes that hold it."""
        return HeldLink(link.id, tuple(self._holders.get(link.id, ())))


class HeldLink(NamedTuple):
    """A link, and the visible processes that have a descriptor of it."""

    id: int
    pids: tuple[int, ...]


class Attached(NamedTuple):
    """A program at one hook of a cgroup.

    ``mode`` is None among the effective ones, where the kernel does not tell it; ``info`` where
    this process may not look the program up (CAP_SYS_ADMIN).
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
    """What is attached to a cgroup; with ``effective`` also what its ancestors pass on.

    Who asks for many cgroups gives ``known``, so that links are listed once. Linux 4.15. Raises
    CgroupError, and OSError where the kernel refuses to tell.
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
                    known.held(link)
                    for link in known.by_program.get(program_id, ())
                    if link.attach_type == hook and (effective or link.cgroup_id == cgroup.id)
                )
                yield Attached(cgroup, hook, program_id, mode, _info(program_id), own)
    finally:
        os.close(fd)


def blocking(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    """The programs that allow none of ours at a hook of a cgroup: its own, or an ancestor's.

    One that may be overridden stands in the way in its own cgroup alone. Where the kernel does
    not tell (before Linux 4.15, or without privileges) there seem to be none.
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
    """The programs that run no more for a cgroup once anything is attached to it at a hook.

    These are an ancestor's that may be overridden, if nothing between has overridden them already.
    ``but`` are the ids of programs at the cgroup that do not count, since they are asked about. Of
    ancestors that are not visible (above a cgroup namespace) see ``from_above``. Where the kernel
    does not tell (before Linux 4.15, or without privileges) there seem to be none.
    """
    with suppress(OSError, CgroupError):
        for where in cgroup.with_ancestors():
            # What an ancestor has is asked for its mode first: there may be many to describe.
            found = [one for one in _ids_at(where, hook) if one not in but or where != cgroup]
            if found:
                there = list(at(where, [hook])) if where != cgroup else []
                return [one for one in there if one.mode is AttachMode.ALLOW_OVERRIDE]
    return []


def from_above(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    """The programs that run for a cgroup and are attached to ancestors that are not visible.

    Only where neither it nor an ancestor that is visible has any: then one of them may be
    overridden.
    """
    with suppress(OSError, CgroupError):
        above = list(cgroup.with_ancestors())
        if above and not above[-1].is_root() and not any(_ids_at(a, hook) for a in above):
            return list(at(cgroup, [hook], effective=True))
    return []


def silenced(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    """The programs of visible ancestors that do not run for a cgroup, since others override them.

    Linux 4.15. Raises CgroupError, and OSError where the kernel refuses to tell.
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
    """The programs that run for one cgroup, and not for another one, at any hook.

    Linux 4.15. Raises CgroupError, and OSError where the kernel refuses to tell.
    """
    if other == origin:
        return []
    known = Links()
    elsewhere = {
        (one.attach_type, one.program_id) for one in at(other, effective=True, known=known)
    }
    return [
        one
        for one in at(origin, effective=True, known=known)
        if (one.attach_type, one.program_id) not in elsewhere
    ]


def effective_ids(cgroup: Cgroup, hook: AttachType) -> frozenset[int]:
    """The ids of the programs that run at a hook of a cgroup; none where the kernel has no hook.

    Linux 4.15. Raises CgroupError, and OSError where the kernel refuses to tell.
    """
    return frozenset(_ids_at(cgroup, hook, effective=True))


def _ids_at(cgroup: Cgroup, hook: AttachType, *, effective: bool = False) -> tuple[int, ...]:
    fd = cgroup.open()
    try:
        return links.query(fd, hook, effective=effective).program_ids
    except OSError as error:
        if error.errno in _NO_HOOK:
            return ()
        raise
    finally:
        os.close(fd)


def _info(program_id: int) -> Optional[ProgramInfo]:
    with suppress(OSError):  # it may be gone, or may not be looked at
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
    """The ids of the BPF links that a process has a descriptor of, as far as this one may look."""
    found = set()
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError), open(f"/proc/{pid}/fdinfo/{descriptor}") as file:
                match = re.search(r"^link_id:\t(\d+)$", file.read(), re.MULTILINE)
                if match:
                    found.add(int(match[1]))
    return found


def holders_of_links() -> dict[int, list[int]]:
    """For each BPF link the processes that have a descriptor of it. It looks at all processes."""
    found: dict[int, list[int]] = {}
    for pid in process.running():
        for link_id in links_of(pid):
            found.setdefault(link_id, []).append(pid)
    return found
