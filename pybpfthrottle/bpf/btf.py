"""BTF, the BPF Type Format: bytes -> types. No system calls.

Source: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Iterator, NamedTuple, Optional

from pybpfthrottle.errors import ObjectFileError

_MAGIC = 0xEB9F
_SECTION = ".BTF"
_POINTER_BYTES = 8
# A chain of typedefs, qualifiers and arrays longer than this is a loop.
_MAX_CHAIN = 64


class Kind(IntEnum):
    """BTF_KIND_*."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_MODIFIERS = (Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG)
_SIZED = (Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.FLOAT, Kind.DATASEC, Kind.ENUM64)
# Bytes after struct btf_type: once, or for each of its vlen items.
_TAIL_BYTES = {Kind.INT: 4, Kind.ARRAY: 12, Kind.VAR: 4, Kind.DECL_TAG: 4}
_ITEM_BYTES = {
    Kind.STRUCT: 12,
    Kind.UNION: 12,
    Kind.ENUM: 8,
    Kind.FUNC_PROTO: 8,
    Kind.DATASEC: 12,
    Kind.ENUM64: 12,
}


class Type(NamedTuple):
    """struct btf_type; ``offset`` is where in the data its kind's own part begins."""

    kind: Kind
    name: str
    size_or_type: int
    vlen: int
    bitfields: bool
    offset: int
    id: int


class Member(NamedTuple):
    """A member of a struct or union; the offset is in bits."""

    name: str
    type: int
    bit_offset: int


class Variable(NamedTuple):
    """A variable in a data section; offset and size are in bytes."""

    type: int
    offset: int
    size: int


class Integer(NamedTuple):
    """What is known of an integer besides its size in bytes."""

    bits: int
    bit_offset: int
    signed: bool
    char: bool
    bool: bool


class Enumerator(NamedTuple):
    """A name of an enum, and its value."""

    name: str
    value: int


class Btf:
    """All types of one .BTF section; ``types[0]`` is void. Raises ObjectFileError for bad data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        if len(data) < 24:
            raise ObjectFileError("too short for a BTF header", section=_SECTION, offset=0)
        if struct.unpack_from("<H", data)[0] == _MAGIC:
            self._order = "<"
        elif struct.unpack_from(">H", data)[0] == _MAGIC:
            self._order = ">"
        else:
            raise ObjectFileError("no BTF magic number", section=_SECTION, offset=0)
        header, type_offset, type_bytes, string_offset, string_bytes = struct.unpack_from(
            self._order + "5I", data, 4
        )
        self._strings = data[header + string_offset : header + string_offset + string_bytes]
        self.types = [Type(Kind.VOID, "", 0, 0, False, 0, 0)]
        self._read_types(header + type_offset, header + type_offset + type_bytes)

    def _read_types(self, offset: int, end: int) -> None:
        if end > len(self._data):
            raise ObjectFileError("the types end past the section", section=_SECTION, offset=offset)
        unpack = struct.Struct(self._order + "3I").unpack_from
        while offset < end:
            if offset + 12 > end:
                raise ObjectFileError("a type is cut off", section=_SECTION, offset=offset)
            name, info, size_or_type = unpack(self._data, offset)
            try:
                kind = Kind(info >> 24 & 0x1F)
            except ValueError:
                raise ObjectFileError(
                    f"unknown kind of type {info >> 24 & 0x1F}", section=_SECTION, offset=offset
                ) from None
            vlen = info & 0xFFFF
            offset += 12
            text, flag, number = self._string(name), bool(info >> 31), len(self.types)
            self.types.append(Type(kind, text, size_or_type, vlen, flag, offset, number))
            offset += _TAIL_BYTES.get(kind, 0) + _ITEM_BYTES.get(kind, 0) * vlen
            if offset > end:
                raise ObjectFileError("a type is cut off", section=_SECTION, offset=offset)

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if offset >= len(self._strings) or end < 0:
            raise ObjectFileError(f"a name lies outside of the strings: {offset}", section=_SECTION)
        return self._strings[offset:end].decode("utf-8", "replace")

    def type(self, type_id: int) -> Type:
        """The type with this id."""
        if type_id >= len(self.types):
            raise ObjectFileError(f"there is no type {type_id}", section=_SECTION)
        return self.types[type_id]

    def resolve(self, type_id: int) -> Type:
        """The type with typedefs, qualifiers and tags taken away."""
        for _ in range(_MAX_CHAIN):
            found = self.type(type_id)
            if found.kind not in _MODIFIERS:
                return found
            type_id = found.size_or_type
        raise ObjectFileError(f"type {type_id} refers to itself", section=_SECTION)

    def find(self, kind: Kind, name: str) -> Optional[Type]:
        """The first type of this kind and name, if there is one."""
        for found in self.types:
            if found.kind == kind and found.name == name:
                return found
        return None

    def array(self, array: Type) -> tuple[int, int]:
        """The id of the element's type and the number of elements."""
        element, _, count = struct.unpack_from(self._order + "3I", self._data, array.offset)
        return element, count

    def members(self, aggregate: Type) -> Iterator[Member]:
        """The members of a struct or union, in order."""
        for index in range(aggregate.vlen):
            name, type_id, offset = struct.unpack_from(
                self._order + "3I", self._data, aggregate.offset + 12 * index
            )
            yield Member(
                self._string(name), type_id, offset & 0xFFFFFF if aggregate.bitfields else offset
            )

    def integer(self, integer: Type) -> Integer:
        """The encoding of an integer."""
        (word,) = struct.unpack_from(self._order + "I", self._data, integer.offset)
        signed, char, boolean = word >> 24 & 1, word >> 25 & 1, word >> 26 & 1
        return Integer(word & 0xFF, word >> 16 & 0xFF, bool(signed), bool(char), bool(boolean))

    def enumerators(self, enum: Type) -> Iterator[Enumerator]:
        """The names and values of an enum, in order."""
        wide = enum.kind == Kind.ENUM64
        layout = struct.Struct(self._order + ("3I" if wide else "2I"))
        bits = 64 if wide else 32
        for index in range(enum.vlen):
            name, low, *high = layout.unpack_from(self._data, enum.offset + layout.size * index)
            value = low | (high[0] << 32 if wide else 0)
            negative = enum.bitfields and value >> bits - 1
            yield Enumerator(self._string(name), value - (1 << bits) if negative else value)

    def variables(self, datasec: Type) -> Iterator[Variable]:
        """The variables of a data section, in order."""
        for index in range(datasec.vlen):
            yield Variable(
                *struct.unpack_from(self._order + "3I", self._data, datasec.offset + 12 * index)
            )

    def size(self, type_id: int) -> int:
        """The size of a type in bytes."""
        count = 1
        for _ in range(_MAX_CHAIN):
            found = self.resolve(type_id)
            if found.kind in _SIZED:
                return count * found.size_or_type
            if found.kind == Kind.PTR:
                return count * _POINTER_BYTES
            if found.kind != Kind.ARRAY:
                raise ObjectFileError(f"type {type_id} has no size", section=_SECTION)
            type_id, elements = self.array(found)
            count *= elements
        raise ObjectFileError(f"type {type_id} refers to itself", section=_SECTION)
