"""The BTF that the running kernel has: its own, its modules', and what programs brought along."""

from __future__ import annotations

import ctypes
import os
from typing import Iterator, NamedTuple

from pybpfthrottle.bpf import abi, descriptors, syscall
from pybpfthrottle.bpf.abi import Cmd

_NAME_BYTES = 64  # MODULE_NAME_LEN


class BtfInfo(NamedTuple):
    """A BTF of the system; ``name`` is vmlinux or a module's, "" for that of programs."""

    id: int
    name: str
    size_bytes: int
    is_kernel: bool


def all_ids() -> Iterator[int]:
    """The ids of all BTF of the machine. Linux 5.3; needs CAP_SYS_ADMIN. Raises OSError."""
    return syscall.all_ids(Cmd.BTF_GET_NEXT_ID)


def info_by_id(btf_id: int) -> BtfInfo:
    """What the kernel says of a BTF. Linux 4.18, names 5.11; needs CAP_SYS_ADMIN."""
    name = ctypes.create_string_buffer(_NAME_BYTES)
    info = abi.BtfInfo(name=ctypes.addressof(name), name_len=_NAME_BYTES)
    _fill(btf_id, info)
    text = name.value.decode("utf-8", "replace")
    return BtfInfo(info.id, text, info.btf_size, bool(info.kernel_btf))


def data_by_id(btf_id: int) -> bytes:
    """The bytes of a BTF, as ``btf.Btf`` takes them. Linux 4.18; needs CAP_SYS_ADMIN."""
    size = info_by_id(btf_id).size_bytes
    data = ctypes.create_string_buffer(size)
    _fill(btf_id, abi.BtfInfo(btf=ctypes.addressof(data), btf_size=size))
    return data.raw


def _fill(btf_id: int, info: abi.BtfInfo) -> None:
    fd = descriptors.by_id(Cmd.BTF_GET_FD_BY_ID, btf_id)
    try:
        descriptors.fill_info(fd, info)
    finally:
        os.close(fd)
