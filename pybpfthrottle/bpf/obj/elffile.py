"""The records of an ELF file that a BPF object is made of: sections, symbols, relocations.

Nothing else in the package knows pyelftools. No system calls.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Iterator, Optional, Union

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.plain import NamedTuple

EXECUTABLE = 0x4  # SHF_EXECINSTR
_ALLOC = 0x2  # SHF_ALLOC
_MAX_ALIGNMENT = 4096
_DATA = (".maps", ".rodata", ".data", ".struct_ops", "?.struct_ops")
_EM_NONE, _EM_BPF = 0, 247
_NULL, _PROGBITS, _SYMTAB, _STRTAB, _RELA, _NOBITS, _REL = 0, 1, 2, 3, 4, 8, 9
_TYPES: dict[int, str] = {
    **dict(enumerate(("SHT_NULL", "SHT_PROGBITS", "SHT_SYMTAB", "SHT_STRTAB", "SHT_RELA"))),
    7: "SHT_NOTE",
    8: "SHT_NOBITS",
    9: "SHT_REL",
    17: "SHT_GROUP",
    18: "SHT_SYMTAB_SHNDX",
    0x6FFF4C03: "SHT_LLVM_ADDRSIG",
}
_SYMBOL_TYPES = {
    number: f"STT_{name}"
    for number, name in enumerate(("NOTYPE", "OBJECT", "FUNC", "SECTION", "FILE", "COMMON", "TLS"))
}
_STB_LOCAL, _STB_WEAK = 0, 2
_HIDDEN = (1, 2)  # STV_INTERNAL, STV_HIDDEN
# The longest names that are seen are C++'s and Rust's. Names may share their bytes, so that
# without a limit a small file could ask for more memory than there is.
_MAX_NAME_BYTES = 1024


class Symbol(NamedTuple):
    """A symbol; ``section`` is a number, or such as "SHN_UNDEF". ``value`` and ``size``: bytes."""

    name: str
    section: Union[int, str]
    value: int
    size: int
    type: str
    local: bool
    weak: bool = False
    hidden: bool = False

    @property
    def undefined(self) -> bool:
        """Whether the symbol is defined elsewhere."""
        return self.section == "SHN_UNDEF"


class Relocation(NamedTuple):
    """A value that is to be put in at byte ``offset`` of a section."""

    offset: int
    type: int
    symbol: Symbol


class Section(NamedTuple):
    """A section; ``data`` is None where it is all zeros and not in the file."""

    number: int
    name: str
    flags: int
    size: int
    data: Optional[bytes]
    relocations: list[Relocation]

    @property
    def executable(self) -> bool:
        """Whether the section holds instructions."""
        return bool(self.flags & EXECUTABLE)


class Header(NamedTuple):
    """A row of the table of sections; ``type`` is such as "SHT_PROGBITS"."""

    name: str
    type: Union[int, str]
    flags: int
    size: int


class Elf(NamedTuple):
    """The sections by their numbers, and the symbols by the sections that they are in.

    ``by_gcc`` tells whether gcc made it, which relocates in its own ways. ``headers`` has all
    sections by number, also those that programs and data are not made of.
    """

    byteorder: str
    sections: dict[int, Section]
    symbols: dict[Union[int, str], list[Symbol]]
    by_gcc: bool
    headers: tuple[Header, ...] = ()

    def named(self, name: str) -> Optional[Section]:
        """Return the first section with a name, if there is one."""
        return next((s for s in self.sections.values() if s.name == name), None)

    def contents(self, name: str) -> Optional[bytes]:
        """Return the bytes of the first section with a name, if there is one."""
        section = self.named(name)
        return section.data if section else None

    def symbols_of(self, section: Section) -> list[Symbol]:
        """Return the symbols in a section by their offsets, without that of the section itself."""
        named = (s for s in self.symbols.get(section.number, ()) if s.type != "STT_SECTION")
        return sorted(named, key=lambda symbol: symbol.value)


def stored_section(path: Union[str, os.PathLike[str]], name: str) -> Optional[bytes]:
    """Return the bytes of one section of an ELF file for any machine, or None if it has none.

    Only the section is read, however large the file is (a vmlinux is). Raises OSError, or
    ObjectFileError.
    """
    from elftools.elf.elffile import ELFFile

    with open(path, "rb") as file:
        try:
            section = ELFFile(file).get_section_by_name(name)
            return None if section is None else bytes(section.data())
        except OSError:
            raise
        except Exception as error:
            raise ObjectFileError(f"{os.fspath(path)} is not a valid ELF file: {error}") from error


def read(data: bytes) -> Elf:
    """Read the records.

    Raises ObjectFileError for all that is no sound object for BPF, and without pyelftools.
    """
    refuse_other_files(data)
    try:
        return _Reader(data).read()
    except ObjectFileError:
        raise
    except ModuleNotFoundError as error:
        raise ObjectFileError("pyelftools is missing: pip install pyelftools") from error
    # pyelftools meets broken input with whatever comes first: its own errors, construct's,
    # AssertionError, IndexError, UnicodeDecodeError.
    except Exception as error:
        raise ObjectFileError(f"not a valid ELF file, perhaps truncated: {error}") from error


def refuse_other_files(data: bytes) -> None:
    """Raise ObjectFileError for what does not begin as an ELF file does."""
    if not data:
        raise ObjectFileError("the file is empty")
    if data[:4] != b"\x7fELF":
        raise ObjectFileError("not an ELF file")


class _SectionHeader(NamedTuple):
    """Elf64_Shdr, with its name."""

    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


class _Layouts:
    """The records of a file for machines of 64 bits, in a byte order as struct marks it."""

    def __init__(self, order: str) -> None:
        texts = ("16sHHIQQQIHHHHHH", "IIQQQQIIQQ", "IBBHQQ", "QQ")
        self.file, self.section, self.symbol, self.relocation = (
            struct.Struct(order + text) for text in texts
        )


class _Reader:
    """Reads the records of an ELF file, whose numbers and names pyelftools has.

    Its parser takes 12 ms to import and as much for a small object, which each short program would
    pay for.
    """

    def __init__(self, data: bytes) -> None:
        # Here, so that its absence is told where an object is read.
        from elftools.elf.constants import SHN_INDICES

        named = ("SHN_UNDEF", "SHN_ABS", "SHN_COMMON")
        self._indexes: dict[int, str] = {getattr(SHN_INDICES, name): name for name in named}
        self._in_first: int = SHN_INDICES.SHN_XINDEX
        self._data = data
        self._little = data[5] == 1
        self._order: Any = "little" if self._little else "big"
        self._layouts = _Layouts("<" if self._little else ">")

    def read(self) -> Elf:
        """Return all sections with contents, the symbols, and the relocations of what is loaded."""
        self._refuse_other_machines()
        headers = self._headers()
        self._refuse_overlaps(headers)
        sections = {
            index: self._section(index, header)
            for index, header in enumerate(headers)
            if header.type in (_PROGBITS, _NOBITS)
        }
        symbols = self._symbols(headers)
        self._read_relocations(headers, sections, symbols)
        joins = _joins(headers)
        if joins:
            self._move_records(headers, sections, symbols, joins)
            sections = _joined(sections, joins)
            symbols = [_moved(symbol, joins) for symbol in symbols]
        by_section: dict[Union[int, str], list[Symbol]] = {}
        for symbol in symbols:
            by_section.setdefault(symbol.section, []).append(symbol)
        comments = (s.data for s in sections.values() if s.name == ".comment")
        by_gcc = any(b"GCC:" in comment for comment in comments if comment)
        return Elf(
            *(self._order, sections, by_section, by_gcc),
            tuple(
                Header(header.name, _TYPES.get(header.type, header.type), header.flags, header.size)
                for header in headers
            ),
        )

    def _refuse_other_machines(self) -> None:
        bits = {1: 32, 2: 64}[self._data[4]]
        machine = int.from_bytes(self._data[18:20], self._order)
        if len(self._data) >= 20 and (bits != 64 or machine not in (_EM_BPF, _EM_NONE)):
            raise ObjectFileError(
                f"built for {_machine_name(machine)} ({bits} bit), not for BPF;"
                " compile it with clang -target bpf"
            )

    def _headers(self) -> list[_SectionHeader]:
        """Return the section headers by number, each with its name."""
        layout = self._layouts.section
        offset, *_, size, count, names_index = self._layouts.file.unpack_from(self._data)[6:]
        if not offset:
            return []
        if size != layout.size:
            raise ObjectFileError(f"section headers of {size} bytes are not supported")
        first = layout.unpack_from(self._data, offset)
        # Where the numbers do not fit, the first header holds them.
        count = count or first[5]
        names_index = first[6] if names_index == self._in_first else names_index
        if offset + count * size > len(self._data):
            raise ObjectFileError(
                f"truncated: the table of {count} sections goes past the end of the file"
            )
        rows = list(layout.iter_unpack(self._data[offset : offset + count * size]))
        names = self._contents(_section_header("of section names", rows[names_index]))
        return [_section_header(_string(names, row[0]), row) for row in rows]

    def _refuse_overlaps(self, headers: list[_SectionHeader]) -> None:
        """Refuse sections that share their bytes: they would cost more memory than the file has."""
        total = sum(header.size for header in headers if header.type not in (_NULL, _NOBITS))
        if total > len(self._data):
            raise ObjectFileError(
                f"truncated, or its sections overlap: they add up to {total} bytes,"
                f" but the file has {len(self._data)}"
            )

    def _section(self, index: int, header: _SectionHeader) -> Section:
        contents = self._contents(header) if header.type == _PROGBITS else None
        return Section(index, header.name, header.flags, header.size, contents, [])

    def _symbols(self, headers: list[_SectionHeader]) -> list[Symbol]:
        tables = [header for header in headers if header.type == _SYMTAB]
        if not tables:
            return []
        if len(tables) > 1:
            raise ObjectFileError("the file has two symbol tables", section=tables[1].name)
        (table,) = tables
        names = self._contents(headers[table.link]._replace(name=table.name))
        rows = self._records(table, self._layouts.symbol)
        return [_symbol(row, names, self._indexes) for row in rows]

    def _read_relocations(
        self,
        headers: list[_SectionHeader],
        sections: dict[int, Section],
        symbols: list[Symbol],
    ) -> None:
        for header in headers:
            if header.type not in (_REL, _RELA):
                continue
            target = sections.get(header.info)
            # Those of .BTF, .BTF.ext, .debug and .eh_frame are for linkers.
            if target is None or not (target.executable or target.name.startswith(_DATA)):
                continue
            if header.type == _RELA:
                raise ObjectFileError("RELA relocations are not supported", section=header.name)
            for offset, info in self._records(header, self._layouts.relocation):
                number = info >> 32
                if number >= len(symbols):
                    raise ObjectFileError(
                        f"a relocation refers to symbol {number}, which does not exist",
                        section=target.name,
                        offset=offset,
                    )
                target.relocations.append(Relocation(offset, info & 0xFFFFFFFF, symbols[number]))

    def _move_records(
        self,
        headers: list[_SectionHeader],
        sections: dict[int, Section],
        symbols: list[Symbol],
        joins: dict[int, _Join],
    ) -> None:
        """Let what .BTF.ext says of sections that are joined hold where their contents are now."""
        for header in headers:
            target = sections.get(header.info)
            if header.type != _REL or target is None or target.name != ".BTF.ext":
                continue
            records = bytearray(target.data or b"")
            for at, info in self._records(header, self._layouts.relocation):
                section = symbols[info >> 32].section if info >> 32 < len(symbols) else 0
                join = joins.get(section) if isinstance(section, int) else None
                if join and at + 4 <= len(records):
                    offset = int.from_bytes(records[at : at + 4], self._order) + join.at
                    records[at : at + 4] = (offset & 0xFFFFFFFF).to_bytes(4, self._order)
            sections[target.number] = target._replace(data=bytes(records))

    def _contents(self, header: _SectionHeader) -> bytes:
        contents = self._data[header.offset : header.offset + header.size]
        if len(contents) != header.size:
            raise ObjectFileError(
                f"truncated: expected {header.size} bytes, found {len(contents)}",
                section=header.name,
            )
        return contents

    def _records(self, header: _SectionHeader, layout: struct.Struct) -> Iterator[Any]:
        """Return the records of a table; bytes at its end that make no whole one are left out."""
        contents = self._contents(header)
        return layout.iter_unpack(contents[: len(contents) // layout.size * layout.size])


def _section_header(name: str, row: tuple[int, ...]) -> _SectionHeader:
    _, type, flags, _, offset, size, link, info, alignment, _ = row  # noqa: A001
    return _SectionHeader(name, type, flags, offset, size, link, info, alignment)


def _machine_name(machine: int) -> Union[str, int]:
    from elftools.elf.enums import ENUM_E_MACHINE

    return next((name for name, number in ENUM_E_MACHINE.items() if number == machine), machine)


class _Join(NamedTuple):
    """The section that another one of its name is put behind, and at which byte of it."""

    into: int
    at: int


def _joins(headers: list[_SectionHeader]) -> dict[int, _Join]:
    """Return the sections that have the name of an earlier one, as those of C++'s templates do.

    They are joined, as a linker joins them: their types are one section as well.
    """
    joins: dict[int, _Join] = {}
    ends: dict[tuple[str, int], _Join] = {}
    for index, header in enumerate(headers):
        if header.type in (_PROGBITS, _NOBITS) and header.flags & _ALLOC:
            key = header.name, header.type
            if key in ends:
                alignment = max(1, min(header.alignment, _MAX_ALIGNMENT))
                at = -(-ends[key].at // alignment) * alignment
                joins[index] = _Join(ends[key].into, at)
                ends[key] = ends[key]._replace(at=at + header.size)
            else:
                ends[key] = _Join(index, header.size)
    return joins


def _joined(sections: dict[int, Section], joins: dict[int, _Join]) -> dict[int, Section]:
    """Return the sections without those that are put behind others."""
    result = dict(sections)
    # By their places: of many sections each is copied once.
    parts: dict[int, list[bytes]] = {}
    for number, (into, at) in joins.items():
        section, first = result.pop(number), result[into]
        if section.data is not None and first.data is not None:
            part = parts.setdefault(into, [first.data])
            part.append(bytes(at - first.size) + section.data)
        first.relocations.extend(
            relocation._replace(offset=relocation.offset + at) for relocation in section.relocations
        )
        result[into] = first._replace(size=at + section.size)
    for into, contents in parts.items():
        result[into] = result[into]._replace(data=b"".join(contents))
    for section in result.values():
        section.relocations[:] = [
            relocation._replace(symbol=_moved(relocation.symbol, joins))
            for relocation in section.relocations
        ]
    return result


def _moved(symbol: Symbol, joins: dict[int, _Join]) -> Symbol:
    join = joins.get(symbol.section) if isinstance(symbol.section, int) else None
    return symbol._replace(section=join.into, value=symbol.value + join.at) if join else symbol


def _symbol(row: tuple[int, ...], names: bytes, indexes: dict[int, str]) -> Symbol:
    name, info, other, section, value, size = row
    return Symbol(
        _string(names, name) if name else "",
        indexes.get(section, section),
        *(value, size, _SYMBOL_TYPES.get(info & 0xF, str(info & 0xF))),
        local=info >> 4 == _STB_LOCAL,
        weak=info >> 4 == _STB_WEAK,
        hidden=other & 0x3 in _HIDDEN,
    )


def _string(strings: bytes, offset: int) -> str:
    end = strings.find(b"\0", offset, offset + _MAX_NAME_BYTES)
    if end < 0 and len(strings) - offset >= _MAX_NAME_BYTES:
        raise ObjectFileError(f"the name at {offset:#x} is longer than {_MAX_NAME_BYTES} bytes")
    return strings[offset : end if end >= 0 else None].decode("utf-8", "replace")
