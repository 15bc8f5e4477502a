"""The line's keeper: a process that carries packets between two devices, each when it is due.

One device is the only way out of a command's network namespace, the other is in the namespace that
the line leads to. What becomes of each packet is decided when it is read.
"""

from __future__ import annotations

import heapq
import os
import socket
import struct
import time
from contextlib import suppress
from typing import Any, NamedTuple

from pybpfthrottle.diversion import impairing
from pybpfthrottle.diversion.impairing import Fate, Impairing
from pybpfthrottle.diversion.packets import Packet
from pybpfthrottle.diversion.tally import Count, Tally
from pybpfthrottle.errors import Error
from pybpfthrottle.linux import clock, helper, run_files, tuntap

# Packets that are read, and that are given back, before the other has its turn.
_BATCH = 64
# An owner that was killed may have to wait for a CPU before it can end.
_GONE_S, _LOOK_S = 10.0, 0.05
# Of a direction: as much as 10 Gbit/s have on their way in 100 ms.
_MOST_BYTES = 128 << 20

_VIRTIO = struct.Struct("=BBHHHH")  # struct virtio_net_hdr
_PLAIN = bytes(_VIRTIO.size)
_LARGEST_BYTES = _VIRTIO.size + (1 << 16)
# Packets of up to 64 KB: they cost as little as small ones.
_WHOLE = tuntap.TUN_F_CSUM | tuntap.TUN_F_TSO4 | tuntap.TUN_F_TSO6


class Held(NamedTuple):
    """A packet that waits; ``number`` keeps the order of those that are due at the same time."""

    due_ns: int
    number: int
    at_ns: int
    packets: int
    frame: bytes


class Way:
    """One direction: packets are read from one device, and written to the other."""

    def __init__(self, source: int, sink: int, tally: Tally, told: Any) -> None:
        self.source = source
        self._sink = sink
        self.tally = tally
        # Whether somebody has removed the device that it is read from.
        self.is_gone = False
        self._heap: list[Held] = []
        self._held_bytes = self._number = 0
        self._impairing = Impairing(impairing.from_json(told))
        self._split()

    def change(self, told: Any, *, anew: bool) -> None:
        """Impair what comes from now on in another way."""
        self._impairing.change(impairing.from_json(told), anew=anew)
        self._split()

    def _split(self) -> None:
        """Have the kernel split packets, and finish checksums, if each has a fate of its own."""
        try:
            tuntap.set_offload(self.source, 0 if self._impairing.splits else _WHOLE)
        except OSError as error:
            self._refused(error)

    @property
    def due_ns(self) -> int:
        """When the next packet is due; 0 if none is held."""
        return self._heap[0].due_ns if self._heap else 0

    def take(self) -> bool:
        """Read packets; return whether there may be more."""
        try:
            for _ in range(_BATCH):
                self._decide(os.read(self.source, _LARGEST_BYTES), clock.monotonic_ns())
        except BlockingIOError:
            return False
        except OSError as error:
            self._refused(error)
            return False
        return True

    def _refused(self, error: OSError) -> None:
        if error.errno != tuntap.GONE:
            raise error
        self.is_gone = True

    def _decide(self, frame: bytes, now_ns: int) -> None:
        fate = self._impairing.decide(now_ns)
        counts, packets = self.tally.counts, _count(frame)
        counts[Count.SEEN] += packets
        if not fate.copies:
            counts[Count.LOST] += packets
            return
        counts[Count.REORDERED] += fate.is_early
        counts[Count.DUPLICATED] += fate.copies - 1
        frame = self._impaired(frame, fate)
        for _ in range(fate.copies):
            if self._held_bytes + len(frame) > _MOST_BYTES:
                counts[Count.FULL_DROPPED] += packets
                continue
            self._held_bytes += len(frame)
            self._number += 1
            heapq.heappush(self._heap, Held(fate.due_ns, self._number, now_ns, packets, frame))

    def _impaired(self, frame: bytes, fate: Fate) -> bytes:
        if fate.is_damaged:
            self.tally.counts[Count.CORRUPTED] += 1
            frame = _damaged(frame, self._impairing)
        if self._impairing.wanted.servfail and _is_udp(frame):
            packet = Packet(bytearray(frame[_VIRTIO.size :]), 0, False)
            if packet.fail_answer():
                self.tally.counts[Count.FAILED_ANSWERS] += 1
                return _PLAIN + packet.data
        return frame

    def give(self) -> bool:
        """Write packets that are due; return whether there may be more."""
        for _ in range(_BATCH):
            now_ns = clock.monotonic_ns()
            if not self._heap or self._heap[0].due_ns > now_ns:
                return False
            held = heapq.heappop(self._heap)
            self._held_bytes -= len(held.frame)
            try:
                os.write(self._sink, held.frame)
            except OSError:
                self.tally.counts[Count.REFUSED] += held.packets
                continue
            self.tally.delivered(now_ns - held.at_ns, held.packets)
        return True


