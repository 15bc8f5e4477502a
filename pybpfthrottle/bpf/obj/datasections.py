"""Sections of data -> maps of one element, and the variables in them. No system calls."""

from __future__ import annotations

from typing import Iterable, Iterator, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Type
from pybpfthrottle.bpf.obj.elffile import Elf, Section, Symbol
from pybpfthrottle.bpf.obj.specs import MapSpec, VariableSpec

# Where clang puts variables of the address space that arenas are.
_ARENA = ".addr_space.1"
_PREFIXES = (".rodata", ".data", ".bss")
MAX_BYTES = 1 << 30
_MAX_NUMBER_BYTES = 8


def data_maps(elf: Elf, btf: Optional[Btf], object_name: str) -> dict[int, MapSpec]:
    """Return the map of each section of data by the section's number, named as libbpf names them.

    Raises ObjectFileError for a section that is too large.
    """
    sections = [s for s in elf.sections.values() if s.size and _is_data(s.name)]
    types = btf.types if btf and sections else ()
    ids = {btf_type.name: btf_type.id for btf_type in types if btf_type.kind == Kind.DATASEC}
    return {
        section.number: _map(section, ids.get(section.name, 0), object_name) for section in sections
    }


def arena_data(elf: Elf, maps: Iterable[MapSpec]) -> dict[int, MapSpec]:
    """Return the arena whose memory begins with the section of its variables, by its number.

    Raises ObjectFileError for variables without an arena, or with several.
    """
    section = elf.named(_ARENA)
    if section is None or not section.size:
        return {}
    arenas = [spec for spec in maps if spec.type == MapType.ARENA]
    if len(arenas) != 1:
        raise ObjectFileError(
            f"variables of an arena need one map of type ARENA, not {len(arenas)}",
            section=section.name,
        )
    arenas[0].contents = section.data or bytes(section.size)
    return {section.number: arenas[0]}


def variables(elf: Elf, btf: Optional[Btf], maps: dict[int, MapSpec]) -> Iterator[VariableSpec]:
    """Return the variables of all data maps; those that are static come last."""
    signs = _Signs(btf)
    found = [
        (spec, types, symbol)
        for number, spec in maps.items()
        for types in [_Types(btf, _datasec(elf, btf, number, spec))]
        for symbol in elf.symbols_of(elf.sections[number])
        if symbol.type == "STT_OBJECT"
        and symbol.size
        and symbol.value + symbol.size <= elf.sections[number].size
    ]
    for spec, types, symbol in sorted(found, key=lambda row: row[2].local):
        type_id = types.of(symbol)
        yield VariableSpec(
            *(symbol.name, spec, symbol.value, symbol.size),
            *(elf.byteorder, signs.of(type_id, symbol.size), type_id),
        )


def _datasec(elf: Elf, btf: Optional[Btf], number: int, spec: MapSpec) -> int:
    """Return the type of a section of data; the value of an arena's map has none."""
    if spec.type != MapType.ARENA or btf is None:
        return spec.value_type
    datasec = btf.find(Kind.DATASEC, elf.sections[number].name)
    return datasec.id if datasec else 0


class Names:
    """Names of static variables: those of several sources may be the same, until they are taken."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def take(self, name: str) -> str:
        """Return a name, or where another has it NAME.1 and so on."""
        free = name
        while free in self._taken:
            self._taken[name] += 1
            free = f"{name}.{self._taken[name]}"
        self._taken[free] = 0
        return free


def _map(section: Section, type_id: int, object_name: str) -> MapSpec:
    if section.size > MAX_BYTES:
        raise ObjectFileError(f"{section.size} bytes is too large", section=section.name, offset=0)
    constant = section.name.startswith(".rodata")
    return MapSpec(
        _name(object_name, section.name),
        MapType.ARRAY,
        key_size=4,
        value_size=section.size,
        max_entries=1,
        flags=abi.BPF_F_MMAPABLE | (abi.BPF_F_RDONLY_PROG if constant else 0),
        contents=section.data,
        frozen=constant,
        value_type=type_id,
        section=section.name,
        addresses=tuple(sorted({relocation.offset for relocation in section.relocations})),
    )


def _is_data(name: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in _PREFIXES)


def _name(object_name: str, section: str) -> str:
    if "." in section[1:]:
        return section  # such as .rodata.str1.1: there may be several
    room = abi.BPF_OBJ_NAME_LEN - 1 - max(len(section), len(".rodata"))
    return object_name[: max(0, room)] + section


class _Types:
    """The types of the variables of a section."""

    def __init__(self, btf: Optional[Btf], datasec_id: int) -> None:
        self._by_name: dict[str, int] = {}
        self._by_place: dict[tuple[str, int], int] = {}
        variables = btf.variables(btf.type(datasec_id)) if btf and datasec_id else ()
        for variable in variables:
            var = btf.type(variable.type) if btf else None
            if var is not None and var.kind == Kind.VAR:
                self._by_name[var.name] = var.size_or_type
                self._by_place[var.name, variable.offset] = var.size_or_type

    def of(self, symbol: Symbol) -> int:
        """Return the type of a variable, or 0.

        Where names do not tell, places do: linkers fill them in, compilers leave them open.
        """
        name = symbol.name
        return self._by_place.get((name, symbol.value), self._by_name.get(name, 0))


class _Signs:
    """The signs of numbers; an enum is looked through once, however many variables it has."""

    def __init__(self, btf: Optional[Btf]) -> None:
        self._btf = btf
        self._known: dict[int, Optional[bool]] = {}

    def of(self, type_id: int, size: int) -> Optional[bool]:
        """Return whether a number of so many bytes has a sign; None for what is no number."""
        if self._btf is None or not type_id or size > _MAX_NUMBER_BYTES:
            return None
        btf_type = self._btf.resolve(type_id)
        if btf_type.id not in self._known:
            self._known[btf_type.id] = _signed(self._btf, btf_type)
        return self._known[btf_type.id]


def _signed(btf: Btf, btf_type: Type) -> Optional[bool]:
    if btf_type.kind == Kind.INT:
        return btf.integer(btf_type).signed
    if btf_type.kind == Kind.ENUM:
        # clang before 15 does not say whether the values have a sign.
        return any(item.value >> 31 for item in btf.enumerators(btf_type))
    if btf_type.kind == Kind.ENUM64:
        return any(item.value < 0 for item in btf.enumerators(btf_type))
    return False if btf_type.kind == Kind.PTR else None
