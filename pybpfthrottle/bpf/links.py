"""Attaching programs: by link, to cgroups by the legacy call, and asking what is attached."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack, suppress
from enum import IntEnum
from types import MappingProxyType
from typing import BinaryIO, Callable, Iterator, Mapping, Optional, Sequence

from pybpfthrottle.bpf import abi, descriptors, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd, LinkType
from pybpfthrottle.bpf.obj.plain import NamedTuple, Protocol
from pybpfthrottle.bpf.programs import Program

_NAME_BYTES = 256  # more than any tracepoint's name has


class AttachMode(IntEnum):
    """The flags of a legacy attachment. Multiple lets others attach beside it."""

    SINGLE = 0
    ALLOW_OVERRIDE = abi.BPF_F_ALLOW_OVERRIDE
    ALLOW_MULTIPLE = abi.BPF_F_ALLOW_MULTI


class Attachment(Protocol):
    """A program at its place. ``mode`` is how others may attach beside it."""

    mode: AttachMode

    def detach(self) -> None:
        """Detach the program. A second time, or after the cgroup is gone, this does nothing."""


class Link:
    """A link: the kernel detaches the program when its last descriptor is closed.

    It owns one descriptor; ``close`` or ``with`` ends it. Linux 5.7, for tracepoints and functions
    4.17; source: man 2 bpf.
    """

    mode = AttachMode.ALLOW_MULTIPLE

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> None:
        """Close the link: the program is detached unless the link is pinned or another has it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def close(self) -> None:
        """Close the link, as ``detach`` does."""
        self.detach()

    def force_detach(self) -> None:
        """Detach the program whoever else has the link, which stays but does nothing. Linux 5.9.

        Raises OSError: EOPNOTSUPP for a type of link that cannot.
        """
        attr = Attr()
        attr.link_detach.link_fd = self.fd
        syscall.bpf(Cmd.LINK_DETACH, attr)

    def update(self, program: Program, *, instead_of: Optional[Program] = None) -> None:
        """Put another program in the old one's place, as one step. Linux 5.7.

        Only if it is ``instead_of``, where that is given. Raises OSError: EPERM if it is another,
        ENOLINK if the link was detached, EINVAL for a program of another kind.
        """
        attr = Attr()
        attr.link_update.link_fd = self.fd
        attr.link_update.new_prog_fd = program.fd
        if instead_of is not None:
            attr.link_update.old_prog_fd = instead_of.fd
            attr.link_update.flags = abi.BPF_F_REPLACE
        syscall.bpf(Cmd.LINK_UPDATE, attr)

    def open_iterator(self) -> BinaryIO:
        """Open what an iterator writes; its program runs as the file is read. Linux 5.8.

        Raises OSError: EINVAL for a link of another type.
        """
        attr = Attr()
        attr.iter_create.link_fd = self.fd
        return os.fdopen(syscall.bpf(Cmd.ITER_CREATE, attr), "rb")

    def info(self) -> LinkInfo:
        """Return what the kernel says of the link. Linux 5.8. Raises OSError."""
        return link_info(self.fd)

    def pin(self, path: descriptors.Path) -> None:
        """Pin it: name it in a bpf file system, where it stays until unlinked. Linux 5.7."""
        descriptors.pin(self.fd, path)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<Link fd={self.fd}>"


class ProbeLink(Link):
    """A program on a perf event; before Linux 5.15 the event's descriptor instead of a link.

    Then ``info``, ``pin`` and ``update`` raise OSError. ``undo`` is called once it is detached.
    """

    def __init__(self, fd: int, undo: Optional[Callable[[], None]] = None) -> None:
        super().__init__(fd)
        self._undo = undo

    def detach(self) -> None:
        """Detach the program, and remove the probe if it was made for it."""
        super().detach()
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class Links(Link):
    """Links of one program in several places, such as one for each CPU, or of several programs.

    ``fd`` is the first one's. What concerns one link is to be done with one of ``parts``.
    """

    def __init__(self, parts: Sequence[Link]) -> None:
        super().__init__(parts[0].fd if parts else -1)
        self.parts = tuple(parts)

    def detach(self) -> None:
        """Detach the program everywhere."""
        self.fd = -1
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.detach)

    def __repr__(self) -> str:
        return f"<Links {len(self.parts)}>"


class LegacyAttachment:
    """A legacy attachment: it outlives this process unless ``detach`` is called."""

    def __init__(
        self, program: Program, cgroup_fd: int, attach_type: AttachType, mode: AttachMode
    ) -> None:
        # Descriptors of its own, since the owners of these may close them before it detaches.
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

    def close(self) -> None:
        """Close the descriptors; what is attached stays attached."""
        os.close(self._program_fd)
        os.close(self._cgroup_fd)
        self._program_fd = self._cgroup_fd = -1

    def __repr__(self) -> str:
        return f"<LegacyAttachment {self._attach_type.name} {self.mode.name}>"


class Attached(NamedTuple):
    """Programs that are attached to a cgroup at one attach type, and with which flags."""

    attach_flags: int
    program_ids: tuple[int, ...]


