"""What NetworkManager knows of the networks that this machine is connected to, over D-Bus.

Source: NetworkManager's D-Bus reference; NMMetered of nm-dbus-interface.h.
"""

from __future__ import annotations

from typing import Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux.dbus import Bus

_SERVICE = "org.freedesktop.NetworkManager"
_TOP = "/org/freedesktop/NetworkManager"
# Also what it guesses, such as for a telephone's hotspot.
_METERED = {1: True, 2: False, 3: True, 4: False}


class Networks(NamedTuple):
    """The names of active connections and of their wireless networks; whether data costs money.

    ``metered`` is None where that is not known, such as without a connection.
    """

    names: frozenset[str]
    metered: Optional[bool]


def networks() -> Networks:
    """Ask NetworkManager. Raises OSError if it does not run, or does not answer."""
    names = set()
    with Bus() as bus:
        metered = _METERED.get(bus.property(_SERVICE, _TOP, _SERVICE, "Metered"))
        for path in bus.property(_SERVICE, _TOP, _SERVICE, "ActiveConnections"):
            active = f"{_SERVICE}.Connection.Active"
            names.add(str(bus.property(_SERVICE, path, active, "Id")))
            point = str(bus.property(_SERVICE, path, active, "SpecificObject"))
            if point.startswith(f"{_TOP}/AccessPoint/"):
                name = bus.property(_SERVICE, point, f"{_SERVICE}.AccessPoint", "Ssid")
                names.add(bytes(name).decode(errors="replace"))
    return Networks(frozenset(names), metered)
