"""Types as C spells them. No system calls.

Types without a name are told apart by their number: ``struct #12``. So each type is one text that
grows with its own members only.
"""

from __future__ import annotations

from typing import Callable, Iterator, Optional

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import COMPOSITES, ENUMS, MAX_CHAIN, Btf, Kind, Type

_WORDS = {Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.ENUM: "enum ", Kind.ENUM64: "enum "}
_QUALIFIERS = {Kind.CONST: "const", Kind.VOLATILE: "volatile", Kind.RESTRICT: "restrict"}


def declaration(
    btf: Btf, type_id: int, name: str = "", *, spell: Optional[Callable[[Type], str]] = None
) -> str:
    """Return how something of a type is declared: ``char name[16]``, or without a name the type.

    ``spell`` may say otherwise how types are called. Raises ObjectFileError for a type that is not
    there, or that refers to itself.
    """
    return _Declaring(btf, spell or _named).declared(type_id, name, inside=False)


class _Declaring:
    """Declarations with the types of an object, called as ``spell`` has it."""

    def __init__(self, btf: Btf, spell: Callable[[Type], str]) -> None:
        self._btf = btf
        self._spell = spell

    def declared(self, type_id: int, declared: str, *, inside: bool) -> str:
        """Go from the outermost pointer, array or function inwards, as C does."""
        qualifiers = ""
        for _ in range(MAX_CHAIN):
            btf_type = self._btf.type(type_id)
            if btf_type.kind == Kind.PTR:
                declared, qualifiers = f"*{qualifiers}{declared}", ""
            elif btf_type.kind == Kind.ARRAY:
                element, count = self._btf.array(btf_type)
                declared = f"{_in_brackets(declared)}[{count}]"
                type_id = element
                continue
            elif btf_type.kind == Kind.FUNC_PROTO:
                declared = f"{_in_brackets(declared)}({self._parameters(btf_type, inside)})"
            elif btf_type.kind in _QUALIFIERS:
                qualifier = f"{_QUALIFIERS[btf_type.kind]} "
                qualifiers = qualifier + qualifiers.replace(qualifier, "")
            elif btf_type.kind not in (Kind.TYPE_TAG, Kind.FUNC, Kind.VAR):
                return f"{qualifiers}{self._spell(btf_type)} {declared}".rstrip()
            type_id = btf_type.size_or_type
        raise ObjectFileError(f"type {type_id} refers to itself", section=".BTF")

    def _parameters(self, prototype: Type, inside: bool) -> str:
        # Functions that take functions that take functions could take all memory.
        if inside:
            return "..." if self._spell is _named else ""
        texts = [
            self.declared(parameter.type, parameter.name, inside=True) if parameter.type else "..."
            for parameter in self._btf.parameters(prototype)
        ]
        return ", ".join(texts) or "void"


def _in_brackets(declared: str) -> str:
    return f"({declared})" if declared.startswith("*") else declared


def _named(btf_type: Type) -> str:
    if btf_type.kind == Kind.VOID:
        return "void"
    word = _WORDS.get(btf_type.kind, "")
    if btf_type.kind == Kind.FWD:
        word = "union " if btf_type.flag else "struct "
    return word + (btf_type.name or f"#{btf_type.id}")


def definitions(btf: Btf) -> Iterator[str]:
    """Return the lines that define all structs, unions, enums, typedefs, functions, variables."""
    for btf_type in btf.of_kind(*COMPOSITES, *ENUMS, Kind.TYPEDEF, Kind.FUNC, Kind.VAR):
        if btf_type.kind in COMPOSITES:
            yield f"{_named(btf_type)} {{  /* {btf_type.size_or_type} bytes */"
            yield from _members(btf, btf_type)
            yield "};"
        elif btf_type.kind in ENUMS:
            yield f"{_named(btf_type)} {{"
            yield from (f"    {name} = {value}," for name, value in btf.enumerators(btf_type))
            yield "};"
        else:
            word = "typedef " if btf_type.kind == Kind.TYPEDEF else ""
            yield f"{word}{declaration(btf, btf_type.size_or_type, btf_type.name)};"


def _members(btf: Btf, composite: Type) -> Iterator[str]:
    for member in btf.members(composite):
        width = f" : {member.bits}" if member.bits else ""
        yield f"    {declaration(btf, member.type, member.name)}{width};"
