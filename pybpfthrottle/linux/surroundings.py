"""What this machine is connected to, by the kernel's files: power, and the way to the internet."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Iterator, Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple

POWER = "/sys/class/power_supply"
DEVICES = "/sys/class/net"
ROUTES = "/proc/net"

# include/uapi/linux/route.h
_RTF_UP, _RTF_REJECT = 0x0001, 0x0200


def on_battery(power: str = POWER) -> Optional[bool]:
    """Whether this machine runs on a battery; None if the kernel does not tell.

    A machine without batteries does not, nor one whose charger is plugged in.
    """
    try:
        supplies = [os.path.join(power, name) for name in os.listdir(power)]
    except OSError:
        return None
    # A mouse has a battery too.
    own = [supply for supply in supplies if _text(supply, "scope") != "Device"]
    plugs = [_text(one, "online") for one in own if _text(one, "type") in ("Mains", "USB")]
    if "1" in plugs:
        return False
    batteries = [_text(one, "status") for one in own if _text(one, "type") == "Battery"]
    return "Discharging" in batteries or ("0" in plugs and bool(batteries))


class _Route(NamedTuple):
    family: str
    metric: int
    device: str


def default_devices(routes: str = ROUTES, devices: str = DEVICES) -> frozenset[str]:
    """Return the devices that are up and that the best default routes lead through."""
    found = [one for one in _defaults(routes) if _is_up(one.device, devices)]
    return frozenset(
        one.device
        for one in found
        if one.metric == min(other.metric for other in found if other.family == one.family)
    )


def _defaults(routes: str) -> Iterator[_Route]:
    """Yield the default routes of the main tables."""
    for fields in _rows(routes, "route"):
        if len(fields) >= 8 and fields[1] == fields[7] == "00000000" and _usable(fields[3]):
            yield _Route("inet", int(fields[6]), fields[0])
    for fields in _rows(routes, "ipv6_route"):
        if len(fields) >= 10 and fields[:2] == ["0" * 32, "00"] and _usable(fields[8]):
            yield _Route("inet6", int(fields[5], 16), fields[9])


def _usable(flags: str) -> bool:
    return int(flags, 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP


def _rows(routes: str, name: str) -> Iterator[list[str]]:
    with suppress(OSError), open(os.path.join(routes, name)) as file:
        yield from (line.split() for line in file)


def _is_up(device: str, devices: str) -> bool:
    # Tunnels do not know whether they are up.
    return _text(os.path.join(devices, device), "operstate") in ("up", "unknown")


def _text(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
