"""Packets of TCP and UDP: split into those that were on the wire, translated back, damaged, framed.

A packet begins with its IP header. Checksums are sums of 16-bit words with the carry added back.
Source: RFC 791, 768, 8200, 9293; include/uapi/linux/virtio_net.h for the header of a TAP device.
"""

from __future__ import annotations

import socket
import struct
from typing import Callable, Iterator, Optional, Union

_ETHERNET_BYTES = 14
_TYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
_LOCAL_ADDRESS = b"\x02"  # an address of Ethernet that no maker has given out

# struct virtio_net_hdr: flags, GSO type, length of headers, of a segment, start, offset of the sum.
_VIRTIO = struct.Struct("=BBHHHH")
_NEEDS_CHECKSUM = 1
_GSO_TCP4, _GSO_TCP6, _GSO_UDP, _GSO_ECN = 1, 4, 5, 0x80
_PLAIN = _VIRTIO.pack(0, 0, 0, 0, 0, 0)

_ECT0, _CE = 2, 3
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80
_DNS_PORT, _DNS_HEADER_BYTES = 53, 12
_RCODE, _SERVFAIL = 0x0F, 2
_HALF = struct.Struct("!H")
_WORD = struct.Struct("!I")


def total(data: Union[bytes, bytearray]) -> int:
    """Return the sum of all words of 16 bits, folded into one."""
    # 2^16 is 1 modulo 2^16 - 1: the number as a whole leaves the remainder that its words do.
    return _fold(int.from_bytes(data, "big") << 8 * (len(data) % 2))


def _fold(number: int) -> int:
    return number % 0xFFFF or (0xFFFF if number else 0)


