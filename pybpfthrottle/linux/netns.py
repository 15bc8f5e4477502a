"""The sockets and addresses of a network namespace, this process's or another's."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Interface, IPv6Interface
from typing import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    TypeVar,
    Union,
)

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import cgroup, libc, netlink, process
from pybpfthrottle.linux.sockets import TcpInfo

T = TypeVar("T")

_SIOCGSKNS = 0x894C  # include/uapi/linux/sockios.h
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_CLONE_NEWNET = 0x40000000

# include/uapi/linux/sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBxI48s")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=4B48s5I")  # struct inet_diag_msg
_PORTS, _PORTS_OFFSET = struct.Struct("!HH"), 4  # struct inet_diag_sockid, then 16 bytes each
_COOKIE, _COOKIE_OFFSET = struct.Struct("=Q"), 44
_ALL_STATES = 0xFFFFFFFF
# include/net/tcp_states.h: those of connections that may carry data.
_CONNECTED = sum(1 << state for state in (1, 4, 5, 8, 9, 11))
# Those that were closed, and whose last data is not acknowledged.
_ENDING = sum(1 << state for state in (4, 9, 11))
_INET_DIAG_INFO = 2
_INET_DIAG_REQ_PROTOCOL = 3
_INET_DIAG_CGROUP_ID = 21

# include/uapi/linux/unix_diag.h
_UNIX_REQUEST = struct.Struct("=BBxxIII8s")  # struct unix_diag_req
_UNIX_ANSWER = struct.Struct("=BBBxI8s")  # struct unix_diag_msg
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2

# include/uapi/linux/rtnetlink.h, if_addr.h
_RTM_GETADDR = 22
_IFADDRMSG = struct.Struct("=4BI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2

# include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_NETLINK_NETFILTER = 12
_CONNTRACK_GET = 1 << 8 | 1
_NFGENMSG = struct.Struct("=BBH")
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CONNTRACK_COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"


class Ends(NamedTuple):
    """Where packets come from and go to: addresses as ``ipaddress`` spells them, and ports."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


def of_socket(descriptor: int) -> int:
    """Return a descriptor of a socket's network namespace; the caller closes it.

    Linux 4.10; needs CAP_NET_ADMIN there. Raises OSError.
    """
    return fcntl.ioctl(descriptor, _SIOCGSKNS)


def number(pid: Optional[int] = None) -> int:
    """Return the number of a process's network namespace, or of this one's. Raises OSError."""
    return os.stat(_of("self" if pid is None else pid)).st_ino


class Place(NamedTuple):
    """A network namespace: its number, and its cookie; 0 if that is not known."""

    number: int
    cookie: int = 0


class Interfaces(NamedTuple):
    """The interfaces of a network namespace: names by index. ``cookie`` is 0 before Linux 5.14."""

    cookie: int
    names: dict[int, str]


