"""The .BTF.ext section: what the compiler says of single instructions. No system calls.

Source: Documentation/bpf/btf.rst of the kernel, and struct bpf_core_relo of linux/bpf.h.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from itertools import islice
from operator import attrgetter, le, lt
from typing import Callable, Generic, Iterator, Optional, Sequence, TypeVar

from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, words_of
from pybpfthrottle.bpf.obj.insn import INSN_BYTES
from pybpfthrottle.bpf.obj.plain import NamedTuple

_SECTION = ".BTF.ext"
_HEADER_BYTES = 24
_HEADER_BYTES_WITH_CORE = 32
# Records may have grown in newer compilers; more than this is not a record.
_MAX_RECORD_BYTES = 256


class FunctionInfo(NamedTuple):
    """The function (a type of kind FUNC) that begins at byte ``offset`` of a section."""

    offset: int
    type: int


class LineInfo(NamedTuple):
    """From byte ``offset`` of a section on, instructions are of this line of the source.

    ``file`` and ``text`` are offsets of strings; ``place`` holds line and column.
    """

    offset: int
    file: int
    text: int
    place: int

    @property
    def line(self) -> int:
        """The number of the line, from 1."""
        return self.place >> 10


class CoreRelocation(NamedTuple):
    """A question about a type by an instruction at byte ``offset``; ``access`` is as "0:1:2"."""

    offset: int
    type: int
    access: str
    kind: CoreRelocationKind


R = TypeVar("R", FunctionInfo, LineInfo, CoreRelocation)
_LINE_WORDS = 4


class Records(Generic[R]):
    """The records of one section, in the order of their offsets."""

    def __init__(self, rows: list[R]) -> None:
        self.rows: list[R] = sorted(rows, key=attrgetter("offset"))
        self._offsets: list[int] = [row.offset for row in self.rows]

    def between(self, begin: int, end: int) -> list[R]:
        """Return the records of the bytes from ``begin`` up to ``end``."""
        return self.rows[bisect_left(self._offsets, begin) : bisect_left(self._offsets, end)]

    def last_at(self, offset: int) -> Optional[R]:
        """Return the last one at or before a byte."""
        index = bisect_right(self._offsets, offset)
        return self.rows[index - 1] if index else None


class Lines:
    """The lines of one section's source, in the order of their offsets.

    There is about one for each instruction, so that they are kept as columns of numbers, and an
    object is only made of those that are asked for.
    """

    def __init__(self, columns: Sequence[array[int]]) -> None:
        offsets = columns[0]
        if not all(map(le, offsets, islice(offsets, 1, None))):
            order = sorted(range(len(offsets)), key=offsets.__getitem__)
            columns = [array("I", map(column.__getitem__, order)) for column in columns]
        self._offsets, *self._others = columns

    @property
    def rows(self) -> list[LineInfo]:
        """All of them."""
        return [self._row(index) for index in range(len(self._offsets))]

    def _row(self, index: int) -> LineInfo:
        return LineInfo(self._offsets[index], *(column[index] for column in self._others))

    def last_at(self, offset: int) -> Optional[LineInfo]:
        """Return the last one at or before a byte."""
        index = bisect_right(self._offsets, offset)
        return self._row(index - 1) if index else None

    def encoded(self, begin: int, end: int, start: int) -> bytes:
        """Return the lines of a function at bytes ``begin`` to ``end`` that is loaded at ``start``.

        As struct bpf_line_info, the first of each place, in the byte order of this machine;
        nothing if there is none where the function begins, which the kernel asks for.
        """
        which = slice(bisect_left(self._offsets, begin), bisect_left(self._offsets, end))
        offsets, others = self._offsets[which], [column[which] for column in self._others]
        if not offsets or offsets[0] != begin:
            return b""
        if not all(map(lt, offsets, islice(offsets, 1, None))):
            firsts = list({offset: n for n, offset in reversed(list(enumerate(offsets)))}.values())
            firsts.reverse()
            offsets, *others = (
                array("I", map(column.__getitem__, firsts)) for column in (offsets, *others)
            )
        moved = start - begin
        table = array("I", bytes(4 * _LINE_WORDS * len(offsets)))
        table[0::_LINE_WORDS] = array("I", [(at + moved) // INSN_BYTES for at in offsets])
        for number, column in enumerate(others, 1):
            table[number::_LINE_WORDS] = column
        return table.tobytes()


class BtfExt:
    """The records of a .BTF.ext section, by the names of the sections that they are of.

    Its strings are those of the .BTF section. Raises ObjectFileError for bad data.
    """

    def __init__(self, data: bytes, btf: Btf) -> None:
        self._btf = btf
        if len(data) < _HEADER_BYTES:
            raise ObjectFileError("too short for a header", section=_SECTION, offset=0)
        order = "<" if btf.byteorder == "little" else ">"
        magic, _, _, header, *places = struct.unpack_from(order + "HBBI4I", data)
        if magic != 0xEB9F:
            raise ObjectFileError("no BTF magic number", section=_SECTION, offset=0)
        if header >= _HEADER_BYTES_WITH_CORE and len(data) >= _HEADER_BYTES_WITH_CORE:
            places += struct.unpack_from(order + "2I", data, _HEADER_BYTES)
        else:
            places += (0, 0)
        parts = [_Part(data, header + at, size, btf) for at, size in zip(places[::2], places[1::2])]
        self.functions = parts[0].read(2, FunctionInfo)
        self.lines = parts[1].read_lines()
        self.relocations = parts[2].read(4, self._relocation)

    def _relocation(self, offset: int, type_id: int, access: int, kind: int) -> CoreRelocation:
        try:
            known = CoreRelocationKind(kind)
        except ValueError:
            raise ObjectFileError(
                f"unknown kind of CO-RE relocation {kind}", section=_SECTION
            ) from None
        return CoreRelocation(offset, type_id, self._btf.string(access), known)


class _Part:
    """One of the three tables: a record's size, then for each section its name and its records."""

    def __init__(self, data: bytes, begin: int, size: int, btf: Btf) -> None:
        self._begin = begin
        self._btf = btf
        if begin % 4 or size % 4 or begin + size > len(data):
            raise self._bad(f"a table of {size} bytes goes past the end of the section", 0)
        self._words = words_of(data[begin : begin + size], btf.byteorder)

    def _bad(self, reason: str, word: int) -> ObjectFileError:
        return ObjectFileError(reason, section=_SECTION, offset=self._begin + 4 * word)

    def read(self, wanted: int, make: Callable[..., R]) -> dict[str, Records[R]]:
        """Return the records, of which the first ``wanted`` words are known."""
        by_section: dict[str, list[R]] = {}
        record_words = self._record_words(wanted)
        for name, begin, end in self._tables(record_words):
            records = by_section.setdefault(name, [])
            for at in range(begin, end, record_words):
                records.append(make(*self._words[at : at + wanted]))
        return {name: Records(rows) for name, rows in by_section.items()}

    def read_lines(self) -> dict[str, Lines]:
        """Return the records of lines, column by column."""
        by_section: dict[str, list[array[int]]] = {}
        record_words = self._record_words(_LINE_WORDS)
        for name, begin, end in self._tables(record_words):
            columns = by_section.setdefault(name, [array("I") for _ in range(_LINE_WORDS)])
            for number, column in enumerate(columns):
                column.extend(self._words[begin + number : end : record_words])
        return {name: Lines(columns) for name, columns in by_section.items()}

    def _record_words(self, wanted: int) -> int:
        """Return the length of a record; 1 where there is no table."""
        if not self._words:
            return 1
        record_bytes = self._words[0]
        if record_bytes % 4 or not 4 * wanted <= record_bytes <= _MAX_RECORD_BYTES:
            raise self._bad(f"a record cannot have {record_bytes} bytes", 0)
        return record_bytes // 4

    def _tables(self, record_words: int) -> Iterator[tuple[str, int, int]]:
        """Return the name of each section, and where its records begin and end."""
        at = 1
        while at < len(self._words):
            header = self._words[at : at + 2]
            end = at + 2 + record_words * (header[1] if len(header) == 2 else 0)
            if len(header) < 2 or end > len(self._words):
                raise self._bad("records are cut off", at)
            yield self._btf.string(header[0]), at + 2, end
            at = end
