"""The records of an ELF file that a BPF object is made of: sections, symbols, relocations.

Nothing else in the package knows pyelftools. No system calls.
"""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple, Optional, Union

from pybpfthrottle.bpf.errors import ObjectFileError

EXECUTABLE = 0x4  # SHF_EXECINSTR
_SHN_XINDEX = 0xFFFF
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


class _Reader:
    """Reads the records of an ELF file by pyelftools' layouts.

    Its ELFFile, which would do this as well, imports a DWARF reader first: 12 ms that each
    short program would pay for.
    """

    def __init__(self, data: bytes) -> None:
        from elftools.elf.structs import ELFStructs

        self._data = data
        self._stream = io.BytesIO(data)
        self._bits = {1: 32, 2: 64}.get(data[4], 0)
        self._little = data[5] == 1
        self._layouts: Any = ELFStructs(little_endian=self._little, elfclass=self._bits)
        self._layouts.create_basic_structs()

    def read(self) -> Elf:
        """Return all sections with contents, the symbols, and the relocations of what is loaded."""
        file = self._parse(self._layouts.Elf_Ehdr, 0)
        if self._bits != 64 or file["e_machine"] not in ("EM_BPF", "EM_NONE"):
            raise ObjectFileError(
                f"built for {file['e_machine']} ({self._bits} bit), not for BPF;"
                " compile it with clang -target bpf"
            )
        self._layouts.create_advanced_structs(file["e_type"], file["e_machine"])
        headers = self._headers(file)
        self._refuse_overlaps(headers)
        sections = {
            index: self._section(index, name, header)
            for index, (name, header) in enumerate(headers)
            if header["sh_type"] in ("SHT_PROGBITS", "SHT_NOBITS")
        }
        symbols = self._symbols(headers)
        self._read_relocations(headers, sections, symbols)
        by_section: dict[Union[int, str], list[Symbol]] = {}
        for symbol in symbols:
            by_section.setdefault(symbol.section, []).append(symbol)
        comments = (s.data for s in sections.values() if s.name == ".comment")
        by_gcc = any(b"GCC:" in comment for comment in comments if comment)
        return Elf(
            "little" if self._little else "big",
            *(sections, by_section, by_gcc),
            tuple(
                Header(name, header["sh_type"], header["sh_flags"], header["sh_size"])
                for name, header in headers
            ),
        )

    def _headers(self, file: Any) -> list[tuple[str, Any]]:
        """Return the section headers by number, each with its name."""
        size, offset = file["e_shentsize"], file["e_shoff"]
        layout = self._layouts.Elf_Shdr
        if not offset:
            return []
        if size != layout.sizeof():
            raise ObjectFileError(f"section headers of {size} bytes are not supported")
        first = self._parse(layout, offset)
        # Where the numbers do not fit, the first header holds them.
        count = file["e_shnum"] or first["sh_size"]
        names_index = file["e_shstrndx"]
        if names_index == _SHN_XINDEX:
            names_index = first["sh_link"]
        if offset + count * size > len(self._data):
            raise ObjectFileError(
                f"truncated: the table of {count} sections goes past the end of the file"
            )
        headers = [self._parse(layout, offset + size * index) for index in range(count)]
        names = self._contents("of section names", headers[names_index])
        return [(_string(names, header["sh_name"]), header) for header in headers]

    def _refuse_overlaps(self, headers: list[tuple[str, Any]]) -> None:
        """Refuse sections that share their bytes: they would cost more memory than the file has."""
        total = sum(
            header["sh_size"]
            for _, header in headers
            if header["sh_type"] not in ("SHT_NULL", "SHT_NOBITS")
        )
        if total > len(self._data):
            raise ObjectFileError(
                f"truncated, or its sections overlap: they add up to {total} bytes,"
                f" but the file has {len(self._data)}"
            )

    def _section(self, index: int, name: str, header: Any) -> Section:
        stored = header["sh_type"] == "SHT_PROGBITS"
        contents = self._contents(name, header) if stored else None
        return Section(index, name, header["sh_flags"], header["sh_size"], contents, [])

    def _symbols(self, headers: list[tuple[str, Any]]) -> list[Symbol]:
        tables = [numbered for numbered in headers if numbered[1]["sh_type"] == "SHT_SYMTAB"]
        if not tables:
            return []
        if len(tables) > 1:
            raise ObjectFileError("the file has two symbol tables", section=tables[1][0])
        name, header = tables[0]
        names = self._contents(name, headers[header["sh_link"]][1])
        return [
            _symbol(symbol, names) for symbol in self._records(name, header, self._layouts.Elf_Sym)
        ]

    def _read_relocations(
        self,
        headers: list[tuple[str, Any]],
        sections: dict[int, Section],
        symbols: list[Symbol],
    ) -> None:
        for name, header in headers:
            if header["sh_type"] not in ("SHT_REL", "SHT_RELA"):
                continue
            target = sections.get(header["sh_info"])
            # Those of .BTF, .BTF.ext and .debug are for linkers.
            if target is None or not (target.executable or target.name == ".maps"):
                continue
            if header["sh_type"] == "SHT_RELA":
                raise ObjectFileError("RELA relocations are not supported", section=name)
            for record in self._records(name, header, self._layouts.Elf_Rel):
                number = record["r_info_sym"]
                if number >= len(symbols):
                    raise ObjectFileError(
                        f"a relocation refers to symbol {number}, which does not exist",
                        section=target.name,
                        offset=record["r_offset"],
                    )
                target.relocations.append(
                    Relocation(record["r_offset"], record["r_info_type"], symbols[number])
                )

    def _contents(self, name: str, header: Any) -> bytes:
        begin, size = header["sh_offset"], header["sh_size"]
        contents = self._data[begin : begin + size]
        if len(contents) != size:
            raise ObjectFileError(
                f"truncated: expected {size} bytes, found {len(contents)}", section=name
            )
        return contents

    def _records(self, name: str, header: Any, layout: Any) -> list[Any]:
        size = len(self._contents(name, header))
        begin, step = header["sh_offset"], layout.sizeof()
        return [self._parse(layout, at) for at in range(begin, begin + size - step + 1, step)]

    def _parse(self, layout: Any, offset: int) -> Any:
        from elftools.common.utils import struct_parse

        return struct_parse(layout, self._stream, offset)


def _symbol(symbol: Any, names: bytes) -> Symbol:
    return Symbol(
        _string(names, symbol["st_name"]),
        symbol["st_shndx"],
        symbol["st_value"],
        symbol["st_size"],
        symbol["st_info"]["type"],
        symbol["st_info"]["bind"] == "STB_LOCAL",
        symbol["st_info"]["bind"] == "STB_WEAK",
        symbol["st_other"]["visibility"] in ("STV_HIDDEN", "STV_INTERNAL"),
    )


def _string(strings: bytes, offset: int) -> str:
    end = strings.find(b"\0", offset, offset + _MAX_NAME_BYTES)
    if end < 0 and len(strings) - offset >= _MAX_NAME_BYTES:
        raise ObjectFileError(f"the name at {offset:#x} is longer than {_MAX_NAME_BYTES} bytes")
    return strings[offset : end if end >= 0 else None].decode("utf-8", "replace")
