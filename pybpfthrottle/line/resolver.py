"""Which name servers a command asks that has a network namespace of its own.

One that listens on this machine's loopback device cannot be reached from there.
"""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from typing import NamedTuple, Optional

from pybpfthrottle.linux import libc

_USUAL = "/etc/resolv.conf"
# The servers that systemd-resolved asks itself.
_UPSTREAM = "/run/systemd/resolve/resolv.conf"
_CLONE_NEWNS = 0x00020000


class Resolver(NamedTuple):
    """``instead`` is a file in place of resolv.conf, if it needs one; ``note`` is for people."""

    instead: Optional[str] = None
    note: str = ""

    def enter(self) -> None:
        """Have this process read the other file, in a mount namespace of its own.

        Raises OSError.
        """
        if self.instead is None:
            return
        libc.unshare(_CLONE_NEWNS)
        libc.keep_mounts_here()
        libc.bind(self.instead, os.path.realpath(_USUAL))


def choose(usual: str = _USUAL, upstream: str = _UPSTREAM) -> Resolver:
    """Return what a command in a network namespace of its own has to ask."""
    if not is_local(usual):
        return Resolver()
    if not is_local(upstream):
        return Resolver(upstream)
    return Resolver(
        note=f"names may not be found: {usual} has only name servers on this machine's loopback"
        " device, which the command does not reach"
    )


def is_local(path: str) -> bool:
    """Whether a file has no name server but such of the loopback device."""
    servers = []
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            kind, _, rest = line.strip().partition(" ")
            with suppress(ValueError, IndexError):
                if kind == "nameserver":
                    servers.append(ipaddress.ip_address(rest.split()[0].partition("%")[0]))
    return all(server.is_loopback for server in servers)
