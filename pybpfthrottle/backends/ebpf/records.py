"""The records and constants of ebpf_src/throttle.h.

Names follow the C ones: struct throttle_config is ThrottleConfig, THROTTLE_PACE in enum
throttle_flags is ThrottleFlags.PACE, and enum throttle_direction is model.Direction. A test
compares them all with the objects' BTF.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int32, c_int64, c_uint8, c_uint32, c_uint64
from enum import IntEnum, IntFlag

from pybpfthrottle.model import Direction

# The map that all programs of a throttle share; its only element is a ThrottleRecord.
RECORD = "THROTTLE"


def element(slot: int, direction: int) -> int:
    """Return the key of a direction in maps that the throttle in a slot may share (ELEMENT)."""
    return slot * len(Direction) + direction


class ThrottleFlags(IntFlag):
    """enum throttle_flags: what the programs have to do."""

    LOOPBACK = 1
    PACE = 2
    WINDOW = 4
    GATE = 8
    NETWORKS = 16
    LEND = 32


class ThrottleFormat(IntEnum):
    """enum throttle_format: how a record begins."""

    MAGIC = 0x54425059
    VERSION = 2


class ThrottleLevel(IntEnum):
    """enum throttle_level: the setsockopt(2) level that the programs handle."""

    ADOPT = 0x54425059


class ThrottleEntry(IntEnum):
    """enum throttle_entry: where shared programs are in the maps by which they are entered."""

    ENTRY_DENY = 0
    ENTRY_TELL = 1
    ENTRY_GATE = 2


class ThrottleShift(IntEnum):
    """enum throttle_shift: the scales of fixed-point numbers and epochs."""

    INVERSE_RATE_SHIFT = 20
    EPOCH_SHIFT = 30


class ThrottleSlack(IntEnum):
    """enum throttle_slack: how much connections may owe beyond the debt."""

    PACING_SLACK_NS = 300_000_000
    POLICE_SLACK_NS = 180_000_000


class ThrottleGateBounds(IntEnum):
    """enum throttle_gate_bounds: sizes of the data that the gate and its keeper share."""

    GATE_NAMESPACES = 8
    GATE_UNGATED = 64
    GATE_PACKET_BYTES = 100
    GATE_RING_BYTES = 1 << 18
    GATE_STALE_NS = 60_000_000
    GATE_WAKE_SHIFT = 20


class ThrottleGateState(IntEnum):
    """enum throttle_gate_state: whether the keeper can send for a connection."""

    GATE_UNKNOWN = 0
    GATE_READY = 1
    GATE_NEVER = 2
    GATE_ASKED = 3


class ThrottleGateWindow(IntEnum):
    """enum throttle_gate_window: what the kernel advertises where the keeper opens windows."""

    GATE_WINDOW_US = 8000
    MOST_GATE_WAY_US = 200_000
    LEAST_GATE_BYTES = 256
    GATE_SLACK_NS = 330_000_000


class ThrottlePacing(IntEnum):
    """enum throttle_pacing: the rules for pacing uploads."""

    PACING_TARGET_NS = 60_000_000
    PACING_EXTRA_SHIFT = 3
    PACING_LEAST_SHIFT = 2
    PACING_STEP_SHIFT = 6


class ThrottlePacingRate(IntEnum):
    """enum throttle_pacing_rate: SO_MAX_PACING_RATE of a connection that is not paced."""

    UNLIMITED = 0xFFFFFFFF


class ThrottleRecordFlags(IntFlag):
    """enum throttle_record_flags: what is to happen to a throttle."""

    KEPT = 1
    REMOVED = 2


class ThrottleProcessFlags(IntFlag):
    """enum throttle_process_flags: how a process is limited."""

    FOLLOW = 1
    BY_NAME = 2


class ThrottleConfig(ctypes.Structure):
    """struct throttle_config: written by user space."""

    _fields_ = (
        ("magic", c_uint32),
        ("version", c_uint32),
        ("owner_pid", c_uint32),
        ("owner_pid_namespace", c_uint32),
        ("owner_start_ticks", c_uint64),
        ("rate_bytes_per_s", c_uint64),
        ("inverse_rate", c_uint64),
        ("credit_ns", c_uint64),
        ("debt_ns", c_uint64),
        ("small_ns", c_uint64),
        ("flags", c_uint32),
        ("slot", c_uint32),
        ("slack_ns", c_uint64),
        ("expires_ns", c_int64),
    )


class ThrottleNetwork(ctypes.Structure):
    """struct throttle_network: the key of a trie; the address is in network byte order."""

    _fields_ = (("bits", c_uint32), ("address", c_uint32 * 4))


class ThrottleBucket(ctypes.Structure):
    """struct throttle_bucket: written by the programs."""

    _fields_ = (
        ("even_at_ns", c_uint64),
        ("slack_ns", c_uint64),
        ("inverse_rate", c_uint64),
        ("refused", c_uint32),
        ("awaited", c_int32),
        ("credit_ns", c_uint64),
        ("early_at_ns", c_uint64),
        ("early_owed", c_uint32),
        ("early_least", c_uint32),
        ("early_root", c_uint32),
        ("early_sum", c_uint32),
        ("half_at_ns", c_uint64),
    )


class ThrottleFlows(ctypes.Structure):
    """struct throttle_flows."""

    _fields_ = (
        ("epoch", c_uint64),
        ("now", c_uint32),
        ("before", c_uint32),
        ("begun", c_uint32),
        ("moved", c_uint32),
    )


class ThrottleShare(ctypes.Structure):
    """struct throttle_share."""

    _fields_ = (
        ("bytes", c_uint64),
        ("epoch", c_uint64),
        ("epoch_bytes", c_uint64),
        ("counted", c_uint64),
    )


class ThrottleSocket(ctypes.Structure):
    """struct throttle_socket."""

    _fields_ = (
        ("share", ThrottleShare * len(Direction)),
        ("pacing", c_uint32),
        ("clamp", c_uint32),
        ("original_pacing", c_uint32),
        ("original_clamp", c_uint32),
        ("stop", c_uint32),
        ("promised", c_uint32),
        ("segment", c_uint32),
        ("first", c_uint32),
        ("gate", c_uint32),
        ("gated", c_uint32),
        ("window_scale", c_uint32),
        ("edge_known", c_uint32),
        ("edge", c_uint32),
        ("network", c_uint32),
        ("room", c_uint32),
        ("way_us", c_uint32),
        ("slot", c_uint32),
        ("awaited", c_uint32),
        ("opened", c_uint64),
        ("answer", c_uint64),
        ("asked_ns", c_uint64),
    )


class ThrottleGate(ctypes.Structure):
    """struct throttle_gate: the gate of one throttle."""

    _fields_ = (
        ("alive", c_uint32),
        ("id", c_uint32),
        ("next_due_ns", c_uint64),
        ("round_trip_ns", c_uint64),
        ("namespaces", c_uint32 * ThrottleGateBounds.GATE_NAMESPACES),
        ("ungated", c_uint64 * ThrottleGateBounds.GATE_UNGATED),
        ("taken", c_uint64),
        ("oldest_ns", c_uint64),
        ("datagram_ns", c_uint64),
        ("woken", c_uint32),
        ("reserved", c_uint32),
    )


class ThrottleAck(ctypes.Structure):
    """struct throttle_ack: an acknowledgement as the keeper receives it."""

    _fields_ = (
        ("cookie", c_uint64),
        ("at_ns", c_uint64),
        ("gate", c_uint32),
        ("device", c_uint32),
        ("edge", c_uint32),
        ("payload", c_uint32),
        ("mark", c_uint32),
        ("network", c_uint32),
        ("segment", c_uint32),
        ("round_trip_us", c_uint32),
        ("length", c_uint8),
        ("window_scale", c_uint8),
        ("passed", c_uint8),
        ("reserved", c_uint8),
        ("packet", c_uint8 * ThrottleGateBounds.GATE_PACKET_BYTES),
    )


class ThrottleProcess(ctypes.Structure):
    """struct throttle_process."""

    _fields_ = (("flags", c_uint32), ("slot", c_uint32))


class ThrottleStats(ctypes.Structure):
    """struct throttle_stats."""

    _fields_ = (
        ("program_calls", c_uint64),
        ("packets_total", c_uint64),
        ("bytes_total", c_uint64),
        ("packets_dropped", c_uint64),
        ("bytes_dropped", c_uint64),
    )


class ThrottleRecord(ctypes.Structure):
    """struct throttle_record: written by user space; the generation is odd during a write."""

    _fields_ = (
        ("magic", c_uint32),
        ("version", c_uint32),
        ("generation", c_uint32),
        ("flags", c_uint32),
        ("length", c_uint32),
        ("slot", c_uint32),
        ("text", c_char * 4072),
    )
