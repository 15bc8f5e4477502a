"""Iterators: programs that run for each of the kernel's objects of a kind, and write of them.

Source: Documentation/bpf/bpf_iterators.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, BinaryIO, Iterator, Optional

from pybpfthrottle.bpf import abi, links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.codecs import CodecLike, codec_for, size_of
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.programs import Program

if TYPE_CHECKING:
    from pybpfthrottle.bpf.attaching import Place

_ORDERS = {
    "self": abi.BPF_CGROUP_ITER_SELF_ONLY,
    "down": abi.BPF_CGROUP_ITER_DESCENDANTS_PRE,
    "post": abi.BPF_CGROUP_ITER_DESCENDANTS_POST,
    "up": abi.BPF_CGROUP_ITER_ANCESTORS_UP,
}


def attach(
    program: Program,
    *,
    map: Optional[Map[Any, Any]] = None,
    cgroup: Optional[Place] = None,
    order: Optional[str] = None,
    pid: Optional[int] = None,
) -> Link:
    """Attach an iterator to what it is restricted to, as ``Program.iterate`` takes it.

    Raises AttachError, and TypeError for two restrictions at once.
    """
    if sum(place is not None for place in (map, cgroup, pid)) > 1:
        raise TypeError(f"{program.name!r} visits one place: map=, cgroup= or pid=")
    if order is not None and order not in _ORDERS:
        raise TypeError(f"order={order!r} is not one of {', '.join(_ORDERS)}")
    info = abi.IterInfo()
    with ExitStack() as opened:
        if map is not None:
            info.map.map_fd = map.fd
        elif cgroup is not None:
            info.cgroup.cgroup_fd = _opened(cgroup, opened)
            info.cgroup.order = _ORDERS[order or "down"]
        elif pid is not None:
            info.task.pid = pid
        is_whole = map is None and cgroup is None and pid is None
        extra = {"iter_info": ctypes.addressof(info), "iter_info_len": ctypes.sizeof(info)}
        try:
            return links.create_link(program, 0, AttachType.TRACE_ITER, {} if is_whole else extra)
        except OSError as error:
            raise AttachError(
                f"cannot attach the iterator {program.name!r}: {_why(error, pid)}",
                errno=error.errno or 0,
            ) from error


def _opened(place: Place, stack: ExitStack) -> int:
    if isinstance(place, int):
        return place
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise AttachError(f"cannot open the cgroup: {error}", errno=error.errno or 0) from error
    stack.callback(os.close, fd)
    return fd


def _why(error: OSError, pid: Optional[int]) -> str:
    if error.errno == errno.ESRCH and pid is not None:
        return f"there is no process {pid}; it may have ended"
    if error.errno in (errno.EBADF, errno.EINVAL):
        return f"{error} (iterators need Linux 5.8, those of elements 5.9, of cgroups 6.1)"
    return str(error)


def iterate(program: Program, record: Optional[CodecLike], **places: Any) -> Iterator[Any]:
    """Run an iterator, and return what it writes; see ``Program.iterate``."""
    codec = None if record is None else codec_for(record, 0)
    # Attached at once, so that what is wrong is told here and not when it is read.
    link = attach(program, **places)
    try:
        file = link.open_iterator()
    finally:
        link.close()  # the file keeps what it needs
    return _lines(file) if codec is None else _records(file, codec)


def _lines(file: BinaryIO) -> Iterator[str]:
    with file:
        for line in file:
            yield line.decode("utf-8", "replace").rstrip("\n")


def _records(file: BinaryIO, codec: Any) -> Iterator[Any]:
    size = size_of(codec)
    with file:
        while data := file.read(size):
            if len(data) < size:
                raise ValueError(f"{len(data)} bytes are left over: a record has {size}")
            yield codec.decode(data)
