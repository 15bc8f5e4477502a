"""Facts about a loaded program: its info, its code, and how often it ran."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import contextmanager
from typing import Any, Iterator

from pybpfthrottle.bpf import abi, descriptors, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.obj.plain import NamedTuple


class ProgramInfo(NamedTuple):
    """A loaded program as the kernel describes it. ``load_time_ns`` is CLOCK_BOOTTIME.

    ``xlated_bytes`` is the length of the code as the verifier left it, ``jited_bytes`` that of the
    machine code, 0 without a compiler. The run time and count grow while statistics are enabled
    (``run_statistics``). What an older kernel does not say is 0.
    """

    id: int
    name: str
    type: int
    tag: str
    load_time_ns: int
    created_by_uid: int
    map_ids: tuple[int, ...] = ()
    gpl_compatible: bool = False
    xlated_bytes: int = 0
    jited_bytes: int = 0
    memory_bytes: int = 0
    ifindex: int = 0
    btf_id: int = 0
    attach_btf_object_id: int = 0
    attach_btf_id: int = 0
    verified_instructions: int = 0
    run_time_ns: int = 0
    run_count: int = 0
    recursion_misses: int = 0


def program_info(fd: int, *, memory: bool = True) -> ProgramInfo:
    """Return what the kernel says of the program behind a descriptor.

    Without ``memory`` its ``memory_bytes`` is 0, which takes half the time. Linux 4.13; names 4.15,
    BTF 5.0, run time 5.1, verified instructions 5.16. Raises OSError.
    """
    info, map_ids = _info_with_map_ids(fd)
    return ProgramInfo(
        id=info.id,
        name=info.name.decode("ascii", "replace"),
        type=info.type,
        tag=bytes(info.tag).hex(),
        load_time_ns=info.load_time,
        created_by_uid=info.created_by_uid,
        map_ids=map_ids,
        gpl_compatible=bool(info.gpl_compatible),
        xlated_bytes=info.xlated_prog_len,
        jited_bytes=info.jited_prog_len,
        memory_bytes=int(descriptors.fdinfo(fd).get("memlock", 0)) if memory else 0,
        ifindex=info.ifindex,
        btf_id=info.btf_id,
        attach_btf_object_id=info.attach_btf_obj_id,
        attach_btf_id=info.attach_btf_id,
        verified_instructions=info.verified_insns,
        run_time_ns=info.run_time_ns,
        run_count=info.run_cnt,
        recursion_misses=info.recursion_misses,
    )


def xlated_code(fd: int) -> bytes:
    """Return the instructions as the verifier left them.

    Linux 4.13; needs CAP_SYS_ADMIN or CAP_PERFMON. Maps are named by id there, and helpers by
    address: ``disasm`` knows. Raises OSError.
    """
    size = descriptors.fill_info(fd, abi.ProgInfo()).xlated_prog_len
    code: Any = ctypes.create_string_buffer(size)
    info = abi.ProgInfo(xlated_prog_len=size, xlated_prog_insns=ctypes.addressof(code))
    descriptors.fill_info(fd, info)
    if not info.xlated_prog_insns:
        raise syscall.error(errno.EPERM, Cmd.OBJ_GET_INFO_BY_FD)
    return bytes(code.raw)


def function_addresses(fd: int) -> tuple[int, ...]:
    """Return where the kernel has the machine code of each of a program's functions.

    Linux 4.18; none where it is not compiled.
    """
    count = descriptors.fill_info(fd, abi.ProgInfo()).nr_jited_ksyms
    addresses = (ctypes.c_uint64 * count)()
    info = abi.ProgInfo(nr_jited_ksyms=count, jited_ksyms=ctypes.addressof(addresses))
    if count:
        descriptors.fill_info(fd, info)
    return tuple(addresses)


def line_records(fd: int) -> list[abi.LineInfo]:
    """From which instruction on, as the verifier left them, which line of the source is meant.

    The strings are those of the program's BTF. Linux 5.0; none where it was loaded without.
    """
    count = descriptors.fill_info(fd, abi.ProgInfo()).nr_line_info
    records = (abi.LineInfo * count)()
    info = abi.ProgInfo(
        nr_line_info=count,
        line_info_rec_size=ctypes.sizeof(abi.LineInfo),
        line_info=ctypes.addressof(records),
    )
    if count:
        descriptors.fill_info(fd, info)
    return list(records)


@contextmanager
def run_statistics() -> Iterator[None]:
    """Have the kernel measure the runs of all programs while this lasts, at some cost to each.

    Linux 5.8; needs CAP_SYS_ADMIN. Raises OSError.
    """
    attr = Attr()
    attr.enable_stats.type = abi.BPF_STATS_RUN_TIME
    fd = syscall.bpf(Cmd.ENABLE_STATS, attr)
    try:
        yield
    finally:
        os.close(fd)


def _info_with_map_ids(fd: int) -> tuple[abi.ProgInfo, tuple[int, ...]]:
    # First without room, to be told how many there are.
    room = 0
    while True:
        map_ids = (ctypes.c_uint32 * room)()
        info = abi.ProgInfo(nr_map_ids=room)
        if room:  # Linux 4.14 knows no such field, and refuses one that is not zero
            info.map_ids = ctypes.addressof(map_ids)
        descriptors.fill_info(fd, info)
        if info.nr_map_ids <= room:
            return info, tuple(map_ids[: info.nr_map_ids])
        room = info.nr_map_ids
