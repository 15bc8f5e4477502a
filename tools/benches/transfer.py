"""One transfer under one limit: four processes and a line for it alone, and what they report."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from contextlib import ExitStack
from typing import Any, NamedTuple, Optional, Sequence

from benches import figures
from benches.figures import Figures, RoundTrips
from benches.line import DelayLine, LineSpec
from benches.methods import LIMITED_PORT, OTHER_PORT, Method
from benches.ping import Sample
from benches.surroundings import ENVIRONMENT, READY, python
from benches.tcp_info import Sent
from benches.traffic import Plan, Received
from pybpfthrottle.cli.namespaces import Wire
from pybpfthrottle.limits import Direction, Rate

# For what is not the transfer itself: starting Python, connecting, the first byte.
_PATIENCE_S = 30.0
_GRACE_S = 5.0
_GB = 1 << 30
# The CPU time of less is that of the small flows, and of whatever else the machine does.
_LEAST_FOR_CPU_BYTES = _GB // 4
STEP_S = 0.1


class TransferError(Exception):
    """A transfer did not come about; the text is the reason."""


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

    def __str__(self) -> str:
        path = f"{self.round_trip_ms:g} ms" if self.round_trip_ms else "direct"
        if self.bottleneck:
            path += f" through {self.bottleneck.rate}"
        flows = f"{self.flows} flow" + "s" * (self.flows > 1)
        return f"{self.rate} {self.direction}, {flows}, {self.congestion_control}, {path}"

    def wire(self) -> Wire:
        """The two namespaces, joined accordingly."""
        if not (self.round_trip_ms or self.bottleneck):
            return Wire()
        narrow = self.bottleneck
        return DelayLine(
            LineSpec(
                delay_s=self.round_trip_ms / 2000,
                rate_bytes_per_s=narrow.rate.bytes_per_s if narrow else None,
                queue_bytes=narrow.queue_bytes if narrow else 0,
            )
        )


class Outcome(NamedTuple):
    """A transfer's figures, its bytes in each ``STEP_S``, and what else explains them."""

    figures: Figures
    timeline: list[int]
    dropped_by_line: int
    max_pacing_bytes_per_s: list[int]


class _Process:
    """One of ours in a namespace. It ends with its standard input, and so with this process."""

    def __init__(self, stack: ExitStack, command: list[str]) -> None:
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            bufsize=0,
            # Ctrl-C is for this process; it ends the others.
            start_new_session=True,
        )
        self._data = b""
        stack.callback(self._end)

    def line(self, timeout_s: float = _PATIENCE_S, *, beside: Optional[_Process] = None) -> bytes:
        """The next line of output. Raises TransferError, also if ``beside`` says anything."""
        deadline_s = time.monotonic() + timeout_s
        # select() takes no descriptor above 1023, and there may be many.
        waiting = select.poll()
        for process in filter(None, (self, beside)):
            waiting.register(process._output(), select.POLLIN)
        while b"\n" not in self._data:
            left_ms = max(0.0, deadline_s - time.monotonic()) * 1000
            ready = [fd for fd, _ in waiting.poll(left_ms)]
            if self._output() in ready:
                chunk = os.read(self._output(), 1 << 16)
                if not chunk:
                    raise TransferError(self._reason())
                self._data += chunk
            elif ready and beside:
                raise TransferError(beside._reason())
            elif not ready:
                raise TransferError(f"nothing came in {timeout_s:.0f} s")
        line, _, self._data = self._data.partition(b"\n")
        return line

    def report(self, timeout_s: float = _PATIENCE_S, *, beside: Optional[_Process] = None) -> Any:
        """The next line of output, which is JSON."""
        return json.loads(self.line(timeout_s, beside=beside))

    def ready(self) -> None:
        """Wait until it says so."""
        line = self.line().decode(errors="replace")
        if line != READY:
            raise TransferError(f"unexpected output: {line}")

    def stop(self) -> None:
        """Ask for its last report."""
        if self._popen.stdin:
            self._popen.stdin.close()
            self._popen.stdin = None

    def _output(self) -> int:
        assert self._popen.stdout
        return self._popen.stdout.fileno()

    def _reason(self) -> str:
        assert self._popen.stderr
        lines = self._popen.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._popen.wait()}"

    def _end(self) -> None:
        self.stop()
        try:
            # Our limit takes its cgroup away when its command has ended.
            self._popen.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.communicate()


