"""What a socket is: its family, type and protocol, its addresses, its state."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from contextlib import suppress
from typing import Any, Callable, Optional, TypeVar

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import tables

T = TypeVar("T")

# include/uapi/asm-generic/socket.h (which all machines use that support bpf(2))
_SO_TYPE, _SO_PROTOCOL, _SO_DOMAIN = 3, 38, 39
IPPROTO_MPTCP = 262

# include/linux/socket.h; some Python versions lack some of them.
_FAMILIES = {
    1: "unix", 2: "inet", 10: "inet6", 15: "key", 16: "netlink", 17: "packet", 21: "rds",
    29: "can", 30: "tipc", 31: "bluetooth", 38: "alg", 39: "nfc", 40: "vsock", 43: "smc",
    44: "xdp", 45: "mctp",
}  # fmt: skip
_TYPES = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp", 10: "packet"}
_PROTOCOLS = {
    1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "icmpv6", 132: "sctp", 136: "udplite",
    255: "raw", IPPROTO_MPTCP: "mptcp",
}  # fmt: skip
# include/net/tcp_states.h
_STATES = (
    "", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close",
    "close-wait", "last-ack", "listen", "closing", "syn-recv",
)  # fmt: skip

IP_FAMILIES = ("inet", "inet6")
# Their packets bypass the cgroup hooks.
PACKET_FAMILIES = ("packet", "xdp")


class Endpoint(NamedTuple):
    """An address: IP with a port (0: none), or a path or other name without a port (None)."""

    address: str
    port: Optional[int] = None

    def __str__(self) -> str:
        if self.port is None:
            return self.address
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port or '*'}"

    def is_loopback(self) -> bool:
        """Whether this is an IP address of the loopback device."""
        address = self.ip()
        return address is not None and address.is_loopback

    def ip(self) -> Any:
        """The IP address (as IPv4 if it is IPv4-mapped); None for other families."""
        if self.port is None:
            return None
        address = ipaddress.ip_address(self.address.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address


class Kind(NamedTuple):
    """What a socket is, in the kernel's numbers. None: unknown."""

    family: Optional[int] = None
    type: Optional[int] = None
    protocol: Optional[int] = None

    @property
    def family_name(self) -> str:
        """As ``inet6``."""
        return _name(_FAMILIES, self.family)

    @property
    def type_name(self) -> str:
        """As ``stream``."""
        return _name(_TYPES, self.type)

    @property
    def protocol_name(self) -> Optional[str]:
        """As ``tcp``; None if the family has no protocols, or only one."""
        if self.family_name not in IP_FAMILIES:
            return None
        return _name(_PROTOCOLS, self.protocol)

    @property
    def words(self) -> str:
        """As ``tcp6``, ``udp`` or ``unix stream``."""
        if self.protocol_name is None:
            return (
                f"{self.family_name} {self.type_name}"
                if self.type is not None
                else self.family_name
            )
        return f"{self.protocol_name}{'6' if self.family_name == 'inet6' else ''}"

    def is_ip(self) -> bool:
        """Whether the socket carries IP packets."""
        return self.family_name in IP_FAMILIES

    def is_mptcp(self) -> bool:
        """Whether other sockets, opened by the kernel, carry its data."""
        return self.is_ip() and self.protocol == IPPROTO_MPTCP


class Description(NamedTuple):
    """What one socket is. ``state`` is its TCP state."""

    kind: Kind
    local: Optional[Endpoint] = None
    remote: Optional[Endpoint] = None
    state: Optional[str] = None


def describe(descriptor: int) -> Description:
    """Describe the socket behind a descriptor of this process. Raises OSError if it is no socket.

    Works for sockets of other network namespaces too.
    """
    # The family is not known yet, and reading options does not need it.
    kind = _with_socket(descriptor, Kind(socket.AF_UNIX, socket.SOCK_STREAM, 0), _kind)
    return _with_socket(descriptor, kind, lambda own: _description(own, kind))


def _with_socket(descriptor: int, kind: Kind, ask: Callable[[socket.socket], T]) -> T:
    own = socket.socket(kind.family or 0, kind.type or 0, kind.protocol or 0, fileno=descriptor)
    try:
        return ask(own)
    finally:
        own.detach()


