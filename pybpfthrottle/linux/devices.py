"""Set up the devices of this thread's network namespace: up, with addresses and routes.

All functions raise OSError, and need CAP_NET_ADMIN. Source: include/uapi/linux/rtnetlink.h,
if_link.h, if_addr.h.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Interface, IPv6Interface
from typing import Optional, Union

from pybpfthrottle.linux import netlink

Interface = Union[IPv4Interface, IPv6Interface]

_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 16, 20, 24
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ADDRESS = struct.Struct("=4BI")  # struct ifaddrmsg
_ROUTE = struct.Struct("=8BI")  # struct rtmsg
_IFF_UP = 1
_NO_LINK_LOCAL = "1"  # IN6_ADDR_GEN_MODE_NONE
_IFLA_TXQLEN = 13
_IFA_ADDRESS, _IFA_LOCAL, _IFA_F_NODAD = 1, 2, 2
_RTA_OIF = 4
_MAIN_TABLE, _STATIC, _ON_LINK, _UNICAST = 254, 4, 253, 1
_NUMBER = struct.Struct("=I")
_DEVICES, _SEND_DROPS = "/proc/thread-self/net/dev", 11  # net/core/net-procfs.c


def keep_quiet(name: str) -> None:
    """Have a device that is down say nothing by itself once it is up."""
    with suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{name}/addr_gen_mode", "w") as file:
        file.write(_NO_LINK_LOCAL)


def set_up(name: str, *, queue: Optional[int] = None) -> None:
    """Set a device up, with room for so many packets that wait to be sent."""
    body = _LINK.pack(0, 0, socket.if_nametoindex(name), _IFF_UP, _IFF_UP)
    if queue is not None:
        body += netlink.attribute(_IFLA_TXQLEN, _NUMBER.pack(queue))
    netlink.change(_RTM_NEWLINK, body)


def unsent(name: str) -> int:
    """Return how many packets were to be sent by a device, and found no room in its queue."""
    with open(_DEVICES) as file:
        for line in file:
            shown, _, counts = line.partition(":")
            if shown.strip() == name:
                return int(counts.split()[_SEND_DROPS])
    return 0


def add_address(name: str, interface: Interface) -> None:
    """Give a device an address, and the route to its network."""
    family = _family(interface)
    flags = _IFA_F_NODAD if family == socket.AF_INET6 else 0
    body = _ADDRESS.pack(family, interface.network.prefixlen, flags, 0, socket.if_nametoindex(name))
    for kind in (_IFA_LOCAL, _IFA_ADDRESS):
        body += netlink.attribute(kind, interface.ip.packed)
    netlink.change(_RTM_NEWADDR, body, creates=True)


def add_default_route(name: str, interface: Interface) -> None:
    """Have all that is of an address's kind leave by a device, which has no neighbours."""
    body = _ROUTE.pack(_family(interface), 0, 0, 0, _MAIN_TABLE, _STATIC, _ON_LINK, _UNICAST, 0)
    body += netlink.attribute(_RTA_OIF, _NUMBER.pack(socket.if_nametoindex(name)))
    netlink.change(_RTM_NEWROUTE, body, creates=True)


def _family(interface: Interface) -> int:
    return socket.AF_INET if interface.version == 4 else socket.AF_INET6
