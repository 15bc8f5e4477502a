"""Perf events, and programs on them: what probes, tracepoints and profiles have in common."""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack
from typing import Callable, Optional

from pybpfthrottle.bpf import perf, perf_abi, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link, ProbeLink
from pybpfthrottle.bpf.perf_abi import PerfEventAttr
from pybpfthrottle.bpf.privileges import Capability, missing_capabilities
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.tracing.tracefs import Probe

_DEVICES = "/sys/bus/event_source/devices"
_PARANOID = "/proc/sys/kernel/perf_event_paranoid"
_LOCKDOWN = "/sys/kernel/security/lockdown"


def device_type(device: str) -> Optional[int]:
    """Return the type of a device's events, such as "kprobe"; None before Linux 4.17."""
    try:
        return int(perf.read(f"{_DEVICES}/{device}/type"))
    except OSError:
        return None


def device_bit(device: str, name: str) -> int:
    """Return the lowest bit of a device's field in the event's config: "config:0" is 0."""
    found = re.search(r"\d+", perf.read(f"{_DEVICES}/{device}/format/{name}"))
    return int(found[0]) if found else 0


def open_tracepoint(number: int, pid: Optional[int] = None) -> int:
    """Return an event of a tracepoint, for one process or all. Raises OSError."""
    attr = PerfEventAttr(type=perf_abi.PERF_TYPE_TRACEPOINT, config=number, sample_period=1)
    return open_for(attr, pid)


def open_for(attr: PerfEventAttr, pid: Optional[int] = None) -> int:
    """Return an event for one process on all CPUs, or for all processes.

    An event that counts nothing is on one CPU, which stands for all. Raises OSError.
    """
    if pid is None:
        return perf.open_event(attr, cpu=_first_cpu())
    return perf.open_event(attr, pid=pid)


def _first_cpu() -> int:
    return min(os.sched_getaffinity(0), default=0)


def attach(
    program: Program,
    event: int,
    *,
    cookie: Optional[int] = None,
    undo: Optional[Callable[[], None]] = None,
) -> Link:
    """Attach a program to an event, and switch it on. The event is this function's to close.

    By a link since Linux 5.15, which cookies need; before that by ioctl(2). ``undo`` is done when
    it is detached, and also where this fails. Raises OSError, or AttachError.
    """
    with ExitStack() as failed:
        if undo is not None:
            failed.callback(undo)
        failed.callback(os.close, event)
        fd = _link(program, event, cookie)
        if fd is None:
            perf.ioctl(event, perf_abi.PERF_EVENT_IOC_SET_BPF, program.fd)
            perf.ioctl(event, perf_abi.PERF_EVENT_IOC_ENABLE)
            fd = event
        else:
            failed.callback(os.close, fd)
            perf.ioctl(event, perf_abi.PERF_EVENT_IOC_ENABLE)
            os.close(event)  # the link keeps it
        failed.pop_all()
        return ProbeLink(fd, undo)


def attach_made(
    program: Program, probe: Probe, *, pid: Optional[int] = None, cookie: Optional[int] = None
) -> Link:
    """Attach to a probe that was made in tracefs; it is removed with the link, or if this fails.

    Raises OSError, or AttachError.
    """
    try:
        event = open_tracepoint(probe.id, pid)
    except BaseException:
        probe.remove()
        raise
    return attach(program, event, cookie=cookie, undo=probe.remove)


def _link(program: Program, event: int, cookie: Optional[int]) -> Optional[int]:
    """Return a link's descriptor; None where the kernel has no such links."""
    attr = Attr()
    attr.link_create.prog_fd = program.fd
    attr.link_create.target_fd = event
    attr.link_create.attach_type = AttachType.PERF_EVENT
    attr.link_create.perf_event.bpf_cookie = cookie or 0
    try:
        return syscall.bpf(Cmd.LINK_CREATE, attr)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
        if cookie:
            raise AttachError(
                f"cannot attach {program.name!r} with a cookie: {error} (Linux 5.15)",
                errno=error.errno,
            ) from error
        return None


def why(error: OSError, pid: Optional[int] = None) -> str:
    """Return what is behind a perf event that the kernel refuses, and what to do."""
    if error.errno == errno.ESRCH and pid is not None:
        return f"there is no process {pid}; it may have ended"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return str(error)
    missing = missing_capabilities([Capability.CAP_PERFMON])
    if missing:
        return (
            f"{error}: this process lacks CAP_PERFMON (before Linux 5.8 CAP_SYS_ADMIN), and sysctl"
            f" kernel.perf_event_paranoid is {_told(_PARANOID) or 'not told'}; run it as root"
        )
    mode = re.search(r"\[(\w+)\]", _told(_LOCKDOWN))
    if mode and mode[1] != "none":
        return f"{error}: the kernel is locked down ({mode[1]}; see man 7 kernel_lockdown)"
    return f"{error}: a security module or a seccomp filter (as in containers) refuses it"


def _told(path: str) -> str:
    try:
        return perf.read(path).strip()
    except OSError:
        return ""
