"""The records and constants of ebpf_src/conditions.h. A test compares them with the BTF."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64
from enum import IntEnum, IntFlag


class ConditionsFlags(IntFlag):
    """enum conditions_flags: what the programs have to do."""

    LOOPBACK = 1
    NO_SYN = 2
    REFUSE = 4
    DNS_LOST = 8
    DNS_SLOW = 16


class ConditionsScale(IntEnum):
    """enum conditions_scale: chances are in parts of two to the power of this."""

    SHIFT = 32


class ConditionsRule(ctypes.Structure):
    """struct conditions_rule: written by user space."""

    _fields_ = (
        ("seed", c_uint64),
        ("enter", c_uint64),
        ("leave", c_uint64),
        ("nth", c_uint64),
        ("begin_ns", c_uint64),
        ("period_ns", c_uint64),
        ("up_ns", c_uint64),
        ("flags", c_uint32),
        ("reserved", c_uint32),
    )


class ConditionsCounts(ctypes.Structure):
    """struct conditions_counts: written by the programs."""

    _fields_ = (
        ("seen", c_uint64),
        ("lost", c_uint64),
        ("outage", c_uint64),
        ("blocked", c_uint64),
        ("unanswered", c_uint64),
        ("number", c_uint64),
        ("owed", c_uint64),
        ("burst", c_uint32),
        ("reserved", c_uint32),
    )
