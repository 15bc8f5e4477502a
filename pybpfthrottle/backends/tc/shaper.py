"""The commands and the statistics of HTB, and of the queue below its class. Pure."""

from __future__ import annotations

from typing import Any, Mapping, Optional

from pybpfthrottle.backends.tc.iproute import Listing
from pybpfthrottle.model import MAX_RATE, Counters, Rate

# The root of all throttles on a device. Whatever the kernel or tc choose themselves is 8001 or
# more; the number appears in priorities of packets, so it must not be that of somebody else.
MAJOR = "7b0f"
# The kernel takes it for a class's share when classes compete, which ours do not, and complains in
# its log of what it would choose itself.
_QUANTUM = 60_000
# Packets of GSO and GRO have up to 64 KB.
_LARGEST_PACKET = 64 * 1024
# Sizes are 32 bits in tc.
MOST_BYTES = 1 << 30
CANNOT_BLOCK = (
    "it would hold back acknowledgements as well, and the other direction with them; use ebpf or"
    " nftables"
)


def root(device: str, major: str = MAJOR, default: int = 0) -> str:
    """Return the command for the root; what no class is named for passes by ``default`` 0."""
    return f"qdisc add dev {device} root handle {major}: htb default {default}"


def shape(device: str, minor: int, rate: Optional[Rate], major: str = MAJOR) -> list[str]:
    """Return the commands for a class and the queue below it, new or changed."""
    rate = rate or MAX_RATE
    burst, queue = burst_bytes(rate), queue_bytes(rate)
    limit = f"rate {rate.bytes_per_s}bps ceil {rate.bytes_per_s}bps"
    size = f"burst {burst} cburst {burst} quantum {_QUANTUM}"
    return [
        f"class replace dev {device} parent {major}: classid {major}:{minor:x} htb {limit} {size}",
        f"qdisc replace dev {device} parent {major}:{minor:x} bfifo limit {queue}",
    ]


def unshape(device: str, minor: int) -> str:
    """Return the command that deletes a class, with what is below it."""
    return f"class delete dev {device} classid {MAJOR}:{minor:x}"


def burst_bytes(rate: Rate) -> int:
    """Return the size of a bucket: what HTB's timer may be late by, and no less than a packet."""
    return min(max(_LARGEST_PACKET, rate.bytes_per_s // 100), MOST_BYTES)


def queue_bytes(rate: Rate) -> int:
    """Return how much may wait: 100 ms of the rate, as long as that is a few packets."""
    return min(max(2 * _LARGEST_PACKET, rate.bytes_per_s // 10), MOST_BYTES)


def root_of(qdiscs: Listing, device: str) -> Optional[Mapping[str, Any]]:
    """Return a device's root; None if the device is gone."""
    return next((one for one in qdiscs if one["dev"] == device and one.get("root")), None)


def is_default(qdisc: Mapping[str, Any]) -> bool:
    """Whether the kernel has chosen a root by itself, as it will again."""
    return bool(qdisc["handle"] == "0:")


def is_ours(qdisc: Mapping[str, Any]) -> bool:
    """Whether a root is that of throttles."""
    return bool(qdisc["kind"] == "htb" and qdisc["handle"] == f"{MAJOR}:")


def minors(qdiscs: Listing, device: Optional[str] = None) -> set[int]:
    """Return the numbers of the throttles' classes, on one device or on all."""
    return {
        int(parent.rpartition(":")[2], 16)
        for one in qdiscs
        for parent in [one.get("parent", "")]
        if parent.startswith(f"{MAJOR}:") and device in (None, one["dev"])
    }


def counters(qdiscs: Listing, device: str, minor: int, major: str = MAJOR) -> Optional[Counters]:
    """Return what a class's queue has counted; None if it is gone.

    The kernel does not count the bytes that it drops: they are taken for packets of average size.
    """
    for one in qdiscs:
        if one["dev"] == device and one.get("parent") == f"{major}:{minor:x}":
            sent, packets = int(one["bytes"]), int(one["packets"])
            dropped = int(one["drops"])
            lost = dropped * (sent // packets if packets else 0)
            packets += int(one["qlen"]) + dropped
            return Counters(packets, packets, sent + int(one["backlog"]) + lost, dropped, lost)
    return None


def total(*counted: Counters) -> Counters:
    """Return the sums."""
    return Counters(*map(sum, zip(Counters(), *counted)))