def create_link(
    program: Program,
    target: int,
    attach_type: AttachType,
    extra: Mapping[str, int] = MappingProxyType({}),
    *,
    flags: int = 0,
) -> Link:
    """Attach by link, beside whatever else is attached. Linux 5.7. Raises OSError.

    ``target`` is a descriptor of a cgroup or a network namespace; for XDP (Linux 5.9), TCX (6.6)
    and NETKIT (6.7) the index of an interface. ``flags`` and ``extra`` are what one type of link
    has besides, such as "netfilter.priority"; for a cgroup each of the legacy call's flags is
    EINVAL on every kernel.
    """
    attr = Attr()
    attr.link_create.prog_fd = program.fd
    attr.link_create.target_fd = target
    attr.link_create.attach_type = attach_type
    attr.link_create.flags = flags
    for name, value in extra.items():
        part, _, field = name.rpartition(".")
        setattr(getattr(attr.link_create, part) if part else attr.link_create, field, value)
    return Link(syscall.bpf(Cmd.LINK_CREATE, attr))


def attach_raw_tracepoint(program: Program, name: str = "", *, cookie: int = 0) -> Link:
    """Attach to a raw tracepoint; with no name, where a TRACING or LSM program says. Linux 4.17.

    Cookies: 6.10. Raises OSError: ENOENT for a tracepoint that is not there.
    """
    buffer = ctypes.create_string_buffer(name.encode())
    attr = Attr()
    attr.raw_tracepoint.name = ctypes.addressof(buffer) if name else 0
    attr.raw_tracepoint.prog_fd = program.fd
    attr.raw_tracepoint.cookie = cookie
    return Link(syscall.bpf(Cmd.RAW_TRACEPOINT_OPEN, attr))


def open_by_id(link_id: int) -> Link:
    """Return a link of the system by its id. Linux 5.8, needs CAP_SYS_ADMIN. Raises OSError."""
    return Link(descriptors.by_id(Cmd.LINK_GET_FD_BY_ID, link_id))


def open_pinned(path: descriptors.Path) -> Link:
    """Return a pinned link. Linux 5.7. Raises OSError."""
    return Link(descriptors.open_pinned(path, "bpf-link"))


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
    """Detach a program from a cgroup by BPF_PROG_DETACH. Linux 4.10. Raises OSError.

    In any other mode than multiple it detaches whatever program is there, with a ``program_fd`` of
    0 too.
    """
    attr = Attr()
    attr.prog_attach.target_fd = cgroup_fd
    attr.prog_attach.attach_bpf_fd = program_fd
    attr.prog_attach.attach_type = attach_type
    syscall.bpf(Cmd.PROG_DETACH, attr)


def query(cgroup_fd: int, attach_type: AttachType, *, effective: bool = False) -> Attached:
    """Return what is attached to a cgroup; with ``effective`` its ancestors' programs too.

    Linux 4.15.
    """
    room = 64  # BPF_CGROUP_MAX_PROGS; effective ones may be more
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
    """A link as the kernel describes it. Fields that its type does not have are 0 or "".

    ``type`` is a LinkType or a newer kernel's number; ``target`` names what it is attached to
    where that is a raw tracepoint; ``target_object_id`` and ``target_btf_id`` say it of TRACING.
    """

    id: int
    type: int
    program_id: int
    attach_type: int = 0
    cgroup_id: int = 0
    netns_inode: int = 0
    ifindex: int = 0
    target: str = ""
    target_object_id: int = 0
    target_btf_id: int = 0
    map_id: int = 0


def link_info(fd: int) -> LinkInfo:
    """Return what the kernel says of the link behind a descriptor. Linux 5.8. Raises OSError."""
    info = descriptors.fill_info(fd, abi.LinkInfo())
    common = LinkInfo(info.id, info.type, info.prog_id)
    details = info.details
    if info.type == LinkType.CGROUP:
        part = details.cgroup
        return common._replace(attach_type=part.attach_type, cgroup_id=part.cgroup_id)
    if info.type == LinkType.NETNS:
        part = details.netns
        return common._replace(attach_type=part.attach_type, netns_inode=part.netns_ino)
    if info.type == LinkType.XDP:
        return common._replace(attach_type=AttachType.XDP, ifindex=details.xdp.ifindex)
    if info.type in (LinkType.TCX, LinkType.NETKIT):
        part = details.tcx
        return common._replace(attach_type=part.attach_type, ifindex=part.ifindex)
    if info.type == LinkType.TRACING:
        part = details.tracing
        return common._replace(
            attach_type=part.attach_type,
            target_object_id=part.target_obj_id,
            target_btf_id=part.target_btf_id,
        )
    if info.type == LinkType.SOCKMAP:
        part = details.sockmap
        return common._replace(attach_type=part.attach_type, map_id=part.map_id)
    if info.type == LinkType.RAW_TRACEPOINT:
        return common._replace(target=_tracepoint(fd))
    return common


def _tracepoint(fd: int) -> str:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    info = abi.LinkInfo()
    info.details.raw_tracepoint.tp_name = ctypes.addressof(name)
    info.details.raw_tracepoint.tp_name_len = len(name)
    descriptors.fill_info(fd, info)
    return name.value.decode("utf-8", "replace")


def all_ids() -> Iterator[int]:
    """Return the ids of all links of the machine. Linux 5.8; needs CAP_SYS_ADMIN.

    Raises OSError.
    """
    return syscall.all_ids(Cmd.LINK_GET_NEXT_ID)


def all_infos() -> Iterator[LinkInfo]:
    """Return what the kernel says of each link of the machine.

    Linux 5.8; needs CAP_SYS_ADMIN. Raises OSError.
    """
    for link_id in all_ids():
        with suppress(OSError):  # one may end in between (ENOENT), or just begin (EAGAIN)
            yield info_by_id(link_id)


def info_by_id(link_id: int) -> LinkInfo:
    """Return what the kernel says of the link with an id.

    Linux 5.8; needs CAP_SYS_ADMIN. Raises OSError.
    """
    with open_by_id(link_id) as link:
        return link.info()
