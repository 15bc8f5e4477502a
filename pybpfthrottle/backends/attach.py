"""The ladder: attach by link, or by the legacy call where the kernel has no links."""

from __future__ import annotations

import errno
import logging
import os
from typing import Iterator, Optional

from pybpfthrottle.backends import ATTACH_METHODS
from pybpfthrottle.bpf import features, links, privileges
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.links import Attachment, AttachMode
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.syscall import errno_name
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.errors import AttachError

log = logging.getLogger(__name__)

_DIRECTION_NAMES = {
    AttachType.CGROUP_INET_INGRESS: "ingress",
    AttachType.CGROUP_INET_EGRESS: "egress",
}


def attach(
    program: Program, cgroup: Cgroup, attach_type: AttachType, *, method: str = "auto"
) -> Attachment:
    """Attach by ``method``: auto (link, and after EINVAL legacy), link or legacy.

    Raises CgroupError, or AttachError with the cause.
    """
    if method not in ATTACH_METHODS:
        raise ValueError(f"no attach method {method!r} (known: {', '.join(ATTACH_METHODS)})")
    fd = cgroup.open()
    try:
        log.debug('Opened cgroup file: "%s"', cgroup.path)
        attachment = _attach(program, fd, attach_type, method)
    except OSError as error:
        raise AttachError(
            f"cannot attach {program.name!r} to {cgroup.path}: {_why(error)}",
            errno=error.errno or 0,
        ) from error
    finally:
        os.close(fd)
    log.debug(
        'Attached %s to "%s" with mode: AllowMultiple (BPF_F_ALLOW_MULTI - allows coexistence)',
        program.name,
        cgroup.path,
    )
    log.info("Successfully attached eBPF %s program", _DIRECTION_NAMES[attach_type])
    return attachment


def _attach(program: Program, fd: int, attach_type: AttachType, method: str) -> Attachment:
    if method == "legacy":
        log.info("Using legacy BPF attach method (bpf_prog_attach)")
        return _attach_legacy(program, fd, attach_type)
    if method == "auto":
        log.debug("Auto-detecting best BPF attach method")
    try:
        link = links.create_link(program, fd, attach_type)
    except OSError as error:
        found = find_errno(error, errno.EINVAL)
        if method == "link":
            raise
        if found is None:
            log.error("Modern attach failed with non-EINVAL error, not retrying")
            raise
        log.debug("Found OSError with errno %d in error chain", found)
        log.warning(
            "Modern attach failed with %s, falling back to legacy method...", errno_name(found)
        )
        return _attach_legacy(program, fd, attach_type)
    log.info("✅ Successfully attached using modern method (bpf_link_create)")
    return link


def _attach_legacy(program: Program, fd: int, attach_type: AttachType) -> Attachment:
    attachment = links.attach_legacy(program, fd, attach_type, AttachMode.ALLOW_MULTIPLE)
    log.info("✅ Successfully attached using legacy method!")
    return attachment


def find_errno(error: BaseException, *wanted: int) -> Optional[int]:
    """The first of these errnos anywhere in a chain of wrapped exceptions."""
    for link in _chain(error):
        number = getattr(link, "errno", None)
        if number in wanted:
            return int(number)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending: list[Optional[BaseException]] = [error]
    while pending:
        current = pending.pop(0)
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            pending += [current.__cause__, current.__context__]


def _why(error: OSError) -> str:
    if error.errno == errno.EPERM:
        missing = privileges.missing_capabilities()
        if not missing:
            return (
                "another program is attached there, or above, that allows none beside it;"
                f" or {privileges.why_not_permitted('the attachment')}"
            )
        return privileges.why_not_permitted("the attachment")
    if error.errno == errno.ENOENT:
        return "the cgroup was removed"
    if error.errno == errno.E2BIG:
        return "64 programs are attached there already, which is the most that the kernel takes"
    if error.errno == errno.EINVAL and not features.LINK.available():
        return f"{error}; this kernel has no BPF links (Linux 5.7)"
    return str(error)
