"""The ladder: attach by link, else by the legacy call; and explain why the kernel refuses."""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import Callable, Iterator, Optional, Sequence

from pybpfthrottle.backends.ebpf import attached, privileges
from pybpfthrottle.backends.ebpf.attached import Attached
from pybpfthrottle.bpf import features, links, syscall
from pybpfthrottle.bpf.abi import AttachType, Cmd
from pybpfthrottle.bpf.links import Attachment, AttachMode, Link
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.syscall import errno_name
from pybpfthrottle.errors import AttachError
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.signals import held_back
from pybpfthrottle.logger import DEBUG, INFO, WARNING, Logger
from pybpfthrottle.model import Direction
from pybpfthrottle.settings import ATTACH_METHODS, AttachPolicy

log = Logger(__name__)
# Log records are shown only if somebody asked for them.

ATTACH_TYPES = {
    Direction.DOWNLOAD: AttachType.CGROUP_INET_INGRESS,
    Direction.UPLOAD: AttachType.CGROUP_INET_EGRESS,
}
_MOST_PROGRAMS = 64
_HOOK_NAMES = {
    AttachType.CGROUP_INET_INGRESS: "ingress",
    AttachType.CGROUP_INET_EGRESS: "egress",
    AttachType.CGROUP_SOCK_OPS: "sockops",
    AttachType.CGROUP_SETSOCKOPT: "setsockopt",
    AttachType.CGROUP_INET_SOCK_CREATE: "sock_create",
    AttachType.CGROUP_INET_SOCK_RELEASE: "sock_release",
    AttachType.CGROUP_INET4_CONNECT: "connect4",
    AttachType.CGROUP_INET6_CONNECT: "connect6",
}
_NO_OVERRIDE = (
    "Ask its owner to attach it with BPF_F_ALLOW_MULTI, or limit processes with --pid, --name,"
    " --exe or --user; --override-others attaches anyway"
)

_MODES = {
    AttachMode.ALLOW_MULTIPLE: "AllowMultiple (BPF_F_ALLOW_MULTI - allows coexistence)",
    AttachMode.ALLOW_OVERRIDE: "AllowOverride (BPF_F_ALLOW_OVERRIDE - a cgroup below may replace)",
    AttachMode.SINGLE: "Single (0 - allows no other)",
}


def attach(
    program: Program,
    cgroup: Cgroup,
    attach_type: AttachType,
    policy: AttachPolicy = AttachPolicy(),  # noqa: B008 - an immutable value
    *,
    before_replacing: Callable[[Cgroup], None] = lambda _: None,
    repeats: bool = False,
) -> Attachment:
    """Attach by the policy's method: auto is a link, or after certain errors the legacy call.

    ``before_replacing`` is called where this may switch off another program (before Linux 4.15),
    and raises to object. ``repeats`` marks one of several programs or cgroups, which is logged for
    debugging only. Raises CgroupError, or AttachError with the cause.
    """
    if policy.method not in ATTACH_METHODS:
        known = ", ".join(ATTACH_METHODS)
        raise ValueError(f"unknown attach method {policy.method!r}; choose from {known}")
    level = DEBUG if repeats else INFO
    fd = cgroup.open()
    try:
        log.debug('Opened cgroup file: "%s"', cgroup.path)
        alone = partial(_alone, program, cgroup, fd, attach_type, policy, before_replacing)
        attachment = _attach(program, fd, attach_type, policy, alone, level)
    except OSError as error:
        why = _explain(error, program, cgroup, fd, attach_type, policy)
        raise AttachError(
            f"cannot attach {program.name!r} to {cgroup.path}: {why}", errno=error.errno or 0
        ) from error
    finally:
        os.close(fd)
    log.debug(
        'Attached %s to "%s" with mode: %s', program.name, cgroup.path, _MODES[attachment.mode]
    )
    log.log(level, "Successfully attached eBPF %s program", _HOOK_NAMES[attach_type])
    return attachment


