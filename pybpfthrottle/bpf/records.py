"""Records of events as Python objects, by the types of the object that sends them.

Quicker than ``BtfCodec``, which takes any type: most structs are unpacked in one step.
"""

from __future__ import annotations

import keyword
import os
import struct
from collections import namedtuple
from typing import Any, Callable, Optional

from pybpfthrottle.bpf.obj.btf import Btf, Kind, Member, Type
from pybpfthrottle.bpf.obj.btf_values import BtfCodec
from pybpfthrottle.bpf.obj.plain import NamedTuple

_LETTERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
_FLOATS = {4: "f", 8: "d"}

Decode = Callable[[Any], Any]


class RecordCodec:
    """The codec of a struct: values are named tuples, whose class is ``type``.

    Numbers are int, bool or float, enums str (int for a value without a name), char arrays str up
    to their NUL, as ``os.fsdecode`` gives them; other arrays are tuples, structs named tuples.
    Structs with bit fields, unions or members without a name have these as ``BtfCodec`` does.
    Raises TypeError for a type that is no struct.
    """

    def __init__(self, btf: Btf, type_id: int) -> None:
        self._slow = BtfCodec(btf, type_id)
        of = btf.resolve(type_id)
        if of.kind != Kind.STRUCT:
            raise TypeError(f"{of.name or 'the type'!r} is no struct")
        self.size = btf.size(type_id)
        members = [member for member in btf.members(of) if member.name]
        parts = [_part(btf, member) for member in btf.members(of)]
        known = [part for part in parts if part is not None]
        names = [member.name for member in members]
        if len(known) < len(parts):
            names = list(self._slow.decode(bytes(self.size)))
        self.type = _class(of.name or "record", names)
        self._names = names
        # A plain attribute: a method around it would take a tenth of the time.
        if len(known) < len(parts):
            self.decode: Decode = self._decode_slowly
        else:
            self.decode = _decoder(known, self.type, "<" if btf.byteorder == "little" else ">")

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value: a dict, or a tuple of the members' values."""
        if isinstance(value, tuple):
            value = dict(zip(self._names, value))
        return self._slow.encode(value)

    def _decode_slowly(self, data: Any) -> Any:
        return self.type(*self._slow.decode(bytes(data)).values())


def _class(name: str, fields: list[str]) -> Any:
    return namedtuple(_legal(name), map(_legal, fields), rename=True)


class _Part(NamedTuple):
    """A member: its offset in bytes, its letters for ``struct``, and what makes its value."""

    offset: int
    letters: str
    size: int
    fix: Optional[Decode] = None


def _decoder(parts: list[_Part], type: Any, order: str) -> Decode:
    letters, at = order, 0
    for part in parts:
        letters += f"{part.offset - at}x" + part.letters
        at = part.offset + part.size
    unpack, make = struct.Struct(letters).unpack_from, type._make
    fixes = [(at, part.fix) for at, part in enumerate(parts) if part.fix]
    if not fixes:
        return lambda data: make(unpack(data))
    if len(fixes) == 1:
        return _with_one_fix(unpack, make, *fixes[0])

    def decode(data: Any) -> Any:
        values = list(unpack(data))
        for at, fix in fixes:
            values[at] = fix(values[at])
        return make(values)

    return decode


def _with_one_fix(unpack: Decode, make: Decode, at: int, fix: Decode) -> Decode:
    def decode(data: Any) -> Any:
        values = list(unpack(data))
        values[at] = fix(values[at])
        return make(values)

    return decode


def _part(btf: Btf, member: Member) -> Optional[_Part]:
    """Return how a member is unpacked; None for what ``BtfCodec`` has to do."""
    if member.bits or not member.name or member.bit_offset % 8:
        return None
    of, size, offset = btf.resolve(member.type), btf.size(member.type), member.bit_offset // 8
    letter = _letter(btf, of, size)
    if letter:
        is_enum = of.kind in (Kind.ENUM, Kind.ENUM64)
        return _Part(offset, letter, size, _named(_names(btf, of)) if is_enum else None)
    if of.kind == Kind.STRUCT and size:
        return _Part(offset, f"{size}s", size, RecordCodec(btf, member.type).decode)
    if of.kind != Kind.ARRAY or not size:
        return None
    element, count = btf.array(of)
    inner = btf.resolve(element)
    if inner.kind == Kind.INT and inner.name == "char" and inner.size_or_type == 1:
        return _Part(offset, f"{size}s", size, _text)
    letter = _letter(btf, inner, btf.size(element))
    if not letter or inner.kind in (Kind.ENUM, Kind.ENUM64):
        return None
    order = "<" if btf.byteorder == "little" else ">"
    return _Part(offset, f"{size}s", size, struct.Struct(f"{order}{count}{letter}").unpack)


def _letter(btf: Btf, of: Type, size: int) -> str:
    if of.kind == Kind.FLOAT:
        return _FLOATS.get(size, "")
    if of.kind in (Kind.PTR, Kind.ENUM, Kind.ENUM64):
        return _LETTERS.get(size, "")
    if of.kind != Kind.INT:
        return ""
    encoding = btf.integer(of)
    if encoding.bool:
        return "?" if size == 1 else ""
    letter = _LETTERS.get(size, "")
    return letter.lower() if encoding.signed else letter


def _names(btf: Btf, of: Type) -> dict[int, str]:
    mask = (1 << 8 * of.size_or_type) - 1
    return {item.value & mask: item.name for item in btf.enumerators(of)}


def _named(names: dict[int, str]) -> Decode:
    return lambda value: names.get(value, value)


def _text(data: bytes) -> str:
    return os.fsdecode(data.partition(b"\0")[0])


def _legal(name: str) -> str:
    """Return a name as Python takes it for a field."""
    legal = name.lstrip("_") or "field"
    return f"{legal}_" if keyword.iskeyword(legal) else legal
