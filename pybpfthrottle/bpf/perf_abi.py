"""The part of linux/perf_event.h that we speak: numbers and layouts, in the header's spelling."""

from __future__ import annotations

import ctypes

from ctypes import c_uint32, c_uint64  # isort: skip

PERF_TYPE_HARDWARE = 0
PERF_TYPE_SOFTWARE = 1
PERF_TYPE_TRACEPOINT = 2

PERF_COUNT_HW_CPU_CYCLES = 0
PERF_COUNT_SW_CPU_CLOCK = 0
PERF_COUNT_SW_BPF_OUTPUT = 10

PERF_SAMPLE_RAW = 1 << 10

PERF_FLAG_FD_CLOEXEC = 1 << 3

# Of struct perf_event_attr's bit field.
ATTR_FREQ = 1 << 10
ATTR_WATERMARK = 1 << 14

# _IO('$', 0), _IO('$', 1), _IOW('$', 8, __u32), on all machines but those that nobody runs BPF on.
PERF_EVENT_IOC_ENABLE = 0x2400
PERF_EVENT_IOC_DISABLE = 0x2401
PERF_EVENT_IOC_SET_BPF = 0x40042408

PERF_RECORD_LOST = 2
PERF_RECORD_SAMPLE = 9
HEADER_BYTES = 8  # struct perf_event_header: type, misc, size


class PerfEventAttr(ctypes.Structure):
    """struct perf_event_attr up to config2: PERF_ATTR_SIZE_VER1, which every kernel accepts.

    ``flags`` are its bit field, ``config1`` and ``config2`` what the type makes of them.
    """

    _fields_ = (
        ("type", c_uint32),
        ("size", c_uint32),
        ("config", c_uint64),
        ("sample_period", c_uint64),
        ("sample_type", c_uint64),
        ("read_format", c_uint64),
        ("flags", c_uint64),
        ("wakeup_events", c_uint32),
        ("bp_type", c_uint32),
        ("config1", c_uint64),
        ("config2", c_uint64),
    )


# struct perf_event_mmap_page: both positions only ever grow.
DATA_HEAD_OFFSET = 1024
DATA_TAIL_OFFSET = 1032
