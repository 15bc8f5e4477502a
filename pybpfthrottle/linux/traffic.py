"""Whether processes have sent or received anything, judged by devices and connections."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Iterable, Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import process, sockets
from pybpfthrottle.linux.sockets import TcpInfo

# On a new device the kernel itself looks for routers and addresses.
_NOISE_BYTES = 2048


class DeviceBytes(NamedTuple):
    """The bytes that a network namespace's devices have carried, in both directions."""

    loopback: int
    others: int


def device_bytes(pid: int) -> Optional[DeviceBytes]:
    """Return the counters of a process's network namespace; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/net/dev") as file:
            return parse(file.read())
    except OSError:
        return None


def parse(text: str) -> DeviceBytes:
    """Parse /proc/PID/net/dev: two headings, then a line per device."""
    carried = {"lo": 0, "others": 0}
    for line in text.splitlines()[2:]:
        name, _, numbers = line.rpartition(":")
        fields = numbers.split()
        carried["lo" if name.strip() == "lo" else "others"] += int(fields[0]) + int(fields[8])
    return DeviceBytes(carried["lo"], carried["others"])


def differ(before: Optional[DeviceBytes], after: Optional[DeviceBytes]) -> bool:
    """Whether more was carried in between than the kernel sends by itself."""
    if before is None or after is None:
        return False
    return after.loopback > before.loopback or after.others - before.others > _NOISE_BYTES


def share_network(pids: Iterable[int]) -> bool:
    """Whether the first one's network namespace has processes besides these and this session."""
    known = {*pids, *process.own_session()}
    own = next((found for found in map(_namespace, pids) if found), None)
    return any(_namespace(pid) == own for pid in process.running() if pid not in known)


def _namespace(pid: int) -> Optional[int]:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    return None


def tcp_moved(pids: Iterable[int], within_s: float) -> bool:
    """Whether a TCP connection of some processes carried data within the last seconds."""
    for own in sockets.tcp_of(pids):
        with suppress(OSError):
            if TcpInfo.of(own).moved_within(within_s):
                return True
    return False
