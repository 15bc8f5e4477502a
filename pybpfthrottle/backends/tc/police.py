"""Downloads by a policer at the ingress hook: all that comes by a device, whoever it is for."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

from pybpfthrottle.backends.recorded import Kind
from pybpfthrottle.backends.tc.at_ingress import AtIngress
from pybpfthrottle.backends.tc.iproute import Listing
from pybpfthrottle.backends.tc.shaper import CANNOT_BLOCK, MOST_BYTES
from pybpfthrottle.model import MAX_RATE, Counters, Rate

NAME = "tc_police"
_ANY, _NUMBER = 0, 1
ALL = "match u32 0 0"
# The kernel drops what is larger than this (2 KB by default), and than the bucket: GRO makes
# packets of 64 KB.
_LARGEST = 256 * 1024


class PoliceRules(AtIngress):
    """One filter on each device, for IPv4, IPv6 and all else."""

    backend = NAME

    def _prepare(self, handles: Mapping[str, Any]) -> None:
        self._prepare_ingress(handles, {"kind": "police"})

    @property
    def _what(self) -> str:
        return f"policer {self._ingress.preference}"

    def _where(self) -> str:
        return (
            f"⚠ {NAME} limits ALL that comes by {', '.join(self._devices)}, of all programs, and"
            " not only what was chosen"
        )

    def _filters(self, device: str) -> Sequence[str]:
        verb = "change" if self._ingress.nodes(device) else "add"
        return [self._ingress.command(device, _ANY, _NUMBER, ALL, police(self._rate), verb)]

    def _counted(self, device: str, qdiscs: Listing) -> Optional[Counters]:
        if not self._ingress.has_qdisc(qdiscs, device):
            return None
        for action in self._ingress.actions(device):
            found = action["stats"]
            count, packets, dropped = (int(found[one]) for one in ("bytes", "packets", "drops"))
            lost = dropped * (count // packets if packets else 0)
            return Counters(packets, packets, count, dropped, lost)
        return None


def police(rate: Optional[Rate]) -> str:
    """Return the action that drops what is over a limit."""
    rate = rate or MAX_RATE
    size = f"burst {burst_bytes(rate)} mtu {_LARGEST}"
    return f"police rate {rate.bytes_per_s}bps {size} conform-exceed drop/pass"


def burst_bytes(rate: Optional[Rate]) -> int:
    """Return the size of the bucket: a second's worth.

    With 100 ms a single connection has 0.6 to 0.7 of the limit: packets of GRO are dropped whole.
    """
    return min(max(_LARGEST, rate.bytes_per_s), MOST_BYTES) if rate else 0


def _how(rate: Optional[Rate]) -> Mapping[str, str]:
    return {
        "shape": "police" if rate else "none",
        "shape_reason": "a policer can drop packets, and not delay them",
    }


KIND = Kind(
    NAME,
    PoliceRules,
    _how,
    burst_bytes,
    "policers",
    "tc qdisc delete, tc filter delete",
    CANNOT_BLOCK,
)
