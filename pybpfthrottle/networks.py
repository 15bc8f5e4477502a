"""Which addresses a limit is for: the kinds of traffic, and networks by CIDR."""

from __future__ import annotations

import ipaddress
import struct
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Iterable, Mapping, Union

from pybpfthrottle.errors import LimitError
from pybpfthrottle.linux import netns
from pybpfthrottle.model import TRAFFIC_KINDS, Traffic

Address = Union[IPv4Address, IPv6Address]
Network = Union[IPv4Network, IPv6Network]

# More would take long to put in, one by one.
MOST_NETWORKS = 4000
# Private, shared by carriers (CGNAT), link-local, loopback, multicast and broadcast.
# Source: IANA's registries of special-purpose addresses.
LOCAL = (
    *("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.168.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
    *("::1/128", "fc00::/7", "fe80::/10", "ff00::/8"),
)
_ANYWHERE = ("0.0.0.0/0", "::/0")


def parse(text: str) -> Network:
    """Return a network by CIDR, or of one address; IPv4-mapped ones as IPv4. Raises LimitError."""
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise LimitError(
            f"{text!r} is not a network: give an address, or a network such as 192.0.2.0/24 or"
            " 2001:db8::/32"
        ) from None
    mapped = getattr(found.network_address, "ipv4_mapped", None)
    if mapped is not None and found.prefixlen >= 96:
        return IPv4Network((mapped, found.prefixlen - 96))
    return found


def traffic(
    kind: str = "all", to: Iterable[str] = (), but: Iterable[str] = (), *, loopback: bool = False
) -> Traffic:
    """Return which packets are meant, as model.Traffic has it. Raises LimitError."""
    if kind not in TRAFFIC_KINDS:
        raise LimitError(f"unknown traffic {kind!r}: choose from {', '.join(TRAFFIC_KINDS)}")
    own: list[str] = []
    if kind != "all":
        with suppress(OSError):  # then only what is local everywhere is
            own = netns.own_networks()
    to, but = (tuple(str(parse(text)) for text in texts) for texts in (to, but))
    return Traffic(loopback, kind, to, but, tuple(own))


@lru_cache(maxsize=16)
def decisions(traffic: Traffic) -> Mapping[Network, bool]:
    """Return for networks whether packets to and from them are limited.

    Of several that contain an address the smallest one decides. Empty if all are limited. Raises
    LimitError.
    """
    if traffic.everywhere:
        return {}
    texts = dict.fromkeys(_ANYWHERE, not traffic.to and traffic.kind != "local")
    if traffic.kind != "all":
        texts.update(dict.fromkeys((*LOCAL, *traffic.on_link), traffic.kind == "local"))
    found = {parse(text): limited for text, limited in texts.items()}
    found.update({parse(text): True for text in traffic.to})
    found.update({parse(text): False for text in traffic.but})
    if len(found) > MOST_NETWORKS:
        raise LimitError(f"{len(found)} networks are too many: at most {MOST_NETWORKS}")
    return found


def key(network: Network) -> bytes:
    """Return a network as a struct throttle_network: IPv4 as IPv6 has it mapped."""
    if isinstance(network, IPv4Network):
        packed = b"\0" * 10 + b"\xff\xff" + network.network_address.packed
        return struct.pack("=I16s", 96 + network.prefixlen, packed)
    return struct.pack("=I16s", network.prefixlen, network.network_address.packed)


def limits(traffic: Traffic, address: Address) -> bool:
    """Whether packets to and from an address are limited."""
    found = decisions(traffic)
    around = [one for one in found if one.version == address.version and address in one]
    return found[max(around, key=lambda one: one.prefixlen)] if around else True
