"""The records of ebpf_src/throttle.h, for ctypes. A test compares them with the object's BTF."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64

INVERSE_RATE_SHIFT = 20
THROTTLE_LOOPBACK = 1
THROTTLE_PACE = 2
THROTTLE_WINDOW = 4
THROTTLE_ADOPT = 0x54425059
THROTTLE_MAGIC = 0x54425059
THROTTLE_VERSION = 1


class ThrottleConfig(ctypes.Structure):
    """struct throttle_config."""

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
        ("reserved", c_uint32),
    )


class ThrottleBucket(ctypes.Structure):
    """struct throttle_bucket."""

    _fields_ = (("even_at_ns", c_uint64), ("slack_ns", c_uint64))


class ThrottleFlows(ctypes.Structure):
    """struct throttle_flows."""

    _fields_ = (
        ("epoch", c_uint64),
        ("now", c_uint32),
        ("before", c_uint32),
        ("begun", c_uint32),
        ("reserved", c_uint32),
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
        ("share", ThrottleShare * 2),
        ("pacing", c_uint32),
        ("clamp", c_uint32),
        ("original_pacing", c_uint32),
        ("original_clamp", c_uint32),
        ("stop", c_uint32),
        ("promised", c_uint32),
    )


class ThrottleProcess(ctypes.Structure):
    """struct throttle_process."""

    _fields_ = (("follow", c_uint32),)


class ThrottleStats(ctypes.Structure):
    """struct throttle_stats."""

    _fields_ = (
        ("program_calls", c_uint64),
        ("packets_total", c_uint64),
        ("bytes_total", c_uint64),
        ("packets_dropped", c_uint64),
        ("bytes_dropped", c_uint64),
    )
