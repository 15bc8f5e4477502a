"""One transfer under one limit: some processes and a line for it alone, and what they report."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import NamedTuple, Optional, Sequence

from benches import figures
from benches.child import PATIENCE_S, Child, TransferError
from benches.figures import Figures
from benches.judge import Reports, judge
from benches.line import DelayLine, LineSpec
from benches.methods import LIMITED_PORT, OTHER_PORT, Method
from benches.ping import Sample
from benches.surroundings import python
from benches.tcp_info import Sent
from benches.traffic import Plan, Received
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.model import Direction, Rate

STEP_S = 0.1


class Bottleneck(NamedTuple):
    """The narrowest place of a line, and the queue before it."""

    rate: Rate
    queue_bytes: int


class Cell(NamedTuple):
    """What is the same for all methods that are compared. A round trip of 0 ms is a veth pair."""

    direction: Direction
    rate: Rate
    flows: int
    congestion_control: str
    round_trip_ms: float
    bottleneck: Optional[Bottleneck] = None
    # What a UDP flow beside them offers, in per cent of the limit.
    udp_percent: int = 0
    # The packets that are lost, each way, and the round trip in the middle third of a transfer.
    lost_percent: float = 0.0
    middle_ms: Optional[float] = None
    # What both devices have, as "ip link set" takes it.
    link: str = ""

    def __str__(self) -> str:
        path = f"{self.round_trip_ms:g} ms" if self.round_trip_ms else "direct"
        if self.bottleneck:
            path += f" through {self.bottleneck.rate}"
        if self.middle_ms is not None:
            path += f", {self.middle_ms:g} ms in the middle"
        if self.lost_percent:
            path += f", {self.lost_percent:g} % lost"
        if self.link:
            path += f", {self.link}"
        flows = f"{self.flows} flow" + "s" * (self.flows > 1)
        if self.udp_percent:
            flows += f" beside UDP of {self.udp_percent} %"
        return f"{self.rate} {self.direction}, {flows}, {self.congestion_control}, {path}"

    def wire(self, seconds: float) -> Wire:
        """The two namespaces, joined accordingly, for a transfer of this length."""
        changes = self.middle_ms is not None
        if not (self.round_trip_ms or self.bottleneck or self.lost_percent or changes):
            return Wire()
        narrow = self.bottleneck
        later = [(seconds / 3, self.middle_ms or 0), (seconds * 2 / 3, self.round_trip_ms)]
        return DelayLine(
            LineSpec(
                delay_s=self.round_trip_ms / 2000,
                rate_bytes_per_s=narrow.rate.bytes_per_s if narrow else None,
                queue_bytes=narrow.queue_bytes if narrow else 0,
                lost=self.lost_percent / 100,
                later=[(at_s, ms / 2000) for at_s, ms in later] if changes else [],
            )
        )


class Outcome(NamedTuple):
    """A transfer's figures, its bytes in each ``STEP_S``, and what else explains them."""

    figures: Figures
    timeline: list[int]
    dropped_by_line: int
    max_pacing_bytes_per_s: list[int]


class _Ends(NamedTuple):
    """The processes of a transfer that report."""

    sender: Child
    receiver: Child
    client: Child
    outside: Child
    # The served end of a UDP flow.
    datagrams: Optional[Child]


def transfer(cell: Cell, method: Method, seconds: float) -> Outcome:
    """Limit, transfer, and judge. Raises TransferError, MethodError or NamespaceError."""
    with ExitStack() as stack:
        wire = stack.enter_context(cell.wire(seconds))
        if cell.link:
            wire.change(cell.link)
        method.apply(wire.client, cell.direction, cell.rate)
        reports = _collect(_start(stack, wire, cell, method, seconds), seconds)
        dropped = wire.dropped() if isinstance(wire, DelayLine) else 0
    if not any(map(any, reports.received.bins)):
        raise TransferError("no data arrived")
    return Outcome(
        judge(cell.rate, reports),
        _steps(figures.total(reports.received.bins)),
        dropped,
        [flow.max_pacing_bytes_per_s for flow in reports.sent],
    )


def _start(stack: ExitStack, wire: Wire, cell: Cell, method: Method, seconds: float) -> _Ends:
    """Start the two ends, and the small flows with who answers them."""

    def here(*command: str) -> Child:
        return Child(stack, wire.client.inside(*command))

    def there(*command: str) -> Child:
        child = Child(stack, wire.server.inside(*command))
        child.ready()
        return child

    upload = cell.direction is Direction.UPLOAD
    served, asked = ("receive", "send") if upload else ("send", "receive")
    address, inside_port, outside_port = wire.server.address, LIMITED_PORT | 1, OTHER_PORT
    there(*python("benches.ping", "--echo", address, str(inside_port), str(outside_port)))
    companions = [python("benches.ping", address, str(inside_port))]
    datagrams = None
    if cell.udp_percent:
        offered = cell.rate.bytes_per_s * cell.udp_percent // 100
        flow = (address, str(LIMITED_PORT), str(offered))
        datagrams = there(*python("benches.datagrams", "accept", served, *flow))
        companions.append(python("benches.datagrams", "connect", asked, *flow))
    plan = json.dumps(
        Plan(address, LIMITED_PORT, cell.flows, seconds, cell.congestion_control, companions)
    )
    server = there(*python("benches.traffic", "accept", served, plan))
    outside = here(*python("benches.ping", address, str(outside_port)))
    prefix = method.prefix(cell.direction, cell.rate)
    client = here(*prefix, *python("benches.traffic", "connect", asked, plan))
    sender, receiver = (client, server) if upload else (server, client)
    return _Ends(sender, receiver, client, outside, datagrams)


def _collect(ends: _Ends, seconds: float) -> Reports:
    """Wait for the receiver's report, and ask for all the others. Raises TransferError."""
    received = Received(*ends.receiver.report(seconds + PATIENCE_S, beside=ends.sender))
    ends.sender.stop()
    sent = [Sent(*flow) for flow in ends.sender.report()[0]]
    ends.receiver.stop()
    ends.outside.stop()
    inside, outside = (
        [Sample(*each) for each in child.report()] for child in (ends.client, ends.outside)
    )
    datagrams = None
    if ends.datagrams:
        ends.datagrams.stop()
        # The sender's end has none.
        datagrams = [*ends.datagrams.report(), *ends.client.report()]
    return Reports(received, sent, inside, outside, datagrams)


def _steps(bins: Sequence[int]) -> list[int]:
    width = round(STEP_S / figures.BIN_S)
    return [sum(bins[start : start + width]) for start in range(0, len(bins), width)]