def interfaces(pid: Optional[int] = None) -> Interfaces:
    """Return the interfaces in a process's network namespace, or in this one. Raises OSError.

    Needs CAP_SYS_ADMIN for another namespace than this process's own.
    """
    fd = os.open(_of("self" if pid is None else pid), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return inside(fd, _own_interfaces)
    finally:
        os.close(fd)


def _own_interfaces() -> Interfaces:
    return Interfaces(own_cookie(), dict(socket.if_nameindex()))


def own_cookie() -> int:
    """Return the cookie of this thread's network namespace, which no other ever has.

    0 before Linux 5.14.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        return int(struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])
    return 0


def cookie(wanted: int) -> int:
    """Return the cookie of the network namespace with a number, 0 if it is gone or not told."""
    fd = open_by_number(wanted)
    if fd is None:
        return 0
    try:
        return _cookie_of(fd)
    finally:
        os.close(fd)


def _cookie_of(fd: int) -> int:
    with suppress(OSError):  # who may not enter it does not know
        return inside(fd, own_cookie)
    return 0


def open_by_number(wanted: int, cookie: int = 0) -> Optional[int]:
    """Return a descriptor of the network namespace with a number; the caller closes it.

    None if no visible process is in it, and it is not mounted here (ip netns): then it is gone, as
    far as this process can see. The kernel gives the number of one that has ended to the next one;
    that is not found if it has another ``cookie``.
    """
    for path in _places():
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino != wanted:
                os.close(fd)
            elif cookie and _cookie_of(fd) not in (0, cookie):
                os.close(fd)
                return None
            else:
                return fd
    return None


def exists(wanted: int) -> bool:
    """Whether there is a network namespace with a number, as far as this process can see."""
    fd = open_by_number(wanted)
    if fd is not None:
        os.close(fd)
    return fd is not None


def _places() -> Iterator[str]:
    """Yield the paths by which network namespaces may be reached."""
    yield _of("self")
    yield from map(_of, process.running())
    for mounted in cgroup.mounts():
        if mounted.type == "nsfs" and mounted.root.startswith("net:"):
            yield mounted.path


def _of(process_id: object) -> str:
    return f"/proc/{process_id}/ns/net"


def inside(namespace: int, work: Callable[[], T]) -> T:
    """Return the result of ``work`` in the network namespace behind a descriptor.

    A separate thread enters it, so that the rest of this process stays where it is. Needs
    CAP_SYS_ADMIN, except for this process's own namespace. Raises OSError.
    """

    def enter() -> T:
        libc.setns(namespace, _CLONE_NEWNET)
        return work()

    if os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/net")):
        return work()
    return _in_thread(enter)


def new() -> int:
    """Return a descriptor of a new network namespace, which ends with it.

    Needs CAP_SYS_ADMIN. Raises OSError.
    """

    def unshare() -> int:
        libc.unshare(_CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(unshare)


def _in_thread(work: Callable[[], T]) -> T:
    # Imported late: the import registers an exit handler, which fails while the program is ending.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def unread() -> int:
    """Return how many datagrams found no room in the sockets of this thread's namespace."""
    with open("/proc/thread-self/net/snmp") as file:
        names, counts = (line.split() for line in file if line.startswith("Udp:"))
    found = int(counts[names.index("RcvbufErrors")])
    with suppress(FileNotFoundError), open("/proc/thread-self/net/snmp6") as file:
        found += sum(int(line.split()[1]) for line in file if line.startswith("Udp6RcvbufErrors"))
    return found


class Listed(NamedTuple):
    """A socket that the kernel lists: its inode, its cgroup, and both ends, its own first.

    ``state`` is one of include/net/tcp_states.h.
    """

    inode: int
    cgroup_id: int
    state: int
    ends: tuple[tuple[str, int], ...]


def cgroup_ids(kinds: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the id of the cgroup in which each socket was created, by the socket's inode.

    ``kinds`` has the families and protocols to ask for. Sockets that are neither bound nor
    connected are not listed. Needs Linux 5.8 with CONFIG_SOCK_CGROUP_DATA; empty before that, and
    for protocols that the kernel cannot list. Raises OSError.
    """
    return {one.inode: one.cgroup_id for one in listed(kinds)}


def listed(kinds: Iterable[tuple[int, int]]) -> Iterator[Listed]:
    """Yield the sockets whose cgroups the kernel reports, as for ``cgroup_ids``."""
    for family, protocol in kinds:
        try:
            for answer in _sockets(family, protocol, _ALL_STATES):
                own = netlink.attributes(answer[_ANSWER.size :]).get(_INET_DIAG_CGROUP_ID)
                inode = _inode(answer)
                if own is not None and inode:
                    cgroup_id = struct.unpack("=Q", own)[0]
                    yield Listed(inode, cgroup_id, answer[1], _both_ends(answer))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
                raise


class Connection(NamedTuple):
    """A TCP connection: what identifies it until the next boot, its inode and its cgroup.

    Subflows of Multipath TCP have the inode of their socket. ``cgroup_id`` is None before Linux
    5.8. ``ends`` has both ends, its own first.
    """

    cookie: int
    inode: int
    cgroup_id: Optional[int]
    ends: tuple[tuple[str, int], ...]
    info: TcpInfo


def connections(wanted: Collection[int], cgroup_ids: Collection[int] = ()) -> Iterator[Connection]:
    """Yield the TCP connections with an inode in ``wanted``, or of one of these cgroups.

    Raises OSError: ENOENT if the kernel cannot list them (CONFIG_INET_TCP_DIAG).
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        for answer in _sockets(family, socket.IPPROTO_TCP, _CONNECTED, 1 << _INET_DIAG_INFO - 1):
            inode = _inode(answer)
            # There may be thousands of others.
            if inode not in wanted and not cgroup_ids:
                continue
            more = netlink.attributes(answer[_ANSWER.size :])
            own = more.get(_INET_DIAG_CGROUP_ID)
            cgroup_id = None if own is None else struct.unpack("=Q", own)[0]
            if inode in wanted or cgroup_id in cgroup_ids:
                cookie = _COOKIE.unpack_from(answer, _COOKIE_OFFSET)[0]
                info = TcpInfo.parse(more.get(_INET_DIAG_INFO, b""))
                yield Connection(cookie, inode, cgroup_id, _both_ends(answer), info)


def is_sending() -> bool:
    """Whether connections of TCP in this namespace still send what was left at their end.

    Raises OSError: ENOENT if the kernel cannot list them (CONFIG_INET_TCP_DIAG).
    """
    return any(
        True
        for family in (socket.AF_INET, socket.AF_INET6)
        for _ in _sockets(family, socket.IPPROTO_TCP, _ENDING)
    )


def _sockets(family: int, protocol: int, states: int, more: int = 0) -> Iterator[bytes]:
    """Yield the kernel's answer for each socket; ``more`` has bits of what else to tell."""
    # MPTCP's number does not fit into the one byte for the protocol.
    long = struct.pack("=HHI", 8, _INET_DIAG_REQ_PROTOCOL, protocol) if protocol > 255 else b""
    request = _REQUEST.pack(family, protocol & 0xFF, more, states, bytes(48)) + long
    return netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request)


def _inode(answer: bytes) -> int:
    return int(_ANSWER.unpack_from(answer)[-1])


def _both_ends(answer: bytes) -> tuple[tuple[str, int], ...]:
    """Return the addresses and ports of a socket; IPv4-mapped IPv6 as IPv4."""
    ports = _PORTS.unpack_from(answer, _PORTS_OFFSET)
    size = 4 if answer[0] == socket.AF_INET else 16
    found = []
    for number, port in enumerate(ports):
        begin = _PORTS_OFFSET + _PORTS.size + 16 * number
        address = ipaddress.ip_address(answer[begin : begin + size])
        mapped = getattr(address, "ipv4_mapped", None)
        found.append((str(mapped or address), port))
    return tuple(found)


def unix_peers() -> dict[int, int]:
    """Return the inode of the peer of each connected Unix socket, by the socket's inode.

    Empty if the kernel lacks CONFIG_UNIX_DIAG. Raises OSError.
    """
    found = {}
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, _ALL_STATES, 0, _UDIAG_SHOW_PEER, bytes(8))
    try:
        for answer in netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request):
            peer = netlink.attributes(answer[_UNIX_ANSWER.size :]).get(_UNIX_DIAG_PEER)
            if peer is not None:
                found[_UNIX_ANSWER.unpack_from(answer)[3]] = struct.unpack("=I", peer)[0]
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
    return found


