"""The .BTF.ext section: what the compiler says of single instructions. No system calls.

Source: Documentation/bpf/btf.rst of the kernel, and struct bpf_core_relo of linux/bpf.h.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import Callable, Generic, Iterator, NamedTuple, Optional, TypeVar

from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, words_of

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
    """What an instruction at byte ``offset`` wants to know of a type; ``access`` is as "0:1:2"."""

    offset: int
    type: int
    access: str
    kind: CoreRelocationKind


R = TypeVar("R", FunctionInfo, LineInfo, CoreRelocation)


class Records(Generic[R]):
    """The records of one section, in the order of their offsets."""

    def __init__(self, rows: list[R]) -> None:
        self.rows: list[R] = sorted(rows, key=attrgetter("offset"))
        self._offsets: list[int] = [row.offset for row in self.rows]

    def between(self, begin: int, end: int) -> list[R]:
        """Those of the bytes from ``begin`` up to ``end``."""
        return self.rows[bisect_left(self._offsets, begin) : bisect_left(self._offsets, end)]

    def last_at(self, offset: int) -> Optional[R]:
        """The last one at or before a byte."""
        index = bisect_right(self._offsets, offset)
        return self.rows[index - 1] if index else None


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
        self.lines = parts[1].read(4, LineInfo)
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
            raise self._bad(f"a table of {size} bytes does not fit in", 0)
        self._words = words_of(data[begin : begin + size], btf.byteorder)

    def _bad(self, reason: str, word: int) -> ObjectFileError:
        return ObjectFileError(reason, section=_SECTION, offset=self._begin + 4 * word)

    def read(self, wanted: int, make: Callable[..., R]) -> dict[str, Records[R]]:
        """The records, of which the first ``wanted`` words are known."""
        if not self._words:
            return {}
        record_bytes = self._words[0]
        if record_bytes % 4 or not 4 * wanted <= record_bytes <= _MAX_RECORD_BYTES:
            raise self._bad(f"records of {record_bytes} bytes", 0)
        found: dict[str, list[R]] = {}
        for name, begin, end in self._tables(record_bytes // 4):
            records = found.setdefault(name, [])
            for at in range(begin, end, record_bytes // 4):
                records.append(make(*self._words[at : at + wanted]))
        return {name: Records(rows) for name, rows in found.items()}

    def _tables(self, record_words: int) -> Iterator[tuple[str, int, int]]:
        """The name of each section, and where its records begin and end."""
        at = 1
        while at < len(self._words):
            header = self._words[at : at + 2]
            end = at + 2 + record_words * (header[1] if len(header) == 2 else 0)
            if len(header) < 2 or end > len(self._words):
                raise self._bad("records are cut off", at)
            yield self._btf.string(header[0]), at + 2, end
            at = end
