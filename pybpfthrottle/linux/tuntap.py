"""Devices whose packets a process reads and writes.

Source: Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

_TUN = "/dev/net/tun"
# The direction of an ioctl is spelled in another way on some machines (asm/ioctl.h).
_WRITES = 0x80000000 if os.uname().machine.startswith(("mips", "ppc", "sparc")) else 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = _WRITES | 0x454CA, _WRITES | 0x454D0
_TUNSETCARRIER = _WRITES | 0x454E2
IFF_TUN, IFF_TAP = 0x0001, 0x0002
_IFF_NO_PI, _IFF_VNET_HDR = 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40
_NAME_BYTES, _REQUEST_BYTES = 16, 40
# What a descriptor says once somebody has removed its device.
GONE = errno.EBADFD


def create(kind: int, name: str) -> tuple[int, str]:
    """Create a device in this thread's network namespace; return its descriptor and its name.

    ``kind`` is IFF_TUN or IFF_TAP, and ``%d`` in the name stands for a free number. Each packet
    begins with a struct virtio_net_hdr. The device ends with its last descriptor. Needs
    CAP_NET_ADMIN there. Raises OSError.
    """
    fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = struct.pack("=H", kind | _IFF_NO_PI | _IFF_VNET_HDR)
        request = (name.encode().ljust(_NAME_BYTES, b"\0") + flags).ljust(_REQUEST_BYTES, b"\0")
        answer = fcntl.ioctl(fd, _TUNSETIFF, request)
    except BaseException:
        os.close(fd)
        raise
    return fd, answer[:_NAME_BYTES].rstrip(b"\0").decode()


def set_offload(fd: int, offload: int) -> None:
    """Say which unfinished packets may be read: TUN_F_CSUM and so on. Raises OSError."""
    fcntl.ioctl(fd, _TUNSETOFFLOAD, offload)


def set_carrier(fd: int, *, on: bool) -> None:
    """Have a device a carrier, or none. Linux 5.0. Raises OSError."""
    fcntl.ioctl(fd, _TUNSETCARRIER, struct.pack("=i", on))
