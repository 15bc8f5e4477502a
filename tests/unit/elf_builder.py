"""Small ELF64 objects and BTF data made in memory, for either byte order."""

from __future__ import annotations

import struct

NOTYPE, OBJECT, FUNC, SECTION = range(4)
LOCAL, GLOBAL = range(2)
PROGBITS, SYMTAB, STRTAB, NOBITS, REL = 1, 2, 3, 8, 9
ALLOC, EXECUTABLE = 2, 4
EM_X86_64, EM_BPF = 62, 247
R_BPF_64_64, R_BPF_64_32 = 1, 10
UNDEFINED = 0

_HEADER_BYTES = 64
_SECTION_BYTES = 64


class _Strings:
    def __init__(self) -> None:
        self.data = b"\0"

    def add(self, text: str) -> int:
        if not text:
            return 0
        offset = len(self.data)
        self.data += text.encode() + b"\0"
        return offset


class ObjectBuilder:
    """An object file as clang lays it out; the parts are given in any order."""

    def __init__(self, byteorder: str = "little", *, machine: int = EM_BPF) -> None:
        self.byteorder = byteorder
        self.order = "<" if byteorder == "little" else ">"
        self._machine = machine
        self._names = _Strings()
        self._symbol_names = _Strings()
        self._headers = [(0, 0, 0, 0, 0, 0, 0)]  # name, type, flags, size, link, info, entry size
        self._contents = [b""]
        self._symbols = [struct.pack(self.order + "IBBHQQ", 0, 0, 0, 0, 0, 0)]
        self._relocations: dict[int, list[bytes]] = {}

    def section(
        self, name: str, data: bytes = b"", *, flags: int = ALLOC, type: int = PROGBITS, size=None
    ) -> int:
        """Add a section; the answer is its index."""
        return self._add(name, type, flags, data, size=size)

    def code(self, name: str, data: bytes, *functions: str) -> int:
        """Add an executable section, with one global function for each name, of equal sizes."""
        index = self._add(name, PROGBITS, ALLOC | EXECUTABLE, data)
        size = len(data) // max(1, len(functions))
        for number, function in enumerate(functions):
            self.symbol(function, index, value=number * size, size=size)
        return index

    def symbol(
        self,
        name: str,
        section: int,
        *,
        value: int = 0,
        size: int = 0,
        type: int = FUNC,
        bind: int = GLOBAL,
    ) -> int:
        """Add a symbol; the answer is its index."""
        name_at = self._symbol_names.add(name)
        self._symbols.append(
            struct.pack(self.order + "IBBHQQ", name_at, bind << 4 | type, 0, section, value, size)
        )
        return len(self._symbols) - 1

    def relocation(self, section: int, offset: int, symbol: int, type: int) -> None:
        """Add a relocation for a section."""
        entry = struct.pack(self.order + "QQ", offset, symbol << 32 | type)
        self._relocations.setdefault(section, []).append(entry)

    def insn(self, code: int, *, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
        """One instruction."""
        registers = dst | src << 4 if self.byteorder == "little" else dst << 4 | src
        return struct.pack(self.order + "BBhi", code, registers, off, imm)

    def returns(self, value: int = 1) -> bytes:
        """A function of two instructions."""
        return self.insn(0xB7, imm=value) + self.insn(0x95)

    def load(self, imm: int = 0) -> bytes:
        """A 64-bit load into r1, of two slots, to be relocated."""
        return self.insn(0x18, dst=1, imm=imm) + self.insn(0)

    def call(self, imm: int = -1) -> bytes:
        """A call of a function in the same object."""
        return self.insn(0x85, src=1, imm=imm)

    def build(self, *, table_first: bool = False) -> bytes:
        """The file; the section table is at its end unless it is to be first."""
        symbols = self._add(
            ".symtab", SYMTAB, 0, b"".join(self._symbols), link=len(self._headers) + 1, entry=24
        )
        self._add(".strtab", STRTAB, 0, self._symbol_names.data)
        for section, entries in self._relocations.items():
            self._add(
                f".rel{section}", REL, 0, b"".join(entries), link=symbols, info=section, entry=16
            )
        names_at = self._names.add(".shstrtab")
        self._headers.append((names_at, STRTAB, 0, len(self._names.data), 0, 0, 0))
        self._contents.append(self._names.data)
        table_bytes = _SECTION_BYTES * len(self._headers)
        contents_at = _HEADER_BYTES + (table_bytes if table_first else 0)
        contents = b"".join(self._contents)
        table_at = _HEADER_BYTES if table_first else contents_at + len(contents)
        table = b""
        position = contents_at
        for (name, kind, flags, size, link, info, entry), data in zip(
            self._headers, self._contents
        ):
            table += struct.pack(
                self.order + "IIQQQQIIQQ",
                *(name, kind, flags, 0, position, size, link, info, 1, entry),
            )
            position += len(data)
        header = struct.pack(
            self.order + "4sBBBB8xHHIQQQIHHHHHH",
            *(b"\x7fELF", 2, 1 if self.order == "<" else 2, 1, 0),
            *(1, self._machine, 1, 0, 0, table_at, 0),
            *(_HEADER_BYTES, 0, 0, _SECTION_BYTES, len(self._headers), len(self._headers) - 1),
        )
        return header + (table + contents if table_first else contents + table)

    def _add(self, name, type, flags, data, *, size=None, link=0, info=0, entry=0) -> int:
        size = len(data) if size is None else size
        self._headers.append((self._names.add(name), type, flags, size, link, info, entry))
        self._contents.append(data)
        return len(self._headers) - 1


class BtfBuilder:
    """Types of a .BTF section; the first that is added has the id 1."""

    def __init__(self, byteorder: str = "little") -> None:
        self.order = "<" if byteorder == "little" else ">"
        self._strings = _Strings()
        self._types = b""
        self._count = 0

    def add(self, kind: int, name: str = "", *, size=0, vlen=0, flag=False, tail=()) -> int:
        """Add a type; ``tail`` is what follows struct btf_type: numbers, or names to be stored."""
        name_at = self._strings.add(name) if isinstance(name, str) else name
        self._types += struct.pack(self.order + "3I", name_at, flag << 31 | kind << 24 | vlen, size)
        for item in tail:
            number = self._strings.add(item) if isinstance(item, str) else item
            self._types += struct.pack(self.order + "I", number)
        self._count += 1
        return self._count

    def build(self, *, magic: int = 0xEB9F) -> bytes:
        """The section."""
        types, strings = self._types, self._strings.data
        header = struct.pack(
            self.order + "HBBIIIII",
            *(magic, 1, 0, 24, 0, len(types), len(types), len(strings)),
        )
        return header + types + strings
