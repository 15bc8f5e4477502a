"""How a direction is kept to its limit: paced, by the receive window, or policed."""

from __future__ import annotations

from typing import NamedTuple, Optional

from pybpfthrottle.backends.ebpf.records import ThrottleFlags
from pybpfthrottle.model import Direction, Rate

# Small windows keep the kernel from merging packets: beyond this, the window costs more than the
# policer's retransmissions do.
MOST_FOR_WINDOW = Rate(25_000_000)
_FOR = {Direction.UPLOAD: "pace", Direction.DOWNLOAD: "window"}
_MS = 1_000_000
# The policer's burst is 250 ms, which is longer than TCP's shortest retransmission timeout (200
# ms): with less, a flow that waits for it loses bandwidth for good (0.72 of the limit was measured
# with 150 ms). 40 % of it may be owed. It is also the burst at the start, where there is no credit
# yet: it makes up for the slow start of TCP in the first seconds. Behind a receive window nobody
# waits for a timeout. What shaped connections may owe beyond it the shaper itself adds.
_POLICED = (150 * _MS, 100 * _MS)
_BURSTS = {"police": _POLICED, "pace": _POLICED, "window": (50 * _MS, 20 * _MS)}
_FLAGS = {
    "police": ThrottleFlags(0),
    "pace": ThrottleFlags.PACE,
    "window": ThrottleFlags.WINDOW,
}


class Shaping(NamedTuple):
    """The method for a direction, one of settings.SHAPES but auto, and why it was chosen."""

    method: str
    reason: str

    @property
    def credit_ns(self) -> int:
        """How far the bucket may lag behind the clock."""
        return _BURSTS[self.method][0]

    @property
    def debt_ns(self) -> int:
        """How far it may run ahead before packets are dropped."""
        return _BURSTS[self.method][1]

    @property
    def burst_ns(self) -> int:
        """Both together."""
        return self.credit_ns + self.debt_ns

    @property
    def flags(self) -> ThrottleFlags:
        """What the programs have to do."""
        return _FLAGS[self.method]


POLICE = Shaping("police", "nothing else was asked for")


def choose(
    direction: Direction, rate: Optional[Rate], wanted: str, *, refused: Optional[str] = None
) -> Shaping:
    """The method for a direction; ``refused`` is why nothing can be shaped here."""
    method = _FOR[direction]
    if wanted not in ("auto", method):
        return Shaping("police", f"--shape {wanted}")
    if refused is not None:
        return Shaping("police", f"it cannot be shaped here: {refused}")
    if wanted == method:
        return Shaping(method, f"--shape {wanted}")
    if method == "window" and rate is not None and rate.bytes_per_s > MOST_FOR_WINDOW.bytes_per_s:
        return Shaping("police", f"above {MOST_FOR_WINDOW} the receive window costs too much CPU")
    return Shaping(method, "this kernel can")
