"""BTF in the kernel: an object's types while it is loaded, and what the system has of its own.

The latter are the types of the kernel, of its modules, and what programs brought along.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack, suppress
from typing import Iterator, Optional

from pybpfthrottle.bpf import abi, descriptors, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.errors import ExternError
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.btf_rewrite import CONCESSIONS, conceding
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.privileges import with_memlock

_NAME_BYTES = 64  # MODULE_NAME_LEN
# What kernels say of types that they do not know.
_UNKNOWN = (errno.EINVAL, errno.E2BIG, errno.ENOTSUP, syscall.ENOTSUPP)


class LoadedBtf:
    """The types of an object as the kernel has them; ``close`` or ``with`` ends it.

    ``functions`` tells whether the kernel took functions, so that programs may refer to them.
    """

    def __init__(self, fd: int, *, functions: bool) -> None:
        self.fd = fd
        self.functions = functions

    def close(self) -> None:
        """Close the descriptor; maps and programs keep the types that they use."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> LoadedBtf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ObjectTypes:
    """An object's types in the kernel, and those of modules that it needs, while it is loaded."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._modules: dict[str, int] = {}
        self._loaded: Optional[LoadedBtf] = None

    def load(self, data: Optional[bytes]) -> None:
        """Load the object's, as far as the kernel takes them."""
        self._loaded = load(data) if data is not None else None
        if self._loaded is not None:
            self._undo.callback(self._loaded.close)

    @property
    def fd(self) -> int:
        """The descriptor of the object's types, or 0."""
        return self._loaded.fd if self._loaded else 0

    @property
    def functions(self) -> bool:
        """Whether programs may refer to the types of their functions."""
        return self._loaded is not None and self._loaded.functions

    def descriptor(self, module: Btf) -> int:
        """Return a descriptor of a module's types. Raises OSError or ExternError."""
        if module.name not in self._modules:
            self._modules[module.name] = open_module(module.name)
            self._undo.callback(os.close, self._modules[module.name])
        return self._modules[module.name]

    def __enter__(self) -> ObjectTypes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors."""
        self._undo.close()


def load(data: bytes) -> Optional[LoadedBtf]:
    """Load types, without the kinds that this kernel lacks. Linux 4.18; functions 5.0.

    None where the kernel takes none at all, or not from this process: most objects do without.
    """
    functions = True
    for concession in (None, *CONCESSIONS):
        if concession is not None:
            # The last one takes the functions away, and with them all that refers to them.
            functions = concession is not CONCESSIONS[-1]
            changed = conceding(data, concession)
            if changed is None:
                continue
            data = changed
        try:
            return LoadedBtf(_load(data), functions=functions)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                return None
    return None


def _load(data: bytes) -> int:
    buffer = ctypes.create_string_buffer(data, len(data))
    attr = Attr()
    attr.btf_load.btf = ctypes.addressof(buffer)
    attr.btf_load.btf_size = len(data)
    return with_memlock(lambda: syscall.bpf(Cmd.BTF_LOAD, attr))


def open_module(name: str) -> int:
    """Return a descriptor of the types of a kernel module; the caller closes it.

    Linux 5.11; needs CAP_SYS_ADMIN. Raises ExternError for a module without types.
    """
    with suppress(OSError):
        for btf_id in all_ids():
            if info_by_id(btf_id).name == name:
                return descriptors.by_id(Cmd.BTF_GET_FD_BY_ID, btf_id)
    raise ExternError(f"cannot open the types of module {name!r}: this needs CAP_SYS_ADMIN")


class BtfInfo(NamedTuple):
    """A BTF of the system; ``name`` is vmlinux or a module's, "" for that of programs."""

    id: int
    name: str
    size_bytes: int
    is_kernel: bool


def all_ids() -> Iterator[int]:
    """Return the ids of all BTF of the machine. Linux 5.3; needs CAP_SYS_ADMIN. Raises OSError."""
    return syscall.all_ids(Cmd.BTF_GET_NEXT_ID)


def info_by_id(btf_id: int) -> BtfInfo:
    """Return what the kernel says of a BTF. Linux 4.18, names 5.11; needs CAP_SYS_ADMIN."""
    name = ctypes.create_string_buffer(_NAME_BYTES)
    info = abi.BtfInfo(name=ctypes.addressof(name), name_len=_NAME_BYTES)
    try:
        _fill(btf_id, info)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        info = abi.BtfInfo()
        _fill(btf_id, info)
    text = name.value.decode("utf-8", "replace")
    return BtfInfo(info.id, text, info.btf_size, bool(info.kernel_btf))


def data_by_id(btf_id: int) -> bytes:
    """Return the bytes of a BTF, as ``btf.Btf`` takes them. Linux 4.18; needs CAP_SYS_ADMIN."""
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