def own_addresses() -> set[str]:
    """Return the IP addresses of this namespace, as ``ipaddress`` spells them. Raises OSError."""
    return {str(one.ip) for one in _interfaces(_IFA_LOCAL)}


def own_networks() -> list[str]:
    """Return the networks that this namespace's addresses are in, by CIDR. Raises OSError."""
    return sorted({str(one.network) for one in _interfaces(_IFA_ADDRESS)})


def _interfaces(preferred: int) -> Iterator[Union[IPv4Interface, IPv6Interface]]:
    """Yield addresses; for a point-to-point device IFA_ADDRESS is the peer's."""
    request = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    for answer in netlink.dump(socket.NETLINK_ROUTE, _RTM_GETADDR, request):
        bits = _IFADDRMSG.unpack_from(answer)[1]
        attributes = netlink.attributes(answer[_IFADDRMSG.size :])
        found = attributes.get(preferred, attributes.get(_IFA_ADDRESS))
        if found is not None:
            yield ipaddress.ip_interface((found, bits))


def translations() -> Optional[dict[Ends, tuple[str, int]]]:
    """Return the real destinations of connections translated by netfilter (NAT), by their ends.

    None if there may be translations that cannot be read. Needs CAP_NET_ADMIN.
    """
    found = {}
    try:
        request = _NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)
        for answer in netlink.dump(_NETLINK_NETFILTER, _CONNTRACK_GET, request):
            with suppress(KeyError):  # a protocol without ports
                sent, real = _translated(netlink.attributes(answer[_NFGENMSG.size :]))
                if real != (sent.destination, sent.destination_port):
                    found[sent] = real
    except OSError:
        return None if _has_conntrack() else {}
    return found


def _translated(attributes: Mapping[int, bytes]) -> tuple[Ends, tuple[str, int]]:
    """Return the original ends, and who answers. Raises KeyError for a protocol without ports."""
    sent, reply = (_ends(attributes[way]) for way in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY))
    return sent, (reply.source, reply.source_port)


def _ends(data: bytes) -> Ends:
    """Parse a conntrack tuple. Raises KeyError for a protocol without ports."""
    parts = netlink.attributes(data)
    addresses = netlink.attributes(parts[_CTA_TUPLE_IP])
    ports = netlink.attributes(parts[_CTA_TUPLE_PROTO])
    # CTA_IP_V4_SRC and CTA_IP_V4_DST, or their IPv6 counterparts, in this order.
    source, destination = (str(ipaddress.ip_address(addresses[key])) for key in sorted(addresses))
    source_port, destination_port = (
        int.from_bytes(ports[key], "big") for key in (_CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT)
    )
    return Ends(ports[_CTA_PROTO_NUM][0], source, source_port, destination, destination_port)


def _has_conntrack() -> bool:
    """Whether connection tracking is active here."""
    with suppress(OSError, ValueError), open(_CONNTRACK_COUNT) as file:
        return int(file.read()) > 0
    return False
