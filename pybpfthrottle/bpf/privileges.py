"""The rights of this process to use bpf(2): capabilities, and locked memory."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from enum import IntEnum
from typing import Callable, Iterable, Optional, TypeVar

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, MapType, ProgType

T = TypeVar("T")


class Capability(IntEnum):
    """Capabilities that bpf(2) asks for. Source: include/uapi/linux/capability.h."""

    CAP_NET_ADMIN = 12
    CAP_SYS_ADMIN = 21
    CAP_SYS_RESOURCE = 24
    CAP_PERFMON = 38
    CAP_BPF = 39


_FIRST_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO of include/linux/proc_ns.h
_C, _P = Capability, ProgType
# is_net_admin_prog_type and is_perfmon_prog_type of kernel/bpf/syscall.c, and CGROUP_SKB, which
# needs CAP_NET_ADMIN when it is attached. EXT extends programs of any type.
_NET_ADMIN = frozenset(
    (
        *(_P.SCHED_CLS, _P.SCHED_ACT, _P.XDP, _P.LWT_IN, _P.LWT_OUT, _P.LWT_XMIT),
        *(_P.LWT_SEG6LOCAL, _P.SK_SKB, _P.SK_MSG, _P.FLOW_DISSECTOR, _P.CGROUP_DEVICE),
        *(_P.CGROUP_SOCK, _P.CGROUP_SOCK_ADDR, _P.CGROUP_SOCKOPT, _P.CGROUP_SYSCTL),
        *(_P.SOCK_OPS, _P.EXT, _P.NETFILTER, _P.CGROUP_SKB),
    )
)
_PERFMON = frozenset(
    (
        *(_P.KPROBE, _P.TRACEPOINT, _P.PERF_EVENT, _P.RAW_TRACEPOINT),
        *(_P.RAW_TRACEPOINT_WRITABLE, _P.TRACING, _P.LSM, _P.STRUCT_OPS, _P.EXT),
    )
)


def effective_capabilities() -> int:
    """Return the capabilities of this process as a bit set; all where /proc does not tell."""
    try:
        with open("/proc/self/status", errors="replace", newline="\n") as status:
            for line in status:
                if line.startswith("CapEff:"):
                    return int(line.split()[1], 16)
    except OSError:
        pass
    return (1 << 64) - 1


def in_user_namespace() -> bool:
    """Return whether this process is in another user namespace than the machine's first."""
    try:
        return os.stat("/proc/self/ns/user").st_ino != _FIRST_USER_NAMESPACE
    except OSError:
        return False


def capabilities_for(program_type: int) -> tuple[Capability, ...]:
    """Return the capabilities that loading and attaching a program of a type needs.

    Linux 5.8; before that CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
    """
    needed = [_C.CAP_BPF]
    if program_type in _NET_ADMIN:
        needed.append(_C.CAP_NET_ADMIN)
    if program_type in _PERFMON:
        needed.append(_C.CAP_PERFMON)
    return tuple(needed)


def missing_capabilities(needed: Iterable[Capability], *, refused: bool = False) -> list[str]:
    """Return the names of the capabilities among ``needed`` that this process does not have.

    CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON. It includes CAP_NET_ADMIN on some kernels only
    (6.18, not 5.10): after an EPERM, with ``refused``, CAP_NET_ADMIN counts as missing.
    """
    held = effective_capabilities()
    missing = []
    for capability in needed:
        included = held >> _C.CAP_SYS_ADMIN & 1
        if capability is _C.CAP_NET_ADMIN and refused:
            included = 0
        if not (held >> capability & 1 or included):
            missing.append(capability.name)
    return missing


def _needed_for(command: str) -> tuple[Capability, ...]:
    """Return what any command needs: those that look at objects of others need CAP_SYS_ADMIN."""
    is_search = command.endswith(("_NEXT_ID", "_FD_BY_ID"))
    return (_C.CAP_SYS_ADMIN,) if is_search else (_C.CAP_BPF,)


def why_not_permitted(command: str, needed: Optional[Iterable[Capability]] = None) -> str:
    """Return what is behind the EPERM of a bpf(2) command, and what to do.

    Without ``needed`` the capabilities are those that the command needs for any kind of object.
    """
    needed = _needed_for(command) if needed is None else needed
    missing = missing_capabilities(needed, refused=True)
    if missing:
        return (
            f"this process lacks {' and '.join(missing)};"
            " run it as root (sudo), or give it these capabilities"
        )
    if in_user_namespace():
        return (
            "this process has its capabilities in a user namespace only, as in a rootless"
            f" container, and {command} wants those of the host: run it outside, or have a bpf file"
            " system mounted here that delegates it (Linux 6.9, pybpfthrottle.bpf.token)"
        )
    text = (
        "this process has the capabilities, so a seccomp filter (as in containers), a security"
        f" module or kernel lockdown refuses {command}"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not may_raise_memlock(hard) and memlock_is_charged():
        text += (
            f"; or, before Linux 5.11, the limit on locked memory ({soft // 1024} KiB) is used up:"
            " try ulimit -l unlimited"
        )
    return text


def may_raise_memlock(hard: int) -> bool:
    """Return whether RLIMIT_MEMLOCK can be lifted, where ``hard`` is its upper bound."""
    return hard == resource.RLIM_INFINITY or bool(
        effective_capabilities() >> _C.CAP_SYS_RESOURCE & 1
    )


def memlock_is_charged() -> bool:
    """Return whether the kernel (before 5.11) refuses a tiny map with no locked memory allowed.

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


def why_refused(error: OSError, command: str, needed: Optional[Iterable[Capability]] = None) -> str:
    """Return what is behind a failed bpf(2) command, where its errno alone tells too little."""
    if error.errno == errno.EPERM:
        return f"{command} gives EPERM: {why_not_permitted(command, needed)}"
    if error.errno == errno.ENOSYS:
        return f"{command} gives ENOSYS: this kernel has no bpf(2) system call (CONFIG_BPF_SYSCALL)"
    if error.errno == errno.EINVAL:
        from pybpfthrottle.bpf.obj import releases

        if command in releases.COMMANDS:
            return f"this kernel does not support {command} (Linux {releases.COMMANDS[command]})"
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
    # Without CAP_SYS_RESOURCE the hard limit is as far as it goes.
    for wanted in ((infinity, infinity), (hard, hard)):
        if wanted[0] == soft:
            continue
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, wanted)
        except (ValueError, OSError):  # no CAP_SYS_RESOURCE
            continue
        return True
    return False