class Packet:
    """One packet. ``segment`` is the payload of those that it was put together of, or 0.

    ``is_partial`` says that its checksum was not calculated, or that it need not be: the kernel
    has verified it, and the field has the sum of the addresses only.
    """

    __slots__ = ("at", "data", "header", "is_partial", "is_tcp", "segment", "version")

    def __init__(self, data: bytearray, segment: int, is_partial: Optional[bool] = None) -> None:
        self.data = data
        self.version = data[0] >> 4
        self.at = (data[0] & 15) * 4 if self.version == 4 else 40
        self.is_tcp = data[9 if self.version == 4 else 6] == socket.IPPROTO_TCP
        # Up to the payload.
        self.header = self.at + (data[self.at + 12] >> 4) * 4 if self.is_tcp else self.at + 8
        self.segment = segment if len(data) - self.header > segment else 0
        if is_partial is None:
            is_partial = bool(segment) or self.checksum == self._of_addresses()
        self.is_partial = is_partial

    @property
    def checksum_at(self) -> int:
        """Where the checksum of TCP or UDP is."""
        return self.at + (16 if self.is_tcp else 6)

    @property
    def checksum(self) -> int:
        """The checksum of TCP or UDP, or as much of it as is there."""
        return int(_HALF.unpack_from(self.data, self.checksum_at)[0])

    @property
    def count(self) -> int:
        """As how many packets it was on the wire."""
        if not self.segment:
            return 1
        return -(-(len(self.data) - self.header) // self.segment)

    def _of_addresses(self) -> int:
        """Return the sum of the addresses, the length and the protocol."""
        data = self.data
        protocol = socket.IPPROTO_TCP if self.is_tcp else socket.IPPROTO_UDP
        addresses = data[12:20] if self.version == 4 else data[8:40]
        return _fold(total(addresses) + len(data) - self.at + protocol)

    def flow(self) -> bytes:
        """Return what the packets of one flow have in common: addresses and ports."""
        addresses = self.data[12:20] if self.version == 4 else self.data[8:40]
        return bytes(addresses + self.data[self.at : self.at + 4])

    def translate(self, source: bytes, target: bytes, ports: bytes) -> None:
        """Have other addresses and ports; the packet stays as right or wrong as it was."""
        data, at = self.data, self.at
        first = 12 if self.version == 4 else 8
        last = first + len(source) + len(target)
        before = total(data[first:last]) + total(data[at : at + 4])
        data[first:last] = source + target
        data[at : at + 4] = ports
        if self.version == 4:
            self._sum_header()
        after = total(data[first:last]) + total(data[at : at + 4])
        has_none = not self.is_tcp and not self.checksum
        if not self.is_partial and not has_none:
            changed = _fold((~self.checksum & 0xFFFF) + (~_fold(before) & 0xFFFF) + after)
            _HALF.pack_into(data, self.checksum_at, ~changed & 0xFFFF or 0xFFFF)

    def split(self) -> Iterator[Packet]:
        """Yield the packets that it was on the wire."""
        if not self.segment:
            yield self
            return
        for number, start in enumerate(range(self.header, len(self.data), self.segment)):
            yield self._part(number, start)

    def _part(self, number: int, start: int) -> Packet:
        data, at = self.data, self.at
        part = data[: self.header] + data[start : start + self.segment]
        if self.version == 4:
            _HALF.pack_into(part, 2, len(part))
            identification = _HALF.unpack_from(data, 4)[0]
            _HALF.pack_into(part, 4, (identification + number) & 0xFFFF)
        else:
            _HALF.pack_into(part, 4, len(part) - at)
        if self.is_tcp:
            sequence = _WORD.unpack_from(data, at + 4)[0] + start - self.header
            _WORD.pack_into(part, at + 4, sequence & 0xFFFFFFFF)
            if start + self.segment < len(data):
                part[at + 13] &= ~(_PSH | _FIN)
            if number:
                part[at + 13] &= ~_CWR
        else:
            _HALF.pack_into(part, at + 4, len(part) - at)
        one = Packet(part, 0, True)
        if self.version == 4:
            one._sum_header()
        return one

    def damage(self, below: Callable[[int], int]) -> None:
        """Turn one bit behind the IP header, by a number below what is asked for."""
        if self.is_partial:
            self._finish()
        bit = below(8 * (len(self.data) - self.at))
        self.data[self.at + bit // 8] ^= 1 << bit % 8

    def mark_congested(self) -> bool:
        """Mark congestion for its receiver; return whether its sender understands that (RFC 3168).

        One that sends ECT(1) expects marks by another law (RFC 9331).
        """
        shift = 0 if self.version == 4 else 4
        mark = self.data[1] >> shift & _CE
        if mark == _ECT0:
            self.data[1] |= _CE << shift
            if self.version == 4:
                self._sum_header()
        return mark in (_ECT0, _CE)

    def fail_answer(self) -> bool:
        """Have the answer of a name server say SERVFAIL; return whether it is one.

        Its records stay: nobody reads them then. RFC 1035, 4.1.1.
        """
        data = self.data
        source = _HALF.unpack_from(data, self.at)[0]
        if self.is_tcp or source != _DNS_PORT or len(data) < self.header + _DNS_HEADER_BYTES:
            return False
        data[self.header + 3] = data[self.header + 3] & ~_RCODE | _SERVFAIL
        if not self.is_partial and self.checksum:
            self._finish()
        return True

    def frame(self, device_address: bytes, tag: int, device: int) -> bytes:
        """Return it for a TAP device, to come in by a device with an index and an address."""
        start = self._virtio()
        head = device_address + _LOCAL_ADDRESS + tag.to_bytes(2, "big") + device.to_bytes(3, "big")
        return b"".join((start, head, _TYPES[self.version], self.data))

    def _virtio(self) -> bytes:
        if not self.is_partial:
            return _PLAIN  # the kernel verifies what the sender has written
        _HALF.pack_into(self.data, self.checksum_at, self._of_addresses())
        sum_at = _ETHERNET_BYTES + self.at, self.checksum_at - self.at
        if not self.segment:
            return _VIRTIO.pack(_NEEDS_CHECKSUM, 0, 0, 0, *sum_at)
        kind = _GSO_UDP
        if self.is_tcp:
            kind = _GSO_TCP4 if self.version == 4 else _GSO_TCP6
            if self.data[self.at + 13] & _CWR:
                kind |= _GSO_ECN
        headers = _ETHERNET_BYTES + self.header
        return _VIRTIO.pack(_NEEDS_CHECKSUM, kind, headers, self.segment, *sum_at)

    def _sum_header(self) -> None:
        self.data[10:12] = b"\0\0"
        _HALF.pack_into(self.data, 10, ~total(self.data[: self.at]) & 0xFFFF)

    def _finish(self) -> None:
        """Calculate the checksum that the sender would have sent."""
        at = self.checksum_at
        self.data[at : at + 2] = b"\0\0"
        number = _fold(self._of_addresses() + total(self.data[self.at :]))
        _HALF.pack_into(self.data, at, ~number & 0xFFFF or 0xFFFF)
        self.is_partial = False
