"""The types of an object -> as a kernel takes them: places filled in, externs and news taken out.

Ids stay what they are. What the kernel does not take becomes a pointer to void. Pure; source:
kernel/bpf/btf.c of the kernel.
"""

from __future__ import annotations

import re
import struct
from array import array
from typing import Callable, Container, Mapping, Optional

from pybpfthrottle.bpf.obj.btf import Btf, Kind, Linkage, Type
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import SectionLayout

_MAGIC, _VERSION, _HEADER_BYTES = 0xEB9F, 1, 24
_INFO, _SIZE = 1, 2  # words of struct btf_type
_KIND_SHIFT = 24
_TYPE_WORDS = 3
# What has names, by kind and number of words; and what has none itself.
_ITEM_WORDS = {
    **dict.fromkeys((Kind.STRUCT, Kind.UNION, Kind.ENUM64), 3),
    **dict.fromkeys((Kind.ENUM, Kind.FUNC_PROTO), 2),
}
_NAMELESS = frozenset(
    (Kind.PTR, Kind.ARRAY, Kind.CONST, Kind.VOLATILE, Kind.RESTRICT, Kind.FUNC_PROTO)
)
_TAGS = frozenset((Kind.DECL_TAG, Kind.TYPE_TAG))
_LEGAL = re.compile(rb"[A-Za-z_.][A-Za-z0-9_.]*").fullmatch
_UNDERSCORES = re.sub(rb"[^A-Za-z0-9_.]", b"_", bytes(range(256)))


def _stand_in() -> array[int]:
    return array("I", (0, Kind.PTR << _KIND_SHIFT, 0))