def _count(frame: bytes) -> int:
    """Return as how many packets of TCP it would be on a wire."""
    _, kind, _, segment, start, _ = map(int, _VIRTIO.unpack_from(frame))
    if not kind or not segment:
        return 1
    at = _VIRTIO.size + start
    payload = len(frame) - at - (frame[at + 12] >> 4) * 4
    return max(1, -(-payload // segment))


def _header_bytes(frame: bytes) -> int:
    """Return the length of the IP header."""
    first = frame[_VIRTIO.size]
    return (first & 15) * 4 if first >> 4 == 4 else 40


def _is_udp(frame: bytes) -> bool:
    first = _VIRTIO.size
    protocol = frame[first + (9 if frame[first] >> 4 == 4 else 6)]
    return protocol == socket.IPPROTO_UDP and len(frame) >= first + _header_bytes(frame) + 8


def _damaged(frame: bytes, by: Impairing) -> bytes:
    """Turn one bit behind the IP header. The checksum is that of the sender."""
    begin = _VIRTIO.size + _header_bytes(frame)
    if begin >= len(frame):
        return frame
    data = bytearray(frame)
    bit = by.below(8 * (len(data) - begin))
    data[begin + bit // 8] ^= 1 << bit % 8
    data[: _VIRTIO.size] = _PLAIN  # or the kernel would not look at the checksum
    return bytes(data)


class Keeper:
    """The loop over the owner's messages, the devices and the clock."""

    def __init__(self, owner: socket.socket) -> None:
        self.way_id = ""
        self._owner = owner
        self._ways: list[Way] = []
        self._gone: set[int] = set()
        self._drains = False
        self._wakeups = helper.Wakeups(owner)

    def run(self) -> None:
        """Serve until the owner is gone."""
        is_idle = True
        while True:
            ready = self._wakeups.wait(is_idle=is_idle)
            if self._owner.fileno() in ready and not self._listen():
                return
            takes = [way.take() for way in self._ways if way.source in ready]
            self._say_what_is_gone()
            gives = [way.give() for way in self._ways]
            is_idle = not any((*takes, *gives))
            if is_idle:
                dues = (way.due_ns for way in self._ways if way.due_ns)
                self._wakeups.wake_at(min(dues, default=0))
                self._say_when_drained()

    def _say_what_is_gone(self) -> None:
        for number, way in enumerate(self._ways):
            if way.is_gone and number not in self._gone:
                self._gone.add(number)
                self._wakeups.remove(way.source)
                helper.report(self._owner, gone=number)

    def _say_when_drained(self) -> None:
        if self._drains and not any(way.due_ns for way in self._ways):
            self._drains = False
            helper.report(self._owner, drained=True)

    def _listen(self) -> bool:
        """Handle one of the owner's messages; return False if it is gone."""
        heard = helper.listen(self._owner)
        if heard is None:
            return False
        message, fds = heard
        self.way_id = message.get("way", self.way_id)
        if "open" in message:
            inner, outer, *tallies = fds
            ends = ((outer, inner), (inner, outer))
            for (source, sink), tally, told in zip(ends, tallies, message["open"]):
                self._ways.append(Way(source, sink, Tally(tally), told))
                self._wakeups.add(source)
            helper.report(self._owner, opened=True)
        elif "drain" in message:
            self._drains = True
        elif "change" in message:
            for way, told in zip(self._ways, message["change"]):
                way.change(told, anew=message["anew"])
        return True


def main(fd: int) -> None:
    """Keep the line of the process at the other end of a Unix socket."""
    keeper = Keeper(helper.begin(fd, "pybpfn-keeper"))
    helper.without_collector()
    with suppress(ConnectionError):
        keeper.run()
    _tidy_up(keeper.way_id)


def _tidy_up(way_id: str) -> None:
    """Restore what the owner has changed, if it was killed. The next start would do so too."""
    deadline_s = time.monotonic() + _GONE_S
    while way_id in run_files.stems(run_files.WAYS_OUT) and time.monotonic() < deadline_s:
        from pybpfthrottle import wayout

        with suppress(Error, OSError):
            wayout.tidy_up()  # which may find those of others, and not yet this one
        time.sleep(_LOOK_S)  # it closes its descriptors before it is gone