class _Ends(NamedTuple):
    """The processes of a transfer."""

    sender: _Process
    receiver: _Process
    inside: _Process
    outside: _Process


def transfer(cell: Cell, method: Method, seconds: float) -> Outcome:
    """Limit, transfer, and judge. Raises TransferError, MethodError or NamespaceError."""
    with ExitStack() as stack:
        wire = stack.enter_context(cell.wire())
        method.apply(wire.client, cell.direction, cell.rate)
        ends = _start(stack, wire, cell, method, seconds)
        received = Received(*ends.receiver.report(seconds + _PATIENCE_S, beside=ends.sender))
        ends.sender.stop()
        sent = [Sent(*flow) for flow in ends.sender.report()[0]]
        ends.receiver.stop()
        ends.outside.stop()
        inside, outside = ends.inside.report(), ends.outside.report()
        dropped = wire.dropped() if isinstance(wire, DelayLine) else 0
    if not any(map(any, received.bins)):
        raise TransferError("not one byte came through")
    return Outcome(
        _judge(cell.rate, received, sent, inside, outside),
        _steps(figures.total(received.bins)),
        dropped,
        [flow.max_pacing_bytes_per_s for flow in sent],
    )


def _start(stack: ExitStack, wire: Wire, cell: Cell, method: Method, seconds: float) -> _Ends:
    """Start the two ends, and the two small flows with who answers them."""
    here, there = wire.client.inside, wire.server.inside
    address = wire.server.address
    plan = json.dumps(Plan(address, LIMITED_PORT, cell.flows, seconds, cell.congestion_control))
    ports = (str(LIMITED_PORT | 1), str(OTHER_PORT))
    echo = _Process(stack, there(*python("benches.ping", "--echo", address, *ports)))
    echo.ready()
    upload = cell.direction is Direction.UPLOAD
    served, asked = ("receive", "send") if upload else ("send", "receive")
    server = _Process(stack, there(*python("benches.traffic", "accept", served, plan)))
    server.ready()
    outside = _Process(stack, here(*python("benches.ping", address, str(OTHER_PORT))))
    prefix = method.prefix(cell.direction, cell.rate)
    client = _Process(stack, here(*prefix, *python("benches.traffic", "connect", asked, plan)))
    sender, receiver = (client, server) if upload else (server, client)
    return _Ends(sender, receiver, inside=client, outside=outside)


def _judge(
    rate: Rate,
    received: Received,
    sent: Sequence[Sent],
    inside: Sequence[Sequence[float]],
    outside: Sequence[Sequence[float]],
) -> Figures:
    together = figures.total(received.bins)
    windows = figures.windows(together, rate.bytes_per_s)
    end_s = received.begin_s + len(together) * figures.BIN_S
    came = sum(together)

    def during(samples: Sequence[Sequence[float]]) -> Optional[RoundTrips]:
        took = [Sample(*each).took_s for each in samples if received.begin_s <= each[0] < end_s]
        return figures.round_trips(took)

    return Figures(
        ratio=figures.ratio(together, rate.bytes_per_s),
        window_min=min(windows, default=None),
        window_max=max(windows, default=None),
        retransmitted_percent=figures.percent(
            sum(flow.bytes_retransmitted for flow in sent), sum(flow.bytes_sent for flow in sent)
        ),
        inside=during(inside),
        outside=during(outside),
        fairness=figures.fairness([sum(bins) for bins in received.bins]),
        cpu_s_per_gb=received.cpu_s * _GB / came if came >= _LEAST_FOR_CPU_BYTES else None,
        stall_s=figures.longest_stall_s(received.bins),
    )


def _steps(bins: Sequence[int]) -> list[int]:
    width = round(STEP_S / figures.BIN_S)
    return [sum(bins[start : start + width]) for start in range(0, len(bins), width)]
