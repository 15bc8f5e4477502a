"""Why an attachment was refused: what is attached there and above, and what the kernel lacks."""

from __future__ import annotations

import errno
from typing import Optional

from pybpfthrottle.backends.ebpf import attached, privileges
from pybpfthrottle.bpf import features, links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.linux.cgroup import Cgroup
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
    if privileges.missing_capabilities(refused=True):
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
    if privileges.missing_capabilities(refused=True):
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
    found = attached.blocking(cgroup, attach_type)
    if not found:
        return None
    where = found[0].cgroup
    place = "there" if where == cgroup else f"to {where.path}, above it,"
    return (
        f"another program is attached {place} in a mode that allows none beside it:"
        f" {', '.join(map(str, found))}. Ask its owner to attach it with BPF_F_ALLOW_MULTI"
    )
