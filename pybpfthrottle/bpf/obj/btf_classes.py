"""Classes of Python for the types of an object: their names, their text, and their values. Pure.

A struct or union becomes a dataclass, whose members are what ``btf_values`` has for them, but:

=================  ==============================================================
struct, union      its own dataclass; the members of an anonymous one are its own
enum               its own IntEnum, or int for a value without a name
char[]             str, up to the first zero
=================  ==============================================================
"""

from __future__ import annotations

import keyword
import re
from typing import Any, Iterable, Iterator, Mapping, Optional

from pybpfthrottle.bpf.obj.btf import COMPOSITES, ENUMS, Btf, Kind, Member, Type
from pybpfthrottle.bpf.obj.btf_values import BtfCodec

_MAX_DEPTH = 64
# What the text of the classes says with these names must not mean a field.
_MEANING_MORE = ("int", "str", "bool", "float", "list", "field", "self")


def python_name(name: str) -> str:
    """Return a name as Python takes it: ``box<u32>`` is ``box_u32_``, ``from`` is ``from_``."""
    legal = re.sub(r"[^A-Za-z0-9_]", "_", name) or "_"
    if legal[0].isdigit() or legal.startswith("__"):
        legal = f"n{legal}"
    return f"{legal}_" if keyword.iskeyword(legal) or legal in _MEANING_MORE else legal


def class_name(name: str) -> str:
    """Return the name of a class: ``flow_key`` is ``FlowKey``."""
    parts = python_name(name).split("_")
    joined = "".join(part[:1].upper() + part[1:] for part in parts)
    return joined if joined[:1].isalpha() else f"T{joined}"