def refuse_to_override(
    program: Program, cgroup: Cgroup, attach_type: AttachType, policy: AttachPolicy
) -> None:
    """Raise AttachError if another tool's program would no longer run for a cgroup.

    A program attached with BPF_F_ALLOW_OVERRIDE is replaced by any program attached below it.
    Call this before attaching anything; ``policy`` may allow overriding.
    """
    if policy.override_others or not attached.runs_any(cgroup, attach_type):
        return
    found = attached.overridden(cgroup, attach_type)
    if found:
        raise _overriding(program, cgroup, found)
    seen = {one.program_id for one in _without_link(cgroup, attach_type)}
    # One that ends while it is looked at seems to have none, but is not seen again.
    again = _without_link(cgroup, attach_type) if seen else []
    hidden = [one for one in again if one.program_id in seen]
    if hidden:
        _try_below(program, cgroup, attach_type, hidden)


def _without_link(cgroup: Cgroup, attach_type: AttachType) -> list[Attached]:
    """Return the programs above the visible cgroups that may be overridden: a link never is."""
    return [one for one in attached.from_above(cgroup, attach_type) if not one.links]


def _try_below(
    program: Program, cgroup: Cgroup, attach_type: AttachType, hidden: Sequence[Attached]
) -> None:
    """Find out whether programs attached above the visible cgroups may be overridden.

    The kernel does not report their mode, but an empty new cgroup allows probing for it.
    """
    try:
        with held_back():
            trial = own_cgroups.create_empty(cgroup)
    except OSError as error:
        raise AttachError(
            f"cannot attach {program.name!r} to {cgroup.path}: that may switch off"
            f" {', '.join(map(str, hidden))}, attached above the cgroups visible here, and no new"
            f" cgroup can be made to test it ({error.strerror}). {_NO_OVERRIDE}"
        ) from error
    try:
        remaining = _remaining(program, trial.cgroup, attach_type)
        # One that was detached meanwhile was not switched off by this.
        there = attached.effective_ids(trial.cgroup, attach_type)
    except OSError:  # the kernel will report it again
        return
    finally:
        trial.remove()
    lost = [one for one in hidden if one.program_id in there - remaining]
    if lost:
        raise _overriding(program, cgroup, lost)


def _remaining(program: Program, trial: Cgroup, attach_type: AttachType) -> frozenset[int]:
    """Attach a program to a cgroup for a moment; return the ids of the programs that then run."""
    fd = trial.open()
    try:
        attachment = links.attach_legacy(program, fd, attach_type, AttachMode.ALLOW_MULTIPLE)
    finally:
        os.close(fd)
    try:
        return attached.effective_ids(trial, attach_type)
    finally:
        attachment.detach()


def _overriding(program: Program, cgroup: Cgroup, found: Sequence[Attached]) -> AttachError:
    where = found[0].cgroup
    place = "above the cgroups visible here" if where == cgroup else f"to {where.path}, above it,"
    return AttachError(
        f"cannot attach {program.name!r} to {cgroup.path}: that would switch off a program"
        f" attached {place} with BPF_F_ALLOW_OVERRIDE:"
        f" {', '.join(map(str, found))}. {_NO_OVERRIDE}"
    )


def _attach(
    program: Program,
    fd: int,
    attach_type: AttachType,
    policy: AttachPolicy,
    alone: Callable[[], Attachment],
    level: int,
) -> Attachment:
    if policy.method == "legacy":
        log.log(level, "Using legacy BPF attach method (bpf_prog_attach)")
        return _attach_legacy(program, fd, attach_type, alone, level)
    if policy.method == "auto":
        log.debug("Auto-detecting best BPF attach method")
    try:
        link = links.create_link(program, fd, attach_type)
    except OSError as error:
        if policy.method == "link":
            raise
        found = find_errno(error, *policy.fallback_errnos)
        if found is None:
            log.error("Modern attach failed with non-EINVAL error, not retrying")
            raise
        log.debug("Found OSError with errno %d in error chain", found)
        log.log(
            WARNING if level == INFO else level,
            "Modern attach failed with %s, falling back to legacy method...",
            errno_name(found),
        )
        return _attach_legacy(program, fd, attach_type, alone, level)
    log.log(level, "✅ Successfully attached using modern method (bpf_link_create)")
    return link


def _attach_legacy(
    program: Program,
    fd: int,
    attach_type: AttachType,
    alone: Callable[[], Attachment],
    level: int,
) -> Attachment:
    """Attach as multiple, or as the only program on a kernel without multiple."""
    try:
        attachment: Attachment = links.attach_legacy(
            program, fd, attach_type, AttachMode.ALLOW_MULTIPLE
        )
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        attachment = alone()
    log.log(level, "✅ Successfully attached using legacy method!")
    return attachment


