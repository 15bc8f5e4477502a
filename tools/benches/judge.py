"""From what the processes of a transfer report to its figures. Pure."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

from benches import figures
from benches.figures import Figures, RoundTrips
from benches.ping import BYTES, Sample
from benches.tcp_info import Sent
from benches.traffic import Received
from pybpfthrottle.model import Rate

_GB = 1 << 30
# The CPU time of less is that of the small flows, and of whatever else the machine does.
_LEAST_FOR_CPU_BYTES = _GB // 20


class Reports(NamedTuple):
    """What was received and sent, and the small flows; of a UDP flow when how much came."""

    received: Received
    sent: Sequence[Sent]
    inside: Sequence[Sample]
    outside: Sequence[Sample]
    datagrams: Optional[Sequence[tuple[int, int]]] = None


def judge(rate: Rate, reports: Reports) -> Figures:
    """The figures, of the time between the first byte and the end alone."""
    received = reports.received
    came = sum(map(sum, received.bins))
    # The small flow has its part of the limit: at 50 KB/s a sixteenth.
    together = figures.total([*received.bins, _bins(reports.inside, received)])
    windows = figures.windows(together, rate.bytes_per_s)
    sent = sum(flow.bytes_sent for flow in reports.sent)
    again = sum(flow.bytes_retransmitted for flow in reports.sent)
    return Figures(
        ratio=figures.ratio(together, rate.bytes_per_s),
        window_min=min(windows, default=None),
        window_max=max(windows, default=None),
        retransmitted_percent=figures.percent(again, sent),
        inside=_round_trips(reports.inside, received),
        outside=_round_trips(reports.outside, received),
        fairness=figures.fairness([sum(bins) for bins in received.bins]),
        cpu_s_per_gb=received.cpu_s * _GB / came if came >= _LEAST_FOR_CPU_BYTES else None,
        stall_s=figures.longest_stall_s(received.bins),
        udp_ratio=_udp_ratio(rate, reports),
    )


def _bins(samples: Sequence[Sample], received: Received) -> list[int]:
    """The bytes of a small flow in the bins of a transfer."""
    bins = [0] * len(received.bins[0])
    for sample in samples:
        at = (sample.begin_s + sample.took_s - received.begin_s) // figures.BIN_S
        if 0 <= at < len(bins):
            bins[int(at)] += BYTES
    return bins


def _round_trips(samples: Sequence[Sample], received: Received) -> Optional[RoundTrips]:
    return figures.round_trips(
        [
            sample.took_s
            for sample in samples
            if 0 <= sample.begin_s - received.begin_s < _seconds(received)
        ]
    )


def _udp_ratio(rate: Rate, reports: Reports) -> Optional[float]:
    if reports.datagrams is None:
        return None
    first = int(reports.received.begin_s / figures.BIN_S)
    bins = len(reports.received.bins[0])
    came = sum(count for step, count in reports.datagrams if 0 <= step - first < bins)
    return came / (rate.bytes_per_s * _seconds(reports.received))


def _seconds(received: Received) -> float:
    return len(received.bins[0]) * figures.BIN_S
