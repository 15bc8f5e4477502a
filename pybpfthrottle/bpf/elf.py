"""A clang-built object file: bytes -> ObjectSpec. Same bytes, same spec; no system calls.

Nothing else in the package knows pyelftools.
"""

from __future__ import annotations

import ctypes
import io
import os
from typing import Any, NamedTuple, Optional, Union

from pybpfthrottle.bpf import abi, sections
from pybpfthrottle.bpf.btf import Btf, Kind
from pybpfthrottle.bpf.specs import (
    CallReference,
    FunctionKey,
    FunctionSpec,
    MapReference,
    MapSpec,
    ObjectSpec,
    ProgramSpec,
)
from pybpfthrottle.errors import ObjectFileError

_EXECUTABLE = 0x4  # SHF_EXECINSTR
_SHN_XINDEX = 0xFFFF
_R_BPF_64_64 = 1
_R_BPF_64_32 = 10
_DATA_PREFIXES = (".rodata", ".data", ".bss")
_MAX_DATA_BYTES = 1 << 30


class _Symbol(NamedTuple):
    name: str
    section: Union[int, str]
    value: int
    size: int
    type: str
    local: bool


class _Relocation(NamedTuple):
    offset: int
    type: int
    symbol: _Symbol


class _Section(NamedTuple):
    number: int
    name: str
    flags: int
    size: int
    data: Optional[bytes]  # None: all zeros, not in the file
    relocations: list[_Relocation]


class _Elf(NamedTuple):
    byteorder: str
    sections: dict[int, _Section]
    symbols: list[_Symbol]

    def named(self, name: str) -> Optional[_Section]:
        return next((s for s in self.sections.values() if s.name == name), None)


