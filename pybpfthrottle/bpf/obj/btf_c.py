"""Types -> a header for C that defines them all, as vmlinux.h does for the kernel's. Pure.

The members of structs are where the types have them: where C would put them elsewhere, there is
padding, or the struct is packed. Of several types of one name the later ones are called NAME___2.
"""

from __future__ import annotations

from typing import Iterator, Optional

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import (
    COMPOSITES,
    ENUMS,
    MAX_CHAIN,
    MODIFIERS,
    Btf,
    Kind,
    Member,
    Type,
)
from pybpfthrottle.bpf.obj.btf_text import declaration

_PREFIX = {Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.ENUM: "enum ", Kind.ENUM64: "enum "}
# What takes so many bits, at a place that they are a divisor of.
_UNITS = tuple(zip(("long", "int", "short", *("char",) * 4), (64, 32, 16, 8, 4, 2, 1)))
_LARGE_BITS = 8 << 12
# The sizes of enums that are not of four bytes.
_MODES = {1: "QI", 2: "HI", 8: "DI"}
# Compilers know it, and each calls something else so.
_BUILT_IN = "__builtin_va_list"
# The header of a kernel is 3 MB long. Types without names are written out wherever they are used,
# so a few that contain each other several times could take more than any memory.
_MOST_CHARACTERS = 1 << 26
_KFUNC = "bpf_kfunc"
_BEGIN = """\
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
#endif
"""
_END = """
#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif

#endif"""


def header(btf: Btf) -> str:
    """Return the text of the header. Raises ObjectFileError for types that are broken."""
    try:
        return "\n".join([_BEGIN, *_Header(btf).lines(), _END]) + "\n"
    except RecursionError:
        raise ObjectFileError("types are nested too deeply", section=".BTF") from None


