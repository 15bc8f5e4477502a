"""The queue of a limit: where what has no receive window, such as QUIC, waits for its turn.

Each flow has a queue of its own, and they take turns by bytes; a flow that has not waited comes
first. So a ping is not held up by a download. A flow that waits for too long loses single packets,
or has them marked. Source: RFC 8289 (CoDel), RFC 8290 (FQ-CoDel), RFC 3168 (ECN).

A packet may go once nothing is owed to the limit. The policer charges for it then, as for anything
else, so all that is limited together shares one bucket.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Iterator, NamedTuple, Optional, Protocol

from pybpfthrottle.backends.ebpf.records import ThrottleShift
from pybpfthrottle.diversion.packets import Packet

_MS = 1_000_000
_SECOND_NS = 1000 * _MS
_SHIFT = int(ThrottleShift.INVERSE_RATE_SHIFT)

# CoDel's own values.
TARGET_NS, INTERVAL_NS = 5 * _MS, 100 * _MS
# So many packets of a flow are no queue. No sender has less than two on their way, and one like
# Reno that loses a packet in 70 has 10 in the middle.
LEAST_PACKETS = 12
# Nor are these, or more if that is too few for who slows down, while they wait for less than that:
# Reno loses one packet in 2,000 if at most 73 are on their way and in the queue. Another flow does
# not wait for them.
USUAL_PACKETS, LONG_NS = 72, 200 * _MS
# A slow start doubles what it has on its way before it knows, and is told sooner.
FIRST_NS = 100 * _MS
# So one that has a queue although it loses such a share does not slow down for losses: nginx 1.26,
# for one, always has 131 KB on their way. It would lose more and more for nothing.
LEAST_APART = 70
# If a flow leaves the limit unused so soon after a loss, it had less in the queue than on its way,
# as Reno halves both together. It may have half as many packets more in the queue next time.
_REGAINING_NS, _MOST_USUAL = _SECOND_NS, 2048
# The limit is unused if nothing was owed for so long.
_UNUSED_NS = 2 * _MS
# If a flow is over the target again so soon, it goes on where it was.
_RECENT_NS = 16 * INTERVAL_NS
# What a flow may send in its turn: a packet of the usual largest size.
_TURN_BYTES = 1514
# Of all flows together. Beyond, the longest flow loses its oldest packets.
_MOST_NS, _LEAST_BYTES = 500 * _MS, 64 * 1024
# Below that the policer does not count a packet as lost, and none gets lost.
_LEAST_LOST_BYTES = 160
# What comes later than this helps nobody: the sender has sent it once more.
_LATEST_NS = _SECOND_NS
# What may be owed when a packet goes: so they leave together, and not each by a wake-up.
_BURST_NS = _MS
# The rate may change while packets wait.
_SHORTEST_WAIT_NS, _LONGEST_WAIT_NS = _MS // 4, 20 * _MS
# By how much what is guaranteed beside TCP may be late, and be made up for.
_HALF_NS = 50 * _MS


class Record(Protocol):
    """An element of a map."""

    def read(self) -> Any:
        """Return the current value."""

    def close(self) -> None:
        """Close the map."""


class Waiting(NamedTuple):
    """A packet that waits, since when, and how it is given back in which network namespace."""

    packet: Packet
    at_ns: int
    way: tuple[bytes, int, int]
    network: int


class Leaving(NamedTuple):
    """A packet that waits no longer, and whether it is one that gets lost."""

    waiting: Waiting
    is_lost: bool


class _Flow:
    """The packets of one flow, and what CoDel knows of it."""

    __slots__ = (
        *("bytes", "count", "deficit", "drop_ns", "is_dropping", "key", "lost_ns", "over_ns"),
        *("since", "waiting"),
    )

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.waiting: deque[Waiting] = deque()
        self.bytes = 0
        self.deficit = _TURN_BYTES
        self.over_ns = self.drop_ns = self.lost_ns = self.count = 0
        self.is_dropping = False
        # How many packets have left since one got lost.
        self.since = LEAST_APART


class Fair:
    """Queues of flows that take turns."""

    def __init__(self) -> None:
        self._flows: dict[bytes, _Flow] = {}
        self._new: deque[_Flow] = deque()
        self._old: deque[_Flow] = deque()
        self.bytes = 0
        self._lost: deque[Waiting] = deque()
        self.marked = 0
        # The flow that was the last to slow down, when it was told to, and what is usual for it.
        self._slowed, self._slowed_ns = b"", 0
        self._usual = USUAL_PACKETS

    def put(self, one: Waiting) -> None:
        """Have a packet wait."""
        key = one.packet.flow()
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(key)
            self._new.append(flow)
        flow.waiting.append(one)
        size = len(one.packet.data)
        flow.bytes += size
        self.bytes += size

    def trim(self, most_bytes: int, now_ns: int) -> None:
        """Have the oldest packets of the longest flows get lost, if there are too many."""
        while self.bytes > most_bytes:
            longest = max(self._flows.values(), key=lambda each: each.bytes)
            longest.lost_ns = now_ns
            self._lost.append(self._pop(longest))

    def get(self, now_ns: int) -> Optional[Leaving]:
        """Return the next packet that leaves, or None if there is none."""
        while not self._lost and (self._new or self._old):
            flows = self._new or self._old
            flow = flows[0]
            if not flow.waiting:
                flows.popleft()
                self._end(flow, flows is self._new)
            elif flow.deficit <= 0:
                flow.deficit += _TURN_BYTES
                flows.popleft()
                self._old.append(flow)
            else:
                one = self._next(flow, now_ns)
                flow.deficit -= len(one.waiting.packet.data) * (not one.is_lost)
                return one
        return Leaving(self._lost.popleft(), True) if self._lost else None

    def regain(self, one: Waiting) -> None:
        """Allow a longer queue: the limit was unused until this packet came, and none waits."""
        if one.at_ns - self._slowed_ns < _REGAINING_NS and one.packet.flow() == self._slowed:
            self._usual = min(self._usual * 3 // 2, _MOST_USUAL)
            self._slowed_ns = 0

    def _slow_down(self, flow: _Flow, now_ns: int) -> None:
        """Note that a flow is told to; if what it had was enough last time, less may do."""
        if flow.key != self._slowed:
            self._usual = USUAL_PACKETS
        elif self._slowed_ns:
            self._usual = max(self._usual * 7 // 8, USUAL_PACKETS)
        self._slowed, self._slowed_ns = flow.key, now_ns

    def _end(self, flow: _Flow, is_new: bool) -> None:
        """Forget a flow that is empty, or it would be a new one with its next packet."""
        if is_new and self._old:
            self._old.append(flow)
        else:
            del self._flows[flow.key]

    def _pop(self, flow: _Flow) -> Waiting:
        one = flow.waiting.popleft()
        size = len(one.packet.data)
        flow.bytes -= size
        self.bytes -= size
        return one

    def _next(self, flow: _Flow, now_ns: int) -> Leaving:
        """Return a flow's next packet, and whether it gets lost."""
        one = self._pop(flow)
        flow.since += 1
        is_over = self._is_over(flow, now_ns - one.at_ns, now_ns)
        is_large = len(one.packet.data) >= _LEAST_LOST_BYTES
        is_due = is_over and is_large and self._is_due(flow, one.at_ns, now_ns)
        if now_ns - one.at_ns > _LATEST_NS:
            return Leaving(one, True)
        if not is_due:
            return Leaving(one, False)
        self._slow_down(flow, now_ns)
        is_marked = one.packet.mark_congested()
        self.marked += is_marked
        return Leaving(one, not is_marked)

    def _is_over(self, flow: _Flow, waited_ns: int, now_ns: int) -> bool:
        """Whether a flow has had a queue that is too long for a whole interval."""
        usual = self._usual if flow.key == self._slowed else USUAL_PACKETS
        least = LEAST_PACKETS if waited_ns >= LONG_NS else usual
        if waited_ns < TARGET_NS or len(flow.waiting) < least:
            flow.over_ns, flow.is_dropping = 0, False
        elif waited_ns >= FIRST_NS and not flow.drop_ns:
            flow.over_ns = now_ns
        elif not flow.over_ns:
            flow.over_ns = now_ns + INTERVAL_NS
        return bool(flow.over_ns) and now_ns >= flow.over_ns

    def _is_due(self, flow: _Flow, at_ns: int, now_ns: int) -> bool:
        """Whether a flow that is over the target loses a packet now; more often with each.

        What came before the last loss waits for what was sent before its sender knew of that.
        """
        if not flow.is_dropping:
            is_recent = flow.count > 2 and now_ns - flow.drop_ns < _RECENT_NS
            flow.count = flow.count - 2 if is_recent else 0
            flow.is_dropping, flow.drop_ns = True, now_ns
        if now_ns < flow.drop_ns or at_ns < flow.lost_ns or flow.since < LEAST_APART:
            return False
        flow.lost_ns = now_ns
        flow.count += 1
        flow.since = 0
        flow.drop_ns += int(INTERVAL_NS / flow.count**0.5)
        return True