def read_file(path: Union[str, os.PathLike[str]]) -> ObjectSpec:
    """Read an object file. Raises OSError, or ObjectFileError with the path in front."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return read_object(data, name=os.path.basename(os.fspath(path)).partition(".")[0])
    except ObjectFileError as error:
        error.args = (f"{os.fspath(path)}: {error}",)
        raise


def read_object(data: bytes, *, name: str = "object") -> ObjectSpec:
    """Read an object of clang's BPF target; ``name`` goes into the names of its data maps.

    Raises ObjectFileError with the section and offset at fault.
    """
    elf = _read_elf(data)
    btf_section = elf.named(".BTF")
    btf_data = btf_section.data if btf_section else None
    spec = ObjectSpec(name=name, byteorder=elf.byteorder, license=_license(elf), btf=btf_data)
    for found in (*_legacy_maps(elf), *_btf_maps(elf, btf_data), *_data_maps(elf, name)):
        spec.maps[found.name] = found
    reader = _CodeReader(elf, data_maps=_data_map_names(elf, name), maps=spec.maps)
    for section in elf.sections.values():
        if section.flags & _EXECUTABLE and section.size:
            _add_functions(spec, reader, section)
    return spec


def _add_functions(spec: ObjectSpec, reader: _CodeReader, section: _Section) -> None:
    kind = sections.kind_of(section.name)
    for function, is_local in reader.functions(section):
        spec.functions[function.key] = function
        if section.name == ".text" or is_local:
            continue
        if kind is None:
            raise ObjectFileError(
                "this name tells no program type (such as cgroup_skb/ingress)", section=section.name
            )
        spec.programs[function.name] = ProgramSpec(
            name=function.name,
            section=section.name,
            type=kind.type,
            expected_attach_type=kind.attach_type,
            function=function,
        )


def _read_elf(data: bytes) -> _Elf:
    if not data:
        raise ObjectFileError("the file is empty")
    if data[:4] != b"\x7fELF":
        raise ObjectFileError("not an ELF file")
    try:
        return _Reader(data).read()
    except ObjectFileError:
        raise
    # pyelftools meets broken input with whatever comes first: its own errors, construct's,
    # AssertionError, IndexError, UnicodeDecodeError.
    except Exception as error:
        raise ObjectFileError(f"not a sound ELF file, perhaps truncated: {error}") from error


class _Reader:
    """Reads the records of an ELF file by pyelftools' layouts.

    Its ELFFile, which would do this as well, imports a DWARF reader first: 12 ms that each start
    of the limiter would pay for.
    """

    def __init__(self, data: bytes) -> None:
        from elftools.elf.structs import ELFStructs

        self._data = data
        self._stream = io.BytesIO(data)
        self._bits = {1: 32, 2: 64}.get(data[4], 0)
        self._little = data[5] == 1
        self._layouts: Any = ELFStructs(little_endian=self._little, elfclass=self._bits)
        self._layouts.create_basic_structs()

    def read(self) -> _Elf:
        """All sections with contents, the symbols, and the relocations of code."""
        file = self._parse(self._layouts.Elf_Ehdr, 0)
        if self._bits != 64 or file["e_machine"] not in ("EM_BPF", "EM_NONE"):
            raise ObjectFileError(
                f"built for {file['e_machine']} ({self._bits} bit), not for BPF;"
                " compile it with clang -target bpf"
            )
        self._layouts.create_advanced_structs(file["e_type"], file["e_machine"])
        headers = self._headers(file)
        found: dict[int, _Section] = {}
        symbols: list[_Symbol] = []
        for index, (name, header) in enumerate(headers):
            kind = header["sh_type"]
            if kind == "SHT_SYMTAB":
                names = self._contents(name, headers[header["sh_link"]][1])
                symbols = [
                    _symbol(symbol, names)
                    for symbol in self._records(name, header, self._layouts.Elf_Sym)
                ]
            elif kind in ("SHT_PROGBITS", "SHT_NOBITS"):
                contents = self._contents(name, header) if kind == "SHT_PROGBITS" else None
                found[index] = _Section(
                    index, name, header["sh_flags"], header["sh_size"], contents, []
                )
        for name, header in headers:
            if header["sh_type"] not in ("SHT_REL", "SHT_RELA"):
                continue
            target = found.get(header["sh_info"])
            # Those of .BTF and .BTF.ext are for linkers.
            if target is not None and target.flags & _EXECUTABLE:
                if header["sh_type"] == "SHT_RELA":
                    raise ObjectFileError("relocations with addends are not BPF's", section=name)
                target.relocations.extend(
                    _Relocation(r["r_offset"], r["r_info_type"], symbols[r["r_info_sym"]])
                    for r in self._records(name, header, self._layouts.Elf_Rel)
                )
        return _Elf("little" if self._little else "big", found, symbols)

    def _headers(self, file: Any) -> list[tuple[str, Any]]:
        """The section headers by number, each with its name."""
        size, offset = file["e_shentsize"], file["e_shoff"]
        layout = self._layouts.Elf_Shdr
        if not offset:
            return []
        if size != layout.sizeof():
            raise ObjectFileError(f"section headers of {size} bytes")
        first = self._parse(layout, offset)
        # Where the numbers do not fit, the first header holds them.
        count = file["e_shnum"] or first["sh_size"]
        names_index = file["e_shstrndx"]
        if names_index == _SHN_XINDEX:
            names_index = first["sh_link"]
        if offset + count * size > len(self._data):
            raise ObjectFileError(f"truncated: the table of {count} sections ends past the file")
        headers = [self._parse(layout, offset + size * index) for index in range(count)]
        names = self._contents("of section names", headers[names_index])
        return [(_string(names, header["sh_name"]), header) for header in headers]

    def _contents(self, name: str, header: Any) -> bytes:
        begin, size = header["sh_offset"], header["sh_size"]
        contents = self._data[begin : begin + size]
        if len(contents) != size:
            raise ObjectFileError(
                f"truncated: {size} bytes are promised, {len(contents)} are there", section=name
            )
        return contents

    def _records(self, name: str, header: Any, layout: Any) -> list[Any]:
        size = len(self._contents(name, header))
        begin, step = header["sh_offset"], layout.sizeof()
        return [self._parse(layout, at) for at in range(begin, begin + size - step + 1, step)]

    def _parse(self, layout: Any, offset: int) -> Any:
        from elftools.common.utils import struct_parse

        return struct_parse(layout, self._stream, offset)


def _symbol(symbol: Any, names: bytes) -> _Symbol:
    return _Symbol(
        _string(names, symbol["st_name"]),
        symbol["st_shndx"],
        symbol["st_value"],
        symbol["st_size"],
        symbol["st_info"]["type"],
        symbol["st_info"]["bind"] == "STB_LOCAL",
    )


def _string(strings: bytes, offset: int) -> str:
    end = strings.find(b"\0", offset)
    return strings[offset : end if end >= 0 else None].decode("utf-8", "replace")


def _license(elf: _Elf) -> str:
    section = elf.named("license")
    return (section.data or b"").partition(b"\0")[0].decode("ascii", "replace") if section else ""


def _legacy_maps(elf: _Elf) -> list[MapSpec]:
    """Maps defined by struct bpf_map_def in section ``maps``."""
    section = elf.named("maps")
    if section is None or not section.data:
        return []
    order = ctypes.LittleEndianStructure if elf.byteorder == "little" else ctypes.BigEndianStructure
    layout: Any = type("MapDef", (order,), {"_fields_": abi.LegacyMapDef._fields_})
    wanted = ctypes.sizeof(layout)
    found = sorted(
        (s for s in elf.symbols if s.section == section.number and s.type != "STT_SECTION"),
        key=lambda symbol: symbol.value,
    )
    maps = []
    for symbol in found:
        raw = section.data[symbol.value : symbol.value + (symbol.size or wanted)]
        if len(raw) < wanted:
            raise ObjectFileError(
                f"map {symbol.name!r}: {wanted} bytes are needed, {len(raw)} are there",
                section="maps",
                offset=symbol.value,
            )
        if any(raw[wanted:]):
            raise ObjectFileError(
                f"map {symbol.name!r} has fields that are not known",
                section="maps",
                offset=symbol.value + wanted,
            )
        define = layout.from_buffer_copy(raw)
        maps.append(
            MapSpec(
                symbol.name,
                define.type,
                define.key_size,
                define.value_size,
                define.max_entries,
                define.map_flags,
            )
        )
    return maps


def _btf_maps(elf: _Elf, btf_data: Optional[bytes]) -> list[MapSpec]:
    """Maps defined by their types, in section ``.maps``."""
    section = elf.named(".maps")
    if section is None or not section.size:
        return []
    if btf_data is None:
        raise ObjectFileError("needs a .BTF section; compile with -g", section=".maps")
    btf = Btf(btf_data)
    datasec = btf.find(Kind.DATASEC, ".maps")
    if datasec is None:
        raise ObjectFileError("the .BTF section does not describe it", section=".maps")
    maps = []
    for index, variable in enumerate(btf.variables(datasec)):
        var = btf.type(variable.type)
        # The linker of an object file knows the offsets; clang leaves them 0 in the BTF.
        offset = next(
            (s.value for s in elf.symbols if s.section == section.number and s.name == var.name),
            index,
        )
        maps.append(_btf_map(btf, var.name, var.size_or_type, offset))
    return maps


def _btf_map(btf: Btf, name: str, type_id: int, offset: int) -> MapSpec:
    def bad(reason: str) -> ObjectFileError:
        return ObjectFileError(f"map {name!r}: {reason}", section=".maps", offset=offset)

    define = btf.resolve(type_id)
    if define.kind != Kind.STRUCT:
        raise bad("not a struct")
    values = {"type": 0, "key_size": 0, "value_size": 0, "max_entries": 0, "map_flags": 0}
    values.update(numa_node=0, map_extra=0)
    for member in btf.members(define):
        pointer = btf.resolve(member.type)
        if pointer.kind != Kind.PTR:
            raise bad(f"{member.name!r} is not a pointer")
        if member.name in ("key", "value"):
            values[f"{member.name}_size"] = btf.size(pointer.size_or_type)
        elif member.name in values:
            array = btf.resolve(pointer.size_or_type)
            if array.kind != Kind.ARRAY:
                raise bad(f"{member.name!r} is not a number")
            values[member.name] = btf.array(array)[1]
        else:
            raise bad(f"{member.name!r} is not supported")
    if not values["type"]:
        raise bad("it has no type")
    return MapSpec(
        name,
        values["type"],
        values["key_size"],
        values["value_size"],
        values["max_entries"],
        values["map_flags"],
        values["numa_node"],
        values["map_extra"],
    )


def _data_map_names(elf: _Elf, name: str) -> dict[int, str]:
    """The map for each data section, by the section's index; named as libbpf names them."""
    return {
        section.number: name[: max(0, abi.BPF_OBJ_NAME_LEN - 1 - len(section.name))] + section.name
        for section in elf.sections.values()
        if section.size
        and any(
            section.name == prefix or section.name.startswith(prefix + ".")
            for prefix in _DATA_PREFIXES
        )
    }