def _kind(own: socket.socket) -> Kind:
    return Kind(
        own.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN),
        own.getsockopt(socket.SOL_SOCKET, _SO_TYPE),
        own.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL),
    )


def _description(own: socket.socket, kind: Kind) -> Description:
    state = None
    if kind.is_ip() and kind.type == socket.SOCK_STREAM:
        with suppress(OSError):  # SCTP has none
            first = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            state = _state(first)
    local, remote = (_endpoint(ask, kind) for ask in (own.getsockname, own.getpeername))
    return Description(kind, local, remote, state)


def _endpoint(ask: Callable[[], Any], kind: Kind) -> Optional[Endpoint]:
    try:
        found = ask()
    except OSError as error:
        # Not connected, not supported by this family, or closed by the peer meanwhile.
        if error.errno in (errno.ENOTSOCK, errno.EBADF):
            raise
        return None
    if kind.is_ip():
        host, port, *more = found
        scope = f"%{more[1]}" if more and more[1] and "%" not in host else ""
        # For raw sockets this is the protocol.
        return _ip_endpoint(host + scope, 0 if kind.type == socket.SOCK_RAW else port)
    name = _NAMES.get(kind.family_name, lambda _: "")(found)
    return Endpoint(name) if name else None


def _ip_endpoint(address: str, port: int) -> Optional[Endpoint]:
    """Return an endpoint; None if the socket is not bound."""
    found = Endpoint(address, port)
    return None if not port and found.ip().is_unspecified else found


def _unix_name(found: Any) -> str:
    if isinstance(found, bytes):  # an abstract name begins with a zero byte
        return "@" + found[1:].decode("utf-8", "replace") if found else ""
    return str(found)


# Python's address formats: https://docs.python.org/3/library/socket.html
_NAMES: dict[str, Callable[[Any], str]] = {
    "unix": _unix_name,
    "netlink": lambda found: str(found[0]) if found[0] else "",
    "packet": lambda found: str(found[0]),
    "vsock": lambda found: f"{found[0]}:{found[1]}",
}


def _state(number: int) -> Optional[str]:
    return _STATES[number] if 0 < number < len(_STATES) else None


def _name(names: dict[int, str], number: Optional[int]) -> str:
    if number is None:
        return "?"
    return names.get(number, str(number))


_TABLES = {
    "tcp": Kind(2, 1, 6),
    "tcp6": Kind(10, 1, 6),
    "udp": Kind(2, 2, 17),
    "udp6": Kind(10, 2, 17),
    "udplite": Kind(2, 2, 136),
    "udplite6": Kind(10, 2, 136),
    "icmp": Kind(2, 2, 1),
    "icmp6": Kind(10, 2, 58),
    "raw": Kind(2, 3, 255),
    "raw6": Kind(10, 3, 255),
}
# The family of each table, and the column of the inode.
_OTHER_TABLES = {"unix": (1, 6), "netlink": (16, -1), "packet": (17, -1)}


def listed_in_proc(pid: int) -> dict[int, Description]:
    """Return the sockets in /proc/PID/net of a process's network namespace, by inode.

    For sockets that cannot be borrowed. Those neither bound nor connected are not listed.
    """
    found: dict[int, Description] = {}
    for table, kind in _TABLES.items():
        for line in _lines(pid, table):
            fields = line.split()
            local, remote = (_from_hex(field) for field in fields[1:3])
            state = _state(int(fields[3], 16)) if kind.protocol == 6 else None
            found[int(fields[9])] = Description(kind, local, remote, state)
    for table, (family, column) in _OTHER_TABLES.items():
        for line in _lines(pid, table):
            # A Unix socket's name may look like more lines: what is known of others stays.
            with suppress(IndexError, ValueError):
                found.setdefault(int(line.split()[column]), Description(Kind(family)))
    return found


def _lines(pid: int, table: str) -> list[str]:
    try:
        return tables.lines(f"/proc/{pid}/net/{table}")[1:]
    except OSError:  # the kernel lacks the protocol
        return []


def _from_hex(text: str) -> Optional[Endpoint]:
    """Parse an address of these tables: 32-bit numbers in the machine's byte order."""
    address, _, port = text.partition(":")
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    ip = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return _ip_endpoint(str(ip), int(port, 16))