class Names:
    """Names that are each given once; another taker gets the name with a number behind it."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def take(self, name: str) -> str:
        """Return a name that nothing else has."""
        number, free = 1, name
        while free in self._taken:
            number += 1
            free = f"{name}_{number}"
        self._taken.add(free)
        return free


class Classes:
    """The classes that some types need, by the ids of structs, unions and enums.

    The same types get the same names each time. Raises ObjectFileError for types that are broken.
    """

    def __init__(self, btf: Btf, roots: Iterable[int], taken: Iterable[str] = ()) -> None:
        self._btf = btf
        self._names = Names(taken)
        self.names: dict[int, str] = {}
        for root in roots:
            self._visit(root, "", 0)

    def _visit(self, type_id: int, inside: str, depth: int) -> None:
        """Name a type after what is in it; ``inside`` names those that have no name."""
        given = self._btf.type(type_id)
        btf_type = self._btf.resolve(type_id)
        if depth > _MAX_DEPTH or btf_type.id in self.names:
            return
        name = btf_type.name or (given.name if given.kind == Kind.TYPEDEF else "") or inside
        if btf_type.kind == Kind.ARRAY:
            self._visit(self._btf.array(btf_type)[0], name, depth + 1)
        elif btf_type.kind in COMPOSITES:
            self._visit_members(btf_type, name or "unnamed", depth)
        elif btf_type.kind in ENUMS:
            self.names[btf_type.id] = self._names.take(class_name(name or "unnamed"))

    def _visit_members(self, aggregate: Type, name: str, depth: int) -> None:
        for member in self._flat(aggregate, depth):
            self._visit(member.type, f"{name}_{member.name}", depth + 1)
        self.names[aggregate.id] = self._names.take(class_name(name))

    def _flat(self, aggregate: Type, depth: int) -> Iterator[Member]:
        """Return the members with names, those of anonymous members among them."""
        for member in self._btf.members(aggregate):
            inner = self._btf.resolve(member.type)
            if member.name:
                yield member
            elif inner.kind in COMPOSITES and depth < _MAX_DEPTH:
                yield from self._flat(inner, depth + 1)

    def definitions(self) -> Iterator[str]:
        """Return the lines that define the classes, each behind those that it needs."""
        for type_id, name in self.names.items():
            btf_type = self._btf.type(type_id)
            yield from ("", "")
            if btf_type.kind in ENUMS:
                yield f"class {name}(IntEnum):"
                yield from self._enumerators(btf_type)
            else:
                yield from ("@dataclass", f"class {name}:")
                yield f'    """{_c_name(btf_type)}: {btf_type.size_or_type} bytes."""'
                for field, member in fields(self._flat(btf_type, 0)).items():
                    hint, default = self._hint(member.type), self.default(member.type)
                    yield f"    {field}: {hint} = {default}"

    def _enumerators(self, enum: Type) -> Iterator[str]:
        yield f'    """{_c_name(enum)}."""'
        names = Names(("name", "value", "mro", "real", "imag", "numerator", "denominator"))
        for item in self._btf.enumerators(enum):
            yield f"    {names.take(python_name(item.name))} = {item.value}"

    def hint(self, type_id: int) -> str:
        """Return the annotation of a value of a type."""
        return self._hint(type_id)

    def _hint(self, type_id: int) -> str:
        btf_type = self._btf.resolve(type_id)
        if btf_type.kind in COMPOSITES:
            return self.names.get(btf_type.id, "Any")
        if btf_type.kind in ENUMS:
            return f"Union[{self.names.get(btf_type.id, 'int')}, int]"
        if btf_type.kind == Kind.ARRAY:
            return "str" if is_text(self._btf, btf_type) else f"list[{self._element(btf_type)}]"
        if btf_type.kind == Kind.INT and self._btf.integer(btf_type).bool:
            return "bool"
        return "float" if btf_type.kind == Kind.FLOAT else "int"

    def _element(self, array: Type) -> str:
        return self._hint(self._btf.array(array)[0])

    def default(self, type_id: int) -> str:
        """Return the text of the default of a field: zero, or what is made of zeros."""
        btf_type = self._btf.resolve(type_id)
        if btf_type.kind in COMPOSITES:
            return f"field(default_factory={self.names.get(btf_type.id, 'dict')})"
        if btf_type.kind == Kind.ARRAY:
            return '""' if is_text(self._btf, btf_type) else "field(default_factory=list)"
        return {"bool": "False", "float": "0.0"}.get(self._hint(type_id), "0")


def _c_name(btf_type: Type) -> str:
    kind = "enum" if btf_type.kind in ENUMS else btf_type.kind.name.lower()
    return f"{kind} {python_name(btf_type.name)}" if btf_type.name else f"a {kind} without a name"


def is_text(btf: Btf, array: Type) -> bool:
    """Return whether an array is one of char, which C keeps texts in."""
    element = btf.resolve(btf.array(array)[0])
    return element.kind == Kind.INT and element.name == "char" and element.size_or_type == 1


def fields(members: Iterable[Member]) -> dict[str, Member]:
    """Return members by the names that Python has for them."""
    names = Names()
    return {names.take(python_name(member.name)): member for member in members}


class ClassCodec(BtfCodec):
    """Values of a BTF type as instances of classes, which are given by the ids of types."""

    def __init__(self, btf: Btf, type_id: int, classes: Mapping[int, Any]) -> None:
        super().__init__(btf, type_id)
        self._classes = classes
        self._renamed: dict[int, dict[str, str]] = {}

    def _names_of(self, aggregate: Type) -> dict[str, str]:
        """Return the fields of a class, and the members that they stand for."""
        if aggregate.id not in self._renamed:
            found = fields(Classes(self._btf, ())._flat(aggregate, 0))
            self._renamed[aggregate.id] = {name: member.name for name, member in found.items()}
        return self._renamed[aggregate.id]

    def _read_members(self, aggregate: Type, data: bytes, at: int, depth: int) -> Any:
        values = super()._read_members(aggregate, data, at, depth)
        made = self._classes.get(aggregate.id)
        if made is None:
            return values
        names = self._names_of(aggregate)
        return made(**{name: values[member] for name, member in names.items()})

    def _read_array(self, array: Type, data: bytes, at: int, depth: int) -> Any:
        if is_text(self._btf, array):
            text = data[at : at + self._btf.array(array)[1]].partition(b"\0")[0]
            return text.decode("utf-8", "surrogateescape")
        return super()._read_array(array, data, at, depth)

    def _meaning(self, btf_type: Type, number: int, bits: int) -> Any:
        made: Optional[Any] = self._classes.get(btf_type.id)
        if btf_type.kind not in ENUMS or made is None:
            return super()._meaning(btf_type, number, bits)
        mask = (1 << bits) - 1
        return next((item for item in made if item & mask == number), number)

    def _write_members(
        self, aggregate: Type, value: Any, data: bytearray, at: int, depth: int
    ) -> None:
        if not isinstance(value, Mapping):
            names = self._names_of(aggregate)
            value = {member: getattr(value, name) for name, member in names.items()}
        super()._write_members(aggregate, value, data, at, depth)

    def _write_member(
        self, member: Member, value: Any, data: bytearray, at: int, depth: int
    ) -> None:
        # Zeros are there already; those of a union's other members would replace what counts.
        if value or not isinstance(value, (int, float, str)):
            super()._write_member(member, value, data, at, depth)
