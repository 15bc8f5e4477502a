"""The diversion's keeper: a process that holds packets back, and gives them back when they are due.

The programs of divert.bpf.c copy them into a ring buffer and drop them. What becomes of each is
decided when it is read, by the time at which it was taken: so it does not matter when the keeper
gets to it. In between they are in a heap by the time at which they are due.

The keeper alone holds the links of the programs and the devices by which packets come back. Nothing
of them is left when it ends, in whatever way.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import mmap
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle.backends.ebpf.keeper import Element, Ring
from pybpfthrottle.backends.ebpf.records import (
    ThrottleBucket,
    ThrottleConfig,
    ThrottleGate,
    element,
)
from pybpfthrottle.diversion import tap
from pybpfthrottle.diversion.packets import Packet
from pybpfthrottle.diversion.queueing import Leaving, Queue, Waiting
from pybpfthrottle.diversion.records import DivertKeeper, DivertPacket, DivertState, DivertTag
from pybpfthrottle.diversion.tally import Count, Tally
from pybpfthrottle.linux import clock, helper, tuntap
from pybpfthrottle.model import Direction

if TYPE_CHECKING:
    from pybpfthrottle.diversion.impairing import Impairing

# Packets that are read, and that are given back, before the other has its turn.
_BATCH = 64
# What comes later than this helps nobody: the sender has sent it once more.
_LATEST_NS = 1_000_000_000
# Of all diversions: as much as 10 Gbit/s have on their way in 200 ms.
_MOST_BYTES = 256 << 20
_LINGER_NS = 10_000_000
# An address may be changed.
_ADDRESS_NS = 1_000_000_000

_HEAD = struct.Struct("=QIIIIIHH")  # struct divert_packet up to the translation
_WIRE = struct.Struct("=16s16sHH")
_PORTS = struct.Struct("=HH")
_PACKET_AT = ctypes.sizeof(DivertPacket)


class Network(NamedTuple):
    """The device in a network namespace, and what is to be closed with it."""

    device: int
    control: int
    has_udp: bool
    held: Sequence[int]


class Line:
    """One diversion: it impairs packets, or is the queue of a limit and has no ``impairing``."""

    impairing: Impairing

    def __init__(
        self, state: int, tally: int, links: Sequence[int], queue: Optional[Queue] = None
    ) -> None:
        self._memory = mmap.mmap(state, mmap.PAGESIZE)
        self.state = DivertState.from_buffer(self._memory)
        self.tally = Tally(tally)
        self.queue = queue
        self.unreturned = Unreturned()
        self._fds = [state, *links]

    def close(self) -> None:
        """Let go of its programs, which detaches them."""
        for fd in self._fds:
            os.close(fd)
        self.tally.close()
        if self.queue is not None:
            self.queue.close()


class Unreturned:
    """Whether what a queue gives back arrives: a firewall, or a policy of IPsec, may drop it.

    It may arrive late on a busy machine, so it is given a second.
    """

    _SAMPLE = 64
    _PATIENCE_NS = 1_000_000_000

    def __init__(self) -> None:
        self._given = self._wanted = self._returned = self._due_ns = 0

    def given(self, returned: int, now_ns: int) -> bool:
        """Count a packet that was given back; return whether less than half of them come back.

        ``returned`` counts all that came back so far.
        """
        self._given += 1
        if self._wanted and now_ns >= self._due_ns:
            came, wanted = returned - self._returned, self._wanted
            self._given = self._wanted = 0
            self._returned = returned
            return came < wanted // 2
        if not self._wanted and self._given >= self._SAMPLE:
            self._wanted, self._due_ns = self._given, now_ns + self._PATIENCE_NS
        return False


class Held(NamedTuple):
    """A packet that waits; ``number`` keeps the order of those that are due at the same time."""

    due_ns: int
    number: int
    at_ns: int
    packets: int
    line: Line
    device: int
    frame: bytes


class Keeper:
    """The loop over the owner's messages, packets and the clock."""

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._lines: dict[int, Line] = {}
        self._networks: dict[int, Network] = {}
        # Those whose device does not take anything any more.
        self._broken: set[int] = set()
        self._settings: list[int] = []
        self._addresses: dict[tuple[int, int], tuple[int, bytes]] = {}
        self._heap: list[Held] = []
        self._held_bytes = self._number = 0
        self._ring: Optional[Ring] = None
        self._unread: Optional[Ring] = None
        self._shared = DivertKeeper()
        self._wakeups = helper.Wakeups(owner)

    def run(self) -> None:
        """Serve until the owner is gone."""
        is_idle = True
        try:
            while True:
                ready = self._wakeups.wait(is_idle=is_idle)
                # All that it is told, before it reads packets of what it is told of.
                while self._owner.fileno() in ready:
                    if not self._listen():
                        return
                    ready = self._wakeups.wait(is_idle=False)
                is_idle = self._ring is None or self._turn()
        finally:
            self._drain(list(self._lines.values()))
            self._shared.alive = 0
            tap.restore(self._settings)

    def _turn(self) -> bool:
        """Read packets, and give some back; return whether to sleep before the next turn."""
        self._shared.oldest_ns = 0
        taken = self._take(_BATCH)
        given = max(self._give(_BATCH), self._serve_queues(_BATCH))
        if taken == _BATCH or given == _BATCH:
            return False
        # A packet that was taken and read in this turn has set it as well. Left so, the next one
        # would be thought to come when the keeper does not keep up.
        self._shared.oldest_ns = 0
        if self._ring is not None and not self._ring.is_empty():
            if not (taken or given):
                self._wakeups.wake_soon()
            return not (taken or given)
        due_ns = self._next_due_ns()
        self._shared.next_due_ns = due_ns
        # Once nothing is due, look at the ring once more: while a packet waited, others came in
        # without a wake-up, and the last of them may just have been on its way.
        self._wakeups.wake_at(due_ns, else_after_ns=_LINGER_NS)
        return True

    def _next_due_ns(self) -> int:
        """Return when the next packet is to be given back, 0 for never."""
        dues = [line.queue.due_ns for line in self._queues()]
        dues += [self._heap[0].due_ns] if self._heap else []
        return min(filter(None, dues), default=0)

    def _take(self, most: int) -> int:
        """Read so many packets at most; return how many there were."""
        taken = 0
        if self._ring is not None:
            for record in self._ring.records():
                if taken == most:  # it stays in the ring: only what is followed is consumed
                    break
                self._record(record)
                taken += 1
        return taken

    def _record(self, record: memoryview) -> None:
        at_ns, number, length, device, segment, inode, tag, is_translated = _HEAD.unpack_from(
            record
        )
        if not length:
            helper.report(self._owner, unserved=inode)
            return
        line, network = self._lines.get(number), self._networks.get(inode)
        if line is None:  # it was in the ring by then
            return
        packet = Packet(bytearray(record[_PACKET_AT : _PACKET_AT + length]), segment)
        line.tally.counts[Count.SEEN] += packet.count
        if network is None:
            line.tally.counts[Count.REFUSED] += packet.count
            return
        if is_translated:
            _translate(packet, record)
        address = self._address(inode, network.control, device, at_ns)
        if line.queue is not None:
            for one in packet.split():
                line.queue.put(Waiting(one, at_ns, (address, tag, device), inode))
            return
        for one in packet.split() if _is_split(packet, line, network) else (packet,):
            self._decide(line, one, at_ns, network.device, (address, tag, device))

    def _decide(
        self, line: Line, packet: Packet, at_ns: int, device: int, way: tuple[bytes, int, int]
    ) -> None:
        fate = line.impairing.decide(at_ns)
        counts = line.tally.counts
        if not fate.copies:
            counts[Count.LOST] += packet.count
            return
        if fate.is_early:
            counts[Count.REORDERED] += 1
        if fate.is_damaged:
            counts[Count.CORRUPTED] += 1
            packet.damage(line.impairing.below)
        if line.impairing.wanted.servfail and packet.fail_answer():
            counts[Count.FAILED_ANSWERS] += 1
        counts[Count.DUPLICATED] += fate.copies - 1
        frame = packet.frame(*way)
        for _ in range(fate.copies):
            if self._held_bytes + len(frame) > _MOST_BYTES:
                counts[Count.FULL_DROPPED] += packet.count
                continue
            self._held_bytes += len(frame)
            self._number += 1
            held = Held(fate.due_ns, self._number, at_ns, packet.count, line, device, frame)
            heapq.heappush(self._heap, held)

    def _address(self, inode: int, control: int, device: int, now_ns: int) -> bytes:
        until_ns, address = self._addresses.get((inode, device), (0, b""))
        if now_ns >= until_ns:
            address = tap.address_of(control, device)
            self._addresses[inode, device] = now_ns + _ADDRESS_NS, address
        return address

    def _give(self, most: int) -> int:
        """Give back so many packets at most that are due; return how many there were."""
        given = 0
        while self._heap and given < most:
            now_ns = clock.monotonic_ns()
            if self._heap[0].due_ns > now_ns:
                break
            self._shared.next_due_ns = 0
            held = heapq.heappop(self._heap)
            given += 1
            if now_ns - held.due_ns > _LATEST_NS:
                self._held_bytes -= len(held.frame)
                held.line.tally.counts[Count.LATE_DROPPED] += held.packets
            else:
                self._write(held, now_ns)
        return given

    def _write(self, held: Held, now_ns: int) -> None:
        self._held_bytes -= len(held.frame)
        try:
            os.write(held.device, held.frame)
        except OSError as error:
            held.line.tally.counts[Count.REFUSED] += held.packets
            self._refused(self._network_of(held.device), error)
            return
        held.line.tally.delivered(now_ns - held.at_ns, held.packets)

    def _network_of(self, device: int) -> int:
        return next(inode for inode, one in self._networks.items() if one.device == device)

    def _refused(self, network: int, error: Exception) -> None:
        """Ask for another device if somebody has removed the one of a namespace, or set it down."""
        is_broken = isinstance(error, OSError) and error.errno in (tuntap.GONE, errno.EIO)
        if is_broken and network not in self._broken:
            self._broken.add(network)
            helper.report(self._owner, broken=network)

    def _queues(self) -> Iterator[Any]:
        return (line for line in self._lines.values() if line.queue is not None)

    def _serve_queues(self, most: int) -> int:
        """Give back what the limits of the queues allow; return the most that one gave back."""
        counts = [0]
        for line in self._queues():
            now_ns = clock.monotonic_ns()
            is_due = line.queue and now_ns >= line.queue.due_ns
            found = list(line.queue.leaving(now_ns, most)) if is_due else []
            for one in found:
                self._leave(line, one, now_ns)
            line.state.waits = bool(line.queue)
            counts.append(len(found))
        return max(counts)

    def _leave(self, line: Line, one: Leaving, now_ns: int) -> None:
        """Give back a packet of a queue; the policer drops and counts one that gets lost."""
        self._shared.next_due_ns = 0
        waiting = one.waiting
        address, tag, device = waiting.way
        frame = waiting.packet.frame(address, tag | DivertTag.DIVERT_LOST * one.is_lost, device)
        try:
            os.write(self._networks[waiting.network].device, frame)
        except (KeyError, OSError) as error:  # nobody is in it any more, or it is broken
            line.tally.counts[Count.REFUSED] += 1
            self._refused(waiting.network, error)
            return
        if one.is_lost:
            line.tally.counts[Count.LOST] += 1
        else:
            line.tally.delivered(now_ns - waiting.at_ns, 1)
        if line.unreturned.given(line.state.returned, now_ns) and line.state.on:
            line.state.on = 0
            helper.report(self._owner, unreturned=line.state.id)

    def _drain(self, lines: Iterable[Line]) -> None:
        """Give back at once, in order, all that is held for some diversions, and hold no more."""
        lines = list(lines)
        self._take_all()
        self._give_all(lines)
        for line in lines:
            line.state.on = 0
        # What was taken until then.
        self._take_all()
        self._give_all(lines)

    def _take_all(self) -> None:
        while self._take(_BATCH) == _BATCH:
            pass

    def _give_all(self, lines: Sequence[Line]) -> None:
        now_ns = clock.monotonic_ns()
        given = sorted(held for held in self._heap if held.line in lines)
        self._heap = [held for held in self._heap if held.line not in lines]
        heapq.heapify(self._heap)
        for held in given:
            self._write(held, now_ns)
        for line in lines:
            for one in line.queue.all() if line.queue is not None else ():
                self._leave(line, one, now_ns)

    def _listen(self) -> bool:
        """Handle one of the owner's messages; return False if it is gone."""
        heard = helper.listen(self._owner, _MOST_DESCRIPTORS)
        if heard is None:
            return False
        message, fds = heard
        if "ring" in message:
            self._begin(message["ring"], *fds)
        elif "network" in message:
            device, control, *held = fds
            inode = message["network"]
            self._networks[inode] = Network(device, control, message["udp"], held)
            self._shared.namespaces[message["index"]] = inode
        elif "forget" in message:
            self._shared.namespaces[message["index"]] = 0
            self._forget(message["forget"])
        elif "settings" in message:
            # Its owner has restored those that are not to be changed any more.
            for fd in self._settings:
                os.close(fd)
            self._settings = fds
        elif "open" in message:
            self._lines[message["open"]] = _open(message, fds)
            self._read_ring()
            self._shared.alive = 1
            helper.report(self._owner, opened=message["open"])
        elif "change" in message:
            from pybpfthrottle.diversion import impairing

            wanted = impairing.from_json(message["impairment"])
            self._lines[message["change"]].impairing.change(wanted, anew=message["anew"])
        elif "close" in message:
            self._end(message["close"])
        return True

    def _forget(self, inode: int) -> None:
        """Close the device in a namespace; what is held for it is lost."""
        network = self._networks.pop(inode, None)
        self._broken.discard(inode)
        # Another one may get its number.
        self._addresses = {key: one for key, one in self._addresses.items() if key[0] != inode}
        if network is None:
            return
        lost = [held for held in self._heap if held.device == network.device]
        for held in lost:
            self._held_bytes -= len(held.frame)
            held.line.tally.counts[Count.REFUSED] += held.packets
        self._heap = [held for held in self._heap if held.device != network.device]
        heapq.heapify(self._heap)
        for fd in (network.device, network.control, *network.held):
            os.close(fd)

    def _begin(self, size: int, shared: int, ring: int) -> None:
        self._shared = DivertKeeper.from_buffer(mmap.mmap(shared, mmap.PAGESIZE))
        self._unread = Ring(ring, size)

    def _read_ring(self) -> None:
        """Read from now on: the first diversion is open.

        What a keeper that was killed has not read is then given back by the one that replaces it.
        """
        if self._unread is not None:
            self._ring, self._unread = self._unread, None
            self._wakeups.add(self._ring.fd)

    def _end(self, number: int) -> None:
        line = self._lines.get(number)
        if line is not None:
            self._drain([line])
            del self._lines[number]
            line.close()
        helper.report(self._owner, closed=number)


