"""Descriptors of BPF objects: got by id or from a pinned path, pinned, asked what they are."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from typing import TypeVar, Union

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd

_FIELD = re.compile(r"^([^:\n]*):[ \t]*(.*)$", re.MULTILINE)

Path = Union[str, os.PathLike[str]]
I = TypeVar("I", bound=ctypes.Structure)  # noqa: E741


def by_id(cmd: Cmd, object_id: int) -> int:
    """Return a descriptor by a GET_FD_BY_ID command. Linux 4.13; needs CAP_SYS_ADMIN.

    Raises OSError.
    """
    attr = Attr()
    attr.get_id.id = object_id
    return syscall.bpf(cmd, attr)


def fill_info(fd: int, info: I) -> I:
    """Return a structure that the kernel filled in about an object. Linux 4.13. Raises OSError."""
    attr = Attr()
    attr.info.bpf_fd = fd
    attr.info.info_len = ctypes.sizeof(info)
    attr.info.info = ctypes.addressof(info)
    syscall.bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
    return info


def pin(fd: int, path: Path) -> None:
    """Pin an object: name it in a bpf file system, where it stays until unlinked. Linux 4.4.

    Raises OSError: EPERM if the directory is in another kind of file system.
    """
    _with_path(Cmd.OBJ_PIN, path, fd)


def open_pinned(path: Path, kind: str) -> int:
    """Return a descriptor of a pinned object: a bpf-map, bpf-prog or bpf-link, as /proc names them.

    Linux 4.4. Raises OSError, with EINVAL if something else is pinned there.
    """
    fd = _with_path(Cmd.OBJ_GET, path, 0)
    # BPF_OBJ_GET opens whatever is there; taken for something else it would fail far from here.
    actual = _kind(fd)
    if actual not in (kind, ""):
        os.close(fd)
        raise OSError(errno.EINVAL, f"it is a {actual}, not a {kind}", os.fspath(path))
    return fd


def _kind(fd: int) -> str:
    """Return what a descriptor is of; "" without /proc. A link is bpf_link where it was created."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").rpartition(":")[2].replace("_", "-")
    except OSError:
        return ""


def fdinfo(fd: int) -> dict[str, str]:
    """Return what /proc/self/fdinfo says of an object; nothing without /proc."""
    try:
        # Who looks for limits asks this of each map, so it reads without buffers.
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
            return dict(_FIELD.findall(file.read().decode()))
    except OSError:
        return {}


def _with_path(cmd: Cmd, path: Path, fd: int) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr = Attr()
    attr.obj_pin.pathname = ctypes.addressof(name)
    attr.obj_pin.bpf_fd = fd
    try:
        return syscall.bpf(cmd, attr)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename, None, os.fspath(path)) from None