class _Rewriting:
    """The words of all types, to be replaced one by one."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._strings = btf.strings
        self._types = [btf.words(type_id) for type_id in range(1, btf.count)]

    def __getitem__(self, type_id: int) -> array[int]:
        return self._types[type_id - 1]

    def __setitem__(self, type_id: int, words: array[int]) -> None:
        self._types[type_id - 1] = words

    def stand_in(self, type_id: int) -> None:
        """Put a pointer to void in the place of a type."""
        self[type_id] = _stand_in()

    def take_tags_away(self) -> None:
        """Take away tags of declarations that are gone, which the kernel would refuse."""
        for tag in self._btf.of_kind(Kind.DECL_TAG):
            declared = tag.size_or_type
            if 0 < declared < self._btf.count and self[declared] == _stand_in():
                self.stand_in(tag.id)

    def make_names_legal(self) -> None:
        """Put an underscore in place of what no name in C has: ``box<u32>`` is ``box_u32_``.

        Compilers of Rust, C++ and Zig write such names, and some where the kernel wants none.
        """
        offsets: set[int] = set()
        for words in self._types:
            kind = Kind(words[_INFO] >> _KIND_SHIFT & 0x1F)
            if kind in _NAMELESS:
                words[0] = 0
            elif kind not in _TAGS:
                offsets.add(words[0])
            if kind in _ITEM_WORDS:
                offsets.update(words[_TYPE_WORDS :: _ITEM_WORDS[kind]])
        strings = bytearray(self._strings)
        for offset in offsets:
            end = strings.find(0, offset)
            name = bytes(strings[offset:end])
            if name and not _LEGAL(name):
                legal = name.translate(_UNDERSCORES)
                strings[offset:end] = b"_" + legal[1:] if legal[:1].isdigit() else legal
        self._strings = bytes(strings)

    def build(self) -> bytes:
        """Return the section, in the byte order of this machine."""
        types = b"".join(words.tobytes() for words in self._types)
        strings = self._strings
        header = struct.pack(
            "=HBBIIIII",
            *(_MAGIC, _VERSION, 0, _HEADER_BYTES, 0, len(types), len(types), len(strings)),
        )
        return header + types + strings


def loadable(btf: Btf, layouts: Mapping[str, SectionLayout], static: Container[str]) -> bytes:
    """Return all that compilers leave open filled in, for a kernel that knows all kinds of types.

    ``layouts`` tells where variables are; sections that are not in it, externs and their tags go.
    Functions named by ``static`` (hidden ones) are not verified apart from their callers.
    """
    out = _Rewriting(btf)
    for section in btf.of_kind(Kind.DATASEC):
        layout = layouts.get(section.name)
        words = _placed(btf, section, layout) if layout else None
        out[section.id] = words or _stand_in()
        _settle_variables(btf, section, out, defined=words is not None)
    for function in btf.of_kind(Kind.FUNC):
        if function.vlen == Linkage.EXTERN:
            out.stand_in(function.id)
        elif function.name in static:
            out[function.id][_INFO] = Kind.FUNC << _KIND_SHIFT | Linkage.STATIC
    out.take_tags_away()
    out.make_names_legal()
    return out.build()


def _placed(btf: Btf, section: Type, layout: SectionLayout) -> Optional[array[int]]:
    """Return a section with the places of its variables, or None if not all are known."""
    variables = [(variable, btf.type(variable.type)) for variable in btf.variables(section)]
    # Only linkers make several of one name, and they fill the places in.
    if len({var.name for _, var in variables}) < len(variables):
        return btf.words(section.id)
    rows = []
    for variable, var in variables:
        place = layout.places.get(var.name)
        if place is None or var.kind != Kind.VAR:
            return None
        rows.append((place.offset, variable.type, place.size))
    words = btf.words(section.id)[:3]
    words[_SIZE] = layout.size
    for offset, type_id, size in sorted(rows):
        words.extend((type_id, offset, size))
    return words


def _settle_variables(btf: Btf, section: Type, out: _Rewriting, *, defined: bool) -> None:
    """Make variables that are declared extern defined, in a map of ours, or else no types."""
    for variable in btf.variables(section):
        var = btf.type(variable.type)
        if var.kind == Kind.VAR and btf.linkage(var) == Linkage.EXTERN:
            if defined:
                out[var.id][3] = Linkage.GLOBAL
            else:
                out.stand_in(var.id)


class Concession(NamedTuple):
    """Kinds of types that older kernels lack, and how to do without them."""

    since: str
    kinds: tuple[Kind, ...]
    replace: Callable[[array[int]], array[int]]


def _as_integer(words: array[int]) -> array[int]:
    size = words[_SIZE]
    return array("I", (words[0], Kind.INT << _KIND_SHIFT, size, size * 8))


def _as_const(words: array[int]) -> array[int]:
    return array("I", (0, Kind.CONST << _KIND_SHIFT, words[_SIZE]))


def _as_struct(words: array[int]) -> array[int]:
    return array("I", (0, Kind.STRUCT << _KIND_SHIFT, words[_SIZE]))


def _as_static(words: array[int]) -> array[int]:
    return array("I", (words[0], Kind.FUNC << _KIND_SHIFT, words[_SIZE]))


def _as_pointer(_: array[int]) -> array[int]:
    return _stand_in()


# Newest first: a kernel that refuses one knows none that is newer.
CONCESSIONS = (
    Concession("6.0", (Kind.ENUM64,), _as_integer),
    Concession("5.17", (Kind.TYPE_TAG,), _as_const),
    Concession("5.16", (Kind.DECL_TAG,), _as_pointer),
    Concession("5.13", (Kind.FLOAT,), _as_struct),
    Concession("5.6", (Kind.FUNC,), _as_static),
    Concession("5.2", (Kind.DATASEC, Kind.VAR), _as_pointer),
    Concession("5.0", (Kind.FUNC, Kind.FUNC_PROTO), _as_pointer),
)


def conceding(data: bytes, concession: Concession) -> Optional[bytes]:
    """Return types without the kinds that an older kernel lacks; None if they have none."""
    btf = Btf(data)
    affected = list(btf.of_kind(*concession.kinds))
    out = _Rewriting(btf)
    changed = False
    for item in affected:
        words = concession.replace(out[item.id])
        changed = changed or words != out[item.id]
        out[item.id] = words
    return out.build() if changed else None