def _alone(
    program: Program,
    cgroup: Cgroup,
    fd: int,
    attach_type: AttachType,
    policy: AttachPolicy,
    before_replacing: Callable[[Cgroup], None],
) -> Attachment:
    """Attach as the only program (before Linux 4.15) if that cannot, or may, replace another.

    Nobody else uses a cgroup that this process made; single mode also keeps others from attaching
    below it, which would end the limit there. Raises OSError, or what ``before_replacing`` raises.
    """
    own = own_cgroups.is_held(cgroup)
    if not (own or policy.exclusive) or _has_query(fd, attach_type):
        raise syscall.error(errno.EINVAL, Cmd.PROG_ATTACH)
    modes = [AttachMode.ALLOW_OVERRIDE, AttachMode.SINGLE]
    if own:
        modes = [AttachMode.SINGLE, *modes[: int(policy.exclusive)]]
    if policy.exclusive:
        before_replacing(cgroup)
    try:
        return links.attach_legacy(program, fd, attach_type, modes[0])
    except OSError:
        # Below another program, or (in override mode) before Linux 4.12.
        if len(modes) == 1:
            raise
    return links.attach_legacy(program, fd, attach_type, modes[1])


def rung(attachment: Attachment) -> str:
    """Return how a program is attached: link, or legacy, with its mode unless it is multiple."""
    if isinstance(attachment, Link):
        return "link"
    if attachment.mode is AttachMode.ALLOW_MULTIPLE:
        return "legacy"
    return f"legacy ({attachment.mode.name.lower()})"


def _has_query(fd: int, attach_type: AttachType) -> bool:
    """Whether the kernel has BPF_PROG_QUERY, which came with multiple (Linux 4.15)."""
    try:
        links.query(fd, attach_type)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def find_errno(error: BaseException, *wanted: int) -> Optional[int]:
    """Return the first of these errnos anywhere in a chain of wrapped exceptions."""
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


def _explain(
    error: OSError,
    program: Program,
    cgroup: Cgroup,
    fd: int,
    attach_type: AttachType,
    policy: AttachPolicy,
) -> str:
    """Return why the kernel refused, and what to do."""
    command = str(error.filename or "the attachment")
    if error.errno == errno.ENOENT or not cgroup.exists():
        return "the cgroup was removed"
    if error.errno == errno.EBADF:
        return "this is not a cgroup of version 2"
    if error.errno == errno.E2BIG:
        return f"{_MOST_PROGRAMS} programs are attached there, the most that the kernel allows"
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
    if command == "BPF_PROG_ATTACH" and not features.QUERY.available():
        return (
            "another program is attached there or above. This kernel (before Linux 4.15) runs only"
            " one program per cgroup, and does not report which. Detach it first, or limit another"
            " cgroup; pybpfthrottle list shows the limits"
        )
    text = privileges.why_not_permitted(command)
    if command == "BPF_LINK_CREATE" and policy.method == "auto":
        name = errno.errorcode[error.errno or 0]
        text += (
            "; if only links are refused, use --bpf-attach-method legacy, or put"
            f' fallback_errnos = ["EINVAL", "{name}"] under [bpf] in the config file'
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
            f"the program is for {program.expected_attach_type!r}, so it cannot be attached"
            f" to {attach_type!r}"
        )
    if policy.method == "link" and not features.LINK.available():
        return (
            "this kernel does not support BPF links (Linux 5.7):"
            " use --bpf-attach-method auto or legacy"
        )
    try:
        if program.info().id in links.query(fd, attach_type).program_ids:
            return "this program is already attached there"
    except OSError as error:
        if error.errno == errno.EINVAL and not policy.exclusive:
            return (
                "this kernel (before Linux 4.15) allows only one program per cgroup, and does not"
                " report whether there is one; --exclusive attaches anyway, and may replace another"
                " tool's program"
            )
    return None


def exclusive_program(cgroup: Cgroup, attach_type: AttachType) -> Optional[str]:
    """Return the program that excludes others at a cgroup: the cgroup's own, or an ancestor's."""
    found = attached.blocking(cgroup, attach_type)
    if not found:
        return None
    where = found[0].cgroup
    place = "there" if where == cgroup else f"to {where.path}, above it,"
    return (
        f"another program is attached {place} in a mode that allows no others:"
        f" {', '.join(map(str, found))}. Ask its owner to attach it with BPF_F_ALLOW_MULTI"
    )