def _open(message: Mapping[str, Any], fds: Sequence[int]) -> Line:
    """Return the diversion that the owner tells of."""
    if "slot" not in message:
        # The queue of a limit does without, and has to start soon.
        from pybpfthrottle.diversion import impairing

        state, tally, *links = fds
        line = Line(state, tally, links)
        line.impairing = impairing.Impairing(impairing.from_json(message["impairment"]))
        return line
    state, tally, bucket, config, gate, *links = fds
    slot = message["slot"]
    download = element(slot, Direction.DOWNLOAD)
    queue = Queue(
        Element(bucket, download, ThrottleBucket),
        Element(config, download, ThrottleConfig),
        Element(gate, slot, ThrottleGate),
    )
    return Line(state, tally, links, queue)


# More than any message has.
_MOST_DESCRIPTORS = 64


def _translate(packet: Packet, record: memoryview) -> None:
    """Have a packet the ends that it had on the wire."""
    remote, local, remote_port, local_port = _WIRE.unpack_from(record, _HEAD.size)
    size = 4 if packet.version == 4 else 16
    packet.translate(remote[:size], local[:size], _PORTS.pack(remote_port, local_port))


def _is_split(packet: Packet, line: Line, network: Network) -> bool:
    return line.impairing.splits or not (packet.is_tcp or network.has_udp)


def main(fd: int) -> None:
    """Keep the diversions of the process at the other end of a Unix socket."""
    keeper = Keeper(helper.begin(fd, "pybpfd-keeper"))
    helper.without_collector()
    with suppress(ConnectionError):
        keeper.run()
