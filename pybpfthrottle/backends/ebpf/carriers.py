"""Who carries the data of processes without connections of their own: limiting these is useless.

Examples: rsync and git over ssh, a client of a local proxy, a virtual machine with a tap device.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from contextlib import suppress
from typing import Iterator, Mapping, NamedTuple, Sequence

from pybpfthrottle.linux import endpoints, netns, process
from pybpfthrottle.linux.endpoints import Description

_PIPE, _SOCKET = "pipe", "socket"
_LINK = re.compile(r"(pipe|socket):\[(\d+)\]")


class _Open(NamedTuple):
    """What a process has open: pipes and sockets by inode, and devices that take packets."""

    pipes: frozenset[int]
    sockets: frozenset[int]
    devices: tuple[str, ...]


def notes(pids: Sequence[int], *, loopback: bool) -> Iterator[str]:
    """Yield who has the connection, if none of these processes has one that leaves the machine.

    ``loopback``: traffic over the loopback device is limited too.
    """
    opened = {pid: _open_of(pid) for pid in pids}
    tables = _Tables()
    for pid, own in opened.items():
        if own.devices and not any(map(tables.at(pid).sends, own.sockets)):
            yield (
                f"{process.listed([pid])} uses the device {', '.join(own.devices)}. Packets that"
                " pass through it belong to no socket, and are not limited. Limit the device"
                " itself, for example with tc"
            )
    if not any(
        tables.at(pid).leaves(inode) for pid, own in opened.items() for inode in own.sockets
    ):
        yield from _carried(opened, tables, loopback)


def _carried(opened: Mapping[int, _Open], tables: _Tables, loopback: bool) -> Iterator[str]:
    local = {
        peer
        for pid, own in opened.items()
        for inode in own.sockets
        for peer in tables.at(pid).peers(inode)
    }
    pipes = {inode for own in opened.values() for inode in own.pipes}
    unix = {
        peer
        for pid, own in opened.items()
        for inode, peer in tables.at(pid).unix_peers.items()
        if inode in own.sockets
    }
    if not (local or pipes or unix):
        return
    who = process.listed(list(opened))
    over_loopback, over_pipes = [], []
    for pid in process.running():
        if pid in opened or pid == os.getpid():
            continue
        own = _open_of(pid)
        if own.sockets & local:
            over_loopback.append(pid)
        elif (own.pipes & pipes or own.sockets & unix) and any(
            map(tables.at(pid).is_connected, own.sockets)
        ):
            over_pipes.append(pid)
    if over_loopback and not loopback:
        yield (
            f"all connections of {who} go over the loopback device (limited only with --loopback)"
            f" to {process.listed(over_loopback)}: {_instead(over_loopback)}"
        )
    if over_pipes:
        yield (
            f"{who} has no connection that leaves the machine. {process.listed(over_pipes)} has"
            f" one, and talks to it over a pipe or a Unix socket: {_instead(over_pipes)}"
        )


def _instead(pids: Sequence[int]) -> str:
    return f"to limit that, give {' '.join(f'--pid {pid}' for pid in pids)}"


def _open_of(pid: int) -> _Open:
    found: dict[str, set[int]] = defaultdict(set)
    devices = []
    directory = f"/proc/{pid}/fd"
    with suppress(OSError):  # it has ended, or may not be inspected
        for name in os.listdir(directory):
            with suppress(OSError):
                target = os.readlink(f"{directory}/{name}")
                if match := _LINK.fullmatch(target):
                    found[match[1]].add(int(match[2]))
                elif target == "/dev/net/tun":
                    devices += _interface(pid, name)
                elif re.fullmatch(r"/dev/tap\d+", target):
                    devices.append(target)
    return _Open(frozenset(found[_PIPE]), frozenset(found[_SOCKET]), tuple(dict.fromkeys(devices)))


def _interface(pid: int, descriptor: str) -> list[str]:
    """Return the name of a tun or tap device, if the descriptor has one."""
    with open(f"/proc/{pid}/fdinfo/{descriptor}", errors="replace") as file:
        lines = [line.split() for line in file if line.startswith("iff:")]
    return [words[1] for words in lines if len(words) > 1]


class _Table:
    """The sockets of a network namespace, as /proc/PID/net lists them."""

    def __init__(self, pid: int) -> None:
        self._found = endpoints.listed_in_proc(pid)
        self._addresses: set[str] = set()
        # A Unix socket may have been inherited from another namespace, most often from ours.
        self.unix_peers: dict[int, int] = {}
        with suppress(OSError):
            self.unix_peers.update(netns.unix_peers())
            namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._addresses = netns.inside(namespace, netns.own_addresses)
                self.unix_peers.update(netns.inside(namespace, netns.unix_peers))
            finally:
                os.close(namespace)
        self._by_ends = {
            (one.local, one.remote): inode
            for inode, one in self._found.items()
            if one.local and one.remote and one.kind.is_ip()
        }

    def leaves(self, inode: int) -> bool:
        """Whether an inode is an IP socket whose packets leave the machine, or may."""
        one = self._found.get(inode)
        return one is not None and one.kind.is_ip() and not self._is_local(one)

    def sends(self, inode: int) -> bool:
        """The same, except for listeners, which do not send themselves."""
        return self.leaves(inode) and self._found[inode].state != "listen"

    def is_connected(self, inode: int) -> bool:
        """Whether an inode is a connection that leaves the machine."""
        return self.leaves(inode) and self._found[inode].remote is not None

    def peers(self, inode: int) -> list[int]:
        """Return the other end of a connection that does not leave the machine."""
        one = self._found.get(inode)
        if one is None or not one.kind.is_ip() or one.remote is None:
            return []
        ends = [
            peer
            for (local, remote), peer in self._by_ends.items()
            if _same(local, one.remote) and _same(remote, one.local)
        ]
        return ends[:1]

    def _is_local(self, one: Description) -> bool:
        end = one.remote or one.local
        if end is None or end.is_loopback():  # not bound, or does not leave
            return True
        return one.remote is not None and str(one.remote.ip()) in self._addresses


def _same(one: object, other: object) -> bool:
    """Whether two ends are the same; one may be an IPv4-mapped IPv6 address."""
    if isinstance(one, endpoints.Endpoint) and isinstance(other, endpoints.Endpoint):
        return one.port == other.port and one.ip() == other.ip()
    return False


class _Tables:
    """The socket tables of processes' network namespaces, read on demand."""

    def __init__(self) -> None:
        self._found: dict[int, _Table] = {}

    def at(self, pid: int) -> _Table:
        """Return the table of a process."""
        try:
            namespace = os.stat(f"/proc/{pid}/ns/net").st_ino
        except OSError:  # it has ended
            namespace = 0
        if namespace not in self._found:
            self._found[namespace] = _Table(pid)
        return self._found[namespace]
