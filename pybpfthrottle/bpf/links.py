"""Attaching programs to cgroups: by link, by the legacy call, and asking what is attached."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from enum import IntEnum
from typing import Iterator, NamedTuple, Protocol

from pybpfthrottle.bpf import abi, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.bpf.programs import Program


class AttachMode(IntEnum):
    """The flags of a legacy attachment. Multiple lets others attach beside it."""

    SINGLE = 0
    ALLOW_OVERRIDE = abi.BPF_F_ALLOW_OVERRIDE
    ALLOW_MULTIPLE = abi.BPF_F_ALLOW_MULTI


class Attachment(Protocol):
    """A program at its place. ``mode`` is how others may attach beside it."""

    mode: AttachMode

    @property
    def rung(self) -> str:
        """link, legacy, or legacy with a mode that is not multiple."""

    def detach(self) -> None:
        """Take the program away. Doing so twice, or after the cgroup is gone, is no error."""


class Link:
    """A link: the kernel detaches the program when its last descriptor is closed."""

    mode = AttachMode.ALLOW_MULTIPLE
    rung = "link"

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> None:
        """Close the link."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __repr__(self) -> str:
        return f"<Link fd={self.fd}>"


class LegacyAttachment:
    """A legacy attachment: it outlives this process unless ``detach`` is called."""

    def __init__(
        self, program: Program, cgroup_fd: int, attach_type: AttachType, mode: AttachMode
    ) -> None:
        self._program_fd = os.dup(program.fd)
        try:
            self._cgroup_fd = os.dup(cgroup_fd)
        except OSError:
            os.close(self._program_fd)
            raise
        self._attach_type = attach_type
        self.mode = mode

    def detach(self) -> None:
        """Detach the program. In the modes that are not multiple, whatever program is there."""
        if self._program_fd < 0:
            return
        try:
            detach(self._program_fd, self._cgroup_fd, self._attach_type)
        except OSError as error:
            # ENOENT: someone took it away; ENODEV or EINVAL: the cgroup is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
                raise
        finally:
            self.close()

    @property
    def rung(self) -> str:
        """legacy, or legacy with its mode where that is not multiple."""
        if self.mode is AttachMode.ALLOW_MULTIPLE:
            return "legacy"
        return f"legacy ({self.mode.name.lower()})"

    def close(self) -> None:
        """Close the descriptors; what is attached stays attached."""
        os.close(self._program_fd)
        os.close(self._cgroup_fd)
        self._program_fd = self._cgroup_fd = -1

    def __repr__(self) -> str:
        return f"<LegacyAttachment {self.rung}>"


class Attached(NamedTuple):
    """What is attached to a cgroup at one attach type."""

    attach_flags: int
    program_ids: tuple[int, ...]


def create_link(program: Program, cgroup_fd: int, attach_type: AttachType) -> Link:
    """Attach by link, beside whatever else is attached. Linux 5.7. Raises OSError.

    The flags are always 0: each of the legacy call's flags is EINVAL here on every kernel.
    """
    attr = Attr()
    attr.link_create.prog_fd = program.fd
    attr.link_create.target_fd = cgroup_fd
    attr.link_create.attach_type = attach_type
    return Link(syscall.bpf(Cmd.LINK_CREATE, attr))


def attach_legacy(
    program: Program,
    cgroup_fd: int,
    attach_type: AttachType,
    mode: AttachMode = AttachMode.ALLOW_MULTIPLE,
) -> LegacyAttachment:
    """Attach by BPF_PROG_ATTACH. Linux 4.10; multiple 4.15. Raises OSError.

    In any other mode than multiple this silently replaces another tool's program.
    """
    # First its owner, which may fail, then what must not be left without one.
    attachment = LegacyAttachment(program, cgroup_fd, attach_type, mode)
    attr = Attr()
    attr.prog_attach.target_fd = cgroup_fd
    attr.prog_attach.attach_bpf_fd = program.fd
    attr.prog_attach.attach_type = attach_type
    attr.prog_attach.attach_flags = mode
    try:
        syscall.bpf(Cmd.PROG_ATTACH, attr)
    except OSError:
        attachment.close()
        raise
    return attachment


def detach(program_fd: int, cgroup_fd: int, attach_type: AttachType) -> None:
    """BPF_PROG_DETACH. Linux 4.10. Raises OSError."""
    attr = Attr()
    attr.prog_attach.target_fd = cgroup_fd
    attr.prog_attach.attach_bpf_fd = program_fd
    attr.prog_attach.attach_type = attach_type
    syscall.bpf(Cmd.PROG_DETACH, attr)


def query(cgroup_fd: int, attach_type: AttachType, *, effective: bool = False) -> Attached:
    """What is attached to a cgroup; with ``effective`` its ancestors' programs too. Linux 4.15."""
    room = 64
    while True:
        ids = (ctypes.c_uint32 * room)()
        attr = Attr()
        attr.query.target_fd = cgroup_fd
        attr.query.attach_type = attach_type
        attr.query.query_flags = abi.BPF_F_QUERY_EFFECTIVE if effective else 0
        attr.query.prog_ids = ctypes.addressof(ids)
        attr.query.prog_cnt = room
        try:
            syscall.bpf(Cmd.PROG_QUERY, attr)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room = max(room * 2, attr.query.prog_cnt)
            continue
        return Attached(attr.query.attach_flags, tuple(ids[: attr.query.prog_cnt]))


class LinkInfo(NamedTuple):
    """What the kernel says of a link to a cgroup."""

    id: int
    program_id: int
    cgroup_id: int
    attach_type: int


def all_links() -> Iterator[LinkInfo]:
    """The links to cgroups of the whole machine; none where that may not be seen.

    Linux 5.8; needs CAP_SYS_ADMIN.
    """
    for link_id in syscall.ids(Cmd.LINK_GET_NEXT_ID):
        with suppress(OSError):  # one may end in between
            info = _link_info(link_id)
            if info.type == abi.BPF_LINK_TYPE_CGROUP:
                yield LinkInfo(info.id, info.prog_id, info.cgroup_id, info.attach_type)


def _link_info(link_id: int) -> abi.LinkInfo:
    attr = Attr()
    attr.get_id.id = link_id
    fd = syscall.bpf(Cmd.LINK_GET_FD_BY_ID, attr)
    try:
        info = abi.LinkInfo()
        attr = Attr()
        attr.info.bpf_fd = fd
        attr.info.info_len = ctypes.sizeof(info)
        attr.info.info = ctypes.addressof(info)
        syscall.bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
        return info
    finally:
        os.close(fd)
