"""The device of a network namespace by which packets come back, and what loopback needs for it.

Nothing but the keeper writes to it, it has no address, and it ends with its last descriptor.
Source: include/uapi/linux/sockios.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence

from pybpfthrottle.linux import tuntap

if TYPE_CHECKING:
    from pybpfthrottle.bpf.links import Link
    from pybpfthrottle.bpf.programs import Program

_SIOCGIFNAME, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8910, 0x8913, 0x8914
_SIOCSIFMTU, _SIOCGIFHWADDR, _SIOCGIFINDEX = 0x8922, 0x8927, 0x8933
_IFF_UP = 1
_NAME = "pybpfd%d"
# With the header of Ethernet, 64 KB less one byte.
_LARGEST_BYTES = 65521
_NAME_BYTES, _REQUEST_BYTES = 16, 40
_ADDRESS = slice(18, 24)  # in struct ifreq, behind the name and the kind of address

# Without these, packets with addresses of this machine vanish when they come in from outside; and
# 127/8 is only for those that are sent here.
_SETTINGS = ("accept_local", "route_localnet")
_OFF, _ON = b"0", b"1"


class Tap(NamedTuple):
    """A device, in descriptors. ``link`` is that of its program, or None where tc has it.

    ``control`` is a socket in its namespace, and ``has_udp`` whether it takes segmented UDP.
    """

    device: int
    control: socket.socket
    link: Optional[Link]
    has_udp: bool

    def close(self) -> None:
        """Close all descriptors; with the last copies of them the device ends."""
        os.close(self.device)
        self.control.close()
        if self.link is not None:
            self.link.close()

    def fds(self) -> list[int]:
        """Return the descriptors: the device, the socket, and the link if there is one."""
        own = [self.device, self.control.fileno()]
        return own if self.link is None else [*own, self.link.fd]


def create(back: Program) -> Tap:
    """Create one in this thread's network namespace; ``back`` handles what is written to it.

    Needs CAP_NET_ADMIN there. Raises OSError.
    """
    with ExitStack() as undo:
        device, shown = tuntap.create(tuntap.IFF_TAP, _NAME)
        undo.callback(os.close, device)
        name = shown.encode()
        control = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        has_udp = _takes_udp(device)
        # Without a carrier it takes what is written to it, and nobody thinks that there is a new
        # network: browsers give up what they load then. Linux 5.0.
        tuntap.set_carrier(device, on=False)
        # It is to say nothing by itself. /proc/sys may be read-only, and then nobody listens.
        with (
            suppress(OSError),
            open(f"/proc/sys/net/ipv6/conf/{shown}/disable_ipv6", "w") as file,
        ):
            file.write("1")
        fcntl.ioctl(control, _SIOCSIFMTU, _request(name, struct.pack("=i", _LARGEST_BYTES)))
        (flags,) = struct.unpack_from(
            "=h", fcntl.ioctl(control, _SIOCGIFFLAGS, _request(name)), _NAME_BYTES
        )
        # Before it is up, so that nothing of it gets further.
        link = _attach(back, control, name)
        if link is not None:
            undo.callback(link.close)
        up = _request(name, struct.pack("=h", flags | _IFF_UP))
        fcntl.ioctl(control, _SIOCSIFFLAGS, up)
        undo.pop_all()
    return Tap(device, control, link, has_udp)


def _attach(back: Program, control: socket.socket, name: bytes) -> Optional[Link]:
    # The keeper does without, and has to start soon.
    from pybpfthrottle.bpf import links, tc
    from pybpfthrottle.bpf.abi import AttachType

    answer = fcntl.ioctl(control, _SIOCGIFINDEX, _request(name))
    (index,) = struct.unpack_from("=i", answer, _NAME_BYTES)
    try:
        return links.create_link(back, index, AttachType.TCX_INGRESS)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 6.6
            raise
    # It ends with its device, which nobody else attaches to.
    tc.attach(back, index, AttachType.TCX_INGRESS)
    return None


def _takes_udp(device: int) -> bool:
    """Whether UDP that is still to be segmented may be written to a device (Linux 6.2)."""
    try:
        tuntap.set_offload(device, tuntap.TUN_F_CSUM | tuntap.TUN_F_USO4 | tuntap.TUN_F_USO6)
    except OSError:
        return False
    tuntap.set_offload(device, 0)
    return True


def address_of(control: int, index: int) -> bytes:
    """Return the Ethernet address of the device with an index in a socket's namespace.

    Devices that have none have zeros, as has a device that is gone.
    """
    try:
        request = struct.pack(f"={_NAME_BYTES}si", b"", index).ljust(_REQUEST_BYTES, b"\0")
        name = fcntl.ioctl(control, _SIOCGIFNAME, request)[:_NAME_BYTES].rstrip(b"\0")
        return fcntl.ioctl(control, _SIOCGIFHWADDR, _request(name))[_ADDRESS]
    except OSError:
        return bytes(6)


def _request(name: bytes, value: bytes = b"") -> bytes:
    return (name.ljust(_NAME_BYTES, b"\0") + value).ljust(_REQUEST_BYTES, b"\0")


def let_loopback_in() -> list[int]:
    """Have packets of this thread's network namespace come back by its loopback device.

    Return descriptors of the settings that were changed, for ``restore``. Raises OSError.
    """
    changed: list[int] = []
    with ExitStack() as undo:
        for name in _SETTINGS:
            fd = os.open(f"/proc/sys/net/ipv4/conf/lo/{name}", os.O_RDWR | os.O_CLOEXEC)
            if os.read(fd, 1) != _OFF:
                os.close(fd)
                continue
            undo.callback(restore, [fd])
            change([fd])
            changed.append(fd)
        undo.pop_all()
    return changed


def change(settings: Sequence[int]) -> None:
    """Switch settings on. Raises OSError."""
    for fd in settings:
        os.pwrite(fd, _ON, 0)


def restore(settings: Sequence[int]) -> None:
    """Switch settings off again, and close them."""
    for fd in settings:
        with suppress(OSError):
            os.pwrite(fd, _OFF, 0)
        os.close(fd)
