"""Who carries the data of processes without connections of their own: limiting these is useless.

Examples: rsync and git over ssh, a client of a local proxy, a virtual machine with a tap device.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from contextlib import suppress
from typing import Iterator, Mapping, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import endpoints, netns, process, tables
from pybpfthrottle.linux.endpoints import Description, Endpoint

_PIPE, _SOCKET = "pipe", "socket"
_LINK = re.compile(r"(pipe|socket):\[(\d+)\]")


class _Open(NamedTuple):
    """What a process has open: pipes and sockets by inode, and devices that take packets."""

    pipes: frozenset[int]
    sockets: frozenset[int]
    devices: tuple[str, ...]


class Carriers(NamedTuple):
    """Who carries what processes send and receive.

    ``devices`` are tun and tap devices, by the process that uses one and has no connection beside.
    ``leaves`` tells whether a socket of the processes may send to other machines; if none does, the
    others are processes that have the other ends ``over_loopback``, and those that have a
    connection and talk to them ``over_pipes`` or Unix sockets.
    """

    devices: Mapping[int, tuple[str, ...]]
    leaves: bool
    over_loopback: tuple[int, ...] = ()
    over_pipes: tuple[int, ...] = ()


def find(pids: Sequence[int]) -> Carriers:
    """Return who carries the data of some processes."""
    opened = {pid: _open_of(pid) for pid in pids}
    tables = _Tables()
    devices = {
        pid: own.devices
        for pid, own in opened.items()
        if own.devices and not any(map(tables.at(pid).sends, own.sockets))
    }
    if any(tables.at(pid).leaves(inode) for pid, own in opened.items() for inode in own.sockets):
        return Carriers(devices, leaves=True)
    return Carriers(devices, False, *_carried(opened, tables))


def other_ends(inodes: Mapping[int, int]) -> tuple[int, ...]:
    """Return the processes at the other ends of connections within this machine.

    ``inodes`` has a process that has each of the sockets open, by the socket's inode.
    """
    tables = _Tables()
    peers = {peer for inode, pid in inodes.items() for peer in tables.at(pid).peers(inode)}
    if not peers:
        return ()
    return tuple(pid for pid in process.running() if _open_of(pid).sockets & peers)


def notes(pids: Sequence[int], *, loopback: bool) -> Iterator[str]:
    """Yield who has the connection, if none of these processes has one that leaves the machine.

    ``loopback``: traffic over the loopback device is limited too.
    """
    found = find(pids)
    for pid, devices in found.devices.items():
        yield (
            f"{process.listed([pid])} uses the device {', '.join(devices)}. Packets that"
            " pass through it belong to no socket, and are not limited. Limit the device"
            " itself, for example with tc"
        )
    who = process.listed(pids)
    if found.over_loopback and not loopback:
        yield (
            f"all connections of {who} go over the loopback device (limited only with --loopback)"
            f" to {process.listed(found.over_loopback)}: {_instead(found.over_loopback)}"
        )
    if found.over_pipes:
        yield (
            f"{who} has no connection that leaves the machine. {process.listed(found.over_pipes)}"
            f" has one, and talks to it over a pipe or a Unix socket: {_instead(found.over_pipes)}"
        )


def _carried(
    opened: Mapping[int, _Open], tables: _Tables
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the processes at the other ends, over loopback, and over pipes and Unix sockets."""
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
    over_loopback, over_pipes = [], []
    for pid in process.running() if local or pipes or unix else ():
        if pid in opened or pid == os.getpid():
            continue
        own = _open_of(pid)
        if own.sockets & local:
            over_loopback.append(pid)
        elif (own.pipes & pipes or own.sockets & unix) and any(
            map(tables.at(pid).is_connected, own.sockets)
        ):
            over_pipes.append(pid)
    return tuple(over_loopback), tuple(over_pipes)


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
    found = tables.lines(f"/proc/{pid}/fdinfo/{descriptor}")
    lines = [line.split() for line in found if line.startswith("iff:")]
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
        # There may be thousands of connections, so the other end is looked up.
        self._by_ends = {
            (_plain(one.local), _plain(one.remote)): inode
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
        if one is None or not one.kind.is_ip() or one.remote is None or one.local is None:
            return []
        peer = self._by_ends.get((_plain(one.remote), _plain(one.local)))
        return [] if peer is None else [peer]

    def _is_local(self, one: Description) -> bool:
        end = one.remote or one.local
        if end is None or end.is_loopback():  # not bound, or does not leave
            return True
        return one.remote is not None and str(one.remote.ip()) in self._addresses


def _plain(end: Endpoint) -> tuple[str, Optional[int]]:
    """Return an end with the address as IPv4 if it is IPv4-mapped IPv6."""
    return str(end.ip()), end.port


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
