"""Maps defined by their types, in section ``.maps`` -> MapSpecs. No system calls.

Source: libbpf's macros __uint, __ulong, __type and __array.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Mapping, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Member, Type
from pybpfthrottle.bpf.obj.datasections import Names
from pybpfthrottle.bpf.obj.elffile import Elf, Relocation, Section
from pybpfthrottle.bpf.obj.insn import RelocationType
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import FunctionKey, MapSpec

SECTION = ".maps"
_POINTER_BYTES = 8
# clang before 13 wrote R_BPF_64_64 for data too.
_POINTER_RELOCATIONS = (
    RelocationType.R_BPF_64_64,
    RelocationType.R_BPF_64_ABS64,
    RelocationType.R_BPF_DATA_64,
)
_MAX_WRAPPINGS = 64
_NUMBERS = {
    "type": "type",
    "max_entries": "max_entries",
    "map_flags": "flags",
    "numa_node": "numa_node",
    "map_extra": "extra",
}

# enum libbpf_pin_type of libbpf's bpf_helpers.h.
LIBBPF_PIN_NONE = 0
LIBBPF_PIN_BY_NAME = 1


class _Definition(NamedTuple):
    """A map, and where its own pointers to maps or programs are."""

    spec: MapSpec
    values_at: int
    end: int


class TypedMaps:
    """The maps of an object, by the number of their section and their offset in it."""

    def __init__(self, elf: Elf, btf: Optional[Btf]) -> None:
        self._elf = elf
        self._section = elf.named(SECTION)
        self._found: dict[int, _Definition] = {}
        if self._section is not None and self._section.size:
            _refuse_contents(self._section)
            self._read(self._section, btf)

    @property
    def maps(self) -> dict[tuple[int, int], MapSpec]:
        """The maps by the number of their section and their offset in it."""
        number = self._section.number if self._section else 0
        return {(number, at): definition.spec for at, definition in sorted(self._found.items())}

    def _read(self, section: Section, btf: Optional[Btf]) -> None:
        if btf is None:
            raise ObjectFileError(
                "needs a .BTF section; compile with -g", section=SECTION, offset=0
            )
        datasec = btf.find(Kind.DATASEC, SECTION)
        if datasec is None:
            raise ObjectFileError(
                "the .BTF section does not describe it", section=SECTION, offset=0
            )
        # The symbol tells the offset. clang leaves it 0 in the BTF; linkers fill it in, which tells
        # apart static maps of several sources.
        symbols = self._elf.symbols_of(section)
        by_name = {symbol.name: symbol for symbol in symbols}
        by_place = {(symbol.name, symbol.value): symbol for symbol in symbols}
        names = Names()
        for variable in btf.variables(datasec):
            var = btf.type(variable.type)
            symbol = by_place.get((var.name, variable.offset)) or by_name.get(var.name)
            if symbol is None:
                raise ObjectFileError(
                    f"map {var.name!r} is not in the section", section=SECTION, offset=0
                )
            name = names.take(var.name) if symbol.local else var.name
            reader = _Reader(btf, name, symbol.value)
            spec = reader.read(var.size_or_type)
            values_at = symbol.value + reader.values_at
            end = symbol.value + (symbol.size or section.size)
            self._found[symbol.value] = _Definition(spec, values_at, end)

    def fill(self, programs: Mapping[FunctionKey, str]) -> None:
        """Put the names of inner maps and of programs into the maps that point to them."""
        if self._section is None:
            return
        starts = sorted(self._found)
        for relocation in self._section.relocations:
            index = bisect_right(starts, relocation.offset) - 1
            outer = self._found[starts[index]] if index >= 0 else None
            name = self._pointed(relocation, programs)
            if outer is None or name is None or not self._put(outer, relocation.offset, name):
                raise ObjectFileError(
                    f"a relocation (type {relocation.type}) against"
                    f" {relocation.symbol.name or 'a section'!r} does not set a map's value",
                    section=SECTION,
                    offset=relocation.offset,
                )

    def _pointed(
        self, relocation: Relocation, programs: Mapping[FunctionKey, str]
    ) -> Optional[tuple[str, bool]]:
        """Return the name of what a relocation points to, and whether that is a program."""
        number = relocation.symbol.section
        target = self._elf.sections.get(number) if isinstance(number, int) else None
        if target is None or relocation.type not in _POINTER_RELOCATIONS:
            return None
        offset = relocation.symbol.value + self._addend(relocation.offset)
        if target is self._section and offset in self._found:
            return self._found[offset].spec.name, False
        name = programs.get(FunctionKey(target.name, offset))
        return (name, True) if name else None

    def _addend(self, at: int) -> int:
        data = (self._section and self._section.data) or b""
        order: Any = self._elf.byteorder
        return int.from_bytes(data[at : at + _POINTER_BYTES], order)

    def _put(self, outer: _Definition, at: int, pointed: tuple[str, bool]) -> bool:
        name, program = pointed
        kinds = (MapType.PROG_ARRAY,) if program else abi.MAPS_OF_MAPS
        slot, rest = divmod(at - outer.values_at, _POINTER_BYTES)
        if outer.spec.type not in kinds or rest or slot < 0 or at >= outer.end:
            return False
        outer.spec.initial[slot] = name
        return True


def _refuse_contents(section: Section) -> None:
    """Refuse contents: types say everything, and relocations fill in the rest of the section."""
    data = bytearray(section.data or b"")
    for relocation in section.relocations:
        slot = slice(relocation.offset, relocation.offset + _POINTER_BYTES)
        data[slot] = bytes(len(data[slot]))
    rest = data.lstrip(b"\0")
    if rest:
        raise ObjectFileError(
            "a map's definition is initialized with a value; its types alone define it",
            section=section.name,
            offset=len(data) - len(rest),
        )


class _Reader:
    """Reads the struct that defines one map."""

    def __init__(self, btf: Btf, name: str, offset: int, *, nested: bool = False) -> None:
        self._btf = btf
        self._offset = offset
        self._nested = nested
        self._spec = MapSpec(name, 0, 0, 0, 0)
        self.values_at = 0

    def read(self, type_id: int) -> MapSpec:
        """Return the map. Raises ObjectFileError for what is not known of a map."""
        define = self._unwrapped(type_id)
        if define.kind != Kind.STRUCT:
            raise self._bad("not a struct")
        seen = set()
        for member in self._btf.members(define):
            if member.name in seen:
                raise self._bad(f"{member.name!r} is given twice")
            seen.add(member.name)
            self._take(member)
        if not self._spec.type:
            raise self._bad("it has no type")
        if self._spec.inner is not None and self._spec.type not in abi.MAPS_OF_MAPS:
            raise self._bad("it has inner maps, but is not a map of maps")
        return self._spec

    def _unwrapped(self, type_id: int) -> Type:
        """Return the innermost of structs that hold a single struct, as those of aya do."""
        for _ in range(_MAX_WRAPPINGS):
            define = self._resolve(type_id)
            if define.kind != Kind.STRUCT or define.vlen != 1:
                return define
            member = self._btf.member(define, 0)
            if member.bit_offset or self._resolve(member.type).kind != Kind.STRUCT:
                return define
            type_id = member.type
        raise self._bad("its definition is nested too deeply")

    def _take(self, member: Member) -> None:
        if member.name in ("key", "value"):
            type_id = self._pointed(member).size_or_type
            self._set_size(member.name, self._size(member.name, type_id))
            setattr(self._spec, f"{member.name}_type", type_id)
        elif member.name in ("key_size", "value_size"):
            self._set_size(member.name[:-5], self._number(member))
        elif member.name == "values":
            self._take_values(member)
        elif member.name == "pinning":
            self._take_pinning(self._number(member))
        elif member.name in _NUMBERS:
            setattr(self._spec, _NUMBERS[member.name], self._number(member))
        else:
            raise self._bad(f"{member.name!r} is not supported")

    def _size(self, what: str, type_id: int) -> int:
        try:
            return self._btf.size(type_id)
        except ObjectFileError as error:
            raise self._bad(f"cannot tell the size of its {what}: {error}") from error

    def _set_size(self, what: str, size: int) -> None:
        before = getattr(self._spec, f"{what}_size")
        if before not in (0, size):
            raise self._bad(f"its {what} has two sizes: {before} and {size} bytes")
        setattr(self._spec, f"{what}_size", size)

    def _take_pinning(self, how: int) -> None:
        if how not in (LIBBPF_PIN_NONE, LIBBPF_PIN_BY_NAME):
            raise self._bad(f"pinning {how} is not supported")
        if how and self._nested:
            raise self._bad("an inner map cannot be pinned")
        self._spec.pinned = bool(how)

    def _take_values(self, member: Member) -> None:
        """Take an array of pointers to inner maps, or to the programs of a program array."""
        self.values_at = member.bit_offset // 8
        array = self._resolve(member.type)
        if array.kind != Kind.ARRAY or self._nested:
            raise self._bad("'values' is not an array of pointers")
        pointer = self._resolve(self._btf.array(array)[0])
        if pointer.kind != Kind.PTR:
            raise self._bad("'values' is not an array of pointers")
        inner = self._resolve(pointer.size_or_type)
        if inner.kind == Kind.STRUCT:
            reader = _Reader(self._btf, f"{self._spec.name}.inner", self._offset, nested=True)
            self._spec.inner = reader.read(pointer.size_or_type)
        elif inner.kind != Kind.FUNC_PROTO:
            raise self._bad("'values' are neither maps nor programs")

    def _number(self, member: Member) -> int:
        """Return a number as libbpf's __uint has it, or as its __ulong has it."""
        direct = self._resolve(member.type)
        if direct.kind in (Kind.ENUM, Kind.ENUM64) and direct.vlen == 1:
            return next(iter(self._btf.enumerators(direct))).value
        pointer = self._pointed(member)
        array = self._resolve(pointer.size_or_type)
        if array.kind != Kind.ARRAY:
            raise self._bad(f"{member.name!r} is not a number")
        return self._btf.array(array)[1]

    def _pointed(self, member: Member) -> Type:
        pointer = self._resolve(member.type)
        if pointer.kind != Kind.PTR:
            raise self._bad(f"{member.name!r} is not a pointer")
        return pointer

    def _resolve(self, type_id: int) -> Type:
        return self._btf.resolve(type_id)

    def _bad(self, reason: str) -> ObjectFileError:
        return ObjectFileError(
            f"map {self._spec.name!r}: {reason}", section=SECTION, offset=self._offset
        )
