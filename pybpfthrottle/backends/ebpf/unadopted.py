"""Shape, from user space, connections that were open before the limit.

Before Linux 6.12 these cannot be handed to a program: a chore does for them what the shaper does
for all others (ebpf_src/shape.h). It runs only four times a second. That is enough for downloads,
whose windows the gate's keeper opens. It divides the rate of uploads from the start, whereas the
shaper lets each connection find out how much there is.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any, Callable, Iterable, Optional

from pybpfthrottle.backends.ebpf.bucket import Seen
from pybpfthrottle.backends.ebpf.records import (
    ThrottleGateState,
    ThrottleGateWindow,
    ThrottlePacing,
    ThrottlePacingRate,
    ThrottleSocket,
)
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.plain import Data, NamedTuple
from pybpfthrottle.linux import sockets
from pybpfthrottle.linux.sockets import Borrowed, Lenders, Place, TcpInfo
from pybpfthrottle.model import Rate

_PERIOD_S = 0.25
# Rounds take at most this fraction of one CPU's time, however many connections there are.
_MOST_BUSY = 0.05
# In rounds: for the keeper to be able to send in a connection's network namespace.
_PATIENCE = 4
_RECENT_MS = 1000
_TCP, _CLAMP = socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP
# A smaller share is no use: TCP waits out the gap between two segments, whatever is set meanwhile.
_LEAST = 1024
# 1/N of a fair share: the extra on top of it, and the least that is left of it.
_EXTRA = 1 << ThrottlePacing.PACING_EXTRA_SHIFT
_LEAST_SHARE = 1 << ThrottlePacing.PACING_LEAST_SHIFT


class _Usage(Data):
    """How fast a count of bytes has grown lately."""

    count: int
    at_s: float
    bytes_per_s: Optional[float] = None

    def look(self, count: int) -> Optional[float]:
        """Add a count; return bytes per second, or None if the last count is too recent."""
        now = time.monotonic()
        elapsed = now - self.at_s
        if elapsed < _PERIOD_S / 2:
            return None
        latest = (count - self.count) / elapsed
        self.bytes_per_s = latest if self.bytes_per_s is None else (self.bytes_per_s + latest) / 2
        self.count, self.at_s = count, now
        return self.bytes_per_s


class _Options(NamedTuple):
    """What a connection has."""

    pacing: int  # bytes per second
    clamp: int  # of its receive window, in bytes

    @classmethod
    def of(cls, own: socket.socket) -> _Options:
        pacing = own.getsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE, 4)
        return cls(int.from_bytes(pacing, sys.byteorder), own.getsockopt(_TCP, _CLAMP))


class _Flow(Data):
    """A connection; ``original`` is what it had.

    ``wants`` is what it uses of the upload limit, or infinite if it uses about all it may.
    ``refusals`` counts the rounds in which the gate could not take it.
    """

    place: Place
    original: _Options
    segment_bytes: int
    usage: _Usage
    wants: float
    pacing: int = 0
    clamp: int = 0
    gated: bool = False
    gate: int = ThrottleGateState.GATE_UNKNOWN
    refusals: int = 0


class Unadopted:
    """Shapes the connections that it is given.

    They are paced at a share of ``rate``, which is None for no pacing. Acknowledgements of their
    downloads go through the gate unless ``advertised`` returns 0. It returns the window in bytes
    that the kernel may advertise by itself. ``policed`` is called when the gate does not take some.

    Each change is first recorded in ``shaped``, the map SOCKETS, so that whoever has that map can
    restore the connections, as ``connections.restore`` does. A descriptor is borrowed only for a
    moment, lest its owner's close have no effect. Linux 5.6.
    """

    def __init__(
        self,
        pids: Callable[[], Iterable[int]],
        shaped: Map[Any, Any],
        seen: Callable[[], Seen],
        *,
        advertised: Callable[[], int],
        policed: Callable[[], None],
        slot: int = 0,
    ) -> None:
        self._slot = slot
        self._advertised = advertised
        self._on_policed = policed
        self._pids = pids
        self._records: Map[int, ThrottleSocket] = shaped.typed(U32, StructureCodec(ThrottleSocket))
        self._seen = seen
        self._flows: dict[int, _Flow] = {}
        # What their uploads share; None leaves them as they were.
        self.rate: Optional[Rate] = None
        self._level = 0.0
        self._passed = _Usage(0, time.monotonic())
        self.due_s = math.inf

    def __len__(self) -> int:
        """Return how many connections are left."""
        return len(self._flows)

    @property
    def policed(self) -> int:
        """How many downloads are not gated, although they were to be."""
        return sum(flow.refusals > _PATIENCE for flow in self._flows.values())

    def take(self, found: Borrowed) -> None:
        """Shape one more connection, from the next round on. Raises OSError."""
        info = TcpInfo.of(found.socket)
        flow = _Flow(
            found.place,
            _Options.of(found.socket),
            found.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG),
            _Usage(info.bytes_acked, time.monotonic()),
            math.inf if info.last_data_sent_ms < _RECENT_MS else 0.0,
        )
        self._flows[found.place.inode] = flow

    def forget(self, own: socket.socket) -> None:
        """Have nothing to do with a connection any more."""
        self._flows.pop(os.fstat(own.fileno()).st_ino, None)

    def fileno(self) -> int:
        """Return -1: it has no descriptor."""
        return -1

    def run(self) -> None:
        """Measure the connections, share the rate accordingly, and see to the gate."""
        begin = time.monotonic()
        self._round()
        end = time.monotonic()
        self.due_s = end + max(_PERIOD_S, (end - begin) / _MOST_BUSY)

    def _round(self) -> None:
        """Visit all connections; look for those that have moved, and forget those not found."""
        aims = self._share(), self._advertised()
        with Lenders() as lenders:
            flows = self._flows.values()
            lost = [flow for flow in flows if not self._visit(flow, lenders, *aims)]
            places = sockets.places(self._pids()) if lost else {}
            for flow in lost:
                inode = flow.place.inode
                flow.place = places.get(inode, flow.place)
                if inode not in places or not self._visit(flow, lenders, *aims):
                    del self._flows[inode]
        if self.policed:
            self._on_policed()

    def release(self) -> None:
        """Give all connections back what they had, wherever they are."""
        self.rate, self._advertised = None, lambda: 0
        self._round()
        self._flows.clear()

    def _share(self) -> int:
        """Return what each may send, in bytes per second; 0 if nothing is limited.

        This is a fair share of the rate: a little more while next to nothing is owed (TCP paces
        its headers too), and less while much is owed.
        """
        if self.rate is None:
            return 0
        seen = self._seen()
        wants = [flow.wants for flow in self._flows.values()]
        self._passed.look(seen.passed)
        if seen.flows:
            # The shaper's connections have whatever passed besides ours.
            ours = sum(flow.usage.bytes_per_s or 0 for flow in self._flows.values())
            each = max(0, (self._passed.bytes_per_s or 0) - ours) / seen.flows
            wants += [each if 2 * each < self._level else math.inf] * seen.flows
        self._level = fair_share(self.rate.bytes_per_s, wants)
        extra = 1 - max(0, seen.owed_ns) / ThrottlePacing.PACING_TARGET_NS
        factor = max(1 + extra / _EXTRA, 1 / _LEAST_SHARE)
        return min(max(_LEAST, int(self._level * factor)), ThrottlePacingRate.UNLIMITED)

    def _visit(self, flow: _Flow, lenders: Lenders, pacing: int, window: int) -> bool:
        """Shape a connection and measure what it took; return False if it is gone."""
        with suppress(OSError), lenders.borrow(flow.place) as own:
            info = TcpInfo.of(own)
            if not info.is_connected:
                return False
            used = flow.usage.look(info.bytes_acked)
            if used is not None:
                flow.wants = used if 2 * used < flow.pacing else math.inf
            # Not before somebody else opens the window.
            clamp = 0
            if window and self._is_gated(flow, own):
                clamp = max(window, _least_window(flow.segment_bytes))
            paces = _differ(pacing, flow.pacing)
            # TCP's autotuning raises it.
            clamps = _differ(clamp, flow.clamp) or 0 < clamp < own.getsockopt(_TCP, _CLAMP)
            if paces or clamps or bool(window) != flow.gated:
                flow.gated = bool(window)
                self._record(flow, own, pacing, clamp)
            if paces:
                _set_pacing(own, pacing or flow.original.pacing)
                flow.pacing = pacing
            if clamps:
                own.setsockopt(_TCP, _CLAMP, clamp or flow.original.clamp)
                flow.clamp = clamp
            return True
        return False

    def _is_gated(self, flow: _Flow, own: socket.socket) -> bool:
        """Look up, until it is so, whether the gate's program has found that it can take it."""
        if flow.gate != ThrottleGateState.GATE_READY:
            with suppress(KeyError):
                record = self._records[own.fileno()]
                flow.gate = record.gate
                flow.segment_bytes = max(flow.segment_bytes, record.segment)
            refused = flow.gate in (ThrottleGateState.GATE_ASKED, ThrottleGateState.GATE_NEVER)
            flow.refusals = flow.refusals + 1 if refused else 0
        return flow.gate == ThrottleGateState.GATE_READY

    def _record(self, flow: _Flow, own: socket.socket, pacing: int, clamp: int) -> None:
        # What the programs write meanwhile may be lost: they find it out again.
        try:
            record = self._records[own.fileno()]
        except KeyError:
            record = ThrottleSocket(
                original_pacing=flow.original.pacing,
                original_clamp=flow.original.clamp,
                segment=flow.segment_bytes,
                slot=self._slot,
            )
        record.pacing, record.clamp, record.gated = pacing, clamp, flow.gated
        self._records[own.fileno()] = record


def _least_window(segment_bytes: int) -> int:
    return 2 * segment_bytes + ThrottleGateWindow.LEAST_GATE_BYTES


def _differ(value: int, before: int) -> bool:
    """Whether a change is worth while."""
    step = before >> ThrottlePacing.PACING_STEP_SHIFT
    return value != before and abs(value - before) >= step


def _set_pacing(own: socket.socket, rate: int) -> None:
    option = rate.to_bytes(4, sys.byteorder)
    own.setsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE, option)


def fair_share(rate: float, wants: Iterable[float]) -> float:
    """Return the most that each may have if those that want less leave the rest to the others."""
    share = rate
    ascending = sorted(wants)
    for count, want in zip(range(len(ascending), 0, -1), ascending):
        share = rate / count
        if want >= share:
            break
        rate -= want
    return share
