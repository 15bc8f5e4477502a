"""Probes of the kernel: at a function or behind it, at many functions, at a system call."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
import re
from typing import Optional, Sequence, Union

from pybpfthrottle.bpf import abi, perf, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.perf_abi import PerfEventAttr
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.running import RunningKernel, syscall_wrapper
from pybpfthrottle.bpf.tracing import events, nearest, tracefs

_KALLSYMS = "/proc/kallsyms"
_PATTERN = re.compile(r"[*?\[]")


class Place(NamedTuple):
    """A place in the kernel: a function, and an offset in bytes from its beginning."""

    function: str
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.function}+{self.offset:#x}" if self.offset else self.function


def place_of(text: str) -> Place:
    """Return the place that "tcp_connect" or "tcp_connect+0x8" names. Raises AttachError."""
    match = re.fullmatch(r"([\w.$]+)(?:\+(0[xX][0-9a-fA-F]+|\d+))?", text)
    if match is None:
        raise AttachError(f"{text!r} is no place in the kernel: write FUNCTION or FUNCTION+OFFSET")
    return Place(match[1], int(match[2], 0) if match[2] else 0)


def attach_kprobe(
    program: Program,
    function: str,
    *,
    returns: bool = False,
    cookie: Optional[int] = None,
    by_tracefs: bool = False,
) -> Link:
    """Attach at a function, "tcp_connect" or "tcp_connect+0x8", or where it returns. Linux 4.1.

    Before 4.17, and with ``by_tracefs``, the probe is made in tracefs, and removed with the link; a
    process that is killed leaves it there, as pybpf_PID. Cookies need Linux 5.15. Raises
    AttachError.
    """
    place = place_of(function)
    if returns and place.offset:
        raise AttachError(f"a function returns at no offset: {function!r}")
    device = None if by_tracefs else events.device_type("kprobe")
    try:
        if device is None:
            probe = tracefs.make_probe("kprobe_events", str(place), returns=returns)
            return events.attach_made(program, probe, cookie=cookie)
        return events.attach(program, _open(place, device, returns=returns), cookie=cookie)
    except OSError as error:
        raise AttachError(
            f"cannot attach {program.name!r} to the kernel's function {place}:"
            f" {_why(error, place)}",
            errno=error.errno or 0,
        ) from error


def _open(place: Place, device: int, *, returns: bool) -> int:
    name = ctypes.create_string_buffer(place.function.encode())
    attr = PerfEventAttr(type=device, config1=ctypes.addressof(name), config2=place.offset)
    if returns:
        attr.config = 1 << events.device_bit("kprobe", "retprobe")
    return events.open_for(attr)


def _why(error: OSError, place: Place) -> str:
    known = _known_functions()
    if error.errno in (errno.ENOENT, errno.EINVAL) and known and place.function not in known:
        return f"there is none of this name{nearest.hint(place.function, known)}"
    if error.errno in (errno.EINVAL, errno.EILSEQ, errno.EADDRNOTAVAIL, errno.ENOENT):
        return f"{error} (it may not be probed there: see kprobes/blacklist in debugfs)"
    return events.why(error)


def _known_functions() -> set[str]:
    try:
        lines = perf.read(_KALLSYMS).splitlines()
    except OSError:
        return set()
    fields = (line.split() for line in lines)
    return {field[2] for field in fields if len(field) > 2 and field[1] in "tTwW"}


def attach_syscall(
    program: Program, name: str, *, returns: bool = False, cookie: Optional[int] = None
) -> Link:
    """Attach at the kernel's function for a system call, such as "openat". Raises AttachError."""
    wrapper = syscall_wrapper()
    wrapped = wrapper and RunningKernel().has_syscall_wrapper()
    function = wrapper.replace("bpf", name) if wrapper and wrapped else f"__se_sys_{name}"
    return attach_kprobe(program, function, returns=returns, cookie=cookie)


def attach_kprobe_multi(
    program: Program,
    functions: Union[str, Sequence[str]],
    *,
    returns: bool = False,
    cookies: Sequence[int] = (),
) -> Link:
    """Attach at many functions by one link: names, or a pattern such as "tcp_*". Linux 5.18.

    ``cookies`` has one for each function, in the order of the names. A program in
    "kprobe.session" (6.10) runs at both ends. Raises AttachError; ValueError for cookies that are
    not as many.
    """
    names = matching(functions) if isinstance(functions, str) else list(functions)
    if cookies and len(cookies) != len(names):
        raise ValueError(f"{len(cookies)} cookies do not suit {len(names)} functions")
    strings = [ctypes.create_string_buffer(name.encode()) for name in names]
    addresses = (ctypes.c_uint64 * len(names))(*map(ctypes.addressof, strings))
    numbers = (ctypes.c_uint64 * len(cookies))(*cookies)
    attr = Attr()
    attr.link_create.prog_fd = program.fd
    attr.link_create.attach_type = program.expected_attach_type or AttachType.TRACE_KPROBE_MULTI
    multi = attr.link_create.kprobe_multi
    multi.flags = abi.BPF_F_KPROBE_MULTI_RETURN if returns else 0
    multi.cnt, multi.syms = len(names), ctypes.addressof(addresses)
    multi.cookies = ctypes.addressof(numbers) if cookies else 0
    try:
        return Link(syscall.bpf(Cmd.LINK_CREATE, attr))
    except OSError as error:
        raise AttachError(
            f"cannot attach {program.name!r} to {len(names)} of the kernel's functions:"
            f" {_why_not_many(error, names)}",
            errno=error.errno or 0,
        ) from error


def matching(pattern: str) -> list[str]:
    """Return the functions that match a pattern of the shell, or the name itself.

    Raises AttachError for a pattern that nothing matches, or where the kernel does not tell.
    """
    if not _PATTERN.search(pattern):
        return [pattern]
    try:
        known = tracefs.functions()
    except OSError as error:
        raise AttachError(
            f"cannot tell which functions match {pattern!r}: {events.why(error)}",
            errno=error.errno or 0,
        ) from error
    found = fnmatch.filter(dict.fromkeys(known), pattern)
    if not found:
        raise AttachError(f"no function that can be traced matches {pattern!r}")
    return found


def _why_not_many(error: OSError, names: Sequence[str]) -> str:
    if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
        known = _known_functions()
        unknown = [name for name in names if known and name not in known]
        if unknown:
            return f"there is no {unknown[0]}{nearest.hint(unknown[0], known)}"
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return f"{error} (Linux 5.18, with CONFIG_FPROBE; {os.uname().release} runs)"
    return events.why(error)
