"""What the kernel wants of some types of maps, and objects do not always say. No system calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

from pybpfthrottle.bpf.abi import MAPS_OF_MAPS, MapType
from pybpfthrottle.bpf.obj.specs import MapSpec

_RINGS = (MapType.RINGBUF, MapType.USER_RINGBUF)
_ONE_PER_CPU = (MapType.PERF_EVENT_ARRAY, MapType.CPUMAP)
# Their elements are descriptors or indexes of four bytes under a key of four.
_ARRAYS_OF_OBJECTS = (
    *(MapType.PROG_ARRAY, MapType.PERF_EVENT_ARRAY, MapType.CGROUP_ARRAY, MapType.CPUMAP),
    *(MapType.ARRAY_OF_MAPS, MapType.DEVMAP, MapType.XSKMAP),
)
_U32_BYTES = 4


def corrected(spec: MapSpec, *, cpus: Callable[[], int], page_bytes: int) -> MapSpec:
    """The spec as the kernel takes it; the one that is given stays as it is.

    Ring buffers have no keys and values, and a power of two of pages. What holds one element for
    each CPU has no more than there are CPUs, and as many unless it says otherwise. Arrays of other
    objects have keys and values of four bytes unless they say otherwise.
    """
    spec = replace(spec)
    if spec.type in _RINGS:
        spec.key_size = spec.value_size = spec.key_type = spec.value_type = 0
        spec.max_entries = _ring_bytes(spec.max_entries, page_bytes)
    if spec.type in _ONE_PER_CPU:
        spec.max_entries = min(spec.max_entries or cpus(), cpus())
    if spec.type in _ARRAYS_OF_OBJECTS:
        spec.key_size = spec.key_size or _U32_BYTES
    if spec.type in _ARRAYS_OF_OBJECTS or spec.type in MAPS_OF_MAPS:
        spec.value_size = spec.value_size or _U32_BYTES
    return spec


def _ring_bytes(wanted: int, page_bytes: int) -> int:
    """The next power of two of pages; 0 stays 0, for the kernel to refuse."""
    size = page_bytes
    while size < wanted:
        size *= 2
    return size if wanted else 0
