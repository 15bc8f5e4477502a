"""The login session of this process: what serves its terminal, and the sockets it needs.

A session may have left the processes that started it, as in tmux and screen: then its terminal
leads to the processes that display it.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from typing import Iterable, Iterator

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import netns, process
from pybpfthrottle.linux.sockets import descriptors

_FIRST = 1  # the init system, which holds the sockets of all services
_ESTABLISHED, _LISTEN = 1, 10  # include/net/tcp_states.h
_KINDS = [
    (family, protocol)
    for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    for family in (socket.AF_INET, socket.AF_INET6)
]
_SLAVE = re.compile(r"/dev/pts/(\d+)")
# Documentation/admin-guide/devices.txt: the slaves of pseudo terminals.
_SLAVE_MAJORS = range(136, 144)
_VARIABLE = b"SSH_CONNECTION="  # man 1 ssh: address and port of the client, and of the server


class Carrier(NamedTuple):
    """A socket that a login may need: of which process, and the id of its cgroup.

    ``is_open`` is False where a process only has it as its SSH_CONNECTION.
    """

    pid: int
    cgroup_id: int
    is_open: bool


def processes() -> list[int]:
    """Return this process, whatever serves its terminals, and the ancestors of all these.

    tmux and screen have the terminals open that display them; sshd has the terminals' other ends.
    """
    found: dict[int, None] = {}
    pending = list(process.ancestors(os.getpid()))
    served_by: dict[int, list[int]] = {}
    while pending:
        pid = pending.pop(0)
        if pid not in found:
            found[pid] = None
            terminals = set(_terminals(pid))
            served_by = served_by or (_servers() if terminals else {})
            for number in terminals:
                for server in served_by.get(number, ()):
                    pending += process.ancestors(server)
    return list(found)


def carriers(pids: Iterable[int]) -> list[Carrier]:
    """Return the IP sockets that these processes have open, and those of their SSH_CONNECTION.

    That variable may stem from a login that has ended; then its connection is gone.

    Empty before Linux 5.8, and if the kernel does not say.
    """
    found: list[Carrier] = []
    listed: dict[int, list[netns.Listed]] = {}
    for pid in pids:
        if pid == _FIRST:
            continue
        with suppress(OSError):
            sockets = _listed(pid, listed)
            inodes = {one.inode for one in descriptors(pid)}
            ends = _connection(pid)
            found += [
                Carrier(pid, one.cgroup_id, one.inode in inodes)
                for one in sockets
                if (one.inode in inodes and one.state != _LISTEN)
                or (one.ends == ends and one.state == _ESTABLISHED)
            ]
    return found


def _terminals(pid: int) -> Iterator[int]:
    """Yield the numbers of a process's pseudo terminals: the controlling one, and open ones."""
    device = process.terminal_of(pid)
    if os.major(device) in _SLAVE_MAJORS:
        yield os.minor(device)
    for _, path in _open_files(pid):
        match = _SLAVE.fullmatch(path)
        if match:
            yield int(match[1])


def _servers() -> dict[int, list[int]]:
    """Return the processes that have the other end of each pseudo terminal open. Linux 4.14."""
    found: dict[int, list[int]] = {}
    for pid in process.running():
        for number, path in _open_files(pid):
            if path.endswith("/ptmx"):
                with suppress(OSError), open(f"/proc/{pid}/fdinfo/{number}") as file:
                    match = re.search(r"^tty-index:\s*(\d+)$", file.read(), re.MULTILINE)
                    if match:
                        found.setdefault(int(match[1]), []).append(pid)
    return found


def _open_files(pid: int) -> Iterator[tuple[str, str]]:
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                yield number, os.readlink(f"/proc/{pid}/fd/{number}")


def _listed(pid: int, known: dict[int, list[netns.Listed]]) -> list[netns.Listed]:
    """Return the sockets of a process's network namespace; each namespace is queried once."""
    path = f"/proc/{pid}/ns/net"
    namespace = os.stat(path).st_ino
    if namespace not in known:
        known[namespace] = []
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            known[namespace] = netns.inside(descriptor, lambda: list(netns.listed(_KINDS)))
        finally:
            os.close(descriptor)
    return known[namespace]


def _connection(pid: int) -> tuple[tuple[str, int], ...]:
    """Return both ends of a process's SSH_CONNECTION, the server's first."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/environ", "rb") as file:
        for one in file.read().split(b"\0"):
            if one.startswith(_VARIABLE):
                there, its_port, here, port = os.fsdecode(one[len(_VARIABLE) :]).split()
                return (_plain(here), int(port)), (_plain(there), int(its_port))
    return ()


def _plain(text: str) -> str:
    """Return an address, as IPv4 if it is IPv4-mapped IPv6."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)
