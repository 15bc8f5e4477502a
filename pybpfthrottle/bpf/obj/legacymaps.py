"""Maps defined by structs of numbers, in sections ``maps`` -> MapSpecs. No system calls.

Such as libbpf before 1.0, aya and iproute2 have them; each has its own fields after the first five.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import c_uint32
from typing import Any

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.elffile import Elf, Section, Symbol
from pybpfthrottle.bpf.obj.relocate import maps_of
from pybpfthrottle.bpf.obj.specs import MapSpec, ObjectSpec


class LegacyMapDef(ctypes.Structure):
    """struct bpf_map_def, as objects without BTF define maps in section ``maps``."""

    _fields_ = (
        ("type", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
    )


class NumberedMapDef(ctypes.Structure):
    """struct bpf_map_def of samples/bpf and of aya, which has ``pinning`` last instead."""

    _fields_ = (
        *LegacyMapDef._fields_,
        ("inner_map_idx", c_uint32),
        ("numa_node", c_uint32),
    )


# inner_idx of struct bpf_elf_map for what is in no other map.
IPROUTE2_NO_INDEX = 0xFFFFFFFF
# SEC("ID/KEY"): a program's place in the program array with that id.
_ID = "(0x[0-9a-f]+|0[0-7]*|[1-9][0-9]*)"
_PLACE = re.compile(f"{_ID}/{_ID}", re.IGNORECASE)


class Iproute2MapDef(ctypes.Structure):
    """struct bpf_elf_map of iproute2's bpf_elf.h."""

    _fields_ = (
        *LegacyMapDef._fields_,
        ("id", c_uint32),
        ("pinning", c_uint32),
        ("inner_id", c_uint32),
        ("inner_idx", c_uint32),
    )


class LegacyMaps:
    """The maps of an object, by the number of their section and their offset in it.

    Raises ObjectFileError with the place of what is not understood.
    """

    def __init__(self, elf: Elf) -> None:
        self.maps: dict[tuple[int, int], MapSpec] = {}
        self._by_id: dict[int, MapSpec] = {}
        for section in elf.sections.values():
            if section.name == "maps" or section.name.startswith("maps/"):
                definitions = _Definitions(elf, section)
                self.maps.update(definitions.read())
                self._by_id.update(definitions.by_id)

    def fill(self, spec: ObjectSpec) -> None:
        """Put programs in sections such as "0xabcd/1" into iproute2's program arrays.

        They are of the type of those that jump to them: the section's name does not tell.
        """
        for program in spec.programs.values():
            place = _PLACE.fullmatch(program.section)
            held_by = self._by_id.get(_number(place[1])) if place else None
            if place is None or held_by is None or held_by.type != abi.MapType.PROG_ARRAY:
                continue
            held_by.initial[_number(place[2])] = program.name
            kinds = {
                (user.type, user.expected_attach_type)
                for user in spec.programs.values()
                if user.type != abi.ProgType.UNSPEC and held_by.name in maps_of(spec, user)
            }
            if len(kinds) == 1 and program.type == abi.ProgType.UNSPEC:
                program.type, program.expected_attach_type = kinds.pop()


def _number(text: str) -> int:
    """Return a number as scanf reads it by %i, which iproute2 does."""
    return int(text, 8 if text.startswith("0") and text.isdecimal() else 0)


class _Definitions:
    """The maps of one section, each struct bpf_map_def or longer; ``by_id`` has iproute2's."""

    def __init__(self, elf: Elf, section: Section) -> None:
        self._section = section
        order: Any = ctypes.LittleEndianStructure
        if elf.byteorder == "big":
            order = ctypes.BigEndianStructure
        self._layouts: list[Any] = [
            type(layout.__name__, (order,), {"_fields_": layout._fields_})
            for layout in (LegacyMapDef, NumberedMapDef, Iproute2MapDef)
        ]
        self._symbols = elf.symbols_of(section)
        self.by_id: dict[int, MapSpec] = {}

    def read(self) -> dict[tuple[int, int], MapSpec]:
        """Return the maps in the order of their definitions, nested where iproute2 nests them."""
        ends = {
            s.value: e.value for s, e in zip(self._symbols, self._symbols[1:]) if e.value > s.value
        }
        defined = [
            (symbol, self._define(symbol, ends.get(symbol.value, self._section.size)))
            for symbol in self._symbols
            if symbol.name
        ]
        specs = {symbol.name: self._spec(symbol, define) for symbol, define in defined}
        self._nest(defined, specs)
        # Those of iproute2 without inner maps look like the others, whose sixth field is a number.
        ids = (getattr(d, "id", getattr(d, "inner_map_idx", 0)) for _, d in defined)
        self.by_id = dict(zip(ids, specs.values()))
        number = self._section.number
        return {(number, symbol.value): specs[symbol.name] for symbol, _ in defined}

    def _define(self, symbol: Symbol, end: int) -> Any:
        """Return the shortest of the layouts whose fields explain all bytes that are not zero."""
        data = self._section.data or b""
        end = min(end, symbol.value + symbol.size) if symbol.size else end
        raw = data[symbol.value : end]
        shortest = ctypes.sizeof(self._layouts[0])
        if len(raw) < shortest:
            raise self._bad(symbol, f"expected at least {shortest} bytes, found {len(raw)}")
        for layout in self._layouts:
            size = ctypes.sizeof(layout)
            if len(raw) >= size and not any(raw[size:]):
                return layout.from_buffer_copy(raw)
        raise self._bad(symbol, "it has unknown fields", at=shortest)

    def _spec(self, symbol: Symbol, define: Any) -> MapSpec:
        spec = MapSpec(
            symbol.name,
            define.type,
            define.key_size,
            define.value_size,
            define.max_entries,
            define.map_flags,
        )
        numa_or_pinning = getattr(define, "numa_node", 0)
        if spec.flags & abi.BPF_F_NUMA_NODE:
            spec.numa_node = numa_or_pinning
        else:
            spec.pinned = bool(getattr(define, "pinning", numa_or_pinning))
        return spec

    def _nest(self, defined: list[tuple[Symbol, Any]], specs: dict[str, MapSpec]) -> None:
        """The template of a map of maps is named by its id or its number, or by the caller."""
        by_id = {d.id: (s, d) for s, d in reversed(defined) if getattr(d, "id", 0)}
        for symbol, define in defined:
            spec = specs[symbol.name]
            if spec.type not in abi.MAPS_OF_MAPS:
                continue
            inner = by_id.get(getattr(define, "inner_id", 0))
            if inner is None and symbol.size == ctypes.sizeof(NumberedMapDef):
                index = getattr(define, "inner_map_idx", 0)
                inner = defined[index] if index < len(defined) else None
            if inner is None or specs[inner[0].name].type in abi.MAPS_OF_MAPS:
                continue
            spec.inner = specs[inner[0].name]
            slot = getattr(inner[1], "inner_idx", IPROUTE2_NO_INDEX)
            if slot != IPROUTE2_NO_INDEX:
                spec.initial[slot] = inner[0].name

    def _bad(self, symbol: Symbol, reason: str, *, at: int = 0) -> ObjectFileError:
        return ObjectFileError(
            f"map {symbol.name!r}: {reason}",
            section=self._section.name,
            offset=symbol.value + at,
        )
