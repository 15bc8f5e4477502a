"""The records and constants of ebpf_src/divert.h.

Names follow the C ones, as in backends/ebpf/records.py. A test compares them with the objects' BTF.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint16, c_uint32, c_uint64
from enum import IntEnum

# What the keeper and all diversions of a process share, and what each has of its own.
KEEPER, RING, STATE = "DIVERT_KEEPER", "DIVERT_RING", "DIVERT_STATE"


class DivertBounds(IntEnum):
    """enum divert_bounds: sizes and times that the programs and the keeper share."""

    DIVERT_NAMESPACES = 16
    DIVERT_RING_BYTES = 1 << 23
    DIVERT_STALE_NS = 200_000_000
    DIVERT_ASK_NS = 100_000_000
    DIVERT_DEVICES = 1 << 24


class DivertTag(IntEnum):
    """enum divert_tag: the tc_index of packets that come back."""

    DIVERT_TAG = 0xD000
    DIVERT_TAG_MASK = 0xF000
    DIVERT_QUEUED = 0x800
    DIVERT_LOST = 0x400


class DivertMark(IntEnum):
    """enum divert_mark: the mark of a packet that was taken."""

    DIVERT_TAKEN = 0x70594454


class DivertKeeper(ctypes.Structure):
    """struct divert_keeper: what a keeper and the programs of its diversions share."""

    _fields_ = (
        ("alive", c_uint32),
        ("ring_bytes", c_uint32),
        ("oldest_ns", c_uint64),
        ("next_due_ns", c_uint64),
        ("asked_ns", c_uint64),
        ("namespaces", c_uint32 * DivertBounds.DIVERT_NAMESPACES),
    )


class DivertState(ctypes.Structure):
    """struct divert_state: one diversion; the programs write the counts at its end."""

    _fields_ = (
        ("id", c_uint32),
        ("on", c_uint32),
        ("bit", c_uint32),
        ("loopback", c_uint32),
        ("slot", c_uint32),
        ("waits", c_uint32),
        ("taken", c_uint64),
        ("stale", c_uint64),
        ("unserved", c_uint64),
        ("full", c_uint64),
        ("translations", c_uint64),
        ("returned", c_uint64),
    )


class DivertTranslation(ctypes.Structure):
    """struct divert_translation: the ends of a translated packet as they are on the wire."""

    _fields_ = (
        ("remote", c_uint32 * 4),
        ("local", c_uint32 * 4),
        ("remote_port", c_uint16),
        ("local_port", c_uint16),
    )


class DivertFlow(ctypes.Structure):
    """struct divert_flow: by what a translation is found."""

    _fields_ = (
        ("remote", c_uint32 * 4),
        ("network", c_uint32),
        ("remote_port", c_uint16),
        ("local_port", c_uint16),
        ("protocol", c_uint32),
    )


class DivertPacket(ctypes.Structure):
    """struct divert_packet: a packet that was taken; the packet itself follows."""

    _fields_ = (
        ("at_ns", c_uint64),
        ("diversion", c_uint32),
        ("length", c_uint32),
        ("device", c_uint32),
        ("segment", c_uint32),
        ("network", c_uint32),
        ("tag", c_uint16),
        ("translated", c_uint16),
        ("wire", DivertTranslation),
        ("unused", c_uint32),
    )
