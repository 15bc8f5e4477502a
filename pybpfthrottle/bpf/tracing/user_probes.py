"""Probes of programs and libraries: at a function, behind it, or at an offset of the file."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
from typing import Optional, Sequence, Union

from pybpfthrottle.bpf import abi, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.perf_abi import PerfEventAttr
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.tracing import binaries, events, tracefs

_REF_COUNTER_SHIFT = 32


class Target(NamedTuple):
    """What "libc.so.6:malloc+0x10" names: a binary, a function of it, and an offset in bytes."""

    binary: str
    function: str
    offset: int = 0


def target_of(text: str) -> Target:
    """Return the target that a section names. Raises AttachError."""
    binary, _, function = text.rpartition(":")
    if not binary or not function:
        raise AttachError(f"{text!r} is no target: write BINARY:FUNCTION, BINARY:FUNCTION+OFFSET")
    name, plus, number = function.rpartition("+")
    try:
        return Target(binary, name, int(number, 0)) if plus else Target(binary, function)
    except ValueError:
        return Target(binary, function)  # a C++ operator may have a plus


def attach_uprobe(
    program: Program,
    binary: str,
    function: Optional[str] = None,
    *,
    offset: int = 0,
    pid: Optional[int] = None,
    returns: bool = False,
    cookie: Optional[int] = None,
    by_tracefs: bool = False,
) -> Link:
    """Attach at a function of a program or library, or where it returns. Linux 4.1.

    ``binary`` is a path, or a name as ``binaries.find`` takes it. ``offset`` counts from the
    function, or without one from the beginning of the file. With ``pid`` only that process runs
    the program. Before 4.17, and with ``by_tracefs``, the probe is made in tracefs, as for
    ``kernel_probes.attach_kprobe``. Cookies need Linux 5.15. Raises AttachError.
    """
    path, at = located(binary, function, offset, pid)
    return attach_at(
        program, path, at, pid=pid, returns=returns, cookie=cookie, by_tracefs=by_tracefs
    )


def located(
    binary: str, function: Optional[str], offset: int, pid: Optional[int]
) -> tuple[str, int]:
    """Return a path, and where in the file to probe. Raises AttachError."""
    path = binaries.find(binary, pid)
    if function is None:
        return path, offset
    return path, binaries.function_offset(path, function) + offset


def attach_at(
    program: Program,
    path: str,
    offset: int,
    *,
    pid: Optional[int] = None,
    returns: bool = False,
    cookie: Optional[int] = None,
    ref_counter: int = 0,
    by_tracefs: bool = False,
) -> Link:
    """Attach at a byte of a file; ``ref_counter`` is where the file counts who looks.

    Such counters need Linux 4.20. Raises AttachError.
    """
    device = None if by_tracefs else events.device_type("uprobe")
    try:
        if device is None:
            counter = f"({ref_counter:#x})" if ref_counter else ""
            where = f"{path}:{offset:#x}{counter}"
            probe = tracefs.make_probe("uprobe_events", where, returns=returns)
            return events.attach_made(program, probe, pid=pid, cookie=cookie)
        name = ctypes.create_string_buffer(os.fsencode(path))
        attr = PerfEventAttr(type=device, config1=ctypes.addressof(name), config2=offset)
        attr.config = ref_counter << _REF_COUNTER_SHIFT
        if returns:
            attr.config |= 1 << events.device_bit("uprobe", "retprobe")
        return events.attach(program, events.open_for(attr, pid), cookie=cookie)
    except OSError as error:
        raise AttachError(
            f"cannot attach {program.name!r} to {path}:{offset:#x}: {_why(error, pid)}",
            errno=error.errno or 0,
        ) from error


def _why(error: OSError, pid: Optional[int]) -> str:
    if error.errno in (errno.EINVAL, errno.EIO, errno.ENOTSUP):
        return f"{error} (is the offset the beginning of an instruction of the file's code?)"
    return events.why(error, pid)


def attach_uprobe_multi(
    program: Program,
    binary: str,
    functions: Union[str, Sequence[str]],
    *,
    pid: Optional[int] = None,
    returns: bool = False,
    cookies: Sequence[int] = (),
) -> Link:
    """Attach at many functions of a file by one link: names, or a pattern. Linux 6.6.

    ``cookies`` has one for each function, in the order of the names. A program in
    "uprobe.session" (6.13) runs at both ends. Raises AttachError; ValueError for cookies that are
    not as many.
    """
    path = binaries.find(binary, pid)
    places = _matching(path, functions)
    if cookies and len(cookies) != len(places):
        raise ValueError(f"{len(cookies)} cookies do not suit {len(places)} functions")
    name = ctypes.create_string_buffer(os.fsencode(path))
    offsets = (ctypes.c_ulong * len(places))(*places)
    numbers = (ctypes.c_uint64 * len(cookies))(*cookies)
    attr = Attr()
    attr.link_create.prog_fd = program.fd
    attr.link_create.attach_type = program.expected_attach_type or AttachType.TRACE_UPROBE_MULTI
    multi = attr.link_create.uprobe_multi
    multi.path, multi.offsets = ctypes.addressof(name), ctypes.addressof(offsets)
    multi.cookies = ctypes.addressof(numbers) if cookies else 0
    multi.cnt, multi.pid = len(places), pid or 0
    multi.flags = abi.BPF_F_UPROBE_MULTI_RETURN if returns else 0
    try:
        return Link(syscall.bpf(Cmd.LINK_CREATE, attr))
    except OSError as error:
        why = events.why(error, pid)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            why = f"{error} (Linux 6.6; {os.uname().release} runs)"
        raise AttachError(
            f"cannot attach {program.name!r} to {len(places)} functions of {path}: {why}",
            errno=error.errno or 0,
        ) from error


def _matching(path: str, functions: Union[str, Sequence[str]]) -> list[int]:
    """Return where the functions begin. Raises AttachError."""
    if not isinstance(functions, str):
        return [binaries.function_offset(path, function) for function in functions]
    if not any(letter in functions for letter in "*?["):
        return [binaries.function_offset(path, functions)]
    binary = binaries.opened(path)
    found = [
        binary.file_offset(symbol.address)
        for symbol in binary.symbols
        if not symbol.chosen and fnmatch.fnmatchcase(symbol.name, functions)
    ]
    if not found:
        raise AttachError(f"{path} has no function that matches {functions!r}")
    return list(dict.fromkeys(found))
