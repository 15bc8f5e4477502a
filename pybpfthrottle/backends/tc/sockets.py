"""The flows of a target's sockets, as filters at an ingress hook can tell them apart."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Iterable, Iterator, NamedTuple

from pybpfthrottle.backends.protocol import Order
from pybpfthrottle.backends.tc.ingress import IPV4, IPV6
from pybpfthrottle.linux import netns, process, sockets
from pybpfthrottle.linux.netns import Listed

_PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Flow(NamedTuple):
    """Packets that come to a local port; "" and 0 stand for any address and remote port."""

    version: int
    protocol: int
    local: str
    local_port: int
    remote: str = ""
    remote_port: int = 0

    @property
    def match(self) -> str:
        """What matches its packets, in the language of u32. Headers have no options."""
        kind, length = ("ip", 32) if self.version == IPV4 else ("ip6", 128)
        parts = [f"{kind} protocol {self.protocol} 0xff", f"{kind} dport {self.local_port} 0xffff"]
        if self.local:
            parts.append(f"{kind} dst {self.local}/{length}")
        if self.remote:
            parts.append(f"{kind} src {self.remote}/{length}")
            parts.append(f"{kind} sport {self.remote_port} 0xffff")
        return " ".join(f"match {part}" for part in parts)


def limited_processes(order: Order) -> list[int]:
    """Return the selected processes that run now, with their descendants if those are meant."""
    selection = order.processes
    if selection is None:
        return []
    found = {one.pid for one in selection.processes if one.alive()}
    found.update(selection.matching())
    if selection.children and found:
        families = process.families()
        waiting = list(found)
        while waiting:
            children = set(families.get(waiting.pop(), ())) - found
            found |= children
            waiting += children
    return sorted(found)


def flows(order: Order, namespace: int) -> set[Flow]:
    """Return the flows of an order's sockets in a network namespace, given by descriptor or -1.

    They are the sockets that were created in its cgroups, and those that processes in them, or the
    selected processes, have open. Raises OSError.
    """
    pids = limited_processes(order)
    cgroup_ids: set[int] = set()
    for cgroup in order.cgroups:
        with suppress(OSError):
            cgroup_ids |= cgroup.ids_below()
            pids += cgroup.pids_below()
    inodes = sockets.places(pids).keys()

    def listed() -> list[tuple[int, Listed]]:
        return [
            (protocol, one)
            for protocol in _PROTOCOLS
            for one in netns.listed((family, protocol) for family in _FAMILIES)
            if one.inode in inodes or one.cgroup_id in cgroup_ids
        ]

    found = listed() if namespace < 0 else netns.inside(namespace, listed)
    return distinct(flow for protocol, one in found for flow in flows_of(protocol, one))


def flows_of(protocol: int, listed: Listed) -> Iterator[Flow]:
    """Return the flows of one socket: a dual-stack socket has one of each version."""
    (local, local_port), (remote, remote_port) = listed.ends
    if not local_port:
        return
    if remote_port:
        yield Flow(
            ipaddress.ip_address(remote).version, protocol, local, local_port, remote, remote_port
        )
    elif ipaddress.ip_address(local).is_unspecified:
        # A socket for IPv6 may accept IPv4 as well; the other way round it may not.
        for version in (IPV4, IPV6) if ":" in local else (IPV4,):
            yield Flow(version, protocol, "", local_port)
    else:
        yield Flow(ipaddress.ip_address(local).version, protocol, local, local_port)


def distinct(given: Iterable[Flow]) -> set[Flow]:
    """Return flows without those that others include, such as accepted connections."""
    found = set(given)
    return {
        flow
        for flow in found
        if not flow.remote
        or not found
        & {flow._replace(remote="", remote_port=0, local=one) for one in (flow.local, "")}
    }