class _Header:
    """One header: each type is defined once, behind those that it needs."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._layouts = _Layouts(btf)
        self._names: dict[int, str] = {}
        self._taken: dict[tuple[bool, str], int] = {}
        self._done: set[int] = set()
        self._declared: set[str] = set()
        self._lines: list[str] = []
        self._characters = 0
        # Enums without a name that are written where they are used.
        self._used = {item.size_or_type for item in btf.of_kind(Kind.TYPEDEF)}

    def lines(self) -> list[str]:
        """Return all definitions, and the declarations of functions for programs to call."""
        # C cannot declare an enum before it defines it, and enums need nothing.
        for enum in self._btf.of_kind(*ENUMS):
            if enum.name or enum.id not in self._used:
                self._define(enum)
        for btf_type in self._btf.of_kind(Kind.TYPEDEF, *COMPOSITES):
            if btf_type.name:
                self._need(btf_type.id, whole=True)
        return [*self._lines, *self._functions()]

    def _functions(self) -> Iterator[str]:
        tags = self._btf.of_kind(Kind.DECL_TAG)
        found = {tag.size_or_type for tag in tags if tag.name == _KFUNC}
        functions = [self._btf.type(type_id) for type_id in sorted(found)]
        for function in functions:
            self._need(function.size_or_type, whole=False)
        if functions:
            yield "\n#ifndef BPF_NO_KFUNC_PROTOTYPES"
            for function in functions:
                text = self._declaration(function.size_or_type, function.name)
                yield f'extern {text} __attribute__((weak, section(".ksyms")));'
            yield "#endif"

    def _need(self, type_id: int, *, whole: bool) -> None:
        """Define what something of a type needs; behind pointers, names are enough."""
        for _ in range(MAX_CHAIN):
            btf_type = self._btf.type(type_id)
            if btf_type.kind == Kind.TYPEDEF:
                self._define_typedef(btf_type)
                # Its name is known by now; what it stands for has to be whole here as well.
                if not whole:
                    return
            elif btf_type.kind in COMPOSITES:
                self._need_composite(btf_type, whole)
                return
            elif btf_type.kind == Kind.FWD:
                self._declare(btf_type)
                return
            elif btf_type.kind == Kind.FUNC_PROTO:
                for parameter in self._btf.parameters(btf_type):
                    self._need(parameter.type, whole=False)
                whole = False
            elif btf_type.kind == Kind.PTR:
                whole = False
            elif btf_type.kind not in MODIFIERS and btf_type.kind != Kind.ARRAY:
                return
            is_array = btf_type.kind == Kind.ARRAY
            # C wants the elements of an array to be whole, wherever it is.
            whole = whole or is_array
            type_id = self._btf.array(btf_type)[0] if is_array else btf_type.size_or_type
        raise ObjectFileError(f"type {type_id} refers to itself", section=".BTF")

    def _need_composite(self, composite: Type, whole: bool) -> None:
        if not composite.name:
            if composite.id not in self._done:
                self._done.add(composite.id)
                for member in self._btf.members(composite):
                    self._need(member.type, whole=True)
        elif whole:
            self._define(composite)
        else:
            self._declare(composite)

    def _declare(self, btf_type: Type) -> None:
        text = self._spell(btf_type)
        if btf_type.name and text not in self._declared:
            self._declared.add(text)
            self._lines.append(f"{text};")

    def _define_typedef(self, typedef: Type) -> None:
        if typedef.id in self._done or typedef.name == _BUILT_IN:
            return
        self._done.add(typedef.id)
        self._need(typedef.size_or_type, whole=False)
        name = self._name(typedef)
        self._lines.append(f"typedef {self._declaration(typedef.size_or_type, name)};")

    def _define(self, btf_type: Type) -> None:
        if btf_type.id in self._done:
            return
        self._done.add(btf_type.id)
        if btf_type.kind in COMPOSITES:
            for member in self._btf.members(btf_type):
                self._need(member.type, whole=True)
        self._lines.append(f"{self._spelled_out(btf_type)};")
        if btf_type.name:
            self._declared.add(self._spell(btf_type))

    def _declaration(self, type_id: int, name: str) -> str:
        return declaration(self._btf, type_id, name, spell=self._spell)

    def _spell(self, btf_type: Type) -> str:
        """Return how C calls a type; what has no name is written out."""
        if btf_type.kind == Kind.VOID:
            return "void"
        if btf_type.kind in _PREFIX and not btf_type.name:
            return self._spelled_out(btf_type)
        if btf_type.kind == Kind.FWD:
            return ("union " if btf_type.flag else "struct ") + btf_type.name
        return _PREFIX.get(btf_type.kind, "") + self._name(btf_type)

    def _name(self, btf_type: Type) -> str:
        if btf_type.kind not in _PREFIX and btf_type.kind != Kind.TYPEDEF:
            return btf_type.name
        if btf_type.id not in self._names:
            self._names[btf_type.id] = self._take(btf_type.name, btf_type.kind != Kind.TYPEDEF)
        return self._names[btf_type.id]

    def _take(self, name: str, is_tag: bool) -> str:
        """Return a name, with a number behind it where C has it for something else."""
        number = self._taken[is_tag, name] = self._taken.get((is_tag, name), 0) + 1
        return f"{name}___{number}" if number > 1 else name

    def _spelled_out(self, btf_type: Type) -> str:
        name = f"{self._name(btf_type)} " if btf_type.name else ""
        rows = self._enumerators(btf_type) if btf_type.kind in ENUMS else self._members(btf_type)
        body = "".join(f"\t{line}\n" for row in rows for line in row.split("\n"))
        self._characters += len(body)
        if self._characters > _MOST_CHARACTERS:
            raise ObjectFileError("types without names are nested too often", section=".BTF")
        return f"{_PREFIX[btf_type.kind]}{name}{{\n{body}}}{self._attribute(btf_type)}"

    def _attribute(self, btf_type: Type) -> str:
        """Return what gives a type its size where C would give it another one."""
        if btf_type.kind in ENUMS:
            mode = _MODES.get(btf_type.size_or_type)
            return f" __attribute__((mode({mode})))" if mode else ""
        return " __attribute__((packed))" if self._layouts.is_packed(btf_type) else ""

    def _enumerators(self, enum: Type) -> Iterator[str]:
        for name, value in self._btf.enumerators(enum):
            suffix = "" if -(1 << 31) <= value < 1 << 31 else "LL" if value < 1 << 63 else "ULL"
            yield f"{self._take(name, False)} = {value}{suffix},"

    def _members(self, composite: Type) -> Iterator[str]:
        for member, at, gap in self._layouts.members(composite):
            if composite.kind == Kind.UNION and gap:
                yield f"char __size[{gap // 8}];"
            else:
                yield from _padding(at - gap, at)
            if member is not None:
                width = f" : {member.bits}" if member.bits else ""
                yield f"{self._declaration(member.type, member.name)}{width};"


def _padding(begin: int, end: int) -> Iterator[str]:
    """Return members without a name that take the bits of a struct from one up to another."""
    while begin < end:
        # A name costs nothing there, and a line for each word would.
        if end - begin > _LARGE_BITS and begin % 8 == 0:
            yield f"char __pad_{begin // 8}[{(end - begin) // 8}];"
            begin += (end - begin) // 8 * 8
            continue
        kind, bits = next(
            (kind, bits) for kind, bits in _UNITS if begin % bits == 0 and begin + bits <= end
        )
        yield f"{kind} : {bits};"
        begin += bits


class _Layouts:
    """Where C puts the members of structs, and where they are; in bits, but alignments in bytes."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._alignments: dict[int, int] = {}
        self._packed: dict[int, bool] = {}

    def members(self, composite: Type) -> Iterator[tuple[Optional[Member], int, int]]:
        """Return each member, where it is, and how many bits of padding it needs in front.

        With None instead of a member, it is the padding at the end.
        """
        end = 0
        for member in self._btf.members(composite):
            at = member.bit_offset
            natural = self._natural(composite, member, end)
            yield member, at, 0 if composite.kind == Kind.UNION or at == natural else at - end
            size = member.bits or self._size(member.type) * 8
            end = max(end, at + size) if composite.kind == Kind.UNION else at + size
        size = composite.size_or_type * 8
        if _up(end, 8 * self._alignment(composite.id)) < size:
            yield None, size, size if composite.kind == Kind.UNION else size - end

    def is_packed(self, composite: Type) -> bool:
        """Return whether members are where C would only put them in a packed struct."""
        if composite.id not in self._packed:
            members = [
                (member.bit_offset, bool(member.bits), 8 * self._alignment(member.type))
                for member in self._btf.members(composite)
                if member.name or not member.bits
            ]
            largest = max((alignment for *_, alignment in members), default=8)
            self._packed[composite.id] = bool(composite.size_or_type * 8 % largest) or any(
                at % alignment for at, is_bit_field, alignment in members if not is_bit_field
            )
        return self._packed[composite.id]

    def _natural(self, composite: Type, member: Member, end: int) -> int:
        if not member.bits:
            packed = self.is_packed(composite)
            return _up(end, 8 if packed else 8 * self._alignment(member.type))
        unit = self._size(member.type) * 8
        if not unit:
            raise ObjectFileError(f"the bit field {member.name} has no size", section=".BTF")
        fits = self.is_packed(composite) or end % unit + member.bits <= unit
        return end if fits else _up(end, unit)

    def _alignment(self, type_id: int) -> int:
        btf_type = self._btf.resolve(type_id)
        if btf_type.kind == Kind.ARRAY:
            return self._alignment(self._btf.array(btf_type)[0])
        if btf_type.kind not in COMPOSITES:
            return max(1, self._size(btf_type.id))
        if btf_type.id not in self._alignments:
            packed = self.is_packed(btf_type)
            members = [] if packed else self._btf.members(btf_type)
            self._alignments[btf_type.id] = max(
                (self._alignment(member.type) for member in members), default=1
            )
        return self._alignments[btf_type.id]

    def _size(self, type_id: int) -> int:
        btf_type = self._btf.resolve(type_id)
        return 1 if btf_type.kind == Kind.FUNC_PROTO else self._btf.size(btf_type.id)


def _up(number: int, to: int) -> int:
    return -(-number // to) * to
