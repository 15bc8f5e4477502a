"""The kernel's log, read without dmesg: messages on BPF, capabilities and denials."""

from __future__ import annotations

import ctypes
import os
import re
import time
from contextlib import suppress
from typing import Iterator, NamedTuple, Optional

from pybpfthrottle.diagnostics.check import Check, Result, Setup, passed, warned
from pybpfthrottle.linux import clock, libc

_TELLING = re.compile(
    r"\b(e?bpf|capability|capable|seccomp|lockdown|cgroup2?)\b|apparmor=.DENIED|avc: +denied"
    r"|\baudit\b.*\bdenied\b|type=13(00|26)|memlock|unprivileged",
    re.I,
)
_SHOWN = 20
_READ_ALL = 3  # man 2 syslog
_RECORD_BYTES = 8192
_BUFFER_BYTES = 1 << 20


class Line(NamedTuple):
    """A message, and its time in seconds since the kernel started."""

    at_s: float
    text: str

    def __str__(self) -> str:
        came = clock.boot_time_s() + self.at_s
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(came))} {self.text}"


def read() -> list[Line]:
    """Return the whole log, oldest first: /dev/kmsg (Linux 3.5) or syslog(2). Raises OSError."""
    with suppress(OSError):
        lines = list(_from_device())
        if lines:  # containers often have /dev/null in its place
            return lines
    return list(_from_system_call())


def telling(lines: list[Line]) -> list[Line]:
    """Return the lines about BPF, capabilities and denials, newest first."""
    return [line for line in reversed(lines) if _TELLING.search(line.text)]


def _from_device() -> Iterator[Line]:
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                record = os.read(fd, _RECORD_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten meanwhile
                continue
            if not record:
                return
            line = parse_record(record)
            if line:
                yield line
    finally:
        os.close(fd)


def parse_record(record: bytes) -> Optional[Line]:
    """Parse ``priority,sequence,microseconds,flags;message`` (ABI/testing/dev-kmsg)."""
    head, _, message = record.decode(errors="replace").partition(";")
    try:
        at_us = int(head.split(",")[2])
    except (IndexError, ValueError):
        return None
    return Line(at_us / 1e6, message.partition("\n")[0])


def _from_system_call() -> Iterator[Line]:
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    length = libc.klogctl(_READ_ALL, buffer, _BUFFER_BYTES)
    for text in buffer.raw[:length].decode(errors="replace").splitlines():
        found = re.match(r"(?:<\d+>)?\[ *(\d+\.\d+)\] (.*)", text)
        if found:
            yield Line(float(found[1]), found[2])


def _log(setup: Setup) -> Result:
    try:
        lines = read()
    except (OSError, AttributeError) as error:
        return warned(f"it cannot be read: {getattr(error, 'strerror', None) or error}")
    found = telling(lines)
    if not found:
        return passed(f"none of {len(lines)} lines is about BPF or denials")
    return passed(
        f"{len(found)} of {len(lines)} lines are about BPF or denials, the newest first",
        *map(str, found[:_SHOWN]),
    )


CHECKS = (
    Check(
        "kernel.log",
        "Kernel log",
        "lines about BPF, capabilities and denials",
        "the kernel and security modules log what they refused",
        "run it as root; kernel.dmesg_restrict=1 hides it from other users",
        _log,
    ),
)
