"""The record of a token bucket, for a rate and the way in which it is kept."""

from __future__ import annotations

from typing import Optional

from pybpfthrottle.backends.ebpf.records import (
    ThrottleConfig,
    ThrottleFlags,
    ThrottleFormat,
    ThrottleShift,
)
from pybpfthrottle.backends.ebpf.shaping import POLICE, Shaping
from pybpfthrottle.linux import process
from pybpfthrottle.model import Rate

_MS = 1_000_000
_NS_PER_S = 1_000_000_000

# One packet as large as they come, at least.
BURST_BYTES = 64 * 1024
# How much longer small packets pass: a ping is not caught behind a bulk transfer.
SMALL_NS = 20 * _MS


def config_for(
    rate: Optional[Rate], *, loopback: bool, shaping: Shaping = POLICE
) -> ThrottleConfig:
    """The record for a rate, in units that spare the program each division."""
    owner = process.identity()
    config = ThrottleConfig(
        magic=ThrottleFormat.MAGIC,
        version=ThrottleFormat.VERSION,
        owner_pid=owner.pid,
        owner_pid_namespace=owner.pid_namespace,
        owner_start_ticks=owner.start_ticks,
        flags=shaping.flags | (ThrottleFlags.LOOPBACK if loopback else 0),
    )
    if rate is None:
        return config
    per_s = rate.bytes_per_s
    # At low rates both grow, in proportion, until they hold the largest packet.
    stretch = max(1.0, BURST_BYTES * _NS_PER_S / per_s / shaping.burst_ns)
    config.rate_bytes_per_s = per_s
    config.inverse_rate = (_NS_PER_S << ThrottleShift.INVERSE_RATE_SHIFT) // per_s
    config.credit_ns = int(shaping.credit_ns * stretch)
    config.debt_ns = int(shaping.debt_ns * stretch)
    config.small_ns = SMALL_NS
    return config
