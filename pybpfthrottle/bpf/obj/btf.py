"""BTF, the BPF Type Format: bytes -> types. No system calls.

Nothing is decoded before it is asked for: the kernel's own BTF has more than 100,000 types. To
find where they begin takes longer than all else that a start does, so that too waits if it may.
Source: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from array import array
from bisect import bisect_left
from enum import IntEnum
from typing import Iterator, Optional, Sequence, Union

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.plain import NamedTuple

_MAGIC = 0xEB9F
_SECTION = ".BTF"
_HEADER_BYTES = 24
_TYPE_WORDS = 3  # struct btf_type
_POINTER_BYTES = 8
# A chain of typedefs, qualifiers and arrays longer than this is a loop.
MAX_CHAIN = 64
# What tells apart several types of one name.
_FLAVOUR = b"___"
# Names may share their bytes, so that without a limit a small file could ask for much memory.
_MAX_STRING_BYTES = 1024


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


class Linkage(IntEnum):
    """BTF_FUNC_* and BTF_VAR_*, which are the same numbers."""

    STATIC = 0
    GLOBAL = 1
    EXTERN = 2


MODIFIERS = frozenset((Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG))
COMPOSITES = frozenset((Kind.STRUCT, Kind.UNION))
ENUMS = frozenset((Kind.ENUM, Kind.ENUM64))
_SIZED = COMPOSITES | ENUMS | {Kind.INT, Kind.FLOAT, Kind.DATASEC}
# 32-bit words after struct btf_type: once, or for each of its vlen items.
_TAIL_WORDS = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_ITEM_WORDS = {
    Kind.STRUCT: 3,
    Kind.UNION: 3,
    Kind.ENUM: 2,
    Kind.FUNC_PROTO: 2,
    Kind.DATASEC: 3,
    Kind.ENUM64: 3,
}
# What the bytes of a type's ``info`` may be, as a regular expression; its lower half may be all.
_KIND = b"[\x01-%c\x81-%c]" % (max(Kind), 0x80 | max(Kind))
_INFO = {"little": b"..\0" + _KIND, "big": _KIND + b"\0.."}
# How many words are looked through at a time for where types begin.
_STRIDE_WORDS = 1 << 14


class Type(NamedTuple):
    """struct btf_type with its ``id``; ``at`` is the word at which its kind's own part begins.

    ``flag`` is kind_flag: of a struct, that it has bit fields; of an enum, that its values are
    signed; of a forward declaration, that it is a union.
    """

    kind: Kind
    name: str
    size_or_type: int
    vlen: int
    flag: bool
    at: int
    id: int


class Member(NamedTuple):
    """A member of a struct or union; offset and width in bits; a width of 0 is no bit field."""

    name: str
    type: int
    bit_offset: int
    bits: int = 0


class Variable(NamedTuple):
    """A variable in a data section; offset and size are in bytes."""

    type: int
    offset: int
    size: int


class Integer(NamedTuple):
    """The encoding of an integer, besides its size in bytes."""

    bits: int
    bit_offset: int
    signed: bool
    char: bool
    bool: bool


class Enumerator(NamedTuple):
    """A name of an enum, and its value."""

    name: str
    value: int


class Parameter(NamedTuple):
    """A parameter of a function; its name may be empty."""

    name: str
    type: int


def words_of(data: Union[bytes, memoryview], byteorder: str) -> array[int]:
    """Return the 32-bit words of data whose length is a multiple of four."""
    words = array("I")
    words.frombytes(data)
    if byteorder != sys.byteorder:
        words.byteswap()
    return words


class _Lengths(dict[int, int]):
    """The length in words of a type by its ``info``. Raises KeyError for an unknown kind."""

    def __missing__(self, info: int) -> int:
        number = info >> 24 & 0x1F
        if not 0 < number < len(Kind):
            raise KeyError(info)
        kind = Kind(number)
        fixed = _TYPE_WORDS + _TAIL_WORDS.get(kind, 0)
        self[info] = length = fixed + _ITEM_WORDS.get(kind, 0) * (info & 0xFFFF)
        return length


class Btf:
    """The types of one .BTF section; the type 0 is void. Raises ObjectFileError for bad data.

    A kernel module's BTF is *split*: it goes on where its ``base``, the kernel's, ends. ``name``
    is the module's. Types of the same bytes are equal. It never changes. What the kernel itself
    says can be ``trusted``: its types are looked through no further than is asked for. The kernel's
    are megabytes: of this machine's byte order nothing is copied, and they may be mapped.
    """

    def __init__(
        self,
        data: Union[bytes, mmap.mmap],
        *,
        base: Optional[Btf] = None,
        name: str = "",
        trusted: bool = False,
    ) -> None:
        self.name = name
        self.base = base
        self._data = data
        self._first_id = base.count if base else 1
        self._first_string = base.string_bytes if base else 0
        self.byteorder = _byteorder(data)
        order = "<" if self.byteorder == "little" else ">"
        header, types_at, types_bytes, strings_at, strings_bytes = struct.unpack_from(
            order + "5I", data, 4
        )
        self._strings_at: int = min(header + strings_at, len(data))
        self._strings_end: int = min(self._strings_at + strings_bytes, len(data))
        self._types_at = header + types_at
        types = memoryview(data)[self._types_at : self._types_at + types_bytes]
        if len(types) != types_bytes:
            raise self._bad("the types go past the end of the section", 0)
        if types_bytes % 4:
            raise self._bad("a type is cut off", types_bytes // 4)
        is_native = self.byteorder == sys.byteorder
        self._words = types.cast("I") if is_native else words_of(types, self.byteorder)
        self._types_end = self._types_at + types_bytes
        # The words at which types begin, up to that at which the search goes on.
        self._starts = array("I")
        self._next = 0
        self._lengths = _Lengths()
        self._found: dict[tuple[str, bool], list[int]] = {}
        if not trusted:
            self._scan(len(self._words))

    def _scan(self, end: int) -> None:
        """Note where types begin, up to a word."""
        words, starts, lengths, at = self._words, self._starts, self._lengths, self._next
        try:
            while at < end:
                starts.append(at)
                at += lengths[words[at + 1]]
        except IndexError:
            raise self._bad("a type is cut off", at) from None
        except KeyError as error:
            raise self._bad(f"unknown kind of type {error.args[0] >> 24 & 0x1F}", at) from None
        if at > len(words):
            raise self._bad("a type is cut off", starts[-1])
        self._next = at

    def _scan_all(self) -> array[int]:
        self._scan(len(self._words))
        return self._starts

    def _has(self, index: int) -> bool:
        """Whether there are so many types."""
        while index >= len(self._starts) and self._next < len(self._words):
            self._scan(min(self._next + _STRIDE_WORDS, len(self._words)))
        return index < len(self._starts)

    def _bad(self, reason: str, word: int) -> ObjectFileError:
        return ObjectFileError(reason, section=_SECTION, offset=self._types_at + 4 * word)

    def __bytes__(self) -> bytes:
        """Return the section that the types were read from."""
        return bytes(self._data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Btf):
            return NotImplemented
        return (bytes(self), self.base) == (bytes(other), other.base)

    def __hash__(self) -> int:
        return hash((len(self._data), self._data[:_HEADER_BYTES]))

    def __repr__(self) -> str:
        return f"<Btf {self.name} of {self.count - self._first_id} types>".replace("  ", " ")

    @property
    def count(self) -> int:
        """The number of types with void and the base's: the first id that does not exist."""
        return self._first_id + len(self._scan_all())

    @property
    def string_bytes(self) -> int:
        """The length of all strings, the base's included."""
        return self._first_string + self._strings_end - self._strings_at

    @property
    def types(self) -> list[Type]:
        """All types by their ids."""
        return [self.type(type_id) for type_id in range(self.count)]

    @property
    def strings(self) -> bytes:
        """All strings but the base's, each with a zero behind it."""
        return self._data[self._strings_at : self._strings_end]

    def string(self, offset: int) -> str:
        """Return the string at an offset, or its first 1024 bytes."""
        if self.base and offset < self._first_string:
            return self.base.string(offset)
        begin, end = self._strings_at + offset - self._first_string, self._strings_end
        if begin >= end or self._data[end - 1]:
            raise ObjectFileError(f"a name is outside the string table: {offset}", section=_SECTION)
        text = self._data[begin : begin + _MAX_STRING_BYTES].partition(b"\0")[0]
        return text.decode("utf-8", "replace")

    def type(self, type_id: int) -> Type:
        """Return the type with this id."""
        if type_id == 0:
            return Type(Kind.VOID, "", 0, 0, False, 0, 0)
        if self.base and type_id < self._first_id:
            return self.base.type(type_id)
        if not self._has(type_id - self._first_id):
            raise ObjectFileError(f"there is no type {type_id}", section=_SECTION)
        at = self._starts[type_id - self._first_id]
        name, info, size_or_type = self._words[at : at + _TYPE_WORDS]
        return Type(
            Kind(info >> 24 & 0x1F),
            self.string(name),
            size_or_type,
            info & 0xFFFF,
            bool(info >> 31),
            at + _TYPE_WORDS,
            type_id,
        )

    def words(self, type_id: int) -> array[int]:
        """Return the words of a type that is not the base's: struct btf_type and what follows."""
        index = type_id - self._first_id
        following = self._starts[index + 1] if self._has(index + 1) else len(self._words)
        return array("I", self._words[self._starts[index] : following])

    def resolve(self, type_id: int) -> Type:
        """Return the type with typedefs, qualifiers and tags taken away."""
        for _ in range(MAX_CHAIN):
            btf_type = self.type(type_id)
            if btf_type.kind not in MODIFIERS:
                return btf_type
            type_id = btf_type.size_or_type
        raise ObjectFileError(f"type {type_id} refers to itself", section=_SECTION)

    def of_kind(self, *kinds: Kind) -> Iterator[Type]:
        """Return the types of some kinds, without the base's, in order."""
        words = self._words
        for index, start in enumerate(self._scan_all()):
            if words[start + 1] >> 24 & 0x1F in kinds:
                yield self.type(self._first_id + index)

    def find(self, kind: Kind, name: str) -> Optional[Type]:
        """Return the first type of this kind and name, if there is one."""
        return next((btf_type for btf_type in self.named(name) if btf_type.kind == kind), None)

    def named(self, name: str, *, flavours: bool = False) -> Iterator[Type]:
        """Return the types of a name, in order; with flavours, also NAME___anything.

        Strings that are the end of another one are not found; nothing that writes BTF makes them.
        """
        if self.base:
            yield from self.base.named(name, flavours=flavours)
        for index in self._indexes(name, flavours):
            yield self.type(self._first_id + index)

    def _indexes(self, name: str, flavours: bool) -> list[int]:
        # Each load asks for the same names, and the kernel's strings are megabytes.
        found = self._found.get((name, flavours))
        if found is None:
            found = self._found[name, flavours] = sorted(
                index
                for offset in self._string_offsets(name.encode(), flavours)
                for index in self._indexes_named(offset)
            )
        return found

    def _string_offsets(self, name: bytes, flavours: bool) -> Iterator[int]:
        if self.base:
            yield from self.base._string_offsets(name, flavours)
        if not name:
            if not self.base:
                yield 0
            return
        for at in self._places_of(name):
            following = self._data[at + len(name) : at + len(name) + len(_FLAVOUR)]
            if following[:1] == b"\0" or (flavours and following == _FLAVOUR):
                yield self._first_string + at - self._strings_at

    def _places_of(self, start: bytes) -> Iterator[int]:
        """Return where strings start in this way: each but the first follows a zero."""
        begin, end = self._strings_at, self._strings_end
        if self._data[begin : begin + len(start)] == start:
            yield begin
        at = self._data.find(b"\0" + start, begin, end)
        while at >= 0:
            yield at + 1
            at = self._data.find(b"\0" + start, at + 1, end)

    def _indexes_named(self, offset: int) -> Iterator[int]:
        """Return the types that begin with the offset of a name, among all words that are equal."""
        order = "<I" if self.byteorder == "little" else ">I"
        name = re.escape(struct.pack(order, offset))
        # What follows has to be a type's ``info``, which leaves few of the others.
        pattern = re.compile(name + _INFO[self.byteorder], re.DOTALL)
        begin, end = self._types_at, self._types_end
        found = pattern.search(self._data, begin, end)
        while found:
            word, rest = divmod(found.start() - begin, 4)
            if not rest:
                self._scan(word + 1)
                index = bisect_left(self._starts, word)
                if index < len(self._starts) and self._starts[index] == word:
                    yield index
            found = pattern.search(self._data, found.start() + 1, end)

    def member(self, aggregate: Type, index: int) -> Member:
        """Return a member of a struct or union; ``index`` is less than its vlen."""
        single = aggregate._replace(at=aggregate.at + 3 * index, vlen=1)
        return next(self.members(single))

    def _items(self, btf_type: Type, each: int) -> Iterator[Sequence[int]]:
        """Return the words of each of a type's items, such as members."""
        words = self._home(btf_type)._words
        for at in range(btf_type.at, btf_type.at + each * btf_type.vlen, each):
            yield words[at : at + each]

    def _home(self, btf_type: Type) -> Btf:
        return self.base._home(btf_type) if self.base and btf_type.id < self._first_id else self

    def _tail(self, btf_type: Type) -> int:
        return self._home(btf_type)._words[btf_type.at]

    def array(self, array: Type) -> tuple[int, int]:
        """Return the id of the element's type and the number of elements."""
        element, _, count = self._home(array)._words[array.at : array.at + 3]
        return element, count

    def integer(self, integer: Type) -> Integer:
        """Return the encoding of an integer."""
        word = self._tail(integer)
        signed, char, boolean = word >> 24 & 1, word >> 25 & 1, word >> 26 & 1
        return Integer(word & 0xFF, word >> 16 & 0xFF, bool(signed), bool(char), bool(boolean))

    def members(self, aggregate: Type) -> Iterator[Member]:
        """Return the members of a struct or union, in order."""
        for name, type_id, offset in self._items(aggregate, 3):
            if aggregate.flag:
                yield Member(self.string(name), type_id, offset & 0xFFFFFF, offset >> 24)
            else:
                yield Member(self.string(name), type_id, offset)

    def enumerators(self, enum: Type) -> Iterator[Enumerator]:
        """Return the names and values of an enum, in order."""
        wide = enum.kind == Kind.ENUM64
        for name, low, *high in self._items(enum, 3 if wide else 2):
            value = low | (high[0] << 32 if wide else 0)
            bits = 64 if wide else 32
            negative = enum.flag and value >> bits - 1
            yield Enumerator(self.string(name), value - (1 << bits) if negative else value)

    def parameters(self, prototype: Type) -> Iterator[Parameter]:
        """Return the parameters of a function's prototype, in order."""
        for name, type_id in self._items(prototype, 2):
            yield Parameter(self.string(name), type_id)

    def variables(self, datasec: Type) -> Iterator[Variable]:
        """Return the variables (and extern functions) of a data section, in order."""
        for type_id, offset, size in self._items(datasec, 3):
            yield Variable(type_id, offset, size)

    def linkage(self, btf_type: Type) -> int:
        """Return the linkage of a function or variable: a Linkage, or a number not known here."""
        return btf_type.vlen if btf_type.kind == Kind.FUNC else self._tail(btf_type)

    def size(self, type_id: int) -> int:
        """Return the size of a type in bytes."""
        count = 1
        for _ in range(MAX_CHAIN):
            btf_type = self.resolve(type_id)
            if btf_type.kind in _SIZED:
                return count * btf_type.size_or_type
            if btf_type.kind == Kind.PTR:
                return count * _POINTER_BYTES
            if btf_type.kind != Kind.ARRAY:
                raise ObjectFileError(f"type {type_id} has no size", section=_SECTION)
            type_id, elements = self.array(btf_type)
            count *= elements
        raise ObjectFileError(f"type {type_id} refers to itself", section=_SECTION)


def _byteorder(data: Union[bytes, mmap.mmap]) -> str:
    """Return the byte order that the magic number of a header tells."""
    if len(data) < _HEADER_BYTES:
        raise ObjectFileError("too short for a BTF header", section=_SECTION, offset=0)
    for byteorder in ("little", "big"):
        if int.from_bytes(data[:2], byteorder) == _MAGIC:
            return byteorder
    raise ObjectFileError("no BTF magic number", section=_SECTION, offset=0)
