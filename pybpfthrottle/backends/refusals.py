"""Why an attachment was refused: what is attached there and above, and what the kernel lacks."""

from __future__ import annotations

import errno
import os
import pwd
import time
from typing import Iterator, Optional

from pybpfthrottle import process
from pybpfthrottle.bpf import features, links, privileges, programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.bpf.programs import Program, ProgramInfo
from pybpfthrottle.cgroup import Cgroup, root
from pybpfthrottle.settings import AttachPolicy

_MOST_PROGRAMS = 64


def explain(
    error: OSError,
    program: Program,
    cgroup: Cgroup,
    fd: int,
    attach_type: AttachType,
    policy: AttachPolicy,
) -> str:
    """The cause of a refusal by the kernel, and what to do."""
    command = str(error.filename or "the attachment")
    if error.errno == errno.ENOENT or not cgroup.exists():
        return "the cgroup was removed"
    if error.errno == errno.EBADF:
        return "this is no cgroup of version 2"
    if error.errno == errno.E2BIG:
        return f"{_MOST_PROGRAMS} programs are attached there, the most that the kernel takes"
    if error.errno in (errno.EPERM, errno.EACCES):
        return _not_permitted(error, cgroup, attach_type, policy, command)
    if error.errno == errno.EINVAL:
        return _invalid(program, fd, attach_type, policy) or str(error)
    return str(error)


def _not_permitted(
    error: OSError, cgroup: Cgroup, attach_type: AttachType, policy: AttachPolicy, command: str
) -> str:
    if privileges.missing_capabilities():
        return privileges.why_not_permitted(command)
    exclusive = exclusive_program(cgroup, attach_type)
    if exclusive:
        return exclusive
    text = privileges.why_not_permitted(command)
    if command == "BPF_LINK_CREATE" and policy.method == "auto":
        name = errno.errorcode[error.errno or 0]
        text += (
            "; if links alone are refused, use --bpf-attach-method legacy, or put"
            f' fallback_errnos = ["EINVAL", "{name}"] below [bpf] in the config file'
        )
    return text


def _invalid(
    program: Program, fd: int, attach_type: AttachType, policy: AttachPolicy
) -> Optional[str]:
    # With CAP_BPF alone a legacy attachment gives EINVAL, not EPERM.
    if privileges.missing_capabilities():
        return privileges.why_not_permitted("the attachment")
    if program.expected_attach_type not in (None, attach_type):
        return (
            f"the program is for {program.expected_attach_type!r}, and cannot be attached"
            f" to {attach_type!r}"
        )
    if policy.method == "link" and not features.LINK.available():
        return "this kernel has no BPF links (Linux 5.7): use --bpf-attach-method auto or legacy"
    try:
        if program.info().id in links.query(fd, attach_type).program_ids:
            return "this program is attached there already"
    except OSError as error:
        if error.errno == errno.EINVAL and not policy.exclusive:
            return (
                "this kernel (before Linux 4.15) lets one program alone be attached to a cgroup,"
                " and does not tell whether there is one; --exclusive attaches all the same,"
                " and may replace another tool's program"
            )
    return None


def exclusive_program(cgroup: Cgroup, attach_type: AttachType) -> Optional[str]:
    """The program that allows no other at a cgroup: its own, or one of an ancestor."""
    for where in _with_ancestors(cgroup):
        try:
            fd = where.open()
            try:
                found = links.query(fd, attach_type)
            finally:
                os.close(fd)
        except OSError:
            continue
        mode = found.attach_flags
        # One that may be overridden stands in the way in its own cgroup alone.
        blocking = mode == AttachMode.SINGLE or (
            mode == AttachMode.ALLOW_OVERRIDE and where == cgroup
        )
        if found.program_ids and blocking:
            named = ", ".join(describe(program_id) for program_id in found.program_ids)
            place = "there" if where == cgroup else f"to {where.path}, above it,"
            return (
                f"another program is attached {place} in a mode that allows none beside it:"
                f" {named}. Ask its owner to attach it with BPF_F_ALLOW_MULTI"
            )
    return None


def _with_ancestors(cgroup: Cgroup) -> Iterator[Cgroup]:
    top = root()
    while cgroup in top:
        yield cgroup
        cgroup = Cgroup(os.path.dirname(cgroup.path))


def describe(program_id: int) -> str:
    """A program by name, id, tag, type, who loaded it and when, and who holds its links."""
    try:
        info = programs.info_by_id(program_id)
    except OSError:
        return f"program {program_id}"
    text = f"{info.name or 'a program without a name'} ({_details(info)})"
    for link in links.all_links():
        if link.program_id == program_id:
            holders = process.listed(process.holders_of_link(link.id))
            text += f", link {link.id} held by {holders or 'a pin, or a process not visible here'}"
    return text


def _details(info: ProgramInfo) -> str:
    try:
        kind = ProgType(info.type).name.lower()
    except ValueError:
        kind = str(info.type)
    try:
        user = pwd.getpwuid(info.created_by_uid).pw_name
    except KeyError:
        user = str(info.created_by_uid)
    age_s = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - info.load_time_ns / 1e9)
    return f"id {info.id}, tag {info.tag}, {kind}, loaded by {user} {_ago(age_s)}"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
