"""The second door to the kernel: perf_event_open(2), ioctl(2) on its events, and files of tracefs.

Call it through this module (``perf.open_event(...)``), so that a test can put fakes in its place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from functools import cache

from pybpfthrottle.bpf import perf_abi, syscall
from pybpfthrottle.bpf.perf_abi import PerfEventAttr

# arch/*/entry/syscalls/syscall.tbl and include/uapi/asm-generic/unistd.h.
_NUMBERS = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "arm": 364,
    "i386": 336,
    "ppc64le": 319,
    "s390x": 331,
}
# The same on all machines, as those of all system calls since Linux 5.1.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_FSCONFIG_CMD_CREATE = 6
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8


def open_event(attr: PerfEventAttr, *, pid: int = -1, cpu: int = -1) -> int:
    """Return the descriptor of a perf event, for one process or CPU, or all with -1.

    Linux 2.6.31; source: man 2 perf_event_open. Raises OSError.
    """
    attr.size = ctypes.sizeof(attr)
    return _call(
        "perf_event_open",
        syscall.number_of("perf_event_open", _NUMBERS),
        *(ctypes.addressof(attr), pid, cpu, -1, perf_abi.PERF_FLAG_FD_CLOEXEC),
    )


def ioctl(fd: int, request: int, argument: int = 0) -> None:
    """Do one command on a perf event. Raises OSError."""
    fcntl.ioctl(fd, request, argument)


def read(path: str) -> str:
    """Return what a file of /sys or tracefs says. Raises OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def names(path: str) -> list[str]:
    """Return what a directory of /sys or tracefs has. Raises OSError."""
    return sorted(os.listdir(path))


def append(path: str, text: str) -> None:
    """Write a line to a file of tracefs, as one write. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def mount_nowhere(kind: str) -> int:
    """Return a descriptor of a file system's root that is mounted at no path; the caller closes it.

    Nobody else sees it, and it ends with the descriptor. Linux 5.2; needs CAP_SYS_ADMIN. Raises
    OSError.
    """
    name = ctypes.create_string_buffer(kind.encode())
    context = _call("fsopen", _FSOPEN, ctypes.addressof(name), _CLOEXEC)
    try:
        _call("fsconfig", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, 0, 0, 0)
        return _call("fsmount", _FSMOUNT, context, _CLOEXEC, _NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, number: int, *arguments: int) -> int:
    try:
        function = _libc()["syscall"]  # a function of its own: others set other types
    except (OSError, AttributeError):
        raise OSError(errno.ENOSYS, "the C library has no syscall()", name) from None
    function.restype = ctypes.c_long
    result = int(function(*map(ctypes.c_long, (number, *arguments))))
    if result < 0:
        told = ctypes.get_errno()
        raise OSError(told, os.strerror(told), name)
    return result
