"""The contents of an object file, as records for tables and for JSON. No system calls."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from enum import IntEnum
from typing import Any, Iterator, Optional, Union

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import CoreRelocationKind, MapType
from pybpfthrottle.bpf.obj import elf, elffile, needs, relocate
from pybpfthrottle.bpf.obj.accesses import describe
from pybpfthrottle.bpf.obj.btf_ext import BtfExt
from pybpfthrottle.bpf.obj.btf_text import declaration, definitions
from pybpfthrottle.bpf.obj.btf_values import BtfCodec
from pybpfthrottle.bpf.obj.externs import Extern
from pybpfthrottle.bpf.obj.externs import externs as declared
from pybpfthrottle.bpf.obj.insn import INSN_BYTES, RelocationType
from pybpfthrottle.bpf.obj.specs import MapSpec, ProgramSpec, VariableSpec

_FLAGS = ((0x1, "W"), (0x2, "A"), (0x4, "X"), (0x10, "M"), (0x20, "S"), (0x40, "I"), (0x80, "L"))
_K = CoreRelocationKind
_QUESTIONS = {
    _K.FIELD_BYTE_OFFSET: "field offset of",
    _K.FIELD_BYTE_SIZE: "field size of",
    _K.FIELD_EXISTS: "field existence of",
    _K.FIELD_SIGNED: "field sign of",
    _K.FIELD_LSHIFT_U64: "field left shift of",
    _K.FIELD_RSHIFT_U64: "field right shift of",
    _K.TYPE_ID_LOCAL: "own type id of",
    _K.TYPE_ID_TARGET: "kernel's type id of",
    _K.TYPE_EXISTS: "type existence of",
    _K.TYPE_SIZE: "type size of",
    _K.ENUMVAL_EXISTS: "enum value existence of",
    _K.ENUMVAL_VALUE: "enum value of",
    _K.TYPE_MATCHES: "type match of",
}
# Tables are to be read; a large array is not.
_MAX_SHOWN_BYTES = 256


def inspect(source: Union[bytes, elf.Path]) -> Inspection:
    """Read an object file, or the bytes of one, to tell what it has. No privileges are needed.

    Raises OSError, or ObjectFileError with the path in front.
    """
    if isinstance(source, bytes):
        return Inspection(source)
    with elf.naming(source):
        return Inspection(elf.file_bytes(source), elf.name_of(source))


class Inspection:
    """An object, and everything that can be told of it. Raises ObjectFileError."""

    def __init__(self, data: bytes, name: str = "object") -> None:
        self._file = elffile.read(data)
        self.spec = elf.object_in(self._file, name)
        self._btf = self.spec.btf
        self._lengths: dict[str, int] = {}

    def describe(self, *, with_types: bool = False) -> dict[str, Any]:
        """Return a record of all that there is; the types as C spells them only on request."""
        core = self.core_relocations()
        programs = self.programs()
        needed = needs.needs(
            self.spec,
            self._btf,
            self._externs(),
            has_core=bool(core),
            longest=max((program["linked_instructions"] for program in programs), default=0),
        )
        return {
            "byteorder": self.spec.byteorder,
            "license": self.spec.license,
            "oldest_kernel": needs.oldest(needed),
            "needs": [need._asdict() for need in needed],
            "sections": self.sections(),
            "programs": programs,
            "maps": self.maps(),
            "variables": self.variables(),
            "externs": self.externs(),
            "relocations": self.relocations(),
            "core_relocations": core,
            "types": self.type_counts(),
            **({"definitions": list(self.definitions())} if with_types else {}),
        }

    def sections(self) -> list[dict[str, Any]]:
        """Return the sections by number, with sizes in bytes and readelf's letters for flags."""
        return [
            {
                "name": header.name,
                "type": _section_type(header.type),
                "size": header.size,
                "flags": "".join(letter for bit, letter in _FLAGS if header.flags & bit),
            }
            for header in self._file.headers[1:]
        ]

    def programs(self) -> list[dict[str, Any]]:
        """Return the programs; ``linked_instructions`` include all functions that they call."""
        return [self._program(program) for program in self.spec.programs.values()]

    def _program(self, program: ProgramSpec) -> dict[str, Any]:
        functions = relocate.functions_of(self.spec, program)
        return {
            "name": program.name,
            "section": program.section,
            "type": _name(program.type),
            "expected_attach_type": _name(program.expected_attach_type),
            "target": program.attach_to,
            "flags": _program_flags(program.flags),
            "autoload": program.autoload,
            "instructions": len(program.function.code) // INSN_BYTES,
            "linked_instructions": sum(len(function.code) for function in functions) // INSN_BYTES,
            "maps": sorted(relocate.maps_of(self.spec, program)),
            "functions": [function.name for function in functions[1:]],
        }

    def maps(self) -> list[dict[str, Any]]:
        """Return the maps, with sizes in bytes, and types as C spells them."""
        return [self._map(spec) for spec in self.spec.maps.values()]

    def _map(self, spec: MapSpec) -> dict[str, Any]:
        return {
            "name": spec.name,
            "type": _known(MapType, spec.type).lower(),
            "key_size": spec.key_size,
            "value_size": spec.value_size,
            "max_entries": spec.max_entries,
            "flags": spec.flags,
            "key_type": self._type(spec.key_type),
            "value_type": self._type(spec.value_type),
            "section": spec.section,
            "frozen": spec.frozen,
            "pinned": spec.pinned,
            "numa_node": spec.numa_node,
            "extra": spec.extra,
            "inner": self._map(spec.inner) if spec.inner else None,
            "initial": {str(key): name for key, name in spec.initial.items()},
        }

    def variables(self) -> list[dict[str, Any]]:
        """Return the variables; the value that one begins with is None where it is a large one."""
        return [
            {
                "name": variable.name,
                "section": variable.map.section,
                "type": self._type(variable.type),
                "size": variable.size,
                "value": self._value(variable) if variable.size <= _MAX_SHOWN_BYTES else None,
            }
            for variable in self.spec.variables.values()
        ]

    def _value(self, variable: VariableSpec) -> Any:
        value = variable.get()
        if self._btf is None or not variable.type or self._btf.size(variable.type) != variable.size:
            return value if isinstance(value, int) else value.hex(" ")
        data = variable.encode(value)
        return _plain(BtfCodec(self._btf, variable.type).decode(data))

    def externs(self) -> list[dict[str, Any]]:
        """Return what the kernel is to have: settings, functions and variables."""
        weak = self.spec.weak_externs
        return [
            {
                "name": name,
                "section": extern.section,
                "type": self._type(extern.declared.size_or_type),
                "weak": name in weak,
            }
            for name, extern in self._externs().items()
        ]

    def relocations(self) -> list[dict[str, Any]]:
        """Return how many relocations of each kind the sections of code and maps have."""
        counts = Counter(
            (section.name, _known(RelocationType, relocation.type))
            for section in self._file.sections.values()
            for relocation in section.relocations
        )
        return [
            {"section": section, "kind": kind, "count": count}
            for (section, kind), count in counts.items()
        ]

    def core_relocations(self) -> list[dict[str, Any]]:
        """Return what the code asks of the kernel's types, in words."""
        if self._btf is None or not self.spec.btf_ext:
            return []
        records = BtfExt(self.spec.btf_ext, self._btf).relocations
        return [
            {
                "section": section,
                "offset": row.offset,
                "kind": _name(row.kind),
                "text": f"{_QUESTIONS[row.kind]} {describe(self._btf, row)}",
            }
            for section, rows in records.items()
            for row in rows.rows
        ]

    def type_counts(self) -> dict[str, int]:
        """Return how many types of each kind there are."""
        counts = Counter(btf_type.kind for btf_type in self._btf.types[1:]) if self._btf else {}
        return {kind.name.lower(): count for kind, count in sorted(counts.items())}

    def definitions(self) -> Iterator[str]:
        """Return the types as C spells them, line by line."""
        return definitions(self._btf) if self._btf else iter(())

    def _externs(self) -> dict[str, Extern]:
        return declared(self._btf) if self._btf else {}

    def _type(self, type_id: int) -> Optional[str]:
        return declaration(self._btf, type_id) if self._btf and type_id else None


def _name(value: Optional[IntEnum]) -> Optional[str]:
    return None if value is None else value.name.lower()


def _section_type(type: Union[int, str]) -> str:
    return hex(type) if isinstance(type, int) else type.replace("SHT_", "").lower()


def _program_flags(flags: int) -> list[str]:
    known = ((abi.BPF_F_SLEEPABLE, "sleepable"), (abi.BPF_F_XDP_HAS_FRAGS, "frags"))
    return [name for flag, name in known if flags & flag]


def _known(names: type[IntEnum], number: int) -> str:
    """Return the name of a number; the number itself where it has none here."""
    with suppress(ValueError):
        return names(number).name
    return str(number)


def _plain(value: Any) -> Any:
    """Return a value in the types that JSON has."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.hex(" ") if isinstance(value, bytes) else value
