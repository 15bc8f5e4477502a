"""Values by their BTF type: bytes <-> what Python has for them. No system calls.

=================  ======================================================
integer, pointer   int
bool               bool
float, double      float
enum               str, or int for a value without a name
char[]             str where it is printable text, else a list of int
other array        list
struct, union      dict; the members of an anonymous one are as their own
data section       dict of its variables
=================  ======================================================
"""

from __future__ import annotations

import struct
from typing import Any, Iterator

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Member, Type

_FLOATS = {2: "e", 4: "f", 8: "d"}
_MAX_DEPTH = 64
# More parts than this for each byte of a value are no type that a compiler made.
_PARTS, _PARTS_OF_A_BYTE = 64, 16


class BtfCodec:
    """Keys or values of one BTF type, as ``maps.Map.typed`` takes it.

    What a dict leaves out is zero. Raises ValueError, naming the member, for a value that does
    not fit, and ObjectFileError for a type that has no values.
    """

    def __init__(self, btf: Btf, type_id: int) -> None:
        self._btf = btf
        self._type_id = type_id
        self.size = self._size = btf.size(type_id)
        self._weights: dict[int, int] = {}
        if self._weight(type_id, 0) > _PARTS + _PARTS_OF_A_BYTE * self._size:
            raise ObjectFileError(
                f"type {type_id} has too many members in one place", section=".BTF"
            )

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value."""
        data = bytearray(self._size)
        self._write(self._type_id, value, data, 0, 0)
        return bytes(data)

    def decode(self, data: bytes) -> Any:
        """Return the value of bytes."""
        if len(data) < self._size:
            raise ValueError(f"expected {self._size} bytes, got {len(data)} bytes")
        return self._read(self._type_id, data, 0, 0)

    def _weight(self, type_id: int, depth: int) -> int:
        """Return the number of parts of a value; unions of unions may have more than bytes."""
        btf_type = self._resolve(type_id, depth)
        if btf_type.id not in self._weights:
            self._weights[btf_type.id] = self._weigh(btf_type, depth + 1)
        return self._weights[btf_type.id]

    def _weigh(self, btf_type: Type, depth: int) -> int:
        if btf_type.kind in (Kind.STRUCT, Kind.UNION):
            return 1 + sum(
                self._weight(member.type, depth) for member in self._btf.members(btf_type)
            )
        if btf_type.kind == Kind.DATASEC:
            return 1 + sum(self._weight(inner, depth) for _, inner, _ in self._variables(btf_type))
        if btf_type.kind == Kind.ARRAY:
            element, count = self._btf.array(btf_type)
            return 1 + (count * self._weight(element, depth) if self._btf.size(element) else 0)
        return 1

    def _read(self, type_id: int, data: bytes, at: int, depth: int) -> Any:
        btf_type = self._resolve(type_id, depth)
        if btf_type.kind in (Kind.STRUCT, Kind.UNION):
            return self._read_members(btf_type, data, at, depth + 1)
        if btf_type.kind == Kind.ARRAY:
            return self._read_array(btf_type, data, at, depth + 1)
        if btf_type.kind == Kind.DATASEC:
            return {
                name: self._read(inner, data, offset, depth + 1)
                for name, inner, offset in self._variables(btf_type)
            }
        size = self._btf.size(type_id)
        part = data[at : at + size]
        if len(part) != size:
            raise ObjectFileError(f"type {type_id} lies outside of its value", section=".BTF")
        if btf_type.kind == Kind.FLOAT:
            return struct.unpack(self._float(size), part)[0]
        number = int.from_bytes(part, self._order)
        return self._meaning(btf_type, number, size * 8)

    def _read_members(self, aggregate: Type, data: bytes, at: int, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for member in self._btf.members(aggregate):
            if bits := member.bits:
                if member.name:  # others are padding
                    number = self._read_bits(data, at * 8 + member.bit_offset, bits)
                    btf_type = self._resolve(member.type, depth)
                    values[member.name] = self._meaning(btf_type, number, bits)
                continue
            value = self._read(member.type, data, at + member.bit_offset // 8, depth)
            if member.name:
                values[member.name] = value
            elif isinstance(value, dict):
                values.update(value)
        return values

    def _read_array(self, array: Type, data: bytes, at: int, depth: int) -> Any:
        element, count = self._btf.array(array)
        size = self._btf.size(element)
        if self._is_char(element):
            text = data[at : at + count].rstrip(b"\0").decode("utf-8", "surrogateescape")
            if text.isprintable():
                return text
        if not size:
            return []
        return [self._read(element, data, at + size * index, depth) for index in range(count)]

    def _read_bits(self, data: bytes, bit: int, bits: int) -> int:
        begin, end = bit // 8, (bit + bits + 7) // 8
        number = int.from_bytes(data[begin:end], self._order)
        return number >> self._shift(bit, bits) & (1 << bits) - 1

    def _meaning(self, btf_type: Type, number: int, bits: int) -> Any:
        """Return what a number without a sign stands for in a type."""
        if btf_type.kind in (Kind.ENUM, Kind.ENUM64):
            mask = (1 << bits) - 1
            names = (e.name for e in self._btf.enumerators(btf_type) if e.value & mask == number)
            return next(names, number)
        if btf_type.kind == Kind.INT:
            encoding = self._btf.integer(btf_type)
            if encoding.bool:
                return bool(number)
            if encoding.signed and number >> max(bits - 1, 0):
                return number - (1 << bits)
        return number

    def _write(self, type_id: int, value: Any, data: bytearray, at: int, depth: int) -> None:
        btf_type = self._resolve(type_id, depth)
        if btf_type.kind in (Kind.STRUCT, Kind.UNION):
            self._write_members(btf_type, value, data, at, depth + 1)
        elif btf_type.kind == Kind.ARRAY:
            self._write_array(btf_type, value, data, at, depth + 1)
        elif btf_type.kind == Kind.DATASEC:
            self._write_variables(btf_type, value, data, depth + 1)
        elif btf_type.kind == Kind.FLOAT:
            struct.pack_into(self._float(btf_type.size_or_type), data, at, value)
        else:
            size = self._btf.size(type_id)
            number = self._number(btf_type, value, size * 8)
            data[at : at + size] = number.to_bytes(size, self._order)

    def _write_members(
        self, aggregate: Type, value: Any, data: bytearray, at: int, depth: int
    ) -> None:
        left = dict(value)
        self._take_members(aggregate, left, data, at, depth)
        if left:
            kind = f"{aggregate.kind.name.lower()} {aggregate.name}".rstrip()
            raise ValueError(f"{kind} has no member {', '.join(map(repr, left))}")

    def _take_members(
        self, aggregate: Type, left: dict[str, Any], data: bytearray, at: int, depth: int
    ) -> None:
        """Write what there is for each member, and take it from what is left."""
        for member in self._btf.members(aggregate):
            inner = self._resolve(member.type, depth)
            if not member.name and inner.kind in (Kind.STRUCT, Kind.UNION):
                self._take_members(inner, left, data, at + member.bit_offset // 8, depth + 1)
            elif member.name in left:
                try:
                    self._write_member(member, left.pop(member.name), data, at, depth)
                except (ValueError, TypeError, OverflowError, struct.error) as error:
                    raise ValueError(f"{member.name}: {error}") from None

    def _write_member(
        self, member: Member, value: Any, data: bytearray, at: int, depth: int
    ) -> None:
        bits = member.bits
        if not bits:
            self._write(member.type, value, data, at + member.bit_offset // 8, depth)
            return
        bit = at * 8 + member.bit_offset
        begin, end = bit // 8, (bit + bits + 7) // 8
        shift = self._shift(bit, bits)
        number = self._number(self._resolve(member.type, depth), value, bits)
        others = int.from_bytes(data[begin:end], self._order) & ~((1 << bits) - 1 << shift)
        data[begin:end] = (others | number << shift).to_bytes(end - begin, self._order)

    def _write_variables(self, section: Type, value: Any, data: bytearray, depth: int) -> None:
        left = dict(value)
        for name, inner, offset in self._variables(section):
            if name in left:
                self._write(inner, left.pop(name), data, offset, depth)
        if left:
            raise ValueError(f"{section.name} has no variable {', '.join(map(repr, left))}")

    def _variables(self, section: Type) -> Iterator[tuple[str, int, int]]:
        """Return name, type and offset in bytes of each variable of a data section."""
        for variable in self._btf.variables(section):
            var = self._btf.type(variable.type)
            yield var.name, var.size_or_type, variable.offset

    def _write_array(self, array: Type, value: Any, data: bytearray, at: int, depth: int) -> None:
        element, count = self._btf.array(array)
        items = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        if len(items) > count:
            raise ValueError(f"{len(items)} elements do not fit into {count}")
        size = self._btf.size(element)
        for index, item in enumerate(items):
            if isinstance(items, bytes):
                data[at + index] = item
            else:
                self._write(element, item, data, at + size * index, depth)

    def _number(self, btf_type: Type, value: Any, bits: int) -> int:
        """Return the bits that stand for a value in a type, as a number without a sign."""
        if isinstance(value, str):
            named = {e.name: e.value for e in self._enumerators(btf_type)}
            if value not in named:
                raise ValueError(f"{value!r} is not one of {', '.join(named) or 'its numbers'}")
            value = named[value]
        signed = btf_type.kind == Kind.INT and self._btf.integer(btf_type).signed
        low = -(1 << bits - 1) if signed or btf_type.kind in (Kind.ENUM, Kind.ENUM64) else 0
        high = (1 << bits - 1) if signed else 1 << bits
        if not low <= value < high:
            raise ValueError(f"{value} does not fit into {bits} bits")
        return int(value) & (1 << bits) - 1

    def _enumerators(self, btf_type: Type) -> Any:
        return self._btf.enumerators(btf_type) if btf_type.kind in (Kind.ENUM, Kind.ENUM64) else ()

    def _resolve(self, type_id: int, depth: int) -> Type:
        if depth > _MAX_DEPTH:
            raise ObjectFileError(f"type {type_id} contains itself", section=".BTF")
        return self._btf.resolve(type_id)

    def _is_char(self, type_id: int) -> bool:
        btf_type = self._btf.resolve(type_id)
        return btf_type.kind == Kind.INT and btf_type.name == "char" and btf_type.size_or_type == 1

    def _float(self, size: int) -> str:
        if size not in _FLOATS:
            raise ObjectFileError(f"a float of {size} bytes is not supported", section=".BTF")
        return ("<" if self._order == "little" else ">") + _FLOATS[size]

    def _shift(self, bit: int, bits: int) -> int:
        """Return how far a bit field's bits are from the low end of the bytes that it touches."""
        if self._order == "little":
            return bit % 8
        return -(bit + bits) % 8

    @property
    def _order(self) -> Any:
        return self._btf.byteorder