def _data_maps(elf: _Elf, name: str) -> list[MapSpec]:
    maps = []
    for index, map_name in _data_map_names(elf, name).items():
        section = elf.sections[index]
        if section.size > _MAX_DATA_BYTES:
            raise ObjectFileError(f"{section.size} bytes is too large", section=section.name)
        constant = section.name.startswith(".rodata")
        maps.append(
            MapSpec(
                map_name,
                abi.MapType.ARRAY,
                key_size=4,
                value_size=section.size,
                max_entries=1,
                flags=abi.BPF_F_RDONLY_PROG if constant else 0,
                contents=section.data,
                frozen=constant,
            )
        )
    return maps


class _CodeReader:
    """Cuts executable sections into functions, with what each of them refers to."""

    def __init__(self, elf: _Elf, *, data_maps: dict[int, str], maps: dict[str, MapSpec]) -> None:
        self._elf = elf
        self._data_maps = data_maps
        self._maps = maps
        self._map_sections = {s.number for n in ("maps", ".maps") if (s := elf.named(n))}

    def functions(self, section: _Section) -> list[tuple[FunctionSpec, bool]]:
        """The functions of a section in order, each with whether it is static."""
        code = section.data or b""
        found = sorted(
            (s for s in self._elf.symbols if s.section == section.number and s.type == "STT_FUNC"),
            key=lambda symbol: symbol.value,
        )
        if not found:
            raise ObjectFileError("it has code, but no function", section=section.name)
        result = []
        for symbol in found:
            start, end = symbol.value, symbol.value + symbol.size
            if not symbol.size or end > len(code) or start % 8 or symbol.size % 8:
                raise ObjectFileError(
                    f"function {symbol.name!r} of {symbol.size} bytes does not fit in",
                    section=section.name,
                    offset=start,
                )
            relocations = [r for r in section.relocations if start <= r.offset < end]
            result.append((self._function(section, symbol, relocations), symbol.local))
        return result

    def _function(
        self, section: _Section, symbol: _Symbol, relocations: list[_Relocation]
    ) -> FunctionSpec:
        start = symbol.value
        code = (section.data or b"")[start : start + symbol.size]
        maps: list[MapReference] = []
        calls: list[CallReference] = []
        relocated = set()
        for relocation in relocations:
            instruction = code[relocation.offset - start :]
            wide = instruction[0] == abi.BPF_LD_IMM64
            if relocation.offset % 8 or (wide and len(instruction) < 2 * abi.INSN_BYTES):
                raise ObjectFileError(
                    "a relocation inside of an instruction",
                    section=section.name,
                    offset=relocation.offset,
                )
            relocated.add(relocation.offset - start)
            reference = self._reference(section, relocation, instruction)
            reference = reference._replace(offset=relocation.offset - start)
            if isinstance(reference, CallReference):
                calls.append(reference)
            else:
                maps.append(reference)
        calls.extend(self._plain_calls(section, start, code, relocated))
        return FunctionSpec(
            symbol.name, FunctionKey(section.name, start), code, tuple(maps), tuple(calls)
        )

    def _reference(
        self, section: _Section, relocation: _Relocation, code: bytes
    ) -> Union[MapReference, CallReference]:
        symbol = relocation.symbol
        target = self._elf.sections.get(symbol.section) if isinstance(symbol.section, int) else None
        imm = int.from_bytes(code[4:8], self._order, signed=True)
        if relocation.type == _R_BPF_64_32 and code[0] == abi.BPF_CALL:
            if target is not None and target.flags & _EXECUTABLE:
                # clang counts the distance from the section's start in instructions, less one.
                extra = (imm + 1) * 8 if symbol.type == "STT_SECTION" else 0
                return CallReference(0, FunctionKey(target.name, symbol.value + extra))
        elif relocation.type == _R_BPF_64_64 and code[0] == abi.BPF_LD_IMM64 and target is not None:
            if target.number in self._map_sections and symbol.name in self._maps:
                return MapReference(0, symbol.name)
            value_offset = symbol.value + imm
            if target.number in self._data_maps and 0 <= value_offset <= target.size:
                return MapReference(0, self._data_maps[target.number], value_offset)
        what = f"symbol {symbol.name!r}" if symbol.name else "a symbol without a name"
        if symbol.section == "SHN_UNDEF":
            what += ", which is not defined in this object"
        raise ObjectFileError(
            f"cannot resolve the relocation (type {relocation.type}) against {what}",
            section=section.name,
            offset=relocation.offset,
        )

    def _plain_calls(
        self, section: _Section, start: int, code: bytes, relocated: set[int]
    ) -> list[CallReference]:
        """Calls inside of one section carry the distance and need no relocation."""
        src_shift = 4 if self._elf.byteorder == "little" else 0
        calls = []
        position = code.find(abi.BPF_CALL)
        while position >= 0:
            if (
                position % 8 == 0
                and code[position + 1] >> src_shift & 0xF == abi.BPF_PSEUDO_CALL
                and position not in relocated
                and (position < 8 or code[position - 8] != abi.BPF_LD_IMM64)
            ):
                imm = int.from_bytes(code[position + 4 : position + 8], self._order, signed=True)
                key = FunctionKey(section.name, start + position + 8 * (imm + 1))
                calls.append(CallReference(position, key))
            position = code.find(abi.BPF_CALL, position + 1)
        return calls

    @property
    def _order(self) -> Any:
        return self._elf.byteorder
