"""The one door to system calls that Python lacks, other than those of the toolkit (``bpf``)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import cache
from typing import Any, Iterable

# The same on all machines: include/uapi/asm-generic/unistd.h.
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
# include/uapi/linux/mount.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
# include/uapi/linux/time.h, timerfd.h
_CLOCK_MONOTONIC = 1
# struct itimerspec: the period, and the first time. Where a long has 32 bits, so has time_t by the
# function's plain name, in glibc and musl.
_TIMER = struct.Struct("@llll")


def pidfd_open(pid: int, flags: int = 0) -> int:
    """Return a descriptor of a process; the caller closes it. Linux 5.3. Raises OSError."""
    return _syscall("pidfd_open", _PIDFD_OPEN, pid, flags)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Return a copy of another process's descriptor ``number``. Linux 5.6.

    Raises OSError.
    """
    return _syscall("pidfd_getfd", _PIDFD_GETFD, pidfd, number, 0)


def setns(namespace: int, kind: int) -> None:
    """Move this thread into the namespace behind a descriptor. Raises OSError."""
    if _function("setns")(namespace, kind):
        raise _error("setns")


def unshare(kind: int) -> None:
    """Give this thread a namespace of its own. Raises OSError."""
    if _function("unshare")(kind):
        raise _error("unshare")


def signalfd(numbers: Iterable[int]) -> int:
    """Return a descriptor to read blocked signals from; the caller closes it. Linux 2.6.27.

    Raises OSError.
    """
    # glibc's sigset_t is 128 bytes; the kernel's is the first 64 bits of it.
    buffer = (ctypes.c_uint64 * 16)(sum(1 << (number - 1) for number in numbers))
    result = int(_function("signalfd")(-1, ctypes.byref(buffer), os.O_CLOEXEC | os.O_NONBLOCK))
    if result < 0:
        raise _error("signalfd")
    return result


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process or thread (man 2 prctl). Raises OSError."""
    if _function("prctl")(option, ctypes.c_ulong(value), 0, 0, 0):
        raise _error("prctl")


def timerfd_create() -> int:
    """Return a timer descriptor on CLOCK_MONOTONIC; the caller closes it. Raises OSError."""
    fd = int(_function("timerfd_create")(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0:
        raise _error("timerfd_create")
    return fd


def timerfd_settime(fd: int, wait_ns: int) -> None:
    """Make a timer descriptor readable after a time; 0: never. Raises OSError."""
    value = _TIMER.pack(0, 0, *divmod(wait_ns, 1_000_000_000))
    if _function("timerfd_settime")(fd, 0, value, None):
        raise _error("timerfd_settime")


def mount(kind: str, path: str, options: str = "") -> None:
    """Mount a file system that has no device, without programs of its own. Raises OSError."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    arguments = [text.encode() for text in (kind, path, kind)]
    if _function("mount")(*arguments, ctypes.c_ulong(flags), options.encode()):
        raise _error(path)


def bind(source: str, target: str) -> None:
    """Have a file or directory appear at another path too. Raises OSError."""
    paths = os.fsencode(source), os.fsencode(target)
    if _function("mount")(*paths, None, ctypes.c_ulong(_MS_BIND), None):
        raise _error(target)


def keep_mounts_here() -> None:
    """Have what is mounted in this mount namespace not be seen in others. Raises OSError."""
    if _function("mount")(None, b"/", None, ctypes.c_ulong(_MS_SLAVE | _MS_REC), None):
        raise _error("/")


def umount(path: str) -> None:
    """Unmount a file system. Raises OSError: EBUSY while it is in use."""
    if _function("umount")(os.fsencode(path)):
        raise _error(path)


def klogctl(kind: int, buffer: Any, size: int) -> int:
    """Read or query the kernel's log (man 2 syslog). Raises OSError."""
    result = int(_function("klogctl")(kind, buffer, size))
    if result < 0:
        raise _error("klogctl")
    return result


def inotify_init(flags: int = 0) -> int:
    """Return a descriptor that reports changes in directories; the caller closes it.

    Raises OSError.
    """
    return _checked("inotify_init1", _function("inotify_init1")(flags))


def inotify_add_watch(descriptor: int, path: str, events: int) -> int:
    """Watch a path for these events; for a watched directory they replace the earlier ones.

    Raises OSError.
    """
    result = _function("inotify_add_watch")(descriptor, os.fsencode(path), ctypes.c_uint32(events))
    return _checked("inotify_add_watch", result)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _function(name: str) -> Any:
    try:
        return getattr(_libc(), name)
    except AttributeError:  # as in a statically linked Python
        raise OSError(errno.ENOSYS, "the C library has no such function", name) from None


def _syscall(name: str, number: int, *arguments: int) -> int:
    function = _function("syscall")
    function.restype = ctypes.c_long
    return _checked(name, function(*map(ctypes.c_long, (number, *arguments))))


def _checked(name: str, result: int) -> int:
    if result < 0:
        raise _error(name)
    return result


def _error(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)
