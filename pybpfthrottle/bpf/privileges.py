"""What this process may ask of bpf(2): capabilities, and locked memory on older kernels."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from typing import Callable, TypeVar

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, MapType

T = TypeVar("T")

# include/uapi/linux/capability.h
_CAP_NET_ADMIN = 12
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24
_CAP_BPF = 39


def effective_capabilities() -> int:
    """The capabilities of this process as a bit set; all of them where /proc does not tell."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("CapEff:"):
                    return int(line.split()[1], 16)
    except OSError:
        pass
    return (1 << 64) - 1


def missing_capabilities(*, refused: bool = False) -> list[str]:
    """The names of the capabilities that loading and attaching a cgroup_skb program still needs.

    CAP_BPF exists since Linux 5.8; before that, and as a substitute after it, CAP_SYS_ADMIN. For
    CAP_NET_ADMIN that stands in on some kernels alone (6.18 does, 5.10 does not): after an EPERM,
    with ``refused``, it counts as missing.
    """
    held = effective_capabilities()

    def has(capability: int) -> bool:
        return bool(held >> capability & 1)

    missing = []
    if not has(_CAP_SYS_ADMIN) and not has(_CAP_BPF):
        missing.append("CAP_BPF")
    if not has(_CAP_NET_ADMIN) and (refused or not has(_CAP_SYS_ADMIN)):
        missing.append("CAP_NET_ADMIN")
    return missing


def why_not_permitted(command: str) -> str:
    """What stands behind the EPERM of a bpf(2) command, and what to do."""
    missing = missing_capabilities(refused=True)
    if missing:
        return (
            f"this process lacks {' and '.join(missing)};"
            " run it as root (sudo), or give it these capabilities"
        )
    text = (
        f"the capabilities are there, so a seccomp filter (containers have one), a security module"
        f" or kernel lockdown refuses {command}"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not may_raise_memlock(hard) and memlock_is_charged():
        text += (
            f"; or, before Linux 5.11, the limit on locked memory ({soft // 1024} KiB) is used up:"
            " try ulimit -l unlimited"
        )
    return text


def may_raise_memlock(hard: int) -> bool:
    """Whether RLIMIT_MEMLOCK can be lifted, where ``hard`` is its upper bound."""
    return hard == resource.RLIM_INFINITY or bool(effective_capabilities() >> _CAP_SYS_RESOURCE & 1)


def memlock_is_charged() -> bool:
    """Whether a tiny map is refused with no locked memory allowed: the kernel is before 5.11.

    Where a filter refuses all maps, or the limit cannot even be lowered, it seems not to be.
    """
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, limits[1]))
    except (ValueError, OSError):
        return False
    try:
        # A map of no type is charged to nothing; a filter does not look at the type.
        return _is_refused(MapType.ARRAY) and not _is_refused(MapType.UNSPEC)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)


def _is_refused(type: MapType) -> bool:
    attr = Attr()
    attr.map_create.map_type = type
    attr.map_create.key_size = attr.map_create.value_size = ctypes.sizeof(ctypes.c_uint32)
    attr.map_create.max_entries = 1
    try:
        os.close(syscall.bpf(Cmd.MAP_CREATE, attr))
    except OSError as error:
        return error.errno == errno.EPERM
    return False


def why_refused(error: OSError, command: str) -> str:
    """What stands behind a failed bpf(2) command, where its errno alone tells too little."""
    if error.errno == errno.EPERM:
        return f"{command} gives EPERM: {why_not_permitted(command)}"
    if error.errno == errno.ENOSYS:
        return f"{command} gives ENOSYS: this kernel has no bpf(2) system call (CONFIG_BPF_SYSCALL)"
    return str(error)


def with_memlock(create: Callable[[], T]) -> T:
    """Do ``create``, and once more with RLIMIT_MEMLOCK raised if that may be why it got EPERM.

    Kernels before 5.11 charge maps and programs to that limit. Only creation checks it, so it is
    put back at once: a command that is run afterwards never sees it. Without CAP_SYS_RESOURCE it
    is raised as far as the hard limit allows.
    """
    try:
        return create()
    except PermissionError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if error.errno != errno.EPERM or soft == resource.RLIM_INFINITY:
            raise
        if not _raise_memlock(soft, hard):
            raise
    try:
        return create()
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def _raise_memlock(soft: int, hard: int) -> bool:
    infinity = resource.RLIM_INFINITY
    for wanted in ((infinity, infinity), (hard, hard)):
        if wanted[0] == soft:
            continue
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, wanted)
        except (ValueError, OSError):  # no CAP_SYS_RESOURCE
            continue
        return True
    return False