class Queue:
    """The queue of one limit. ``due_ns`` is when packets may go, 0 if none wait."""

    def __init__(self, bucket: Record, config: Record, gate: Record) -> None:
        """Take the elements of the limit's download in its maps."""
        self._records = bucket, config, gate
        self._fair = Fair()
        self._even_ns = self._half_ns = self._debt_ns = self._inverse = 0
        self._has_to_share = False
        self.due_ns = 0

    def __bool__(self) -> bool:
        return bool(self._fair.bytes)

    @property
    def marked(self) -> int:
        """How many packets were marked instead of lost."""
        return self._fair.marked

    def put(self, one: Waiting) -> None:
        """Have a packet wait."""
        if not self._fair.bytes and one.at_ns - self._even_ns > _UNUSED_NS:
            self._fair.regain(one)
        self._fair.put(one)

    def leaving(self, now_ns: int, most: int) -> Iterator[Leaving]:
        """Yield the packets that leave now, so many at most, and set when others may."""
        self._read(now_ns)
        while most and self._may_go(now_ns):
            one = self._fair.get(now_ns)
            if one is None:
                break
            if not one.is_lost:
                self._charge(len(one.waiting.packet.data))
            most -= 1
            yield one
        self.due_ns = self._next_ns(now_ns) if self._fair.bytes else 0

    def all(self) -> Iterator[Leaving]:
        """Yield all packets, in the order in which they would leave: nothing is limited here."""
        while True:
            one = self._fair.get(0)
            if one is None:
                return
            yield one

    def close(self) -> None:
        """Close the maps."""
        for record in self._records:
            record.close()

    def _read(self, now_ns: int) -> None:
        """Read the rate, what is owed, and whether TCP waits for it."""
        bucket, config, gate = (record.read() for record in self._records)
        self._inverse = config.inverse_rate if config.rate_bytes_per_s else 0
        most_bytes = max(_LEAST_BYTES, config.rate_bytes_per_s * _MOST_NS // _SECOND_NS)
        self._fair.trim(most_bytes, now_ns)
        self._even_ns = max(bucket.even_at_ns, now_ns - max(config.credit_ns, bucket.credit_ns))
        self._debt_ns = config.debt_ns + max(config.slack_ns, bucket.slack_ns)
        self._half_ns = min(max(self._half_ns, now_ns - _HALF_NS), now_ns + _HALF_NS)
        self._has_to_share = bool(gate.alive and gate.next_due_ns)

    def _may_go(self, now_ns: int) -> bool:
        """Whether a packet may go: if nothing is owed, or within half of the limit.

        So much is guaranteed beside TCP that is policed, and it is all while TCP waits, or who
        never slows down would leave nothing to those who do.
        """
        owed_ns = self._even_ns - now_ns
        is_even = not self._has_to_share and owed_ns < _BURST_NS
        # Beyond its debt the policer would drop it.
        return is_even or (owed_ns < self._debt_ns and self._half_ns - now_ns < _BURST_NS)

    def _charge(self, billed: int) -> None:
        cost_ns = billed * self._inverse >> _SHIFT
        self._even_ns += cost_ns
        self._half_ns += 2 * cost_ns

    def _next_ns(self, now_ns: int) -> int:
        due_ns = self._half_ns if self._has_to_share else min(self._half_ns, self._even_ns)
        return now_ns + min(max(due_ns - now_ns, _SHORTEST_WAIT_NS), _LONGEST_WAIT_NS)
