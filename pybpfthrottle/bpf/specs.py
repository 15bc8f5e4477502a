"""What an object file asks for: pure data, no system calls.

A spec may be edited before it is loaded (``spec.maps["events"].max_entries = 64``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from pybpfthrottle.bpf.abi import AttachType, ProgType


@dataclass
class MapSpec:
    """One map. Sizes are in bytes; ``contents`` is what a data section's one element holds."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    numa_node: int = 0
    extra: int = 0
    contents: Optional[bytes] = None
    frozen: bool = False


class FunctionKey(NamedTuple):
    """Where a function begins: names are not unique, since static functions may share one."""

    section: str
    offset: int


class MapReference(NamedTuple):
    """A 64-bit load at byte ``offset`` of some code: of a map, or an address in its value."""

    offset: int
    map: str
    value_offset: Optional[int] = None


class CallReference(NamedTuple):
    """A call at byte ``offset`` of some code to a function of the same object."""

    offset: int
    target: FunctionKey


@dataclass(frozen=True)
class FunctionSpec:
    """One function's instructions, in the object's byte order, and what they refer to."""

    name: str
    key: FunctionKey
    code: bytes
    map_references: tuple[MapReference, ...] = ()
    call_references: tuple[CallReference, ...] = ()


@dataclass
class ProgramSpec:
    """An entry point. ``expected_attach_type`` is None where the section names none."""

    name: str
    section: str
    type: ProgType
    expected_attach_type: Optional[AttachType]
    function: FunctionSpec


@dataclass
class ObjectSpec:
    """All that one object file defines. ``byteorder`` is "little" or "big"."""

    name: str
    byteorder: str
    license: str = ""
    maps: dict[str, MapSpec] = field(default_factory=dict)
    programs: dict[str, ProgramSpec] = field(default_factory=dict)
    functions: dict[FunctionKey, FunctionSpec] = field(default_factory=dict)
    btf: Optional[bytes] = None
