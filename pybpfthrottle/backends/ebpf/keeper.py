"""The gate's keeper: a process that forwards the acknowledgements of downloads.

The program of gate.bpf.c diverts them from the kernel. The keeper forwards each at once, with an
advertised window that says what the sender may send now: what it was granted before, or more if
the limit allows. If the limit does not allow more yet, the connection queues for its next window.
So a sender is made to wait with all of its data acknowledged: nothing is lost or retransmitted,
however short the round trip is.

The keeper is a separate process because it has to be quick: a window holds 5 ms of data. Its owner
tells it what to keep, and where, by messages on a Unix socket; it ends when the owner closes that.

Sequence numbers have 32 bits, and are compared by their difference as a signed number.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
from collections import deque
from contextlib import suppress
from typing import Any, Iterator, Optional, Protocol, Sequence

from pybpfthrottle.backends.ebpf.records import (
    ThrottleAck,
    ThrottleBucket,
    ThrottleConfig,
    ThrottleGate,
    ThrottleShift,
)
from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.linux import clock, helper

_MS = 1_000_000
_SECOND_NS = 1000 * _MS
_PAGE = mmap.PAGESIZE
_DOWNLOAD, _DIRECTIONS = 0, 2
_SHIFT = int(ThrottleShift.INVERSE_RATE_SHIFT)

# A window lasts this long, plus two round trips: short enough to serve a small flow in between,
# long enough for Python (200 windows a second for each throttle, at any rate).
CHUNK_NS = 5 * _MS
# At high rates turns cost more than all else. There near senders get windows for twice as long, and
# their acknowledgements come with the next window if that is soon. At 400 MB/s that saves nothing,
# and 0.1 % is sent again.
_HIGH_RATES, _LONG_CHUNK_NS = range(50_000_000, 150_000_001), 10 * _MS
# On longer paths a sender gets its next window before it has used up the last one.
SHORT_ROUND_TRIP_NS = _MS
_MAX_ROUND_TRIP_NS = 200 * _MS
# The round trip is the shortest of so many: the others wait for a busy sender too.
_ROUND_TRIPS = 8
# What the kernel's clock for timestamps, of milliseconds, can tell.
_ESTIMATED_NS = 2 * _MS
# After a window was closed on data that is on its way, for so long nothing tells of the round trip.
_CLOSING_NS = 500 * _MS
# Beyond a round trip and a quarter, data that a window allows may come so much later.
_LATE_NS = 20 * _MS
# What a connection is thought to have sent in its first round trip, however long: ten segments.
_FIRST_BYTES, _FOR_EVER_NS = 14_600, 1 << 62
# While there is credit, far senders may have half as much again on their way, and so much at least.
_EXTRA, _LEAST_EXTRA_NS = 2, 20 * _MS
# A window update may be lost like any packet. Unless it is repeated, the sender waits for its own
# timer, 200 ms.
_REPEAT_NS, _MAX_REPEATS = 20 * _MS, 4
# A sender that does not answer a window has nothing to send: its share goes to the others.
_SILENT_NS = 60 * _MS
# The rate may change while a window waits.
_SHORTEST_WAIT_NS, _LONGEST_WAIT_NS = 50_000, 20 * _MS
_SHORTEST_MEMORY_NS = 60_000 * _MS
# Over which it is found out what others take.
_WINDOW_NS = 100 * _MS
# After this many unanswered windows a connection is left to the kernel.
_MAX_UNANSWERED = 2

_SO_MARK, _IP_PKTINFO = 36, 8
_BUSY, _DISCARDED, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1

_TCP = struct.Struct("!IIBBH")  # sequence, acknowledgement, offset, flags, window
_TIMESTAMP, _SACK = 8, 5
_STAMPED = b"\1\1\x08\x0a"  # how the only options of almost all acknowledgements begin
_GATE_OF_ACK = struct.Struct("=I")
_ACK = struct.Struct("=QQIIIIIIIIBBBx")  # struct throttle_ack without its packet
# Signatures, and MPTCP's data sequence signals (the window there is the whole connection's).
_FOREIGN_OPTIONS = {19, 29, 30}


def signed(difference: int) -> int:
    """Return a difference of sequence numbers as a signed number."""
    return ((difference + 0x80000000) & 0xFFFFFFFF) - 0x80000000


class Ring:
    """The ring buffer's consumer, on its pages. Source: Documentation/bpf/ringbuf.rst."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self._size = size
        own = mmap.mmap(fd, _PAGE)
        rest = mmap.mmap(fd, _PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        self._consumed = memoryview(own).cast("Q")
        self._produced = memoryview(rest)[:_PAGE].cast("Q")
        self._data = memoryview(rest)[_PAGE:]
        self._heads = self._data.cast("I")

    def is_empty(self) -> bool:
        """Whether there are no records, and none that is being written."""
        return bool(self._consumed[0] == self._produced[0])

    def records(self) -> Iterator[memoryview]:
        """Yield the new records; each is valid until the next is requested."""
        position = self._consumed[0]
        while position != self._produced[0]:
            at = position % self._size
            head = self._heads[at // 4]
            if head & _BUSY:
                return
            length = head & _LENGTH
            if not head & _DISCARDED:
                yield self._data[at + 8 : at + 8 + length]
            position += (length + 8 + 7) // 8 * 8
            self._consumed[0] = position


class Element:
    """One element of an array map, read by bpf(2) with minimal overhead."""

    def __init__(self, fd: int, key: int, kind: Any) -> None:
        self._fd = fd
        self.value = kind()
        self._key = ctypes.c_uint32(key)
        self._attr = Attr()
        self._attr.map_elem.map_fd = fd
        self._attr.map_elem.key = ctypes.addressof(self._key)
        self._attr.map_elem.value = ctypes.addressof(self.value)

    def read(self) -> Any:
        """Return the current value, in the same structure each time."""
        syscall.bpf(Cmd.MAP_LOOKUP_ELEM, self._attr)
        return self.value

    def close(self) -> None:
        """Close the map."""
        os.close(self._fd)


class Network:
    """Raw sockets in one network namespace."""

    def __init__(self, ipv4: socket.socket, ipv6: Optional[socket.socket]) -> None:
        self.ipv4 = ipv4
        self.ipv6 = ipv6


class Flow:
    """One connection: its newest acknowledgement, and what its sender was granted."""

    __slots__ = (
        *("cookie", "packet", "at", "scale", "segment", "mark", "network"),
        *("device", "where", "target"),
        *("acked", "edge", "promised", "fresh", "queued", "held"),
        *("taken_ns", "last_ns"),
        *("outstanding", "granted_ns", "granted_from", "round_trip_ns", "answered", "unanswered"),
        *("repeats", "repeat_ns", "base", "stamp", "stamp_at", "last_stamp", "passed_edge"),
        *("own_ns", "shortest_ns", "measured", "measurable_ns", "estimate_ns"),
        *("round_ns", "round_from", "round_edge", "rounds", "unused", "likely"),
    )

    def __init__(self, cookie: int, acked: int, edge: int, promised: int) -> None:
        self.cookie = cookie
        self.packet = bytearray()
        self.at = 0  # offset of the TCP header
        self.scale = self.segment = self.mark = self.network = self.device = 0
        self.where = bytearray()  # its address, in network byte order
        self.target: tuple[Any, ...] = ("", 0)
        self.acked = acked  # up to where data is acknowledged
        self.edge = edge  # up to where the sender was told it may send
        self.passed_edge = edge  # what the kernel has told it without the keeper
        self.promised = promised  # up to where the kernel accepts data
        self.fresh = self.queued = self.answered = False
        self.held = False  # whether its acknowledgement waits for its next window
        self.taken_ns = self.last_ns = 0
        self.outstanding = 0  # bytes granted that have not arrived
        self.granted_ns = self.granted_from = 0
        self.round_trip_ns = self.estimate_ns = 0
        self.own_ns = self.shortest_ns = self.measured = self.measurable_ns = 0
        self.unanswered = self.repeats = self.repeat_ns = 0
        # When a round trip began, and up to where data was acknowledged and granted by then; what
        # arrived in the last two and in which time; how much of the window was left after that.
        self.round_ns, self.round_from, self.round_edge = 0, acked, edge
        self.rounds = (_FIRST_BYTES, _FOR_EVER_NS), (_FIRST_BYTES, _FOR_EVER_NS)
        self.unused, self.likely = 0, 3 * _FIRST_BYTES
        self.base = 0  # the checksum without the window and the timestamp; 0: not summed up yet
        self.stamp = self.stamp_at = 0
        self.last_stamp: Optional[int] = None

    def remaining(self) -> int:
        """Return how many bytes its sender may still send."""
        return signed(self.edge - self.acked)

    def usable(self) -> int:
        """Return ``remaining``, or 0 if it is less than a segment: that is not sent."""
        remaining = self.remaining()
        return remaining if remaining >= self.segment else 0

    def is_far(self) -> bool:
        """Whether its sender gets its next window before it has used up the last one."""
        return self.round_trip_ns > SHORT_ROUND_TRIP_NS

    def look_back(self, now: int) -> None:
        """Find out what has arrived in a round trip and more, and what is left of the window.

        From that follows the most that is likely to be sent in a round trip: a slow start doubles
        it, or more. If the round trip has become longer, what is on its way has too.
        """
        took_ns, round_ns = now - self.round_ns, self.round_trip_ns * 5 // 4 + _LATE_NS
        if took_ns >= round_ns:
            if self.round_ns:
                self.rounds = self.rounds[1], (signed(self.acked - self.round_from), took_ns)
                self.unused = max(signed(self.round_edge - self.acked) - 2 * self.segment, 0)
            self.round_ns, self.round_from, self.round_edge = now, self.acked, self.edge
        (before, before_ns), (last, last_ns) = self.rounds
        before = before * max(round_ns, before_ns) // before_ns
        self.likely = 3 * max(before, last * max(round_ns, last_ns) // last_ns)


class Record(Protocol):
    """An element of a map."""

    def read(self) -> Any:
        """Return the current value."""

    def close(self) -> None:
        """Close the map."""


class Outlet(Protocol):
    """Where a gate's packets and messages go."""

    def send(self, flow: Flow) -> bool:
        """Send a flow's packet in its namespace; False if that cannot be done."""

    def tell(self, gate: Gate, **what: Any) -> None:
        """Tell the owner something of a gate."""


class _Others:
    """What connections of before the limit take of it, which are not gated.

    Who is policed may owe 0.3 s, and keeps it owed: nobody who waits until nothing is owed would
    ever have a turn.
    """

    def __init__(self) -> None:
        self._since_ns = self._owed = self._claims = 0
        self._granted_ns = 0  # since then
        self._half_even_ns = 0  # up to when half of the limit is granted, while they take much
        self._squeeze = False

    def granted(self, now: int, price_ns: int) -> None:
        """Something was granted to gated connections."""
        self._granted_ns += price_ns
        # Not while they have it all: they would run ahead of their half for as long.
        if self._squeeze:
            self._half_even_ns = max(self._half_even_ns, now) + 2 * price_ns

    def wait(self, now: int, owed: int, outstanding: int) -> Optional[int]:
        """Return in how many nanoseconds gated ones have a turn for their half.

        None unless the others take more than a quarter of the limit, and something is always owed.
        """
        elapsed = now - self._since_ns
        if elapsed >= _WINDOW_NS:
            claims = owed + outstanding
            taken = claims - self._claims + elapsed - self._granted_ns
            is_recent = elapsed < 10 * _WINDOW_NS
            self._squeeze = is_recent and min(owed, self._owed) > 0 and taken > elapsed // 4
            self._since_ns, self._owed, self._claims, self._granted_ns = now, owed, claims, 0
        return self._half_even_ns - now if self._squeeze and owed > 0 else None


class Gate:
    """The connections of one throttle."""

    def __init__(
        self, keeper: Outlet, number: int, shared: ThrottleGate, bucket: Record, config: Record
    ) -> None:
        """``shared`` is what the programs see; ``bucket`` and ``config`` are the download's."""
        self._keeper = keeper
        self.number = number
        self.shared = shared
        self.due_ns = 0
        self._bucket = bucket
        self._config = config
        self.fresh: dict[int, Flow] = {}  # in this turn
        self.flows: dict[int, Flow] = {}
        self._queue: deque[Flow] = deque()
        self._granted: dict[int, Flow] = {}  # may still use a window, or need it repeated
        self._forget_ns = 0
        self._others: Optional[_Others] = None
        self._rate = self._inverse = 0
        self._even_at_ns = self._charged_at = 0

    def share(self) -> None:
        """Get a part of the limit beside connections that are policed."""
        self._others = self._others or _Others()

    def begin_turn(self) -> None:
        """Read the rate, and how much is owed at present."""
        self.shared.oldest_ns = clock.monotonic_ns()
        bucket = self._bucket.read()
        self._even_at_ns, self._charged_at = bucket.even_at_ns, bucket.inverse_rate
        config = self._config.read()
        if config.rate_bytes_per_s != self._rate:
            self._rate, self._inverse = config.rate_bytes_per_s, config.inverse_rate
            if not self._rate:
                self.open_all()

    def end_turn(self, now: int) -> None:
        """Forward the newest acknowledgements, and open the windows that are due."""
        for flow in self.fresh.values():
            if flow.fresh:
                self.decide(flow, now)
        self.fresh.clear()
        self.due_ns = self.serve(now)
        self.shared.oldest_ns = 0

    def take(self, record: memoryview, now: int) -> None:
        """Record one acknowledgement, or forward it at once if its sender needs each."""
        cookie, at_ns, _, device, edge, payload, mark, network, *rest = _ACK.unpack_from(record)
        segment, round_trip_us, length, scale, passed = rest
        if not length:
            self._keeper.tell(self, **({"unserved": network} if network else {"datagram": True}))
            return
        packet = bytearray(record[_ACK.size : _ACK.size + length])
        at = 20 if packet[0] >> 4 == 4 else 40
        sequence, acked, _, _, window = _TCP.unpack_from(packet, at + 4)
        promised = (acked + (window << scale)) & 0xFFFFFFFF
        flow = self.flows.get(cookie)
        is_new = flow is None
        if flow is None:
            if self._is_ungated(cookie):
                return  # it was in the ring by then
            self._forget(now)
            flow = self.flows[cookie] = Flow(cookie, acked, edge, promised)
        elif not passed and acked == flow.acked and flow.fresh:
            self.decide(flow, now)  # a duplicate tells its sender of a loss
        if signed(acked - flow.acked) < 0:
            return
        is_repeated = not is_new and not passed and acked == flow.acked
        has_sack = _keep(flow, packet, at, (sequence + payload) & 0xFFFFFFFF, bool(passed))
        flow.scale, flow.mark, flow.network, flow.taken_ns = scale, mark, network, at_ns
        flow.segment, flow.estimate_ns = segment, 1000 * round_trip_us
        where = packet[16:20] if at == 20 else packet[24:40]
        if where != flow.where or device != flow.device:
            flow.where, flow.device, flow.target = where, device, _target(where, device)
        if edge != flow.passed_edge:
            flow.passed_edge = edge
            flow.edge = edge if signed(edge - flow.edge) > 0 else flow.edge
        if has_sack or signed(acked - flow.edge) > 0:
            flow.granted_ns = 0  # what is acknowledged had been sent before
        self._measure(flow, acked, at_ns)
        self._know_round_trip(flow)
        if acked != flow.acked or passed:
            flow.repeat_ns = 0
        if acked != flow.acked:
            flow.answered, flow.unanswered = True, 0
        flow.acked = acked
        flow.look_back(at_ns)
        if signed(promised - flow.promised) > 0:
            flow.promised = promised
        if has_sack is None:
            self._give_up(flow, "options")
            return
        if passed:
            flow.outstanding = min(flow.outstanding, flow.usable())
            flow.last_ns, flow.fresh = now, False
            return
        if self._rate and flow.remaining() > 2 * self._most(flow):
            self._close(flow, now)
        if is_repeated or has_sack:
            if self._wants(flow):
                self.decide(flow, now)
            else:
                self._send(flow, flow.edge, now)
                flow.fresh = False
            return
        flow.fresh = True
        self.fresh[cookie] = flow

    def _close(self, flow: Flow, now: int) -> None:
        """Take back a window from before the limit; its sender has to be prepared (RFC 9293)."""
        flow.edge = flow.acked
        flow.granted_ns = 0
        flow.measurable_ns = now + _CLOSING_NS

    def decide(self, flow: Flow, now: int) -> None:
        """Forward its acknowledgement: with a new window, or with what is left of the last."""
        flow.fresh, flow.last_ns = False, now
        flow.outstanding = min(flow.outstanding, flow.usable())
        if not self._rate:
            self._send(flow, flow.promised, now)
            return
        is_next = self._wants(flow) and not self._queue
        wait = self._wait(flow, now) if is_next else 0
        if is_next and wait <= 0:
            self._grant(flow, now)
        elif is_next and wait <= _LONG_CHUNK_NS and self._is_near_and_fast(flow):
            flow.held = True
        else:
            self._send(flow, flow.edge, now)
        self._enqueue(flow)

    def serve(self, now: int) -> int:
        """Open the windows that are due; return when the next one is, 0 for none."""
        due = 0
        while self._queue:
            flow = self._queue[0]
            wants = self._wants(flow)
            wait = self._wait(flow, now) if wants else 0
            if wait > 0:
                if flow.held and wait > _LONG_CHUNK_NS:
                    self._send(flow, flow.edge, now)
                due = now + min(max(wait, _SHORTEST_WAIT_NS), _LONGEST_WAIT_NS)
                break
            self._queue.popleft()
            flow.queued = False
            if wants:
                self._grant(flow, now)
            elif flow.held:
                self._send(flow, flow.edge, now)
            self._enqueue(flow)
        self.shared.next_due_ns = due
        for flow in list(self._granted.values()):
            if flow.repeat_ns and now >= flow.repeat_ns:
                self._repeat(flow, now)
            if flow.repeat_ns and (not due or flow.repeat_ns < due):
                due = flow.repeat_ns
        return due

    def _enqueue(self, flow: Flow) -> None:
        """Let a flow wait for its next window, unless it has enough or was left to the kernel."""
        if not flow.queued and flow.cookie in self.flows and self._wants(flow):
            flow.queued = True
            self._queue.append(flow)

    def open_all(self) -> None:
        """Advertise the kernel's own window to all senders: nothing is limited here any more."""
        now = clock.monotonic_ns()
        self._queue.clear()
        for flow in list(self.flows.values()):
            flow.queued, flow.repeat_ns = False, 0
            if flow.held or signed(flow.promised - flow.edge) > 0:
                self._send(flow, flow.promised, now)

    def close(self) -> None:
        """Leave its connections to the kernel."""
        self.shared.alive = 0
        self.open_all()
        self._bucket.close()
        self._config.close()

    def _forget(self, now: int) -> None:
        """Now and then, forget connections that have long been silent."""
        if now < self._forget_ns:
            return
        self._forget_ns = now + _SHORTEST_MEMORY_NS // 10
        for cookie, flow in list(self.flows.items()):
            if now > flow.taken_ns + _SHORTEST_MEMORY_NS and not flow.queued:
                del self.flows[cookie]

    def _measure(self, flow: Flow, acked: int, at_ns: int) -> None:
        """Measure the time from a window to the first data beyond the previous one."""
        if not flow.granted_ns or signed(acked - flow.granted_from) <= 0:
            return
        took = at_ns - flow.granted_ns
        flow.granted_ns = 0
        flow.measured += 1
        flow.shortest_ns = min(flow.shortest_ns or took, took)
        if flow.measured == _ROUND_TRIPS or not flow.own_ns or took < flow.own_ns:
            flow.own_ns = flow.shortest_ns
        if flow.measured == _ROUND_TRIPS:
            flow.measured = flow.shortest_ns = 0

    def _know_round_trip(self, flow: Flow) -> None:
        """Set the round trip: the kernel's estimate, or if that is short what was measured here.

        With timestamps the kernel knows it from each segment, in milliseconds. Here it is measured
        only where windows are not opened ahead of time, and not while data is sent once more.
        """
        before, flow.round_trip_ns = flow.round_trip_ns, flow.own_ns
        if flow.stamp_at and flow.estimate_ns:
            is_short = flow.estimate_ns <= _ESTIMATED_NS and flow.own_ns
            flow.round_trip_ns = flow.own_ns if is_short else flow.estimate_ns
        if flow.round_trip_ns != before:
            self.shared.round_trip_ns = max(
                each.round_trip_ns for each in (flow, *self._granted.values())
            )

    def _step(self, flow: Flow) -> int:
        """Return by how many bytes a window is opened at a time.

        Two segments at least, whatever the window's unit takes off them.
        """
        least = 2 * flow.segment + (1 << flow.scale)
        chunk_ns = _LONG_CHUNK_NS if self._is_near_and_fast(flow) else CHUNK_NS
        return max(self._rate * chunk_ns // _SECOND_NS, least)

    def _is_near_and_fast(self, flow: Flow) -> bool:
        return self._rate in _HIGH_RATES and not flow.is_far()

    def _most(self, flow: Flow) -> int:
        """Return the size of the largest window in bytes: what a sender needs to go on sending."""
        round_trip_ns = min(flow.round_trip_ns, _MAX_ROUND_TRIP_NS)
        return self._step(flow) + 2 * round_trip_ns * self._rate // _SECOND_NS

    def _wants(self, flow: Flow) -> bool:
        """Whether a sender is to have more: before it has used up what it has, if it is far."""
        more = signed(self._next_edge(flow) - flow.edge)
        is_used_up = flow.remaining() < 2 * flow.segment
        return more > 0 and (is_used_up or (flow.is_far() and more >= 2 * flow.segment))

    def _next_edge(self, flow: Flow) -> int:
        most = min(max(flow.remaining(), 0) + self._step(flow), self._most(flow))
        if flow.is_far():
            most = min(most, self._step(flow) + flow.likely)
        most = min(most, signed(flow.promised - flow.acked)) >> flow.scale << flow.scale
        return (flow.acked + most) & 0xFFFFFFFF

    def _wait(self, flow: Flow, now: int) -> int:
        """Return in how many nanoseconds the limit allows more.

        What far senders are granted arrives a round trip later, and by then the limit allows more.
        Of what others have on their way, as much will have arrived as comes in such a time.
        """
        own = min(flow.round_trip_ns, _MAX_ROUND_TRIP_NS)
        near = far = outstanding = 0
        for each in list(self._granted.values()):
            if now > each.last_ns + _SILENT_NS + 4 * each.round_trip_ns:
                each.outstanding = 0
            if each.outstanding <= 0 and not each.repeat_ns:
                del self._granted[each.cookie]
                continue
            # Who is held up elsewhere, or has little to send, leaves its window to the others.
            used = min(max(each.outstanding, 0), each.likely)
            if each.is_far():
                used = min(used, max(each.outstanding - each.unused, 0))
                way = min(each.round_trip_ns, _MAX_ROUND_TRIP_NS)
                far += used * own // max(own, way)
            else:
                near += used
            outstanding += used
        owed = self._owed(now)
        wait = owed + (near * self._inverse >> _SHIFT)
        if flow.is_far():
            # What a slow start has left out is not made up for at once: the path may be full.
            wait = max(wait, -max(own // _EXTRA, _LEAST_EXTRA_NS))
            wait += (far * self._inverse >> _SHIFT) - own
        if self._others is not None:
            turn = self._others.wait(now, owed, outstanding * self._inverse >> _SHIFT)
            wait = wait if turn is None else min(wait, turn)
        return wait

    def _owed(self, now: int) -> int:
        """Return for how many nanoseconds the limit is used up.

        After a change of the rate the programs charge it anew with the next packet only, which may
        be one that waits for its window.
        """
        owed = self._even_at_ns - now
        if owed > 0 and self._charged_at:
            return owed * self._inverse // self._charged_at
        return owed

    def _grant(self, flow: Flow, now: int) -> None:
        # If much of the last window is left, the answer does not measure the round trip.
        is_used_up = flow.remaining() < 2 * flow.segment and now > flow.measurable_ns
        flow.granted_ns = now if is_used_up else 0
        flow.granted_from, flow.last_ns = flow.edge, now
        before = max(flow.outstanding, 0)
        self._send(flow, self._next_edge(flow), now)
        flow.outstanding = flow.usable()
        if self._others is not None:
            self._others.granted(now, (flow.outstanding - before) * self._inverse >> _SHIFT)
        flow.repeats = 0
        self._granted[flow.cookie] = flow
        flow.repeat_ns = now + _REPEAT_NS + 4 * flow.round_trip_ns

    def _repeat(self, flow: Flow, now: int) -> None:
        """Repeat a window: it, or the answer to it, may have been lost."""
        self._send(flow, flow.edge, now)
        flow.repeats += 1
        if flow.repeats < _MAX_REPEATS:
            flow.repeat_ns = now + (_REPEAT_NS + 4 * flow.round_trip_ns << flow.repeats)
            return
        flow.repeat_ns = 0
        flow.unanswered += 1
        if not flow.answered and flow.unanswered >= _MAX_UNANSWERED:
            self._give_up(flow, "unanswered")
            self._send(flow, flow.promised, clock.monotonic_ns())

    def _is_ungated(self, cookie: int) -> bool:
        return bool(self.shared.ungated[cookie % len(self.shared.ungated)] == cookie)

    def _give_up(self, flow: Flow, why: str) -> None:
        """Leave a connection to the kernel: it cannot be helped from here."""
        self._granted.pop(flow.cookie, None)
        if self.flows.pop(flow.cookie, None) is None:
            return
        self.shared.ungated[flow.cookie % len(self.shared.ungated)] = flow.cookie
        with suppress(ValueError):
            self._queue.remove(flow)
        self._keeper.tell(self, ungated=why)

    def _send(self, flow: Flow, edge: int, now: int) -> None:
        """Send its acknowledgement with the window up to an edge."""
        flow.held = False
        window = signed(edge - flow.acked) >> flow.scale
        window = min(max(window, 0), 0xFFFF)
        packet, at = flow.packet, flow.at
        if not flow.base:
            flow.base = _blank(packet, at, flow.stamp_at)
        total = flow.base + window
        struct.pack_into("!H", packet, at + 14, window)
        if flow.stamp_at:
            # The timestamp advances with the clock: an old one would look like an old packet.
            stamp = (flow.stamp + (now - flow.taken_ns) // _MS) & 0xFFFFFFFF
            if flow.last_stamp is not None and signed(stamp - flow.last_stamp) < 0:
                stamp = flow.last_stamp
            flow.last_stamp = stamp
            struct.pack_into("!I", packet, at + flow.stamp_at, stamp)
            total += (stamp >> 16) + (stamp & 0xFFFF)
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", packet, at + 16, ~total & 0xFFFF)
        if not self._keeper.send(flow):
            self._give_up(flow, "unsent")
        told = (flow.acked + (window << flow.scale)) & 0xFFFFFFFF
        if signed(told - flow.edge) > 0:
            flow.edge = told


def _keep(flow: Flow, packet: bytearray, at: int, following: int, passed: bool) -> Optional[bool]:
    """Make an acknowledgement the flow's template; return whether it has SACK blocks.

    None if it has options that only the kernel may send.
    """
    length = len(packet)
    stamp_at, has_sack = 0, False
    if length == at + 32 and packet[at + 20 : at + 24] == _STAMPED:
        stamp_at = 24
    else:
        for kind, where in _options(packet, at, length):
            if kind in _FOREIGN_OPTIONS:
                return None
            if kind == _TIMESTAMP and where % 2 == 0:
                stamp_at = where + 2
            has_sack = has_sack or kind == _SACK
    if passed:  # a data segment: what follows it is a pure acknowledgement
        struct.pack_into("!I", packet, at + 4, following)
        packet[at + 13] = 0x10 | packet[at + 13] & 0x40
        if at == 20:
            struct.pack_into("!H", packet, 2, length)
        else:
            struct.pack_into("!H", packet, 4, length - 40)
    flow.stamp_at = stamp_at
    if stamp_at:
        flow.stamp = int.from_bytes(packet[at + stamp_at : at + stamp_at + 4], "big")
    # Of several that come at once, most are never sent on.
    flow.packet, flow.at, flow.base = packet, at, 0
    return has_sack


def _target(address: bytearray, device: int) -> tuple[Any, ...]:
    """Return where a packet goes, as sendto(2) has it."""
    if len(address) == 4:
        return socket.inet_ntop(socket.AF_INET, address), 0
    shown = socket.inet_ntop(socket.AF_INET6, address)
    return (shown, 0, 0, device) if device else (shown, 0)  # a link-local one is a device's


def _blank(packet: bytearray, at: int, stamp_at: int) -> int:
    """Blank out a packet's window, checksum and timestamp; return the sum of the rest."""
    if at == 20:
        packet[4] = packet[5] = 0  # the kernel fills in the identification
    packet[at + 14 : at + 18] = b"\0\0\0\0"
    if stamp_at:
        packet[at + stamp_at : at + stamp_at + 4] = b"\0\0\0\0"
    first = 12 if at == 20 else 8
    words: tuple[int, ...] = struct.unpack_from(f"!{(len(packet) - first) // 2}H", packet, first)
    return socket.IPPROTO_TCP + len(packet) - at + sum(words)


def _options(packet: bytearray, at: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the kind of each TCP option, and its offset in the TCP header."""
    offset = 20
    while at + offset < length:
        kind = packet[at + offset]
        if kind == 0:
            return
        if kind == 1:
            offset += 1
            continue
        if at + offset + 1 >= length or packet[at + offset + 1] < 2:
            return
        yield kind, offset
        offset += packet[at + offset + 1]


class Keeper:
    """The loop over the owner's messages, acknowledgements and the clock."""

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._gates: dict[int, Gate] = {}
        self._networks: dict[int, Network] = {}
        self._ring: Optional[Ring] = None
        self._wakeups = helper.Wakeups(owner)

    def run(self) -> None:
        """Serve until the owner is gone."""
        is_idle = True
        try:
            while True:
                ready = self._wakeups.wait(is_idle=is_idle)
                if self._owner.fileno() in ready and not self._listen():
                    return
                is_idle = self._turn()
        finally:
            for gate in self._gates.values():
                gate.close()

    def send(self, flow: Flow) -> bool:
        """Send a flow's packet in its namespace; False if that cannot be done."""
        network = self._networks.get(flow.network)
        own = network and (network.ipv4 if flow.at == 20 else network.ipv6)
        if not own:
            return False
        ancillary = []
        if flow.mark:
            ancillary.append((socket.SOL_SOCKET, _SO_MARK, struct.pack("=I", flow.mark)))
        if flow.device and flow.at == 20:
            ancillary.append((socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=I8x", flow.device)))
        elif flow.device:
            device = struct.pack("=16xI", flow.device)
            ancillary.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, device))
        try:
            if ancillary:
                own.sendmsg([flow.packet], ancillary, socket.MSG_DONTWAIT, flow.target)
            else:
                own.sendto(flow.packet, socket.MSG_DONTWAIT, flow.target)
        except BlockingIOError:  # as good as lost: the window is repeated
            return True
        except OSError:
            return False
        return True

    def tell(self, gate: Gate, **what: Any) -> None:
        """Tell the owner something of a gate."""
        helper.report(self._owner, gate=gate.number, **what)

    def _turn(self) -> bool:
        """Look at what has come and do what is due; return whether to sleep before the next."""
        now = clock.monotonic_ns()
        turn: dict[int, Gate] = {}
        for record in self._ring.records() if self._ring is not None else ():
            number = _GATE_OF_ACK.unpack_from(record, ThrottleAck.gate.offset)[0]
            gate = turn.get(number) or self._begin_turn(number, turn)
            if gate is not None:
                gate.take(record, now)
        for number, gate in self._gates.items():
            if gate.due_ns and gate.due_ns <= now and number not in turn:
                self._begin_turn(number, turn)
        for gate in turn.values():
            gate.end_turn(now)
        if self._ring is not None and not self._ring.is_empty():
            if not turn:
                self._wakeups.wake_soon()
            return not turn
        dues = (gate.due_ns for gate in self._gates.values() if gate.due_ns)
        self._wakeups.wake_at(min(dues, default=0))
        return True

    def _begin_turn(self, number: int, turn: dict[int, Gate]) -> Optional[Gate]:
        gate = self._gates.get(number)
        if gate is not None:
            turn[number] = gate
            gate.begin_turn()
        return gate

    def _listen(self) -> bool:
        """Handle one of the owner's messages; return False if it is gone."""
        heard = helper.listen(self._owner)
        if heard is None:
            return False
        message, fds = heard
        if "network" in message:
            own = [socket.socket(fileno=fd) for fd in fds]
            self._networks[message["network"]] = Network(own[0], own[1] if len(own) > 1 else None)
        elif "ring" in message:
            self._ring = Ring(fds[0], message["ring"])
            self._wakeups.add(fds[0])
        elif "close" in message:
            gate = self._gates.pop(message["close"], None)
            if gate is not None:
                gate.close()
        else:
            if fds:
                self._open(message["gate"], message["slot"], *fds)
            gate = self._gates[message["gate"]]
            if message["shared"]:
                gate.share()
            self._serve(gate, message["networks"])
        return True

    def _open(self, number: int, slot: int, gate: int, buckets: int, configs: int) -> None:
        at = slot * ctypes.sizeof(ThrottleGate)
        memory = mmap.mmap(gate, at + ctypes.sizeof(ThrottleGate))
        os.close(gate)
        shared = ThrottleGate.from_buffer(memory, at)
        element = slot * _DIRECTIONS + _DOWNLOAD
        bucket = Element(buckets, element, ThrottleBucket)
        config = Element(configs, element, ThrottleConfig)
        self._gates[number] = Gate(self, number, shared, bucket, config)

    def _serve(self, gate: Gate, networks: Sequence[int]) -> None:
        for index, inode in enumerate(networks):
            gate.shared.namespaces[index] = inode
        gate.shared.alive = 1
        self.tell(gate, serves=len(networks))


def main(fd: int) -> None:
    """Keep the gates of the process at the other end of a Unix socket."""
    keeper = Keeper(helper.begin(fd, "pybpft-keeper"))
    helper.without_collector()
    with suppress(ConnectionError):
        keeper.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
